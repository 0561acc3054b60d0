//! What foreign bytes may come to, whichever registry they are of.

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use super::{
    Rules, Services, Snapshot,
    file::format::{self, Records, ToRecords},
    kept, remote,
    rules::{self, for_tests},
    services as by_id,
};
use crate::model::{Instance, Service};

const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// A services file.
pub(crate) fn toml(bytes: &[u8]) {
    file("services.toml", bytes);
}

pub(crate) fn yaml(bytes: &[u8]) {
    file("services.yaml", bytes);
}

pub(crate) fn json(bytes: &[u8]) {
    file("services.json", bytes);
}

fn file(name: &str, bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match format::parse(Path::new(name), text, &for_tests()) {
        Ok(None) => {}
        Ok(Some(parsed)) => {
            let count = parsed.len();
            let services = by_id(parsed.into_iter().map(Arc::new));
            assert_eq!(services.len(), count, "a service is there twice");
            self::services(&services);
        }
        Err(error) => {
            // YAML ends lines with either.
            let lines = bytes.iter().filter(|byte| b"\r\n".contains(*byte)).count() as u64 + 1;
            assert!(error.line.is_none_or(|line| (1..=lines).contains(&line)), "{error}");
            problems(&[error.to_string()]);
        }
    }
}

/// What an earlier run left in the state folder.
pub(crate) fn kept(bytes: &[u8]) {
    match kept::parse(bytes, "file", "/etc/mesh/services.d", &for_tests()) {
        Ok((services, refused)) => {
            self::services(&by_id(services.into_iter().map(Arc::new)));
            problems(&refused);
        }
        Err(why) => problems(&[why]),
    }
}

/// What a registry says.
pub(super) fn said(said: &remote::Said) {
    services(&said.services);
    problems(&said.problems);
}

/// Each follows the rules, none has what another one has, and what is kept of them is all of them.
pub(super) fn services(services: &Services) {
    let rules = for_tests();
    for (id, service) in services {
        assert_eq!(*id, service.id);
        self::service(service, &rules);
    }
    let snapshot = Snapshot::complete(services.clone());
    let text = serde_json::to_vec(&ToRecords(&snapshot)).expect("they are JSON");
    let records: Records = serde_json::from_slice(&text).expect("they are records");
    let (kept, refused) = format::check(records, &rules);
    assert_eq!(refused, [""; 0]);
    assert_eq!(by_id(kept.into_iter().map(Arc::new)), *services);
}

pub(super) fn service(service: &Service, rules: &Rules) {
    let Service { id, vip, port_name, aliases, affinity, drain, eject, slow_start, panic_percent, .. } =
        service;
    let names = [&id.name, &id.namespace].into_iter().chain(aliases);
    names.for_each(|name| assert_eq!(rules::dns_name("name", name), Ok(())));
    if let Some(name) = port_name {
        assert_eq!(rules::port_name(name), Ok(()));
    }
    if let Some(vip) = vip {
        assert_eq!(rules.vip(*vip), Ok(()));
    }
    let times = [Some(*drain), *affinity, *slow_start, Some(eject.base), Some(eject.max)];
    assert!(times.into_iter().flatten().all(|time| time <= LONGEST), "{service:?}");
    assert!(*panic_percent <= 100 && eject.max_percent <= 100, "{service:?}");
    instances(&service.instances, rules);
}

pub(super) fn instances(instances: &[Instance], rules: &Rules) {
    let (mut ids, mut places) = (HashSet::new(), HashSet::new());
    for Instance { id, address, port, zone, .. } in instances {
        assert_eq!(rules::instance_id(id), Ok(()));
        assert_eq!(rules.backend(*address), Ok(()));
        assert_eq!(address.to_canonical(), *address);
        if let Some(zone) = zone {
            assert_eq!(rules::dns_name("zone", zone), Ok(()));
        }
        assert!(ids.insert(id), "{id} is there twice");
        assert!(places.insert((address, port)), "{address} port {port} is there twice");
    }
}

/// They are shown to people, a line each.
pub(super) fn problems(problems: &[String]) {
    for problem in problems {
        assert!(!problem.contains(char::is_control), "{problem:?}");
    }
}
