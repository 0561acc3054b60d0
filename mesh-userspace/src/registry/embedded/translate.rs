//! From Cloud Map's records to services as mesh has them. What Cloud Map has no field for is in
//! attributes whose keys begin with `mesh.`.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    num::NonZeroU16,
    time::Duration,
};

use serde_json::{Map, Value, json};

use super::records::{Attributes, Instance, Namespace, NamespaceType, Service, Status};
use crate::{
    model::{self, Health},
    registry::{
        file::format,
        rules::{self, Rules},
    },
};

/// Settings of a service that are numbers.
const NUMBERS: [&str; 4] = ["port", "panic_percent", "eject.failures", "eject.max_percent"];
/// And those that are texts.
const TEXTS: [&str; 10] = [
    "protocol",
    "answer",
    "port_name",
    "vip",
    "policy",
    "affinity",
    "drain",
    "slow_start",
    "eject.base",
    "eject.max",
];

/// What an instance's attributes say of where it listens.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: Option<u16>,
    weight: u16,
    zone: Option<String>,
}

/// `None` for an instance that has no address, which is none of ours.
pub fn endpoint(id: &str, attributes: &Attributes, rules: &Rules) -> Result<Option<Endpoint>, String> {
    rules::instance_id(id)?;
    let mut addresses = Vec::new();
    for key in ["AWS_INSTANCE_IPV4", "AWS_INSTANCE_IPV6"] {
        if let Some(text) = attributes.get(key) {
            let address = text.parse::<IpAddr>().ok().filter(|it| it.is_ipv4() == key.ends_with('4'));
            let address = address.ok_or_else(|| format!("{key} {text:?} is not such an address"))?;
            rules.backend(address).map_err(|why| format!("{key}: {why}"))?;
            addresses.push(address.to_canonical());
        }
    }
    let number = |key: &str| {
        let Some(text) = attributes.get(key) else { return Ok(None) };
        text.parse::<u16>().map(Some).map_err(|_| format!("{key} {text:?} is not from 0 to 65535"))
    };
    let port = number("AWS_INSTANCE_PORT")?;
    if port == Some(0) {
        return Err("AWS_INSTANCE_PORT is 0".into());
    }
    let weight = number("mesh.weight")?.unwrap_or(100);
    let zone = attributes.get("AVAILABILITY_ZONE").cloned();
    if let Some(zone) = &zone {
        rules::dns_name("AVAILABILITY_ZONE", zone)?;
    }
    Ok(addresses.first().map(|address| Endpoint { address: *address, port, weight, zone }))
}

/// How long an instance stays without being registered again.
pub fn lease(attributes: &Attributes) -> Result<Option<Duration>, String> {
    let Some(text) = attributes.get("mesh.lease") else { return Ok(None) };
    let lease = humantime::parse_duration(text).map_err(|error| format!("mesh.lease {text:?}: {error}"))?;
    if !(Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600)).contains(&lease) {
        return Err(format!("mesh.lease {text:?} is not from 1s to 7days"));
    }
    Ok(Some(lease))
}

/// The service with everything but its instances; with port 1 where nothing says one.
pub fn settings(namespace: &Namespace, service: &Service, rules: &Rules) -> Result<model::Service, String> {
    service_at(namespace, service, service.port.and_then(NonZeroU16::new), rules)
}

/// The port that clients dial, where it is known: what the service says, else what its instances
/// have in common, else what one of them had that is gone.
pub fn port_of(service: &Service, instances: &BTreeMap<String, Instance>) -> Option<NonZeroU16> {
    if let Some(port) = service.setting("mesh.port") {
        return port.parse().ok();
    }
    let mut ports =
        instances.values().filter_map(|one| one.attributes.get("AWS_INSTANCE_PORT")?.parse().ok());
    match ports.next() {
        None => service.port.and_then(NonZeroU16::new),
        Some(first) => ports.all(|port: NonZeroU16| port == first).then_some(first),
    }
}

/// As services files have it, so that the same rules hold, in the same words.
fn service_at(
    namespace: &Namespace,
    service: &Service,
    port: Option<NonZeroU16>,
    rules: &Rules,
) -> Result<model::Service, String> {
    let all = service.tags.iter().chain(&service.attributes);
    let mut record = fields(all.map(|(key, text)| (key.as_str(), text.as_str())))?;
    record.entry("port").or_insert_with(|| port.map_or(1, NonZeroU16::get).into());
    record.insert("name".into(), service.name.as_str().into());
    record.insert("namespace".into(), namespace.name.as_str().into());
    let api_only = namespace.kind == NamespaceType::Http || service.http_only;
    record.insert("api_only".into(), api_only.into());
    format::service(record.into(), rules)
}

/// The fields of a services file that are in texts whose keys begin with `mesh.`.
pub fn fields<'a>(texts: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Map<String, Value>, String> {
    let mut record = Map::new();
    for (key, text) in texts.filter_map(|(key, text)| Some((key.strip_prefix("mesh.")?, text))) {
        let value = match key {
            "aliases" => text.split([',', ' ']).filter(|alias| !alias.is_empty()).collect(),
            _ if NUMBERS.contains(&key) => {
                let number = text.parse::<u64>();
                number.map_err(|_| format!("mesh.{key} {text:?} is not a number"))?.into()
            }
            _ if TEXTS.contains(&key) => Value::from(text),
            _ => return Err(format!("mesh.{} is not known to this version", rules::shown(&key))),
        };
        match key.split_once('.') {
            None => drop(record.insert(key.into(), value)),
            Some((table, key)) => record.entry(table).or_insert_with(|| json!({}))[key] = value,
        }
    }
    Ok(record)
}

/// The service as mesh has it, and the instances that are left out, with the reasons. `Ok(None)`
/// where there is no port yet, and so nothing to dial.
pub fn service(
    namespace: &Namespace,
    service: &Service,
    instances: &BTreeMap<String, Instance>,
    rules: &Rules,
) -> Result<(Option<model::Service>, Vec<String>), String> {
    let label = rules::shown(&format!("service {}.{}", service.name, namespace.name));
    let Some(port) = port_of(service, instances) else {
        if instances.is_empty() {
            return Ok((None, Vec::new()));
        }
        return Err(format!("{label}: its instances have no port in common, and mesh.port is not set"));
    };
    let mut translated = service_at(namespace, service, Some(port), rules)?;
    let mut taken = HashSet::new();
    let mut refused = Vec::new();
    for (id, instance) in instances {
        let one = match endpoint(id, &instance.attributes, rules) {
            Ok(Some(one)) => one,
            Ok(None) => continue,
            Err(why) => {
                refused.push(format!("{label}: instance {}: {why}", rules::shown(id)));
                continue;
            }
        };
        let own = one.port.and_then(NonZeroU16::new).unwrap_or(port);
        if !taken.insert((one.address, own)) {
            refused.push(format!("{label}: instance {id}: {} port {own} is used twice", one.address));
            continue;
        }
        let health = match instance.status {
            Status::Unhealthy => Health::Unhealthy,
            Status::Healthy | Status::Unknown => Health::Healthy,
        };
        let Endpoint { address, weight, zone, .. } = one;
        translated.instances.push(model::Instance {
            id: id.clone(),
            address,
            port: own,
            weight,
            zone,
            health,
        });
    }
    if translated.instances.iter().all(|instance| instance.weight == 0) {
        translated.instances.clear();
    }
    Ok((Some(translated), refused))
}
