//! What to write so that the maps hold what is desired: a pure function, no clock and no I/O.
//!
//! Order is what keeps a reader safe. A backend is written before a slot names it, slots before
//! the service word that points at them, the service before its frontend. Taking away goes the
//! other way round, and nothing is reused before [`Op::Grace`]: so after every single operation
//! a `connect()` finds the old backends of its service or the new ones, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::{
    abi::{Frontend, Port, ServiceWord, SlotWord, map},
    address::Address,
};

pub mod alias;
pub mod alloc;
pub mod applied;

pub use applied::Applied;

/// Where a backend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    pub address: Address,
    pub port: Port,
}

/// What the maps should hold: for each frontend its backends and their weights. A backend of
/// weight zero is known, and keeps its id, but gets no new connections.
pub type Desired = BTreeMap<Frontend, BTreeMap<Endpoint, u32>>;

/// One write to the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    PutBackend {
        id: u32,
        service: u32,
        endpoint: Endpoint,
    },
    PutSlots {
        base: u32,
        words: Vec<SlotWord>,
    },
    /// The one store by which a service changes. The default word removes it.
    PutService {
        id: u32,
        word: ServiceWord,
    },
    PutFrontend {
        frontend: Frontend,
        service: u32,
    },
    DeleteFrontend {
        frontend: Frontend,
    },
    DeleteBackend {
        id: u32,
    },
    /// Every `connect()` that began before has ended.
    Grace,
}

/// A service that does not fit: it is left as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} needs {needed} more in map {map}, which has {free} of {max} free in one piece", describe(.frontend))]
pub struct Refused {
    pub frontend: Frontend,
    pub map: &'static str,
    pub needed: usize,
    pub free: u32,
    pub max: u32,
}

fn describe(frontend: &Frontend) -> String {
    format!("service at {} port {}", frontend.address.ip(), frontend.port.get())
}

/// Whether entries that are not desired may be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prune {
    /// Not every registry has delivered: what is missing may only be late.
    No,
    Yes,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub ops: Vec<Op>,
    pub refused: Vec<Refused>,
}

/// The operations that lead from `applied` to `desired`.
pub fn plan(desired: &Desired, applied: &Applied, prune: Prune) -> Plan {
    let mut planner = Planner {
        applied,
        alloc: applied.alloc.clone(),
        ops: Vec::new(),
        unused: BTreeSet::new(),
        refused: Vec::new(),
    };
    for (frontend, backends) in desired {
        if let Err(refused) = planner.service(*frontend, backends) {
            planner.refused.push(refused);
        }
    }
    let gone = applied.frontends.iter().filter(|(frontend, _)| !desired.contains_key(*frontend));
    if prune == Prune::Yes {
        gone.for_each(|(frontend, id)| planner.remove(*frontend, *id));
    }
    planner.finish()
}

struct Planner<'a> {
    applied: &'a Applied,
    alloc: alloc::Alloc,
    ops: Vec<Op>,
    /// Backends that nothing refers to any more once `ops` so far are done.
    unused: BTreeSet<u32>,
    refused: Vec<Refused>,
}

impl Planner<'_> {
    /// Admission first: nothing is planned for a service unless all of it fits.
    fn service(&mut self, frontend: Frontend, backends: &BTreeMap<Endpoint, u32>) -> Result<(), Refused> {
        let applied = self.applied;
        let known = applied.frontends.get(&frontend).copied();
        let current = known.and_then(|id| applied.services.get(&id));
        let id_of = |endpoint: &Endpoint| current.and_then(|service| service.backends.get(endpoint)).copied();

        let new = backends.keys().filter(|endpoint| id_of(endpoint).is_none()).count();
        let used = backends.values().filter(|weight| **weight > 0).count();
        self.admit(frontend, known.is_none(), new, used)?;

        let id = known.unwrap_or_else(|| self.alloc.services.take().expect("admitted"));
        let mut weights = Vec::with_capacity(used);
        for (&endpoint, &weight) in backends {
            let backend = id_of(&endpoint).unwrap_or_else(|| {
                let new = self.alloc.backends.take().expect("admitted");
                self.ops.push(Op::PutBackend { id: new, service: id, endpoint });
                new
            });
            if weight > 0 {
                weights.push((backend, weight));
            }
        }
        weights.sort_unstable();
        let words = alias::table(&weights);
        if current.is_none_or(|service| service.words != words) {
            let count = index(words.len());
            let base = self.alloc.slots.take(count).expect("admitted");
            if count > 0 {
                self.ops.push(Op::PutSlots { base, words });
            }
            self.ops.push(Op::PutService { id, word: ServiceWord::new(base, count) });
        }
        if known.is_none() {
            self.ops.push(Op::PutFrontend { frontend, service: id });
        }
        let before = current.into_iter().flat_map(|service| &service.backends);
        self.unused
            .extend(before.filter(|(endpoint, _)| !backends.contains_key(*endpoint)).map(|(_, id)| id));
        Ok(())
    }

    fn admit(&self, frontend: Frontend, service: bool, backends: usize, slots: usize) -> Result<(), Refused> {
        let alloc = &self.alloc;
        let maps = [
            (map::SERVICES, usize::from(service), alloc.services.free(), alloc.services.max()),
            (map::BACKENDS, backends, alloc.backends.free(), alloc.backends.max()),
            (map::SLOTS, slots, alloc.slots.longest(), alloc.slots.max()),
        ];
        for (map, needed, free, max) in maps {
            if needed > free as usize {
                return Err(Refused { frontend, map, needed, free, max });
            }
        }
        Ok(())
    }

    fn remove(&mut self, frontend: Frontend, id: u32) {
        self.ops.push(Op::DeleteFrontend { frontend });
        self.ops.push(Op::PutService { id, word: ServiceWord::default() });
        if let Some(service) = self.applied.services.get(&id) {
            self.unused.extend(service.backends.values());
        }
    }

    fn finish(mut self) -> Plan {
        self.unused.extend(&self.applied.strays);
        if !self.ops.is_empty() || !self.unused.is_empty() {
            self.ops.extend(self.unused.into_iter().map(|id| Op::DeleteBackend { id }));
            // Only now may ids and slots that became free be used again.
            let at = self.ops.iter().position(|op| matches!(op, Op::DeleteBackend { .. }));
            self.ops.insert(at.unwrap_or(self.ops.len()), Op::Grace);
        }
        Plan { ops: self.ops, refused: self.refused }
    }
}

/// A count of map entries; admission has seen that it fits.
fn index(len: usize) -> u32 {
    u32::try_from(len).expect("admitted")
}

#[cfg(test)]
mod tests;
