//! What the maps hold, as the daemon knows it.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::{
    abi::{Backend, Frontend, ServiceWord, Settings, SlotWord},
    select::Policy,
};

use super::{
    Endpoint, Op, Recipe, Wanted,
    alloc::{Alloc, Ids, Ranges},
    index,
};

/// The numbers of entries the maps were made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub frontends: u32,
    pub services: u32,
    pub backends: u32,
    pub slots: u32,
}

/// A mirror of the maps. It changes only by [`apply`](Self::apply), after the map was written, and as graces
/// begin and end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    pub frontends: BTreeMap<Frontend, u32>,
    pub services: BTreeMap<u32, Service>,
    pub alloc: Alloc,
    /// Ids of backends that are gone, but that sockets may still be counted on.
    resting: BTreeSet<u32>,
    /// Which service a backend belongs to.
    owners: BTreeMap<u32, (u32, Endpoint)>,
    /// Slots written, but not yet pointed at, and what they were made from.
    pending: Option<(Vec<SlotWord>, Recipe)>,
    /// What was taken out of use since the last grace began.
    retired: Retired,
    /// What is free when the grace that is under way has ended.
    waiting: Retired,
}

/// Taken out of use, but perhaps still being read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Retired {
    services: Vec<u32>,
    slots: Vec<(u32, u32)>,
    backends: BTreeSet<u32>,
}

impl Retired {
    fn is_empty(&self) -> bool {
        self.services.is_empty() && self.slots.is_empty() && self.backends.is_empty()
    }
}

/// What a service word points at, and the ids of the service's backends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Of its frontend.
    protocol: u8,
    pub base: u32,
    pub policy: Policy,
    /// As the service word has it; the settings may be ahead of it.
    pub sticky: bool,
    pub settings: Settings,
    pub words: Vec<SlotWord>,
    /// What the words were made from; not known after a start.
    pub made_from: Option<Recipe>,
    /// Whether the words are made from the backends as they are; not known after a start.
    settled: bool,
    pub backends: BTreeMap<Endpoint, Known>,
    /// Backends that are to be deleted after a grace. One that comes back before is the same.
    pub(super) retired: BTreeMap<Endpoint, u32>,
}

impl Service {
    /// Its slots, if it has any.
    fn range(&self) -> Option<(u32, u32)> {
        let len = index(self.words.len());
        (len > 0).then_some((self.base, len))
    }

    /// Whether nothing is to be written: most services of a large table have not changed.
    pub(super) fn is_settled_as(&self, wanted: &Wanted) -> bool {
        let Wanted { policy, settings, backends } = wanted;
        let same = |((a, known), (b, weight)): ((&Endpoint, &Known), _)| (a, &known.weight) == (b, weight);
        self.settled
            && (self.policy, self.settings) == (*policy, *settings)
            && self.sticky == (settings.affinity_ms > 0)
            && self.backends.len() == backends.len()
            && self.backends.iter().zip(backends).all(same)
    }
}

/// A backend's place and weight in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub id: u32,
    pub weight: u16,
}

/// Contents of the maps as read at start, entries in use only.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    pub frontends: BTreeMap<Frontend, u32>,
    pub services: BTreeMap<u32, ServiceWord>,
    /// Of the services that exist.
    pub settings: BTreeMap<u32, Settings>,
    pub backends: BTreeMap<u32, Backend>,
    /// Backend ids that sockets are still counted on.
    pub busy: BTreeSet<u32>,
}

impl Applied {
    pub fn empty(sizes: Sizes) -> Self {
        Self::with_used(sizes, &BTreeSet::new(), &BTreeSet::new())
    }

    fn with_used(sizes: Sizes, services: &BTreeSet<u32>, backends: &BTreeSet<u32>) -> Self {
        // Each service has one frontend, and ids start at 1.
        let service_entries = sizes.services.min(sizes.frontends.saturating_add(1));
        Self {
            frontends: BTreeMap::new(),
            services: BTreeMap::new(),
            alloc: Alloc {
                services: Ids::new(service_entries, services),
                backends: Ids::new(sizes.backends, backends),
                slots: Ranges::new(sizes.slots),
            },
            resting: BTreeSet::new(),
            owners: BTreeMap::new(),
            pending: None,
            retired: Retired::default(),
            waiting: Retired::default(),
        }
    }

    /// Rebuilds the mirror from the maps; `slots` reads a service's range. Also returns the writes
    /// that remove what no sound service has. They come before anything else is planned: an id
    /// that is used again must not have left anything behind.
    pub fn restore(
        sizes: Sizes,
        dump: &Dump,
        slots: impl Fn(ServiceWord) -> Vec<SlotWord>,
    ) -> (Self, Vec<Op>) {
        let used = dump.frontends.values().copied().collect();
        let backends: BTreeSet<_> = dump.backends.keys().copied().collect();
        let mut applied = Self::with_used(sizes, &used, &backends.union(&dump.busy).copied().collect());
        applied.resting = dump.busy.difference(&backends).copied().collect();
        let mut repairs = Vec::new();
        let mut strays = Vec::new();
        for (&frontend, &id) in &dump.frontends {
            let word = dump.services.get(&id).copied().unwrap_or_default();
            let sound = word.exists() && !applied.services.contains_key(&id);
            if sound && applied.alloc.slots.claim(word.base(), word.count()) {
                let service = Service {
                    protocol: frontend.protocol,
                    base: word.base(),
                    policy: word.policy(),
                    sticky: word.is_sticky(),
                    settings: dump.settings.get(&id).copied().unwrap_or_default(),
                    words: slots(word),
                    made_from: None,
                    settled: false,
                    backends: BTreeMap::new(),
                    retired: BTreeMap::new(),
                };
                applied.services.insert(id, service);
                applied.frontends.insert(frontend, id);
            } else {
                repairs.push(Op::DeleteFrontend { frontend });
            }
        }
        for (&id, backend) in &dump.backends {
            let endpoint = Endpoint { address: backend.address, port: backend.port };
            let known = Known { id, weight: backend.weight };
            applied.owners.insert(id, (backend.service, endpoint));
            let owner = applied.services.get_mut(&backend.service);
            if owner.is_none_or(|service| service.backends.entry(endpoint).or_insert(known).id != id) {
                strays.push(Op::DeleteBackend { id });
            }
        }
        // Whatever was being replaced when the writing stopped is no longer read after this.
        repairs.push(Op::Grace);
        repairs.append(&mut strays);
        (applied, repairs)
    }

    /// A backend's protocol, and where it listens.
    pub fn whereabouts(&self, id: u32) -> Option<(u8, Endpoint)> {
        let (service, endpoint) = self.owners.get(&id)?;
        Some((self.services.get(service)?.protocol, *endpoint))
    }

    /// The backends of every service, with its protocol.
    pub fn endpoints(&self) -> impl Iterator<Item = (u8, Endpoint)> {
        let services =
            self.frontends.iter().filter_map(|(frontend, id)| Some((frontend, self.services.get(id)?)));
        services.flat_map(|(frontend, service)| service.backends.keys().map(|at| (frontend.protocol, *at)))
    }

    /// Ids of backends that are gone, but that sockets are still counted on.
    pub fn resting(&self) -> impl Iterator<Item = u32> {
        self.resting.iter().copied()
    }

    /// Whether an id's backend is gone, but sockets are still counted on it.
    pub fn is_resting(&self, id: u32) -> bool {
        self.resting.contains(&id)
    }

    /// The id of a frontend's backend.
    pub fn backend_id(&self, frontend: &Frontend, endpoint: &Endpoint) -> Option<u32> {
        let service = self.services.get(self.frontends.get(frontend)?)?;
        service.backends.get(endpoint).map(|backend| backend.id)
    }

    /// Whether a backend is new to a frontend that has others.
    pub fn is_joined_by(&self, frontend: &Frontend, endpoint: &Endpoint) -> bool {
        let service = self.frontends.get(frontend).and_then(|id| self.services.get(id));
        service
            .is_some_and(|service| !service.backends.is_empty() && !service.backends.contains_key(endpoint))
    }

    /// Gives back the ids of backends that are gone and on which, as `is_idle` says, no socket is
    /// counted any more: so a new backend does not inherit the connections of an old one.
    pub fn reclaim(&mut self, is_idle: impl Fn(u32) -> bool) {
        let alloc = &mut self.alloc.backends;
        self.resting.retain(|id| {
            let idle = is_idle(*id);
            if idle {
                alloc.give_back(*id);
            }
            !idle
        });
    }

    /// Follows one operation that has been written.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::PutBackend { id, service, endpoint, weight } => {
                self.alloc.backends.claim(*id);
                self.owners.insert(*id, (*service, *endpoint));
                let service = self.services.entry(*service).or_default();
                service.backends.insert(*endpoint, Known { id: *id, weight: *weight });
                service.settled = false;
                if service.retired.remove(endpoint).is_some() {
                    self.retired.backends.remove(id);
                    self.waiting.backends.remove(id);
                }
            }
            Op::PutSlots { base, words, made_from } => {
                self.alloc.slots.claim(*base, index(words.len()));
                self.pending = Some((words.clone(), *made_from));
            }
            Op::PutSettings { service, settings } => {
                self.services.entry(*service).or_default().settings = *settings;
            }
            Op::PutService { id, word } if word.exists() => {
                self.alloc.services.claim(*id);
                let service = self.services.entry(*id).or_default();
                self.retired.slots.extend(service.range());
                service.base = word.base();
                service.policy = word.policy();
                service.sticky = word.is_sticky();
                let (words, made_from) = self.pending.take().unzip();
                service.words = words.unwrap_or_default();
                service.made_from = made_from;
                service.settled = true;
            }
            Op::PutService { id, .. } => {
                if let Some(service) = self.services.remove(id) {
                    self.retired.slots.extend(service.range());
                    self.retired.services.push(*id);
                }
            }
            Op::PutFrontend { frontend, service } => {
                self.frontends.insert(*frontend, *service);
                self.services.entry(*service).or_default().protocol = frontend.protocol;
            }
            Op::DeleteFrontend { frontend } => {
                self.frontends.remove(frontend);
            }
            Op::RetireBackend { id, .. } => {
                if let Some((service, endpoint)) = self.owners.get(id)
                    && let Some(service) = self.services.get_mut(service)
                {
                    service.backends.remove(endpoint);
                    service.retired.insert(*endpoint, *id);
                }
                self.retired.backends.insert(*id);
            }
            Op::DeleteBackend { id } => {
                if let Some((service, endpoint)) = self.owners.remove(id)
                    && let Some(service) = self.services.get_mut(&service)
                    && service.retired.get(&endpoint) == Some(id)
                {
                    service.retired.remove(&endpoint);
                }
                self.resting.insert(*id);
            }
            Op::Grace => {}
        }
    }

    /// What is out of use now is free once a grace has ended that begins after this. Says whether there is
    /// something to wait for. No grace may be under way.
    pub fn begin_grace(&mut self) -> bool {
        if self.waiting.is_empty() {
            self.waiting = std::mem::take(&mut self.retired);
        }
        !self.waiting.is_empty()
    }

    /// Every `connect()` that began before the last [`begin_grace`](Self::begin_grace) has ended. Returns what is
    /// to be written now.
    pub fn end_grace(&mut self) -> Vec<Op> {
        let Retired { services, slots, backends } = std::mem::take(&mut self.waiting);
        services.into_iter().for_each(|id| self.alloc.services.give_back(id));
        slots.into_iter().for_each(|(base, len)| self.alloc.slots.give_back(base, len));
        backends.into_iter().map(|id| Op::DeleteBackend { id }).collect()
    }
}
