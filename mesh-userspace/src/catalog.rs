//! All registries' services as one, with their VIPs: what the node should serve.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use imbl::{OrdMap, ordmap::DiffItem};
use mesh_common::abi::{Eject, Frontend, Penalty, Port, Settings};

use crate::{
    model::{Answer, Health, Instance, Protocol, Service, ServiceId},
    plan::{Desired, Endpoint, Prune, Wanted},
    registry::{Claims, Snapshot},
};

pub mod vip;
pub mod weigh;

use vip::Vips;
use weigh::Seen;

/// A service with the VIPs that stand for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub service: Arc<Service>,
    /// One per family at most.
    pub vips: Vec<IpAddr>,
    /// Whether its registry said this once, but has not confirmed it.
    pub kept: bool,
}

/// What each registry has delivered, in the order of the configuration.
pub type Snapshots = [Option<Arc<Snapshot>>];

/// What the node should serve. What has not changed is the same [`Entry`] in the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    pub services: OrdMap<ServiceId, Arc<Entry>>,
    /// Records left out, and why.
    pub conflicts: Vec<String>,
    /// Whether every registry was asked in this run, and something is known of each; set by
    /// whoever asks them.
    pub delivered: bool,
    /// Whether what they delivered is everything there is.
    pub complete: bool,
}

impl Catalog {
    /// Merges the registries' snapshots: the first owner of a name or VIP wins. `vips` gives VIPs to the
    /// names that have none.
    pub fn build(snapshots: &Snapshots, vips: &mut Vips) -> Self {
        let mut catalog = Self {
            // Without registries nobody says that anything is gone.
            complete: !snapshots.is_empty()
                && snapshots.iter().all(|snapshot| snapshot.as_ref().is_some_and(|s| s.complete)),
            ..Self::default()
        };
        let mut claims = Claims::default();
        let mut entries = BTreeMap::new();
        for (service, kept) in snapshots.iter().flatten().flat_map(|snapshot| snapshot.marked()) {
            match claims.add_named(service) {
                Ok(()) => {
                    let entry = Entry { service: service.clone(), vips: Vec::new(), kept };
                    entries.insert(service.id.clone(), entry);
                }
                Err(conflict) => catalog.conflicts.push(conflict),
            }
        }
        assign(&mut entries, vips, &mut catalog.conflicts);
        catalog.services = entries.into_iter().map(|(id, entry)| (id, Arc::new(entry))).collect();
        catalog
    }

    /// The catalog of `now`, where this is the one of `before` and all that is new are services that claim
    /// what they claimed: so it is with nearly every change, and then it costs no more than what has changed.
    pub fn follow(&self, before: &Snapshots, now: &Snapshots) -> Option<Self> {
        if before.len() != now.len() {
            return None;
        }
        let mut catalog = self.clone();
        for pair in before.iter().zip(now) {
            let (before, now) = match pair {
                (Some(before), Some(now)) => (before, now),
                (None, None) => continue,
                _ => return None,
            };
            if before.complete != now.complete || before.kept.diff(&now.kept).next().is_some() {
                return None;
            }
            for change in before.services.diff(&now.services) {
                let DiffItem::Update { old: (id, old), new: (_, new) } = change else { return None };
                // It may have been left out, or be another registry's.
                let entry = catalog.services.get(id).filter(|entry| !entry.kept && entry.service == *old)?;
                if claims(old) != claims(new) {
                    return None;
                }
                let entry = Entry { service: new.clone(), ..Entry::clone(entry) };
                catalog.services.insert(id.clone(), Arc::new(entry));
            }
        }
        Some(catalog)
    }

    /// The services that are not as in an `earlier` catalog, if all have the frontends that they had.
    pub fn changes(&self, earlier: &Self) -> Option<Vec<&Arc<Entry>>> {
        if self.complete != earlier.complete {
            return None;
        }
        let mut changes = Vec::new();
        for item in earlier.services.diff(&self.services) {
            let DiffItem::Update { old: (_, old), new: (_, new) } = item else { return None };
            if (&old.vips, old.kept) != (&new.vips, new.kept) {
                return None;
            }
            changes.push(new);
        }
        Some(changes)
    }

    /// Whether the same names stand for the same VIPs and ports as in an `earlier` catalog.
    pub fn has_names_of(&self, earlier: &Self) -> bool {
        self.delivered == earlier.delivered
            && earlier.services.diff(&self.services).all(|item| match item {
                DiffItem::Update { old: (_, old), new: (_, new) } => old.names() == new.names(),
                DiffItem::Add(..) | DiffItem::Remove(..) => false,
            })
    }

    /// What the maps should hold, as the node sees it. Maps that outlived an earlier run know
    /// better than what else is left of it.
    pub fn desired(&self, node: &impl Node) -> Desired {
        desired(self.services.values(), node)
    }

    /// Every backend behind every VIP.
    pub fn backends(&self) -> impl Iterator<Item = (&Service, Frontend, Endpoint)> {
        self.services.values().flat_map(|entry| {
            entry.vips.iter().flat_map(move |vip| {
                let frontend = frontend(&entry.service.id, *vip);
                entry.instances(*vip).map(move |instance| (&*entry.service, frontend, endpoint(instance)))
            })
        })
    }

    /// `name.namespace` of every service.
    pub fn names(&self) -> HashSet<String> {
        self.services.keys().map(|id| format!("{}.{}", id.name, id.namespace)).collect()
    }

    pub fn prune(&self) -> Prune {
        if self.complete { Prune::Yes } else { Prune::No }
    }
}

/// Ports of one name share its VIPs, so VIPs are found by name.
fn assign(services: &mut BTreeMap<ServiceId, Entry>, vips: &mut Vips, conflicts: &mut Vec<String>) {
    let mut names: BTreeMap<(String, String), Families> = BTreeMap::new();
    for entry in services.values() {
        let Service { id, vip, instances, .. } = &*entry.service;
        let wanted = names.entry((id.namespace.clone(), id.name.clone())).or_default();
        wanted.given.extend(vip);
        wanted.v4 |= instances.iter().any(|instance| instance.address.is_ipv4());
        wanted.v6 |= instances.iter().any(|instance| instance.address.is_ipv6());
    }
    let given = names.values().flat_map(|wanted| wanted.given.iter().copied()).collect();
    let mut assigned = BTreeMap::new();
    for ((namespace, name), wanted) in &names {
        let mut all: Vec<IpAddr> = wanted.given.iter().copied().collect();
        for v4 in wanted.families() {
            match vips.get(namespace, name, v4, &given) {
                Some(vip) => all.push(vip),
                None => conflicts.push(format!(
                    "service {name}.{namespace}: no {} VIP is free in the configured ranges",
                    if v4 { "IPv4" } else { "IPv6" }
                )),
            }
        }
        assigned.insert((namespace.clone(), name.clone()), all);
    }
    // Whoever was given a VIP earlier keeps it: services that name one come last.
    let mut taken = BTreeMap::new();
    let mut entries: Vec<_> = services.iter_mut().collect();
    entries.sort_by_key(|(_, entry)| entry.service.vip.is_some());
    for (id, entry) in entries {
        for vip in &assigned[&(id.namespace.clone(), id.name.clone())] {
            match taken.insert(frontend(id, *vip), id.clone()) {
                None => entry.vips.push(*vip),
                Some(owner) => {
                    let what = format!(
                        "service {id}: vip {vip} port {} already belongs to service {owner}",
                        id.port
                    );
                    conflicts.push(what);
                    taken.insert(frontend(id, *vip), owner);
                }
            }
        }
    }
}

/// What the maps should hold of some services.
pub fn desired<'a>(entries: impl IntoIterator<Item = &'a Arc<Entry>>, node: &impl Node) -> Desired {
    let frontends = entries
        .into_iter()
        .flat_map(|entry| entry.vips.iter().map(move |vip| (entry, *vip, frontend(&entry.service.id, *vip))));
    let frontends = frontends.filter(|(entry, _, frontend)| !(entry.kept && node.is_adopted(frontend)));
    frontends.map(|(entry, vip, frontend)| (frontend, entry.wanted(vip, node))).collect()
}

/// What a service, besides its name, has to itself, and of which families its VIPs have to be.
fn claims(service: &Service) -> (Option<IpAddr>, &[String], (Answer, bool), [bool; 2]) {
    let has = |v4| service.instances.iter().any(|instance| instance.address.is_ipv4() == v4);
    (service.vip, &service.aliases, (service.answer, service.api_only), [true, false].map(has))
}

#[derive(Default)]
struct Families {
    given: BTreeSet<IpAddr>,
    v4: bool,
    v6: bool,
}

impl Families {
    /// The families that need a VIP of their own. A lone VIP of the other family serves IPv4
    /// backends as mapped addresses, but an IPv4 socket cannot reach IPv6.
    fn families(&self) -> Vec<bool> {
        let (has_v4, has_v6) =
            (self.given.iter().any(IpAddr::is_ipv4), self.given.iter().any(IpAddr::is_ipv6));
        let v4 = !has_v4 && if has_v6 { self.v4 && self.v6 } else { self.v4 || !self.v6 };
        let v6 = !has_v6 && self.v6;
        [(true, v4), (false, v6)]
            .into_iter()
            .filter(|(_, wanted)| *wanted)
            .map(|(family, _)| family)
            .collect()
    }
}

/// What a node sees of a catalog.
pub trait Node {
    fn zone(&self) -> Option<&str>;
    /// Whether the maps held a frontend already when the daemon started.
    fn is_adopted(&self, frontend: &Frontend) -> bool;
    /// Whether the kernel avoids a backend.
    fn is_ejected(&self, frontend: &Frontend, endpoint: &Endpoint) -> bool;
    /// How long the node has known a backend; `None` if always.
    fn age(&self, frontend: &Frontend, endpoint: &Endpoint) -> Option<Duration>;
}

/// The key under which the kernel finds a service.
pub fn frontend(id: &ServiceId, vip: IpAddr) -> Frontend {
    Frontend::new(vip.into(), Port::new(id.port.get()), id.protocol.number())
}

/// Where an instance listens.
pub fn endpoint(instance: &Instance) -> Endpoint {
    Endpoint { address: instance.address.into(), port: Port::new(instance.port.get()) }
}

impl Entry {
    /// What its names are, and what they are answered with.
    fn names(&self) -> impl PartialEq {
        let Service { port_name, aliases, answer, api_only, .. } = &*self.service;
        (&self.vips, port_name, aliases, answer, api_only)
    }

    /// The instances behind one VIP: those of its family, or all where the service has only this
    /// VIP and no instance of its family.
    pub fn instances(&self, vip: IpAddr) -> impl Iterator<Item = &Instance> {
        let instances = &self.service.instances;
        let mapped = vip.is_ipv6() && instances.iter().all(|instance| instance.address.is_ipv4());
        let alone = self.vips.len() == 1;
        instances
            .iter()
            .filter(move |instance| instance.address.is_ipv4() == vip.is_ipv4() || (mapped && alone))
    }

    /// The policy and the backends of one VIP, with the weights in effect.
    fn wanted(&self, vip: IpAddr, node: &impl Node) -> Wanted {
        let frontend = frontend(&self.service.id, vip);
        let instances: Vec<_> =
            self.instances(vip).map(|instance| self.seen(instance, &frontend, node)).collect();
        let weights = weigh::weights(&self.service, &instances, node.zone());
        let usable = |seen: &&Seen<'_>| seen.instance.health == Health::Healthy && seen.instance.weight > 0;
        let usable = instances.iter().filter(usable).count();
        let endpoints = instances.iter().map(|seen| endpoint(seen.instance));
        Wanted {
            policy: self.service.policy.in_kernel(),
            settings: self.settings(usable),
            backends: endpoints.zip(weights).collect(),
        }
    }

    fn seen<'a>(&self, instance: &'a Instance, frontend: &Frontend, node: &impl Node) -> Seen<'a> {
        let endpoint = endpoint(instance);
        let window = self.service.slow_start.unwrap_or_default();
        let warmth = match node.age(frontend, &endpoint) {
            Some(age) if age < window => (age.as_secs_f64() / window.as_secs_f64()).max(COLDEST),
            _ => 1.0,
        };
        Seen { instance, ejected: node.is_ejected(frontend, &endpoint), warmth }
    }

    /// What the kernel follows, where so many backends are usable.
    fn settings(&self, usable: usize) -> Settings {
        let Service { id, affinity, drain, eject, .. } = &*self.service;
        // Only a handshake can fail.
        let failures = if id.protocol == Protocol::Tcp { eject.failures } else { 0 };
        let most = usable * usize::from(eject.max_percent) / 100;
        Settings {
            affinity_ms: affinity.map_or(0, |affinity| millis(affinity).max(1)),
            eject: Eject { failures: failures.into(), most: u32::try_from(most).unwrap_or(u32::MAX) },
            penalty: Penalty { base_ms: millis_32(eject.base), max_ms: millis_32(eject.max) },
            drain_ms: millis(*drain),
        }
    }
}

/// The share with which a new instance starts.
const COLDEST: f64 = 0.1;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn millis_32(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
