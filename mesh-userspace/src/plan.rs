//! What to write so that the maps hold what is desired: a pure function, no clock and no I/O.
//!
//! Order is what keeps a reader safe. A backend is written before a slot names it, slots before
//! the service word that points at them, the service before its frontend. Taking away goes the
//! other way round, and nothing is reused before a grace ([`Applied::begin_grace`]): so after every single
//! operation a `connect()` finds the old backends of its service or the new ones, and nothing else.
//! Nobody waits for a grace: other plans may be written while it is under way.

use std::collections::BTreeMap;

use mesh_common::{
    abi::{Frontend, Port, ServiceWord, Settings, SlotWord, map},
    address::Address,
    select::Policy,
};
use xxhash_rust::xxh3::Xxh3;

pub mod alias;
pub mod alloc;
pub mod applied;
pub mod maglev;

use alloc::Alloc;
pub use applied::Applied;
use applied::Known;

/// Where a backend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    pub address: Address,
    pub port: Port,
}

/// What the maps should hold.
pub type Desired = BTreeMap<Frontend, Wanted>;

/// What a frontend should lead to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub policy: Policy,
    pub settings: Settings,
    /// With their weights. A backend of weight zero is known, and keeps its id, but gets no new
    /// connections.
    pub backends: BTreeMap<Endpoint, u16>,
}

/// What a service's slots are made from: ids, weights above zero and endpoints of its backends.
pub type Weights = Vec<(u32, u32, Endpoint)>;

/// Tells what a table was made from: a hash, which takes 16 bytes where the weights take 28 for each backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe([u8; 16]);

impl Recipe {
    fn of(weights: &Weights) -> Self {
        let mut hash = Xxh3::new();
        for (id, weight, endpoint) in weights {
            let mut bytes = [0; 26];
            bytes[..4].copy_from_slice(&id.to_ne_bytes());
            bytes[4..8].copy_from_slice(&weight.to_ne_bytes());
            bytes[8..24].copy_from_slice(&endpoint.address.octets());
            bytes[24..].copy_from_slice(&endpoint.port.get().to_ne_bytes());
            hash.update(&bytes);
        }
        Self(hash.digest128().to_ne_bytes())
    }
}

fn table(policy: Policy, weights: &Weights) -> Vec<SlotWord> {
    match policy {
        Policy::Maglev => maglev::table(weights),
        Policy::Random | Policy::LeastConnections | Policy::RoundRobin => alias::table(weights),
    }
}

/// One write to the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A new backend, or a new weight of one that is in use.
    PutBackend {
        id: u32,
        service: u32,
        endpoint: Endpoint,
        weight: u16,
    },
    PutSlots {
        base: u32,
        words: Vec<SlotWord>,
        made_from: Recipe,
    },
    PutSettings {
        service: u32,
        settings: Settings,
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
    /// Nothing leads to the backend any more, so it is deleted after a grace, unless it is put again before.
    /// Sockets that are connected to it have this long to end.
    RetireBackend {
        id: u32,
        drain_ms: u64,
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
    let mut planner = Planner { applied, alloc: applied.alloc.clone(), ops: Vec::new(), refused: Vec::new() };
    for (frontend, wanted) in desired {
        if let Err(refused) = planner.service(*frontend, wanted) {
            planner.refused.push(refused);
        }
    }
    let gone = applied.frontends.iter().filter(|(frontend, _)| !desired.contains_key(*frontend));
    if prune == Prune::Yes {
        gone.for_each(|(frontend, id)| planner.remove(*frontend, *id));
    }
    Plan { ops: planner.ops, refused: planner.refused }
}

struct Planner<'a> {
    applied: &'a Applied,
    alloc: Alloc,
    ops: Vec<Op>,
    refused: Vec<Refused>,
}

impl Planner<'_> {
    /// A service fits whole, or nothing is planned for it.
    fn service(&mut self, frontend: Frontend, wanted: &Wanted) -> Result<(), Refused> {
        let Wanted { policy, settings, backends } = wanted;
        let applied = self.applied;
        let known = applied.frontends.get(&frontend).copied();
        let current = known.and_then(|id| applied.services.get(&id));
        if current.is_some_and(|service| service.is_settled_as(wanted)) {
            return Ok(());
        }
        let (known_backends, gone) = current.map_or_else(
            || (vec![None; backends.len()], Vec::new()),
            |service| matched(backends, &service.backends),
        );

        let refuse = |map, needed, free, max| Err(Refused { frontend, map, needed, free, max });
        let Alloc { services: service_ids, backends: backend_ids, .. } = &self.alloc;
        let retired = |endpoint: &Endpoint| current?.retired.get(endpoint).copied();
        let both = backends.keys().zip(&known_backends);
        let new = both.filter(|(endpoint, known)| known.is_none() && retired(endpoint).is_none()).count();
        if new > backend_ids.free() as usize {
            return refuse(map::BACKENDS, new, backend_ids.free(), backend_ids.max());
        }
        if known.is_none() && service_ids.free() == 0 {
            return refuse(map::SERVICES, 1, 0, service_ids.max());
        }

        let id = known.unwrap_or_else(|| self.alloc.services.take().expect("one is free"));
        let mut taken = Vec::with_capacity(new);
        let mut weights = Vec::with_capacity(backends.len());
        // All this comes before the service word. A backend that is to get no more connections is
        // marked first: the workloads and datagram sockets that keep it look for another one.
        let mut ops = Vec::new();
        for ((&endpoint, &weight), known) in backends.iter().zip(known_backends) {
            let backend =
                known.map(|backend| backend.id).or_else(|| retired(&endpoint)).unwrap_or_else(|| {
                    taken.push(self.alloc.backends.take().expect("enough are free"));
                    taken[taken.len() - 1]
                });
            if known.is_none_or(|backend| backend.weight != weight) {
                ops.push(Op::PutBackend { id: backend, service: id, endpoint, weight });
            }
            if weight > 0 {
                weights.push((backend, u32::from(weight), endpoint));
            }
        }
        for (endpoint, known) in gone.iter().filter(|(_, known)| known.weight > 0) {
            ops.push(Op::PutBackend { id: known.id, service: id, endpoint: *endpoint, weight: 0 });
        }
        if current.is_none_or(|service| service.settings != *settings) {
            ops.push(Op::PutSettings { service: id, settings: *settings });
        }
        let sticky = settings.affinity_ms > 0;
        let known_word = current.filter(|service| (service.policy, service.sticky) == (*policy, sticky));
        // A table is only made where its making may lead to another one.
        let made_from = Recipe::of(&weights);
        let as_made = known_word.is_some_and(|service| service.made_from == Some(made_from));
        let words = if as_made { None } else { Some(table(*policy, &weights)) };
        let words = words.filter(|words| known_word.is_none_or(|service| service.words != *words));
        if let Some(words) = words {
            let Some(base) = self.alloc.slots.take(index(words.len())) else {
                taken.into_iter().for_each(|id| self.alloc.backends.give_back(id));
                if known.is_none() {
                    self.alloc.services.give_back(id);
                }
                let slots = &self.alloc.slots;
                return refuse(map::SLOTS, words.len(), slots.longest(), slots.max());
            };
            let word = ServiceWord::new(base, index(words.len()), *policy, sticky);
            if !words.is_empty() {
                ops.push(Op::PutSlots { base, words, made_from });
            }
            ops.push(Op::PutService { id, word });
        }
        if known.is_none() {
            ops.push(Op::PutFrontend { frontend, service: id });
        }
        let drain_ms = settings.drain_ms;
        ops.extend(gone.into_iter().map(|(_, known)| Op::RetireBackend { id: known.id, drain_ms }));
        self.ops.extend(ops);
        Ok(())
    }

    fn remove(&mut self, frontend: Frontend, id: u32) {
        self.ops.push(Op::DeleteFrontend { frontend });
        if let Some(service) = self.applied.services.get(&id) {
            let drain_ms = service.settings.drain_ms;
            let retire = |known: &Known| Op::RetireBackend { id: known.id, drain_ms };
            self.ops.extend(service.backends.values().map(retire));
        }
        self.ops.push(Op::PutService { id, word: ServiceWord::default() });
    }
}

/// What is known of each wanted backend, and the known ones that are not wanted. Both are sorted, so one walk
/// over them will do.
fn matched(
    wanted: &BTreeMap<Endpoint, u16>,
    known: &BTreeMap<Endpoint, Known>,
) -> (Vec<Option<Known>>, Vec<(Endpoint, Known)>) {
    let mut known = known.iter().map(|(endpoint, known)| (*endpoint, *known)).peekable();
    let mut gone = Vec::new();
    let of = |endpoint| {
        gone.extend(std::iter::from_fn(|| known.next_if(|(at, _)| at < endpoint)));
        known.next_if(|(at, _)| at == endpoint).map(|(_, known)| known)
    };
    let of_each = wanted.keys().map(of).collect();
    gone.extend(known);
    (of_each, gone)
}

/// A count of map entries; what does not fit is refused before.
fn index(len: usize) -> u32 {
    u32::try_from(len).expect("no more than a map holds")
}

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;
