//! The objects of the API, and how they are made from what the daemon knows.

use std::{
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use mesh_common::abi::{Frontend, map};
use serde::{Deserialize, Serialize};

use super::Dialled;
use crate::{
    catalog::{Entry, endpoint, frontend},
    daemon::View,
    datapath::{PROGRAMS, Stats},
    model::{Health, Policy, Protocol},
    plan::{Applied, alias},
    registry::{State, Sync},
};

#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// Programs in place, every registry heard, everything they said written.
    pub ready: bool,
    pub cgroup: String,
    pub pin_dir: String,
    pub programs: Vec<Program>,
    pub registries: Vec<Registry>,
    pub maps: Vec<MapUse>,
    pub dns: Dns,
    pub services: usize,
    pub backends: usize,
    /// Records left out, services that did not fit, failed writes, name servers that are not asked.
    pub problems: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub attached: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Registry {
    pub r#type: String,
    pub source: String,
    pub state: Sync,
    /// What it said last, perhaps to an earlier run.
    pub services: usize,
    pub instances: usize,
    /// When that was, in RFC 3339.
    pub last_sync: Option<String>,
    /// How long ago that was, by the wall clock.
    pub age_seconds: Option<u64>,
    pub error: Option<String>,
    /// Records that are not followed, and why.
    pub problems: Vec<String>,
}

/// How full a map is.
#[derive(Debug, Serialize, Deserialize)]
pub struct MapUse {
    pub name: String,
    /// Entries that nothing new can have: also those of ids that rest and of slots that may still
    /// be read.
    pub used: u32,
    /// How many can be used: entry 0 of maps with ids never is.
    pub max: u32,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Dns {
    pub listen: Vec<SocketAddr>,
    /// Where others than the node's tasks ask.
    pub outside: Vec<SocketAddr>,
    /// The name servers that are asked for names that are not the node's own.
    pub upstream: Vec<SocketAddr>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub protocol: Protocol,
    pub port: u16,
    pub vips: Vec<IpAddr>,
    pub aliases: Vec<String>,
    pub policy: Policy,
    pub backends: Counts,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub total: usize,
    pub active: usize,
    pub draining: usize,
    pub unhealthy: usize,
    pub ejected: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    Active,
    Draining,
    Unhealthy,
    Ejected,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Backend {
    /// None while it is not in the maps.
    pub id: Option<u32>,
    pub service: String,
    pub namespace: String,
    pub instance: String,
    pub address: IpAddr,
    pub port: u16,
    pub zone: Option<String>,
    pub weight: u16,
    pub state: BackendState,
    pub connections: Connections,
}

/// What is not counted by this version is null.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Connections {
    /// Sockets that were connected to it and are not closed yet.
    pub active: Option<u64>,
    pub opened: Option<u64>,
    pub failed: Option<u64>,
}

/// What a `connect()` would do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Explanation {
    pub target: String,
    pub protocol: Option<Protocol>,
    pub verdict: Verdict,
    pub reason: String,
    pub service: Option<String>,
    pub backends: Vec<Share>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Goes where it was going.
    Untouched,
    /// Fails with ECONNREFUSED.
    Refused,
    /// Goes to one of the backends.
    Translated,
}

/// A backend and its part of new connections, between 0 and 1.
#[derive(Debug, Serialize, Deserialize)]
pub struct Share {
    pub id: u32,
    pub address: IpAddr,
    pub port: u16,
    pub share: f64,
}

impl BackendState {
    /// What the registry says, unless its connects say otherwise.
    fn of(health: Health, ejected: bool) -> Self {
        match health {
            Health::Healthy if ejected => Self::Ejected,
            Health::Healthy => Self::Active,
            Health::Unhealthy => Self::Unhealthy,
            Health::Draining => Self::Draining,
        }
    }
}

impl Status {
    pub fn of(view: &View) -> Self {
        let programs =
            PROGRAMS.map(|name| Program { name: name.into(), attached: view.pins.link_info(name).is_some() });
        let report = view.report.borrow().clone();
        let catalog = view.catalog.borrow().clone();
        let registries = Registry::all(view);
        let left_out = registries.iter().flat_map(|registry| {
            registry.problems.iter().map(|problem| format!("{}: {problem}", registry.r#type))
        });
        let left_out: Vec<_> = left_out.collect();
        let conflicts = catalog.iter().flat_map(|catalog| &catalog.conflicts).cloned();
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            ready: view.ready(),
            cgroup: view.cgroup.display().to_string(),
            pin_dir: view.pins.dir().display().to_string(),
            programs: programs.into(),
            registries,
            maps: view.maps(),
            dns: Dns {
                listen: view.listen.clone(),
                outside: view.outside.clone(),
                upstream: view.dns.upstream(),
            },
            services: catalog.as_ref().map_or(0, |catalog| catalog.services.len()),
            backends: catalog
                .iter()
                .flat_map(|c| c.services.values())
                .map(|e| e.service.instances.len())
                .sum(),
            problems: left_out
                .into_iter()
                .chain(conflicts)
                .chain(report.refused)
                .chain(report.error)
                .chain(view.dns.problems())
                .collect(),
        }
    }
}

impl Registry {
    /// What is wrong with it, on one line.
    pub fn trouble(&self) -> Option<String> {
        let more = self.problems.len().saturating_sub(1);
        let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
        let problem = || self.problems.first().map(|problem| format!("{problem}{more}"));
        self.error.clone().or_else(problem)
    }

    pub fn all(view: &View) -> Vec<Self> {
        view.registries.borrow().iter().map(Self::of).collect()
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "an age is for people; one that a clock spoilt is right again soon"
    )]
    fn of(state: &State) -> Self {
        let services = || state.snapshot.iter().flat_map(|snapshot| snapshot.all());
        let age = state.last_sync.map(|at| at.elapsed().unwrap_or_default());
        Self {
            r#type: state.kind.into(),
            source: state.source.clone(),
            state: state.sync,
            services: services().count(),
            instances: services().map(|service| service.instances.len()).sum(),
            last_sync: state.last_sync.map(rfc3339),
            age_seconds: age.map(|age| age.as_secs()),
            error: state.error.clone(),
            problems: state.problems.clone(),
        }
    }
}

impl View {
    /// Whether every registry was heard, the maps follow what they said, and the programs are in
    /// place.
    pub fn ready(&self) -> bool {
        let report = self.report.borrow().clone();
        // Not whether it is the latest: with many changes a second hardly any is for long.
        let follows = report.written.is_some_and(|written| written.delivered);
        let heard = self.registries.borrow().iter().all(State::is_heard);
        follows
            && heard
            && report.error.is_none()
            && PROGRAMS.iter().all(|name| self.pins.link_info(name).is_some())
    }

    /// How full the maps are. `ORIGIN` and `PEERS` are storage of sockets, which nobody counts,
    /// and `STATS` is a fixed row of counters.
    pub fn maps(&self) -> Vec<MapUse> {
        let applied = self.applied.read().expect("no writer panics");
        let alloc = &applied.alloc;
        let frontends = u32::try_from(applied.frontends.len()).expect("map sizes are 32-bit");
        let frontends = (frontends, alloc.services.max());
        let services = (alloc.services.used(), alloc.services.max());
        let backends = (alloc.backends.used(), alloc.backends.max());
        let slots = (alloc.slots.used(), alloc.slots.max());
        drop(applied);
        let places = self.stats.places();
        let mut maps = vec![
            (map::FRONTENDS, frontends),
            (map::SERVICES, services),
            (map::BACKENDS, backends),
            (map::SLOTS, slots),
            (map::SETTINGS, services),
            (map::EJECTED, services),
            (map::CURSORS, services),
            (map::LOAD, backends),
            (map::HEALTH, backends),
            (map::SOCKETS, places),
            (map::CONNECTIONS, places),
        ];
        maps.extend(self.stats.affinities().ok().map(|affinities| (map::AFFINITY, affinities)));
        let usage = |(name, (used, max)): (&str, _)| MapUse { name: name.into(), used, max };
        maps.into_iter().map(usage).collect()
    }
}

impl Counts {
    fn add(&mut self, state: BackendState) {
        self.total += 1;
        *match state {
            BackendState::Active => &mut self.active,
            BackendState::Draining => &mut self.draining,
            BackendState::Unhealthy => &mut self.unhealthy,
            BackendState::Ejected => &mut self.ejected,
        } += 1;
    }

    /// Of all services together.
    pub fn of_all(view: &View) -> Self {
        let mut counts = Self::default();
        let catalog = view.catalog.borrow().clone();
        let applied = view.applied.read().expect("no writer panics");
        for entry in catalog.iter().flat_map(|catalog| catalog.services.values()) {
            counts.add_all(entry, &applied, &view.stats);
        }
        counts
    }

    /// Each instance once, however many VIPs lead to it.
    fn add_all(&mut self, entry: &Entry, applied: &Applied, stats: &Stats) {
        for instance in &entry.service.instances {
            let mut ids = entry.vips.iter().filter_map(|vip| {
                applied.backend_id(&frontend(&entry.service.id, *vip), &endpoint(instance))
            });
            self.add(BackendState::of(instance.health, ids.any(|id| stats.is_ejected(id))));
        }
    }
}

impl Service {
    pub fn all(view: &View) -> Vec<Self> {
        let catalog = view.catalog.borrow().clone();
        let applied = view.applied.read().expect("no writer panics");
        let services = catalog.iter().flat_map(|catalog| catalog.services.values());
        services.map(|entry| Self::of(entry, &applied, &view.stats)).collect()
    }

    fn of(entry: &Entry, applied: &Applied, stats: &Stats) -> Self {
        let service = &entry.service;
        let mut backends = Counts::default();
        backends.add_all(entry, applied, stats);
        Self {
            name: service.id.name.clone(),
            namespace: service.id.namespace.clone(),
            protocol: service.id.protocol,
            port: service.id.port.get(),
            vips: entry.vips.clone(),
            aliases: service.aliases.clone(),
            policy: service.policy,
            backends,
        }
    }
}

impl Backend {
    pub fn all(view: &View) -> Vec<Self> {
        let catalog = view.catalog.borrow().clone();
        let applied = view.applied.read().expect("no writer panics");
        catalog
            .iter()
            .flat_map(|catalog| catalog.services.values())
            .flat_map(|entry| Self::of(entry, &applied, &view.stats))
            .collect()
    }

    fn of(entry: &Entry, applied: &Applied, stats: &Stats) -> Vec<Self> {
        let id = &entry.service.id;
        let behind = |vip: &IpAddr| {
            let frontend = frontend(id, *vip);
            entry
                .instances(*vip)
                .map(move |instance| (applied.backend_id(&frontend, &endpoint(instance)), instance))
                .map(|(backend, instance)| Self {
                    id: backend,
                    service: id.name.clone(),
                    namespace: id.namespace.clone(),
                    instance: instance.id.clone(),
                    address: instance.address,
                    port: instance.port.get(),
                    zone: instance.zone.clone(),
                    weight: instance.weight,
                    state: BackendState::of(instance.health, backend.is_some_and(|id| stats.is_ejected(id))),
                    connections: Connections {
                        active: backend.map(|id| stats.load(id)),
                        ..Connections::default()
                    },
                })
        };
        entry.vips.iter().flat_map(behind).collect()
    }
}

impl Explanation {
    /// One answer for each protocol and port that the target may mean; what is unknown is an
    /// error only for a name, because an address can always be dialled.
    pub fn of(view: &View, dialled: &Dialled) -> Result<Vec<Self>, String> {
        let catalog = view.catalog.borrow().clone().unwrap_or_default();
        let applied = view.applied.read().expect("no writer panics");
        let entries = catalog.services.values();
        let (found, address): (Vec<(&Entry, IpAddr)>, _) = match dialled {
            Dialled::Address { address, port } => {
                let at = entries.filter(|entry| entry.vips.contains(address));
                let at = at.filter(|entry| port.is_none_or(|port| port == entry.service.id.port.get()));
                (at.map(|entry| (&**entry, *address)).collect(), Some((*address, *port)))
            }
            Dialled::Name { name, port } => {
                let named = entries.filter(|entry| entry.service.answers_to(name));
                let found: Vec<_> =
                    named.flat_map(|entry| entry.vips.iter().map(move |vip| (&**entry, *vip))).collect();
                let Some((_, vip)) = found.first().copied() else {
                    return Err(format!("no service is named {name:?}, or it has no VIP"));
                };
                let at = found
                    .into_iter()
                    .filter(|(entry, _)| port.is_none_or(|port| port == entry.service.id.port.get()));
                (at.collect(), Some((vip, *port)))
            }
        };
        if !found.is_empty() {
            return Ok(found
                .into_iter()
                .map(|(entry, vip)| Self::translated(entry, vip, &applied))
                .collect());
        }
        let (address, port) = address.expect("set above");
        let target = port.map_or(address.to_string(), |port| join(address, port));
        let unknown = |verdict, reason: &str| Self {
            target,
            protocol: None,
            verdict,
            reason: reason.into(),
            service: None,
            backends: Vec::new(),
        };
        let kept = Self::kept(&applied, address, port);
        if !kept.is_empty() {
            return Ok(kept);
        }
        let in_range = view.config.borrow().rules.vip(address).is_ok();
        Ok(vec![match in_range {
            true => {
                unknown(Verdict::Refused, "the address is in a VIP range, but no service has it on this port")
            }
            false => unknown(Verdict::Untouched, "the address is in no VIP range"),
        }])
    }

    /// What the maps hold of an address that no registry names now: it is served until every
    /// registry has said that it is gone.
    fn kept(applied: &Applied, address: IpAddr, port: Option<u16>) -> Vec<Self> {
        let at = |frontend: &Frontend| {
            frontend.address.ip() == address && port.is_none_or(|port| port == frontend.port.get())
        };
        let frontends = applied.frontends.iter().filter(|(frontend, _)| at(frontend));
        let explain = |(frontend, id): (&Frontend, &u32)| {
            let backends = shares(applied, Some(*id));
            let verdict = if backends.is_empty() { Verdict::Refused } else { Verdict::Translated };
            Self {
                target: join(address, frontend.port.get()),
                protocol: Protocol::from_number(frontend.protocol),
                verdict,
                reason: "kept from before; no registry names it at the moment".into(),
                service: None,
                backends,
            }
        };
        frontends.map(explain).collect()
    }

    fn translated(entry: &Entry, vip: IpAddr, applied: &Applied) -> Self {
        let id = &entry.service.id;
        let frontend = frontend(id, vip);
        let backends = shares(applied, applied.frontends.get(&frontend).copied());
        let (verdict, reason) = if !applied.frontends.contains_key(&frontend) {
            (Verdict::Refused, "the service is not in the maps; `mesh status` says why".to_owned())
        } else if backends.is_empty() {
            (Verdict::Refused, "the service has no backend".to_owned())
        } else {
            (
                Verdict::Translated,
                format!(
                    "{} of {} backends get new connections",
                    backends.len(),
                    entry.instances(vip).count()
                ),
            )
        };
        Self {
            target: join(vip, id.port.get()),
            protocol: Some(id.protocol),
            verdict,
            reason,
            service: Some(id.to_string()),
            backends,
        }
    }
}

/// The backends that a service's slots lead to, as the maps have it.
pub fn shares(applied: &Applied, service: Option<u32>) -> Vec<Share> {
    let Some(service) = service.and_then(|id| applied.services.get(&id)) else { return Vec::new() };
    let shares = alias::shares(&service.words);
    let backends = service.backends.iter().filter_map(|(endpoint, backend)| {
        Some(Share {
            id: backend.id,
            address: endpoint.address.ip(),
            port: endpoint.port.get(),
            share: *shares.get(&backend.id)?,
        })
    });
    backends.collect()
}

impl crate::model::Service {
    fn answers_to(&self, name: &str) -> bool {
        let full = |short: &str| name == short || name == format!("{short}.{}", self.id.namespace);
        full(&self.id.name) || self.aliases.iter().any(|alias| full(alias))
    }
}

/// `ADDRESS:PORT`, or `[ADDRESS]:PORT` for IPv6.
pub fn join(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
