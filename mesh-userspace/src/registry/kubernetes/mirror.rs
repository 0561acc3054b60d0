//! What Services and EndpointSlices say, as kube-proxy understands them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    num::NonZeroU16,
};

use k8s_openapi::api::{
    core::v1::{Service as Object, ServiceSpec},
    discovery::v1::{Endpoint as Listed, EndpointSlice},
};
use serde_json::{Map, Value};

use super::Kind;
use crate::{
    model::{Health, Instance, Protocol, Service},
    registry::{
        embedded::translate,
        file::format,
        remote::{Ledger, Said},
        rules::{self, Rules},
    },
};

/// A Service that is left alone where this label is `true`.
const EXCLUDE: &str = "mesh.exclude";

/// Whose Service it is, where that is not everybody's; and whether clients are to find its Pods themselves.
const PROXY: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// Which Service a slice is of.
const OWNER: &str = "kubernetes.io/service-name";

/// What the Service's own ports say.
const NOT_HERE: [&str; 3] = ["port", "port_name", "protocol"];

/// Kubernetes' own default, in seconds.
const AFFINITY: i32 = 10_800;

/// The weight of an endpoint that gets connections.
const WEIGHT: u16 = 100;

/// As many objects without a name are named.
const STRAYS: usize = 20;

/// Namespace and name of an object.
type Name = (String, String);

/// Where this node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) node: String,
    pub(super) zone: Option<String>,
}

/// Every object, by its name.
pub(super) struct Mirror {
    domain: String,
    rules: Rules,
    place: Place,
    fronts: BTreeMap<Name, Record<Front>>,
    /// By the name of their Service.
    slices: BTreeMap<Name, BTreeMap<String, Record<Slice>>>,
    /// The Service of each slice.
    owners: HashMap<Name, Name>,
    /// Objects without a name.
    strays: BTreeSet<String>,
    /// Counts the times that everything was listed.
    listing: u64,
    /// Services of which something has changed since they were last read.
    changed: BTreeSet<Name>,
    /// One service for each port.
    ledger: Ledger<Name, i64>,
}

struct Record<T> {
    /// What it said when it last fulfilled the rules; nothing, where it is none of ours.
    good: Option<T>,
    /// What is wrong with what it says now.
    why: Option<String>,
    /// The listing that has it.
    listing: u64,
}

impl<T> Record<T> {
    fn take(known: Option<Self>, said: Result<Option<T>, String>, listing: u64) -> Self {
        match said {
            Ok(good) => Self { good, why: None, listing },
            // What works stays until there is something better.
            Err(why) => Self { good: known.and_then(|known| known.good), why: Some(why), listing },
        }
    }
}

impl Mirror {
    pub(super) fn new(domain: String, rules: Rules) -> Self {
        Self {
            domain,
            rules,
            place: Place::default(),
            fronts: BTreeMap::new(),
            slices: BTreeMap::new(),
            owners: HashMap::new(),
            strays: BTreeSet::new(),
            listing: 0,
            changed: BTreeSet::new(),
            ledger: Ledger::default(),
        }
    }

    /// From now on everything is put again, on a node at this place.
    pub(super) fn begin(&mut self, place: Place) {
        self.place = place;
        self.listing += 1;
        self.strays.clear();
    }

    /// Everything was put that there is.
    pub(super) fn listed(&mut self) {
        self.changed.extend(self.fronts.keys().cloned());
        let Self { listing, fronts, slices, owners, .. } = self;
        fronts.retain(|_, record| record.listing == *listing);
        slices.retain(|(namespace, _), slices| {
            slices.retain(|name, record| {
                let stays = record.listing == *listing;
                if !stays {
                    owners.remove(&(namespace.clone(), name.clone()));
                }
                stays
            });
            !slices.is_empty()
        });
    }

    pub(super) fn put(&mut self, kind: Kind, object: Value) {
        let name = match name(&object) {
            Ok(name) => name,
            Err(why) => {
                if self.strays.len() < STRAYS {
                    self.strays.insert(why);
                }
                return;
            }
        };
        match kind {
            Kind::Service => {
                let said = front(object, &name, &self.domain, &self.rules);
                let record = Record::take(self.fronts.remove(&name), said, self.listing);
                self.fronts.insert(name.clone(), record);
                self.changed.insert(name);
            }
            Kind::Slice => {
                let owner = object["metadata"]["labels"][OWNER].as_str().map(ToOwned::to_owned);
                let owner = owner.map(|owner| (name.0.clone(), owner));
                let known = self.take_slice(&name, owner.as_ref());
                let Some(owner) = owner else { return };
                let record = Record::take(known, slice(object, &self.rules).map(Some), self.listing);
                self.slices.entry(owner.clone()).or_default().insert(name.1.clone(), record);
                self.owners.insert(name, owner.clone());
                self.changed.insert(owner);
            }
        }
    }

    pub(super) fn delete(&mut self, kind: Kind, object: &Value) {
        let Ok(name) = name(object) else { return };
        match kind {
            Kind::Service => {
                self.fronts.remove(&name);
                self.changed.insert(name);
            }
            Kind::Slice => drop(self.take_slice(&name, None)),
        }
    }

    /// Takes a slice away from its Service; what is known of it, if that is its Service still.
    fn take_slice(&mut self, name: &Name, stays: Option<&Name>) -> Option<Record<Slice>> {
        let owner = self.owners.remove(name)?;
        let slices = self.slices.get_mut(&owner)?;
        let record = slices.remove(&name.1);
        if slices.is_empty() {
            self.slices.remove(&owner);
        }
        let is_still = stays == Some(&owner);
        self.changed.insert(owner);
        record.filter(|_| is_still)
    }

    /// What is known now. Only Services of which something has changed are made anew.
    pub(super) fn read(&mut self) -> Said {
        for name in std::mem::take(&mut self.changed) {
            self.read_one(name);
        }
        let mut said = self.ledger.read();
        said.problems.extend(self.strays.iter().cloned());
        said
    }

    fn read_one(&mut self, name: Name) {
        let mut problems = Vec::new();
        let label = |what: &str, why: &str| format!("{what} {}/{}: {why}", name.0, name.1);
        let Some(record) = self.fronts.get(&name) else { return self.ledger.remove(&name) };
        problems.extend(record.why.iter().map(|why| label("Service", why)));
        let Some(front) = &record.good else {
            self.ledger.put(name, 0, Vec::new(), problems);
            return;
        };
        problems.extend(front.problems.iter().map(|why| label("Service", why)));
        let slices = self.slices.get(&name).into_iter().flatten();
        for (slice, record) in slices.clone() {
            let wrong = record.good.iter().flat_map(|good| &good.problems).chain(&record.why);
            let label = |why: &String| format!("EndpointSlice {}/{slice}: {why}", name.0);
            problems.extend(wrong.map(label));
        }
        let slices: Vec<_> = slices.filter_map(|(_, record)| record.good.as_ref()).collect();
        let services = front.ports.iter().map(|port| {
            let instances = instances(port, front.local, &slices, &self.place);
            Service { instances, ..port.service.clone() }
        });
        let services = services.collect();
        self.ledger.put(name, front.created, services, problems);
    }
}

fn name(object: &Value) -> Result<Name, String> {
    let part = |key| object["metadata"][key].as_str().unwrap_or_default();
    let (namespace, name) = (part("namespace"), part("name"));
    let is_name = |text| rules::dns_name("name", text).is_ok();
    if is_name(namespace) && is_name(name) {
        return Ok((namespace.to_owned(), name.to_owned()));
    }
    Err(format!("{namespace:?}/{name:?} is no object's name"))
}

/// What a Service says, apart from who serves.
#[derive(Clone, Debug, PartialEq)]
struct Front {
    /// In seconds: who came first keeps what two of them want.
    created: i64,
    /// Whether only endpoints on this node serve.
    local: bool,
    ports: Vec<Port>,
    problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct Port {
    /// By which slices know it.
    name: String,
    /// Without instances.
    service: Service,
}

/// `None` for a Service that is none of ours.
fn front(
    object: Value,
    (namespace, name): &Name,
    domain: &str,
    rules: &Rules,
) -> Result<Option<Front>, String> {
    let Object { metadata, spec, .. } = serde_json::from_value(object).map_err(|error| error.to_string())?;
    let (spec, labels) = (spec.unwrap_or_default(), metadata.labels.unwrap_or_default());
    if spec.type_.as_deref() == Some("ExternalName")
        || labels.get(EXCLUDE).is_some_and(|value| value == "true")
        || labels.get(PROXY).is_some_and(|whose| whose != "mesh")
    {
        return Ok(None);
    }
    let annotations = metadata.annotations.unwrap_or_default();
    if let Some(key) = NOT_HERE.iter().find(|key| annotations.contains_key(&format!("mesh.{key}"))) {
        return Err(format!("annotation mesh.{key}: the Service's ports say so"));
    }
    let mut common = translate::fields(annotations.iter().map(|(key, text)| (key.as_str(), text.as_str())))
        .map_err(|why| format!("annotation {why}"))?;
    let mut default = |key: &str, value: Option<Value>| {
        if let (false, Some(value)) = (common.contains_key(key), value) {
            common.insert(key.into(), value);
        }
    };
    default("affinity", affinity(&spec)?);
    default("vip", vip(&spec, rules).map(|vip| vip.to_string().into()));
    let headless = spec.cluster_ip.as_deref() == Some("None") || labels.contains_key(HEADLESS);
    default("answer", headless.then(|| "instances".into()));
    common.insert("name".into(), name.as_str().into());
    common.insert("namespace".into(), format!("{namespace}.{domain}").into());
    let (mut ports, mut problems) = (Vec::new(), Vec::new());
    for port in spec.ports.unwrap_or_default() {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => "tcp",
            Some("UDP") => "udp",
            Some(other) => {
                problems.push(format!("port {}: {} is not translated", port.port, other.escape_debug()));
                continue;
            }
        };
        let mut record = common.clone();
        record.insert("protocol".into(), protocol.into());
        record.insert("port".into(), port.port.into());
        let name = port.name.unwrap_or_default();
        if !name.is_empty() {
            record.insert("port_name".into(), name.as_str().into());
        }
        ports.push(Port { name, service: format::service(Map::into(record), rules)? });
    }
    let created = metadata.creation_timestamp.map_or(i64::MAX, |created| created.0.as_second());
    let local = spec.internal_traffic_policy.as_deref() == Some("Local");
    Ok(Some(Front { created, local, ports, problems }))
}

fn affinity(spec: &ServiceSpec) -> Result<Option<Value>, String> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return Ok(None);
    }
    let config = spec.session_affinity_config.as_ref();
    let seconds = config.and_then(|config| config.client_ip.as_ref()?.timeout_seconds).unwrap_or(AFFINITY);
    if seconds <= 0 {
        return Err(format!("sessionAffinityConfig: timeoutSeconds {seconds} is not above 0"));
    }
    Ok(Some(format!("{seconds}s").into()))
}

/// The first cluster IP that may be a VIP.
fn vip(spec: &ServiceSpec, rules: &Rules) -> Option<IpAddr> {
    let all = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    all.filter_map(|text| text.parse().ok()).find(|vip| rules.vip(*vip).is_ok())
}

/// Endpoints, and the ports at which each of them listens.
#[derive(Clone, Debug, PartialEq)]
struct Slice {
    ports: Vec<(String, Protocol, NonZeroU16)>,
    endpoints: Vec<Endpoint>,
    problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct Endpoint {
    id: String,
    address: IpAddr,
    state: State,
    node: Option<String>,
    zone: Option<String>,
    /// For which nodes and zones it is meant.
    for_nodes: Vec<String>,
    for_zones: Vec<String>,
}

/// The better, the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Unready,
    /// It ends, and does not serve any more.
    Ending,
    /// It ends, and serves as long as nobody else does.
    Serving,
    Ready,
}

fn slice(mut object: Value, rules: &Rules) -> Result<Slice, String> {
    // One by one, so that a bad one is left out alone.
    let listed = object.get_mut("endpoints").map(Value::take);
    object["endpoints"] = Value::Array(Vec::new());
    let EndpointSlice { address_type, ports, .. } =
        serde_json::from_value(object).map_err(|error| error.to_string())?;
    let is_ipv4 = match &*address_type {
        "IPv4" => true,
        "IPv6" => false,
        other => return Err(format!("addresses of type {} are not followed", other.escape_debug())),
    };
    let (mut endpoints, mut problems) = (Vec::new(), Vec::new());
    let listed = match listed.unwrap_or_default() {
        Value::Null => Vec::new(),
        Value::Array(listed) => listed,
        _ => return Err("endpoints is not a list".into()),
    };
    for one in listed {
        let address = one["addresses"][0].to_string();
        match endpoint(one, is_ipv4, rules) {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(why) => problems.push(format!("endpoint {}: {why}", address.escape_debug())),
        }
    }
    let mut known = Vec::new();
    for port in ports.unwrap_or_default() {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some(_) => continue,
        };
        // Without a number it stands for all ports, which is nothing to dial.
        let Some(number) = port.port else { continue };
        match u16::try_from(number).ok().and_then(NonZeroU16::new) {
            Some(number) => known.push((port.name.unwrap_or_default(), protocol, number)),
            None => problems.push(format!("port {number} is not from 1 to 65535")),
        }
    }
    Ok(Slice { ports: known, endpoints, problems })
}

fn endpoint(one: Value, is_ipv4: bool, rules: &Rules) -> Result<Endpoint, String> {
    let Listed { addresses, conditions, hints, node_name, target_ref, zone, .. } =
        serde_json::from_value(one).map_err(|error| error.to_string())?;
    // Others are the same endpoint's, and kube-proxy does not look at them either.
    let address = addresses.first().and_then(|text| text.parse::<IpAddr>().ok());
    let address = address.filter(|address| address.is_ipv4() == is_ipv4);
    let address = address.ok_or("it has no address of the slice's type")?;
    rules.backend(address)?;
    let zone = zone.filter(|zone| !zone.is_empty());
    zone.iter().try_for_each(|zone| rules::dns_name("zone", zone))?;
    let pod = target_ref.and_then(|target| target.name).map(|pod| if is_ipv4 { pod } else { pod + "/ipv6" });
    let id = pod.unwrap_or_else(|| address.to_string());
    rules::instance_id(&id)?;
    let conditions = conditions.unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    let state = match (ready, conditions.terminating.unwrap_or(false)) {
        (true, _) => State::Ready,
        (false, true) if serving => State::Serving,
        (false, true) => State::Ending,
        (false, false) => State::Unready,
    };
    let hints = hints.unwrap_or_default();
    let for_nodes = hints.for_nodes.unwrap_or_default().into_iter().map(|node| node.name).collect();
    let for_zones = hints.for_zones.unwrap_or_default().into_iter().map(|zone| zone.name).collect();
    let address = address.to_canonical();
    Ok(Endpoint { id, address, state, node: node_name, zone, for_nodes, for_zones })
}

/// All endpoints of a port: those that get no connections, at weight zero, keep those that they have.
fn instances(port: &Port, local: bool, slices: &[&Slice], place: &Place) -> Vec<Instance> {
    let mut all: BTreeMap<(IpAddr, NonZeroU16), &Endpoint> = BTreeMap::new();
    for slice in slices {
        let of_port = |(name, protocol, _): &&(String, Protocol, NonZeroU16)| {
            *name == port.name && *protocol == port.service.id.protocol
        };
        for (_, _, number) in slice.ports.iter().filter(of_port) {
            for endpoint in &slice.endpoints {
                // On its way from one slice to another it is in both.
                let known = all.entry((endpoint.address, *number)).or_insert(endpoint);
                if known.state < endpoint.state {
                    *known = endpoint;
                }
            }
        }
    }
    let mut ids = BTreeSet::new();
    let (v4, v6): (Vec<_>, Vec<_>) = all.into_iter().partition(|((address, _), _)| address.is_ipv4());
    let chosen = [v4, v6].map(|family| {
        let endpoints: Vec<_> = family.iter().map(|(_, endpoint)| *endpoint).collect();
        let is_meant = meant(&endpoints, local, place);
        family.into_iter().map(move |(at, endpoint)| (at, endpoint, is_meant(endpoint)))
    });
    chosen
        .into_iter()
        .flatten()
        .map(|((address, port), Endpoint { id, state, zone, .. }, is_meant)| {
            let serves = matches!(state, State::Ready | State::Serving);
            let id = if ids.insert(id) { id.clone() } else { format!("{address}:{port}") };
            Instance {
                id,
                address,
                port,
                weight: if serves && is_meant { WEIGHT } else { 0 },
                zone: zone.clone(),
                health: match state {
                    State::Ready => Health::Healthy,
                    State::Unready => Health::Unhealthy,
                    State::Serving | State::Ending => Health::Draining,
                },
            }
        })
        .collect()
}

/// Which endpoints are for this node: kube-proxy's rules.
fn meant<'a>(all: &[&Endpoint], local: bool, place: &'a Place) -> impl Fn(&Endpoint) -> bool + use<'a> {
    let ready = || all.iter().filter(|endpoint| endpoint.state == State::Ready);
    let here = |names: &[String], here: Option<&str>| names.iter().any(|name| Some(&**name) == here);
    let for_node = move |endpoint: &Endpoint| here(&endpoint.for_nodes, Some(&place.node));
    let for_zone = move |endpoint: &Endpoint| here(&endpoint.for_zones, place.zone.as_deref());
    // Hints are followed where all have them, and some are for here.
    let by_node = ready().all(|one| !one.for_nodes.is_empty()) && ready().any(|one| for_node(one));
    let by_zone = ready().all(|one| !one.for_zones.is_empty()) && ready().any(|one| for_zone(one));
    move |endpoint| {
        if local {
            endpoint.node.as_ref() == Some(&place.node)
        } else if endpoint.state != State::Ready {
            true
        } else if by_node {
            for_node(endpoint)
        } else {
            !by_zone || for_zone(endpoint)
        }
    }
}
