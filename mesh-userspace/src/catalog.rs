//! All registries' services as one, with their VIPs: what the node should serve.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use mesh_common::abi::{Frontend, Port};

use crate::{
    model::{Health, Instance, Service, ServiceId},
    plan::{Desired, Endpoint, Prune, Wanted},
    registry::{Claims, Snapshot},
};

pub mod vip;

use vip::Vips;

/// A service with the VIPs that stand for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub service: Service,
    /// One per family at most.
    pub vips: Vec<IpAddr>,
}

/// What the node should serve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    pub services: BTreeMap<ServiceId, Entry>,
    /// Records left out, and why.
    pub conflicts: Vec<String>,
    /// Whether every registry has delivered something.
    pub delivered: bool,
    /// Whether what they delivered is everything there is.
    pub complete: bool,
}

impl Catalog {
    /// Merges the registries' snapshots, in the order of the configuration: the first owner of a
    /// name or VIP wins. `vips` gives VIPs to the names that have none.
    pub fn build(snapshots: &[Option<Arc<Snapshot>>], vips: &mut Vips) -> Self {
        let mut catalog = Self {
            delivered: snapshots.iter().all(Option::is_some),
            // Without registries nobody says that anything is gone.
            complete: !snapshots.is_empty()
                && snapshots.iter().all(|snapshot| snapshot.as_ref().is_some_and(|s| s.complete)),
            ..Self::default()
        };
        let mut claims = Claims::default();
        for service in snapshots.iter().flatten().flat_map(|snapshot| &snapshot.services) {
            match claims.add_named(service) {
                Ok(()) => {
                    let entry = Entry { service: service.clone(), vips: Vec::new() };
                    catalog.services.insert(service.id.clone(), entry);
                }
                Err(conflict) => catalog.conflicts.push(conflict),
            }
        }
        catalog.assign(vips);
        catalog
    }

    /// Ports of one name share its VIPs, so VIPs are found by name.
    fn assign(&mut self, vips: &mut Vips) {
        let mut names: BTreeMap<(String, String), Families> = BTreeMap::new();
        for entry in self.services.values() {
            let Service { id, vip, instances, .. } = &entry.service;
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
                    None => self.conflicts.push(format!(
                        "service {name}.{namespace}: no {} VIP is free in the configured ranges",
                        if v4 { "IPv4" } else { "IPv6" }
                    )),
                }
            }
            assigned.insert((namespace.clone(), name.clone()), all);
        }
        // Whoever was given a VIP earlier keeps it: services that name one come last.
        let mut taken = BTreeMap::new();
        let mut entries: Vec<_> = self.services.iter_mut().collect();
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
                        self.conflicts.push(what);
                        taken.insert(frontend(id, *vip), owner);
                    }
                }
            }
        }
    }

    /// What the maps should hold.
    pub fn desired(&self) -> Desired {
        let frontends = self.services.values().flat_map(|entry| {
            entry.vips.iter().map(|vip| (frontend(&entry.service.id, *vip), entry.wanted(*vip)))
        });
        frontends.collect()
    }

    pub fn prune(&self) -> Prune {
        if self.complete { Prune::Yes } else { Prune::No }
    }
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

/// The key under which the kernel finds a service.
pub fn frontend(id: &ServiceId, vip: IpAddr) -> Frontend {
    Frontend::new(vip.into(), Port::new(id.port.get()), id.protocol.number())
}

/// Where an instance listens.
pub fn endpoint(instance: &Instance) -> Endpoint {
    Endpoint { address: instance.address.into(), port: Port::new(instance.port.get()) }
}

impl Entry {
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
    fn wanted(&self, vip: IpAddr) -> Wanted {
        let selectable = self.selectable(vip);
        let weight = |instance: &Instance| {
            if Some(instance.health) == selectable { instance.weight } else { 0 }
        };
        let backends = self.instances(vip).map(|instance| (endpoint(instance), weight(instance)));
        Wanted { policy: self.service.policy.in_kernel(), backends: backends.collect() }
    }

    /// Whose turn it is: healthy instances; failing those unhealthy ones, because health may be
    /// wrong but an empty set surely is; failing those draining ones.
    fn selectable(&self, vip: IpAddr) -> Option<Health> {
        let some =
            |health| self.instances(vip).any(|instance| instance.health == health && instance.weight > 0);
        [Health::Healthy, Health::Unhealthy, Health::Draining].into_iter().find(|health| some(*health))
    }
}

#[cfg(test)]
mod tests;
