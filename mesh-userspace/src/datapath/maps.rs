//! The tables that connects read, and how an operation of a plan is written to them.

use std::{collections::BTreeMap, os::fd::AsFd, path::Path, sync::Arc};

use aya::maps::{HashMap, Map, MapData};
use mesh_common::{
    abi::{Backend, Client, Frontend, ServiceWord, Settings, SlotWord, map},
    health::HealthWord,
};

use super::{Pins, Result, io_error, map_error, pins::pinned};
use crate::{
    plan::{
        Applied, Op,
        applied::{Dump, Sizes},
    },
    sys::{Grace, Words},
};

/// The maps, opened for writing.
pub struct Maps {
    pub(super) frontends: HashMap<MapData, Frontend, u32>,
    pub(super) backends: Words,
    pub(super) services: Words,
    pub(super) settings: Words,
    pub(super) slots: Words,
    pub(super) load: Words,
    pub(super) health: Words,
    pub(super) ejected: Words,
    grace: Arc<Grace>,
    pub(super) sizes: Sizes,
}

impl Maps {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self> {
        pins.check()?;
        Self::open_in(&pins.maps())
    }

    pub(super) fn open_in(dir: &Path) -> Result<Self> {
        let frontends = pinned(dir, map::FRONTENDS, size_of::<Frontend>(), size_of::<u32>())?;
        let services = pinned(dir, map::SERVICES, size_of::<u32>(), size_of::<u64>())?;
        let slots = pinned(dir, map::SLOTS, size_of::<u32>(), size_of::<u64>())?;
        let backends = pinned(dir, map::BACKENDS, size_of::<u32>(), size_of::<Backend>())?;
        let load = pinned(dir, map::LOAD, size_of::<u32>(), size_of::<u64>())?;
        let settings = pinned(dir, map::SETTINGS, size_of::<u32>(), size_of::<Settings>())?;
        let health = pinned(dir, map::HEALTH, size_of::<u32>(), size_of::<u64>())?;
        let ejected = pinned(dir, map::EJECTED, size_of::<u32>(), size_of::<u64>())?;
        pinned(dir, map::AFFINITY, size_of::<Client>(), size_of::<u64>())?;
        let sizes = Sizes {
            frontends: entries(&frontends, map::FRONTENDS)?,
            services: entries(&services, map::SERVICES)?,
            backends: entries(&backends, map::BACKENDS)?,
            slots: entries(&slots, map::SLOTS)?,
        };
        Ok(Self {
            services: words(&services, map::SERVICES, sizes.services)?,
            slots: words(&slots, map::SLOTS, sizes.slots)?,
            settings: words(&settings, map::SETTINGS, sizes.services * Settings::WORDS)?,
            load: words(&load, map::LOAD, sizes.backends)?,
            health: words(&health, map::HEALTH, sizes.backends)?,
            ejected: words(&ejected, map::EJECTED, sizes.services)?,
            frontends: HashMap::try_from(Map::HashMap(frontends)).map_err(map_error(map::FRONTENDS))?,
            backends: words(&backends, map::BACKENDS, sizes.backends * Backend::WORDS)?,
            grace: Grace::new().map_err(io_error("cannot make a map of maps"))?.into(),
            sizes,
        })
    }

    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Reads back everything that is in use.
    pub fn dump(&self) -> Result<Dump> {
        let mut dump = Dump::default();
        for entry in self.frontends.iter() {
            let (frontend, id) = entry.map_err(map_error(map::FRONTENDS))?;
            dump.frontends.insert(frontend, id);
        }
        for id in 0..self.sizes.services {
            let word = ServiceWord(self.services.load(id));
            if word.exists() {
                dump.services.insert(id, word);
                dump.settings.insert(id, self.settings(id));
            }
        }
        let backends = (0..self.sizes.backends).map(|id| (id, self.backend(id)));
        dump.backends = backends.filter(|(_, backend)| backend.in_use()).collect();
        dump.busy = (1..self.sizes.backends).filter(|id| self.load(*id) > 0).collect();
        Ok(dump)
    }

    /// How many sockets are counted on a backend.
    pub fn load(&self, backend: u32) -> u64 {
        self.load.load(backend)
    }

    /// What connects say of a backend.
    pub fn health(&self, backend: u32) -> HealthWord {
        HealthWord(self.health.load(backend))
    }

    fn backend(&self, id: u32) -> Backend {
        let first = id * Backend::WORDS;
        Backend::from_words([0, 1, 2, 3].map(|word| self.backends.load(first + word)))
    }

    /// The last word comes last: by it a socket or workload that knows the id from before sees
    /// whether the entry is its backend still. No slot refers to an entry that is not in use.
    pub(super) fn put_backend(&self, id: u32, backend: Backend) {
        let first = id * Backend::WORDS;
        for (word, value) in (first..).zip(backend.words()) {
            self.backends.store(word, value);
        }
    }

    /// The other way round.
    fn clear_backend(&self, id: u32) {
        let first = id * Backend::WORDS;
        (first..first + Backend::WORDS).rev().for_each(|word| self.backends.store(word, 0));
    }

    fn settings(&self, service: u32) -> Settings {
        let first = service * Settings::WORDS;
        Settings::from_words([0, 1, 2, 3].map(|word| self.settings.load(first + word)))
    }

    /// Forgets what was said against a backend that leaves.
    fn forget(&self, backend: u32, service: u32) {
        if HealthWord(self.health.swap(backend, 0)).is_ejected() {
            self.ejected.add(service, u64::MAX);
        }
    }

    /// Sets right how many backends of each service are ejected: a daemon may have ended between
    /// two of its writes.
    pub(super) fn recount(&self, dump: &Dump) {
        let counted: Vec<_> = (0..self.sizes.services).map(|id| self.ejected.load(id)).collect();
        let mut ejected = BTreeMap::<u32, u64>::new();
        for (id, backend) in &dump.backends {
            *ejected.entry(backend.service).or_default() += u64::from(self.health(*id).is_ejected());
        }
        for (id, counted) in (0..).zip(counted) {
            // One that has changed meanwhile is right, or will be set right another time.
            self.ejected.replace(id, counted, ejected.get(&id).copied().unwrap_or(0));
        }
    }

    /// A service's slots.
    pub fn slots(&self, word: ServiceWord) -> Vec<SlotWord> {
        let range = word.base()..word.base() + word.count();
        range.map(|index| SlotWord(self.slots.load(index))).collect()
    }

    /// The mirror of what is in the maps, after removing what an interrupted change left behind.
    pub fn restore(&mut self) -> Result<Applied> {
        let dump = self.dump()?;
        self.recount(&dump);
        let (mut applied, repairs) = Applied::restore(self.sizes, &dump, |word| self.slots(word));
        for op in repairs {
            self.write(&op)?;
            applied.apply(&op);
        }
        Ok(applied)
    }

    /// What waits, on whatever thread, until every `connect()` that began before has ended.
    pub fn grace(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let grace = self.grace.clone();
        move || grace.wait().map_err(io_error("cannot wait for readers"))
    }

    /// Writes one operation.
    pub fn write(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::PutBackend { id, service, endpoint, weight } => {
                let backend = Backend::new(endpoint.address, endpoint.port, *service, *weight);
                if !self.backend(*id).in_use() {
                    // A connect that failed at the last moment may have spoken of who had the id before.
                    self.health.store(*id, 0);
                }
                self.put_backend(*id, backend);
            }
            Op::PutSlots { base, words, .. } => {
                for (index, word) in (*base..).zip(words) {
                    self.slots.store(index, word.0);
                }
            }
            Op::PutSettings { service, settings } => {
                for (word, value) in (service * Settings::WORDS..).zip(settings.words()) {
                    self.settings.store(word, value);
                }
            }
            Op::PutService { id, word } => self.services.store(*id, word.0),
            Op::PutFrontend { frontend, service } => {
                self.frontends.insert(frontend, service, 0).map_err(map_error(map::FRONTENDS))?;
            }
            Op::DeleteFrontend { frontend } => {
                self.frontends.remove(frontend).map_err(map_error(map::FRONTENDS))?;
            }
            Op::DeleteBackend { id } => {
                let service = self.backend(*id).service;
                self.clear_backend(*id);
                self.forget(*id, service);
            }
            Op::RetireBackend { .. } => {}
            Op::Grace => self.grace()()?,
        }
        Ok(())
    }
}

pub(super) fn words(data: &MapData, name: &str, len: u32) -> Result<Words> {
    Words::map(data.fd().as_fd(), len).map_err(io_error(format!("cannot map {name} into memory")))
}

pub(super) fn entries(data: &MapData, name: &'static str) -> Result<u32> {
    Ok(data.info().map_err(map_error(name))?.max_entries())
}
