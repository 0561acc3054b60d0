//! What no two services may both have.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    num::NonZeroU16,
    sync::Arc,
};

use crate::model::{Answer, Protocol, Service, ServiceId};

/// The identities, frontends, VIPs and names taken so far; the first owner wins.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    services: HashSet<ServiceId>,
    frontends: HashMap<(IpAddr, NonZeroU16, Protocol), ServiceId>,
    /// (namespace, name, is IPv4) → VIP.
    vips: HashMap<(String, String, bool), IpAddr>,
    /// (namespace, name) → how it is answered, and whether it is API-only.
    answers: HashMap<(String, String), (Answer, bool)>,
    /// Full name, in lower case → the (namespace, name) it stands for.
    names: HashMap<String, (String, String)>,
}

impl Claims {
    /// Takes what `service` claims; nothing if part of it is taken, and then says what.
    pub fn add(&mut self, service: &Service) -> Result<(), String> {
        self.check(service)?;
        let id = &service.id;
        let owner = (id.namespace.clone(), id.name.clone());
        self.names.extend(names(service).map(|name| (name, owner.clone())));
        self.answers.insert(owner, (service.answer, service.api_only));
        if let Some(vip) = service.vip {
            self.vips.insert((id.namespace.clone(), id.name.clone(), vip.is_ipv4()), vip);
            self.frontends.insert((vip, id.port, id.protocol), id.clone());
        }
        self.services.insert(id.clone());
        Ok(())
    }

    /// Whether nothing that `service` claims is taken; otherwise what.
    fn check(&self, service: &Service) -> Result<(), String> {
        let id = &service.id;
        if self.services.contains(id) {
            return Err("the service is defined twice".into());
        }
        let owner = (id.namespace.clone(), id.name.clone());
        for name in names(service) {
            if let Some((namespace, other)) = self.names.get(&name).filter(|known| **known != owner) {
                return Err(format!(
                    "the name {name} already belongs to service {other} in namespace {namespace}"
                ));
            }
        }
        let answer = (service.answer, service.api_only);
        if self.answers.get(&owner).is_some_and(|other| *other != answer) {
            return Err("answer or api_only differs from that of the same name's other port".into());
        }
        if let Some(vip) = service.vip {
            if let Some(owner) = self.frontends.get(&(vip, id.port, id.protocol)) {
                return Err(format!(
                    "vip {vip} port {}/{} is already taken by service {owner}",
                    id.port, id.protocol
                ));
            }
            let name = (id.namespace.clone(), id.name.clone(), vip.is_ipv4());
            if let Some(other) = self.vips.get(&name).filter(|other| **other != vip) {
                return Err(format!("vip {vip} differs from {other}, the VIP of the same name's other port"));
            }
        }
        Ok(())
    }

    /// Whether services claim what others, in the same order, claim.
    pub fn are_same(some: &[Arc<Service>], others: &[Arc<Service>]) -> bool {
        some.iter().map(claims).eq(others.iter().map(claims))
    }

    /// As [`add`](Self::add), with the service's name in the message.
    pub fn add_named(&mut self, service: &Service) -> Result<(), String> {
        self.add(service).map_err(|clash| format!("service {}: {clash}", service.id))
    }

    /// Adds all services of a file, which has none that exclude each other, or none of them.
    pub fn add_file(&mut self, services: &[Arc<Service>]) -> Result<(), String> {
        for service in services {
            self.check(service).map_err(|clash| format!("service {}: {clash}", service.id))?;
        }
        services.iter().try_for_each(|service| self.add_named(service))
    }
}

fn claims(service: &Arc<Service>) -> (&ServiceId, Option<IpAddr>, &[String], Answer, bool) {
    (&service.id, service.vip, &service.aliases, service.answer, service.api_only)
}

/// Two names that are one in DNS would share a VIP, which is derived from the full name.
fn names(service: &Service) -> impl Iterator<Item = String> {
    let names = std::iter::once(&service.id.name).chain(&service.aliases);
    names.map(|name| format!("{name}.{}", service.id.namespace).to_lowercase())
}
