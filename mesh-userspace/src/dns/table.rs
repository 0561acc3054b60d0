//! The names that the node answers itself: made once from a catalog, then only read.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use arc_swap::{ArcSwap, Guard};
use hickory_resolver::proto::{
    op::ResponseCode,
    rr::{
        Name, RData, Record, RecordType,
        rdata::{PTR, SOA, SRV},
    },
};
use imbl::ordmap::DiffItem;
use ipnet::IpNet;
use mesh_common::abi::Frontend;

use super::{NEGATIVE_TTL, TTL};
use crate::{
    catalog::{Catalog, frontend},
    model::{self, Answer, ServiceId},
    registry::rules::dns_name,
};

mod instances;

use instances::{Instances, Target, some};

/// At or below these a service cannot have a name: it would break what every program relies on.
const RESERVED: [&str; 2] = ["localhost", "arpa"];

/// Whose connects an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// The node's own tasks': those to VIPs are translated.
    Node,
    /// Others': a VIP is nothing to them.
    Outside,
}

/// Names are text here: lower case, without the dot at the end.
#[derive(Debug, Default)]
pub(super) struct Table {
    services: Vec<Service>,
    /// Services' own names and their aliases.
    names: HashMap<String, Known>,
    /// Names that exist only because names below them do (RFC 8020).
    between: HashSet<String>,
    /// VIP → the services that have it.
    vips: HashMap<IpAddr, Vec<usize>>,
    /// Suffixes and namespaces: no name below them is asked for anywhere else.
    zones: HashSet<String>,
    vip_ranges: Vec<IpNet>,
    /// Whether every registry was heard. Until then, a name that is not here may exist.
    pub(super) heard: bool,
}

/// All ports of one name.
#[derive(Debug)]
struct Service {
    /// `name.namespace`, as the registry has it.
    id: String,
    /// What answers call it: its id, or an alias where it is API-only; none while that has none.
    name: Option<String>,
    answer: Answer,
    vips: Vec<IpAddr>,
    ports: Vec<Port>,
    /// Swapped when they change, which is more often than anything else does.
    instances: ArcSwap<Instances>,
}

#[derive(Debug)]
struct Port {
    id: ServiceId,
    name: Option<String>,
}

/// Which service a name stands for.
#[derive(Debug)]
struct Known {
    service: usize,
    is_alias: bool,
    /// Other services that claim this alias and do not get it.
    losers: Vec<usize>,
}

/// What a table says of a name.
#[derive(Debug)]
enum Found<'a> {
    Name(&'a Known),
    /// `_PORT._PROTOCOL` of a name, by number or by name.
    Ports(&'a Known, Vec<usize>),
    /// An instance, below a name of its service.
    Instance(&'a Known, IpAddr),
    Vip(&'a [usize]),
    /// It exists, and has no records.
    Between,
    /// A suffix or a namespace.
    Zone,
    Missing,
    /// It may exist.
    Unheard,
    /// Not the node's own.
    Elsewhere,
}

/// The records of an answer.
#[derive(Debug, PartialEq)]
pub(super) struct Own {
    pub(super) code: ResponseCode,
    pub(super) answers: Vec<Record>,
    pub(super) authorities: Vec<Record>,
    pub(super) additionals: Vec<Record>,
}

impl Table {
    /// The names of a catalog. Only what `is_programmed` has one: a name is not answered before
    /// its VIP works.
    pub(super) fn build(
        catalog: Option<&Catalog>,
        suffixes: &[String],
        vip_ranges: &[IpNet],
        is_programmed: impl Fn(&Frontend) -> bool,
    ) -> Self {
        let mut table = Self {
            zones: suffixes.iter().filter(|zone| !is_reserved(zone)).cloned().collect(),
            vip_ranges: vip_ranges.to_vec(),
            heard: catalog.is_some_and(|catalog| catalog.delivered),
            ..Self::default()
        };
        // (the service, its namespace, its alias)
        let mut aliases: Vec<(usize, &str, &str)> = Vec::new();
        for entry in catalog.into_iter().flat_map(|catalog| catalog.services.values()) {
            let id = &entry.service.id;
            let namespace = id.namespace.to_ascii_lowercase();
            // Names below a namespace without names are others'.
            if !entry.service.api_only && !table.zones.contains(&namespace) && !is_reserved(&namespace) {
                table.zones.insert(namespace);
            }
            let works = |vip: &&IpAddr| is_programmed(&frontend(id, **vip));
            let vips: Vec<IpAddr> = entry.vips.iter().filter(works).copied().collect();
            let name = format!("{}.{}", id.name, id.namespace);
            if vips.is_empty() || dns_name("name", &name).is_err() {
                continue;
            }
            let Some(service) = table.service(name, &entry.service) else { continue };
            table.serve(service, &vips, &entry.service);
            aliases.extend(entry.service.aliases.iter().map(|alias| (service, &*id.namespace, &**alias)));
        }
        for service in &mut table.services {
            // Most have one of each.
            service.vips.shrink_to_fit();
            service.ports.shrink_to_fit();
        }
        for (service, namespace, alias) in &aliases {
            if table.services[*service].name.is_some() {
                table.claim(&format!("{alias}.{namespace}"), *service);
            }
        }
        // An alias alone may be claimed in several namespaces: the first suffix goes first.
        let place =
            |namespace: &str| suffixes.iter().position(|suffix| suffix.eq_ignore_ascii_case(namespace));
        aliases.sort_by_key(|(_, namespace, _)| place(namespace).unwrap_or(usize::MAX));
        for (service, _, alias) in aliases {
            table.claim(alias, service);
        }
        if let Some(catalog) = catalog {
            table.services.iter().for_each(|service| service.follow(catalog));
        }
        for name in table.names.keys() {
            let Some(zone) = table.zone_of(name) else { continue };
            let between = parents(name).skip(1).take_while(|parent| *parent != zone);
            table
                .between
                .extend(between.filter(|name| !table.names.contains_key(*name)).map(ToOwned::to_owned));
        }
        table
    }

    /// Takes the instances of another catalog, in which the names are the same.
    pub(super) fn follow(&self, old: &Option<Arc<Catalog>>, new: &Option<Arc<Catalog>>) {
        let (Some(old), Some(new)) = (old, new) else { return };
        for change in old.services.diff(&new.services) {
            let DiffItem::Update { new: (id, _), .. } = change else { continue };
            // They are in the catalog's order.
            let wanted = (&id.namespace, &id.name);
            let place = self.services.binary_search_by(|service| {
                let id = &service.ports[0].id;
                (&id.namespace, &id.name).cmp(&wanted)
            });
            if let Ok(place) = place {
                self.services[place].follow(new);
            }
        }
    }

    /// The place of a service, whose ports come one after the other; none if it cannot have its name.
    fn service(&mut self, id: String, of: &model::Service) -> Option<usize> {
        let own = id.to_ascii_lowercase();
        if is_reserved(&own) {
            return None;
        }
        if self.services.last().is_some_and(|last| last.id == id) {
            return Some(self.services.len() - 1);
        }
        let service = self.services.len();
        if !of.api_only {
            let known = Known { service, is_alias: false, losers: Vec::new() };
            let known = self.names.entry(own).or_insert(known).service;
            if known != service {
                return Some(known);
            }
        }
        self.services.push(Service {
            name: (!of.api_only).then(|| id.clone()),
            id,
            answer: of.answer,
            vips: Vec::new(),
            ports: Vec::new(),
            instances: ArcSwap::default(),
        });
        Some(service)
    }

    fn serve(&mut self, service: usize, vips: &[IpAddr], of: &model::Service) {
        let Service { vips: known, ports, .. } = &mut self.services[service];
        ports.push(Port { id: of.id.clone(), name: of.port_name.clone() });
        for vip in vips.iter().filter(|vip| !known.contains(vip)).collect::<Vec<_>>() {
            known.push(*vip);
            self.vips.entry(*vip).or_default().push(service);
        }
    }

    /// Gives a service an alias that is free.
    fn claim(&mut self, alias: &str, service: usize) {
        let alias = alias.to_ascii_lowercase();
        if dns_name("alias", &alias).is_err() || is_reserved(&alias) {
            return;
        }
        let known = Known { service, is_alias: true, losers: Vec::new() };
        let known = self.names.entry(alias.clone()).or_insert(known);
        if known.service == service {
            self.services[service].name.get_or_insert(alias);
        } else if !known.losers.contains(&service) {
            known.losers.push(service);
        }
    }

    fn zone_of<'a>(&self, name: &'a str) -> Option<&'a str> {
        parents(name).find(|zone| self.zones.contains(*zone))
    }

    fn find(&self, name: &str, view: View) -> Found<'_> {
        if let Some(known) = self.names.get(name) {
            return Found::Name(known);
        }
        if let Some(found) = self.port(name).or_else(|| self.instance(name, view)) {
            return found;
        }
        match self.zone_of(name) {
            Some(zone) if zone == name => Found::Zone,
            Some(_) if self.between.contains(name) => Found::Between,
            Some(_) if self.heard => Found::Missing,
            Some(_) => Found::Unheard,
            None => match reverse(name).filter(|net| self.vip_ranges.iter().any(|range| range.contains(net)))
            {
                Some(net) if net.prefix_len() < net.max_prefix_len() => Found::Between,
                Some(net) => match self.vips.get(&net.addr()) {
                    Some(services) => Found::Vip(services),
                    None if self.heard => Found::Missing,
                    None => Found::Unheard,
                },
                // It may be an alias.
                None if !self.heard && !name.is_empty() && !name.contains('.') => Found::Unheard,
                None => Found::Elsewhere,
            },
        }
    }

    /// `_PORT._PROTOCOL.NAME`, or the `_PROTOCOL.NAME` above it.
    fn port(&self, name: &str) -> Option<Found<'_>> {
        let (first, rest) = name.strip_prefix('_')?.split_once('.')?;
        let is = |port: &Port, text: &str| port.id.protocol.to_string() == text;
        if let Some(known) = self.names.get(rest) {
            let ports = &self.services[known.service].ports;
            return ports.iter().any(|port| is(port, first)).then_some(Found::Between);
        }
        let (second, rest) = rest.strip_prefix('_')?.split_once('.')?;
        let known = self.names.get(rest)?;
        let is_called =
            |port: &Port| port.name.as_deref() == Some(first) || port.id.port.to_string() == first;
        let ports = self.services[known.service].ports.iter().enumerate();
        let ports = ports.filter(|(_, port)| is(port, second) && is_called(port));
        let ports: Vec<_> = ports.map(|(place, _)| place).collect();
        (!ports.is_empty()).then_some(Found::Ports(known, ports))
    }

    /// An instance of a service whose ports are answered with those of instances.
    fn instance(&self, name: &str, view: View) -> Option<Found<'_>> {
        let (first, rest) = name.split_once('.')?;
        let known = self.names.get(rest)?;
        let address = instances::address(first)?;
        let instances = self.services[known.service].shown(view)?;
        instances.addresses.binary_search(&address).ok().map(|_| Found::Instance(known, address))
    }

    /// The answer to a question for `name`, whose case it keeps; none if it is not the node's to give.
    pub(super) fn answer(&self, name: &Name, kind: RecordType, view: View) -> Option<Own> {
        let text = text(name);
        let wants = |of: RecordType| kind == of || kind == RecordType::ANY;
        let of = |address: &IpAddr| if address.is_ipv4() { RecordType::A } else { RecordType::AAAA };
        let mut own = Own::failed(ResponseCode::NoError);
        match self.find(&text, view) {
            Found::Name(known) => {
                let service = &self.services[known.service];
                let mut add = |addresses: &mut dyn Iterator<Item = &IpAddr>| {
                    let addresses = addresses.filter(|address| wants(of(address)));
                    own.answers.extend(addresses.map(|address| record(name, RData::from(*address))));
                };
                match service.shown(view) {
                    Some(instances) => add(&mut instances.some_addresses()),
                    None => add(&mut service.vips.iter()),
                }
                if wants(RecordType::SRV) {
                    own.add_ports(name, service, 0..service.ports.len(), view);
                }
            }
            Found::Ports(known, ports) if wants(RecordType::SRV) => {
                own.add_ports(name, &self.services[known.service], ports.into_iter(), view);
            }
            Found::Instance(_, address) if wants(of(&address)) => {
                own.answers.push(record(name, RData::from(address)));
            }
            Found::Vip(services) if wants(RecordType::PTR) => {
                let names = services.iter().filter_map(|service| self.services[*service].parsed());
                own.answers.extend(names.map(|target| record(name, RData::PTR(PTR(target)))));
            }
            Found::Zone if wants(RecordType::SOA) => own.answers.push(soa(name.clone())),
            Found::Ports(..) | Found::Instance(..) | Found::Vip(_) | Found::Zone | Found::Between => {}
            Found::Missing => own.code = ResponseCode::NXDomain,
            Found::Unheard => return Some(Own::failed(ResponseCode::ServFail)),
            Found::Elsewhere => return None,
        }
        if own.answers.is_empty() {
            // An alias alone, or a reverse name, has no zone: the name that is nearest will do.
            let zone = self.zone_of(&text);
            let zone = zone.or_else(|| parents(&text).find(|parent| self.names.contains_key(*parent)));
            own.authorities.extend(parse(zone.unwrap_or(&text)).map(soa));
        }
        Some(own)
    }

    /// Why a name is answered as it is, for a person; none if it is not the node's own.
    pub(super) fn explain(&self, name: &Name) -> Option<String> {
        let text = text(name);
        let names = |services: &[usize]| {
            let names: Vec<_> = services.iter().map(|service| &*self.services[*service].id).collect();
            names.join(", ")
        };
        let why = match self.find(&text, View::Node) {
            Found::Name(Known { service, is_alias, losers }) => {
                let what = if *is_alias { "alias of service" } else { "service" };
                let instances = self.services[*service].shown(View::Node);
                let how = if instances.is_some() { ", which answers with its instances" } else { "" };
                let why = format!("{what} {}{how}", names(&[*service]));
                match losers.is_empty() {
                    true => why,
                    false => format!("{why}; also an alias of {}, which does not get it", names(losers)),
                }
            }
            Found::Ports(known, ports) => {
                let service = &self.services[known.service];
                let ports: Vec<_> =
                    ports.iter().map(|place| service.ports[*place].id.port.to_string()).collect();
                format!("port {} of service {}", ports.join(", "), names(&[known.service]))
            }
            Found::Instance(known, _) => format!("an instance of service {}", names(&[known.service])),
            Found::Vip(services) => format!("VIP of service {}", names(services)),
            Found::Between => "only names below it have records".into(),
            Found::Zone => "a suffix or namespace of services".into(),
            Found::Missing => "no service has this name, and names like it are asked for nowhere else".into(),
            Found::Unheard => "not every registry was heard yet, so it may exist".into(),
            Found::Elsewhere => return None,
        };
        Some(why)
    }
}

impl Service {
    /// Its instances, where it is answered with those.
    fn shown(&self, view: View) -> Option<Guard<Arc<Instances>>> {
        (view == View::Outside || self.answer == Answer::Instances).then(|| self.instances.load())
    }

    /// Takes its instances from a catalog.
    fn follow(&self, catalog: &Catalog) {
        let services = self.ports.iter().map(|port| catalog.services.get(&port.id));
        let services = services.map(|entry| entry.map(|entry| &*entry.service));
        self.instances.store(Arc::new(Instances::of(services)));
    }

    fn parsed(&self) -> Option<Name> {
        self.name.as_deref().and_then(parse)
    }
}

impl Own {
    pub(super) fn failed(code: ResponseCode) -> Self {
        Self { code, answers: Vec::new(), authorities: Vec::new(), additionals: Vec::new() }
    }

    /// With the addresses that whoever asked will want next.
    fn add_ports(&mut self, name: &Name, service: &Service, places: impl Iterator<Item = usize>, view: View) {
        let Some(target) = service.parsed() else { return };
        if let Some(instances) = service.shown(view) {
            return self.add_targets(name, &target, places.flat_map(|place| some(&instances.targets[place])));
        }
        let mut ports: Vec<_> = places.map(|place| service.ports[place].id.port.get()).collect();
        ports.sort_unstable();
        // One may be there for TCP and for UDP.
        ports.dedup();
        // As Cloud Map has it: the same priority and weight for all.
        let srv = |port| record(name, RData::SRV(SRV::new(1, 1, port, target.clone())));
        self.answers.extend(ports.into_iter().map(srv));
        self.additionals.extend(service.vips.iter().map(|vip| record(&target, RData::from(*vip))));
    }

    /// Some instances of each port, each at a name of its own below the service's.
    fn add_targets<'a>(&mut self, name: &Name, service: &Name, all: impl Iterator<Item = &'a Target>) {
        let (mut targets, mut hosts) = (HashSet::new(), HashSet::new());
        for Target { address, port, weight } in all {
            let Ok(host) = service.prepend_label(instances::label(*address)) else { continue };
            if targets.insert((address, port)) {
                self.answers.push(record(name, RData::SRV(SRV::new(1, *weight, *port, host.clone()))));
            }
            if hosts.insert(address) {
                self.additionals.push(record(&host, RData::from(*address)));
            }
        }
    }
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL, data)
}

/// What says how long a negative answer may be kept.
fn soa(zone: Name) -> Record {
    let mailbox = zone.prepend_label("hostmaster").unwrap_or_else(|_| zone.clone());
    let soa = SOA::new(zone.clone(), mailbox, 1, 60, 60, 60, NEGATIVE_TTL);
    Record::from_rdata(zone, NEGATIVE_TTL, RData::SOA(soa))
}

/// A name and all that it is below, the root excepted.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    fn parent<'a>(name: &&'a str) -> Option<&'a str> {
        name.split_once('.').map(|(_, parent)| parent)
    }
    std::iter::successors(Some(name).filter(|name| !name.is_empty()), parent)
}

fn is_reserved(name: &str) -> bool {
    parents(name).last().is_some_and(|top| RESERVED.contains(&top))
}

/// The addresses that a reverse name stands for.
fn reverse(name: &str) -> Option<IpNet> {
    name.ends_with(".arpa").then(|| parse(name)?.parse_arpa_name().ok()).flatten()
}

/// None for what DNS has no room for.
fn parse(text: &str) -> Option<Name> {
    Name::from_ascii(format!("{text}.")).ok()
}

fn text(name: &Name) -> String {
    let mut text = String::with_capacity(name.len());
    for label in name {
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|byte| match byte {
            // No name of ours has it, and a dot inside a label is no border.
            b'.' | 0x80.. => '/',
            byte => char::from(byte.to_ascii_lowercase()),
        }));
    }
    text
}

#[cfg(test)]
pub(super) mod tests;
