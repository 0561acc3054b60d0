//! What the keys in etcd say: `PREFIX/services/NAMESPACE/NAME` and `PREFIX/instances/NAMESPACE/NAME/ID`,
//! with the fields of a services file in JSON.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde_json::{Map, Value};

use crate::{
    model::{Instance, Service},
    registry::{
        file::format,
        remote::{Ledger, Said},
        rules::{self, Rules},
    },
};

/// The largest value that is read, in bytes.
const MAX_VALUE: usize = 64 << 10;

/// Namespace and name.
type Name = (String, String);

/// Every record, by its key.
pub(super) struct Mirror {
    /// What every key begins with.
    prefix: String,
    rules: Rules,
    services: BTreeMap<Name, Record<Service>>,
    instances: BTreeMap<Name, BTreeMap<String, Record<Instance>>>,
    /// Keys that name nothing, and why.
    strays: BTreeMap<Vec<u8>, (String, u64)>,
    /// Counts the times that everything was listed.
    listing: u64,
    /// Names of which something has changed since it was last read.
    changed: BTreeSet<Name>,
    ledger: Ledger<Name, i64>,
}

struct Record<T> {
    /// What it said when it last fulfilled the rules.
    good: Option<T>,
    /// What is wrong with what it says now.
    why: Option<String>,
    /// The revision that made it: who came first keeps what both want.
    created: i64,
    /// The listing that has it.
    listing: u64,
}

impl<T: PartialEq> Record<T> {
    fn take(known: Option<Self>, said: Result<T, String>, created: i64, listing: u64) -> Self {
        match said {
            Ok(good) => Self { good: Some(good), why: None, created, listing },
            // What works stays until there is something better.
            Err(why) => Self { good: known.and_then(|known| known.good), why: Some(why), created, listing },
        }
    }
}

/// What a key is about.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Service(Name),
    Instance(Name, String),
}

impl Mirror {
    pub(super) fn new(prefix: &str, rules: Rules) -> Self {
        Self {
            prefix: format!("{prefix}/"),
            rules,
            services: BTreeMap::new(),
            instances: BTreeMap::new(),
            strays: BTreeMap::new(),
            listing: 0,
            changed: BTreeSet::new(),
            ledger: Ledger::default(),
        }
    }

    /// From now on everything is put again.
    pub(super) fn begin(&mut self) {
        self.listing += 1;
    }

    /// Everything was put that there is.
    pub(super) fn listed(&mut self) {
        self.changed.extend(self.services.keys().chain(self.instances.keys()).cloned());
        let listing = self.listing;
        self.services.retain(|_, record| record.listing == listing);
        self.strays.retain(|_, (_, stray)| *stray == listing);
        self.instances.retain(|_, instances| {
            instances.retain(|_, record| record.listing == listing);
            !instances.is_empty()
        });
    }

    pub(super) fn put(&mut self, key: &[u8], value: &[u8], created: i64) {
        match self.key(key) {
            None => {}
            Some(Err(why)) => drop(self.strays.insert(key.into(), (why, self.listing))),
            Some(Ok(Key::Service(name))) => {
                self.changed.insert(name.clone());
                let said = service(&name, value, &self.rules);
                let record = Record::take(self.services.remove(&name), said, created, self.listing);
                self.services.insert(name, record);
            }
            Some(Ok(Key::Instance(name, id))) => {
                self.changed.insert(name.clone());
                let said = instance(&id, value, &self.rules);
                let instances = self.instances.entry(name).or_default();
                let record = Record::take(instances.remove(&id), said, created, self.listing);
                instances.insert(id, record);
            }
        }
    }

    pub(super) fn delete(&mut self, key: &[u8]) {
        match self.key(key) {
            None => {}
            Some(Err(_)) => drop(self.strays.remove(key)),
            Some(Ok(Key::Service(name))) => {
                self.changed.insert(name.clone());
                self.services.remove(&name);
            }
            Some(Ok(Key::Instance(name, id))) => {
                self.changed.insert(name.clone());
                let Some(instances) = self.instances.get_mut(&name) else { return };
                instances.remove(&id);
                if instances.is_empty() {
                    self.instances.remove(&name);
                }
            }
        }
    }

    /// `None` for a key that is about something else.
    fn key(&self, key: &[u8]) -> Option<Result<Key, String>> {
        let key = key.strip_prefix(self.prefix.as_bytes())?;
        if !(key.starts_with(b"services/") || key.starts_with(b"instances/")) {
            return None;
        }
        Some(parse_key(key))
    }

    /// What is known now. Only names of which something has changed are made anew.
    pub(super) fn read(&mut self) -> Said {
        for name in std::mem::take(&mut self.changed) {
            let mut problems = Vec::new();
            let service = self.service(&name, &mut problems);
            match self.services.get(&name).map(|record| record.created) {
                None if problems.is_empty() => self.ledger.remove(&name),
                created => {
                    let services = service.into_iter().collect();
                    self.ledger.put(name, created.unwrap_or_default(), services, problems);
                }
            }
        }
        let mut said = self.ledger.read();
        said.problems.extend(self.strays.iter().map(|(key, (why, _))| format!("{}: {why}", shown(key))));
        said
    }

    /// The service of a name, and what is wrong with its records.
    fn service(&self, name: &Name, problems: &mut Vec<String>) -> Option<Service> {
        let (namespace, service) = name;
        let label = format!("{}services/{namespace}/{service}", self.prefix);
        let Some(record) = self.services.get(name) else {
            if self.instances.contains_key(name) {
                let why = "there are instances, and no such key that says their service's port";
                problems.push(format!("{label}: {why}"));
            }
            return None;
        };
        problems.extend(record.why.iter().map(|why| format!("{label}: {why}")));
        let instances = self.instances_of(name, problems);
        Some(Service { instances, ..record.good.clone()? })
    }

    fn instances_of(&self, name: &Name, problems: &mut Vec<String>) -> Vec<Instance> {
        let mut places = HashSet::new();
        let mut instances = Vec::new();
        for (id, record) in self.instances.get(name).into_iter().flatten() {
            let mut problem = |why: &str| {
                problems.push(format!("{}instances/{}/{}/{id}: {why}", self.prefix, name.0, name.1));
            };
            if let Some(why) = &record.why {
                problem(why);
            }
            let Some(instance) = &record.good else { continue };
            if places.insert((instance.address, instance.port)) {
                instances.push(instance.clone());
            } else {
                problem(&format!("{} port {} is used twice", instance.address, instance.port));
            }
        }
        if instances.iter().all(|instance| instance.weight == 0) {
            instances.clear();
        }
        instances
    }
}

/// A key without the prefix.
fn parse_key(key: &[u8]) -> Result<Key, String> {
    let text = std::str::from_utf8(key).map_err(|_| "the key is not text")?;
    let parts: Vec<_> = text.splitn(4, '/').collect();
    let name = |namespace: &str, name: &str| {
        rules::dns_name("namespace", namespace)?;
        rules::dns_name("name", name)?;
        Ok::<_, String>((namespace.to_owned(), name.to_owned()))
    };
    match *parts {
        ["services", namespace, service] => Ok(Key::Service(name(namespace, service)?)),
        ["instances", namespace, service, id] => {
            rules::instance_id(id)?;
            Ok(Key::Instance(name(namespace, service)?, id.into()))
        }
        _ => Err("the key is neither services/NAMESPACE/NAME nor instances/NAMESPACE/NAME/ID".into()),
    }
}

/// The record in a value; what its key says may be said again, but not otherwise.
fn record(value: &[u8], key: &[(&str, &str)]) -> Result<Value, String> {
    if value.len() > MAX_VALUE {
        return Err(format!("the value has {} bytes; the limit is {MAX_VALUE}", value.len()));
    }
    let mut record: Map<String, Value> =
        serde_json::from_slice(value).map_err(|error| format!("the value is no JSON object: {error}"))?;
    for (field, text) in key {
        if record.insert((*field).into(), (*text).into()).is_some_and(|said| said != *text) {
            return Err(format!("{field} in the value is not that of the key"));
        }
    }
    Ok(record.into())
}

fn service((namespace, name): &Name, value: &[u8], rules: &Rules) -> Result<Service, String> {
    let record = record(value, &[("namespace", namespace), ("name", name)])?;
    if record.get("instance").is_some() {
        return Err("instances have keys of their own".into());
    }
    format::service(record, rules)
}

fn instance(id: &str, value: &[u8], rules: &Rules) -> Result<Instance, String> {
    format::instance(record(value, &[("id", id)])?, rules)
}

/// Whatever is in a key, on one line.
fn shown(key: &[u8]) -> String {
    key.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const SERVICE: &[u8] = br#"{"port": 80}"#;

    fn mirror() -> Mirror {
        Mirror::new("/mesh", rules::for_tests())
    }

    fn put(mirror: &mut Mirror, key: &str, value: &str) {
        mirror.put(key.as_bytes(), value.as_bytes(), 1);
    }

    /// With a service `echo` and one good instance `a`.
    fn echo() -> Mirror {
        let mut mirror = mirror();
        put(&mut mirror, "/mesh/services/service.local/echo", r#"{"port": 80, "policy": "random"}"#);
        put(&mut mirror, "/mesh/instances/service.local/echo/a", r#"{"address": "10.0.0.1", "port": 8080}"#);
        mirror
    }

    fn ids(said: &Said) -> Vec<&str> {
        said.services.values().flat_map(|service| &service.instances).map(|one| &*one.id).collect()
    }

    fn first(said: &Said) -> &Service {
        said.services.values().next().unwrap()
    }

    #[test]
    fn records_come_and_go_with_their_keys() {
        let mut mirror = echo();
        let said = mirror.read();
        assert_eq!(said.problems, [""; 0]);
        assert_eq!(first(&said).id.to_string(), "echo.service.local:80/tcp");
        assert_eq!(ids(&said), ["a"]);
        mirror.delete(b"/mesh/instances/service.local/echo/a");
        mirror.delete(b"/mesh/instances/service.local/echo/a");
        assert_eq!((ids(&mirror.read()).len(), mirror.read().services.len()), (0, 1));
        mirror.delete(b"/mesh/services/service.local/echo");
        assert!(mirror.read().services.is_empty());
    }

    #[test]
    fn a_listing_leaves_out_what_is_gone() {
        let mut mirror = echo();
        put(&mut mirror, "/mesh/services/x", "");
        mirror.begin();
        mirror.put(b"/mesh/services/service.local/echo", SERVICE, 1);
        mirror.listed();
        let said = mirror.read();
        assert_eq!((said.services.len(), ids(&said).len(), said.problems.len()), (1, 0, 0));
    }

    #[test]
    fn a_hostile_or_spoilt_record_is_refused_alone_and_by_name() {
        let instance = "/mesh/instances/service.local/echo/b";
        let service = "/mesh/services/service.local/other";
        for (key, value, why) in [
            (instance, r#"{"address": "127.0.0.1", "port": 80}"#, "loopback"),
            (instance, r#"{"address": "169.254.169.254", "port": 80}"#, "link-local"),
            (instance, r#"{"address": "127.128.0.5", "port": 80}"#, "lies in a VIP range"),
            (instance, r#"{"address": "10.0.0.2", "port": -1}"#, "-1"),
            (instance, r#"{"address": "10.0.0.2", "port": 0}"#, "0"),
            (instance, r#"{"address": "10.0.0.2", "port": 65536}"#, "65536"),
            (instance, r#"{"address": "10.0.0.2", "port": 80, "id": "c"}"#, "id in the value"),
            (instance, r#"{"address": "10.0.0.2", "port": 80, "zone": "ü"}"#, "zone"),
            (instance, r#"{"address": "10.0.0.1", "port": 8080}"#, "10.0.0.1 port 8080 is used twice"),
            (instance, "garbage", "no JSON object"),
            (instance, "", "no JSON object"),
            (instance, "[]", "no JSON object"),
            (service, r#"{"port": 80, "vip": "10.0.0.1"}"#, "outside the configured ranges"),
            (service, r#"{"port": 80, "vip": "8.8.8.8"}"#, "outside the configured ranges"),
            (service, r#"{"port": -80}"#, "-80"),
            (service, r#"{"port": 80, "aliases": ["ü"]}"#, "alias"),
            (service, r#"{"port": 80, "namespace": "other.local"}"#, "namespace in the value"),
            (service, r#"{"port": 80, "instance": []}"#, "keys of their own"),
            (service, r#"{"port": 80, "colour": "red"}"#, "colour"),
            ("/mesh/services/service.local/\u{fc}", r#"{"port": 80}"#, "is not a DNS name"),
            ("/mesh/services/service.local", r#"{"port": 80}"#, "neither services/"),
            ("/mesh/instances/service.local/echo/", "{}", "instance id"),
        ] {
            let mut mirror = echo();
            put(&mut mirror, key, value);
            let said = mirror.read();
            assert_eq!((ids(&said), said.services.len()), (vec!["a"], 1), "{key} {value}");
            let [problem] = &*said.problems else { panic!("{key} {value}: {:?}", said.problems) };
            let label = shown(key.as_bytes());
            assert!(problem.starts_with(&label) && problem.contains(why), "{problem}");
            mirror.delete(key.as_bytes());
            assert_eq!(mirror.read().problems, [""; 0]);
        }
    }

    #[test]
    fn a_record_that_is_spoilt_stays_as_it_was_until_it_is_mended_or_gone() {
        let key = "/mesh/instances/service.local/echo/a";
        let mut mirror = echo();
        put(&mut mirror, key, "garbage");
        assert_eq!((ids(&mirror.read()), mirror.read().problems.len()), (vec!["a"], 1));
        put(&mut mirror, key, r#"{"address": "10.0.0.9", "port": 8080, "weight": 5}"#);
        let said = mirror.read();
        assert_eq!((first(&said).instances[0].weight, said.problems.len()), (5, 0));
        put(&mut mirror, key, "garbage");
        mirror.delete(key.as_bytes());
        assert!(ids(&mirror.read()).is_empty());
    }

    #[test]
    fn who_came_first_keeps_what_both_want() {
        let mut mirror = mirror();
        let vip = br#"{"port": 80, "vip": "127.128.0.1"}"#;
        mirror.put(b"/mesh/services/service.local/z", vip, 5);
        let names = |said: &Said| said.services.keys().map(|id| id.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&mirror.read()), ["z"]);
        mirror.put(b"/mesh/services/service.local/a", vip, 7);
        let said = mirror.read();
        assert_eq!(names(&said), ["z"]);
        let [problem] = &*said.problems else { panic!("{:?}", said.problems) };
        let why = "service a.service.local:80/tcp: vip 127.128.0.1 port 80/tcp is already taken by service z";
        assert!(problem.starts_with(why), "{problem}");
        mirror.delete(b"/mesh/services/service.local/z");
        assert_eq!(names(&mirror.read()), ["a"]);
        assert_eq!(mirror.read().problems, [""; 0]);
    }

    #[test]
    fn what_has_not_changed_is_the_same_service() {
        let mut mirror = echo();
        mirror.put(b"/mesh/services/service.local/other", SERVICE, 2);
        let before = mirror.read().services;
        put(&mut mirror, "/mesh/instances/service.local/echo/b", r#"{"address": "10.0.0.2", "port": 8080}"#);
        let after = mirror.read().services;
        let same: Vec<_> = before.keys().map(|id| Arc::ptr_eq(&before[id], &after[id])).collect();
        assert_eq!(same, [false, true]);
        mirror.begin();
        mirror.put(b"/mesh/services/service.local/other", SERVICE, 2);
        mirror.listed();
        let listed = mirror.read().services;
        assert!(listed.len() == 1 && listed.iter().all(|(id, service)| Arc::ptr_eq(service, &after[id])));
    }

    #[test]
    fn instances_without_a_service_are_named_and_other_keys_are_not_ours() {
        let mut mirror = mirror();
        put(&mut mirror, "/mesh/instances/service.local/echo/a", r#"{"address": "10.0.0.1", "port": 1}"#);
        put(&mut mirror, "/mesh/other/thing", "x");
        put(&mut mirror, "/elsewhere", "x");
        let problems = mirror.read().problems;
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("/mesh/services/service.local/echo: there are instances"));
    }

    proptest! {
        #[test]
        fn no_key_and_no_value_does_harm(
            key in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..40),
                "(services|instances)(/[a-z.é/]{0,9}){0,4}".prop_map(String::into_bytes),
            ],
            value in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..60),
                r#"\{("(port|address|vip|weight|id|name)": ("10\.0\.0\.[0-9]"|-?[0-9]{1,6}|null|\{\}),?){0,4}\}"#
                    .prop_map(String::into_bytes),
            ],
        ) {
            let mut mirror = echo();
            let key = [b"/mesh/", &key[..]].concat();
            mirror.put(&key, &value, 1);
            let said = mirror.read();
            prop_assert!(ids(&said).contains(&"a"));
            prop_assert!(said.problems.iter().all(|problem| !problem.contains('\n')));
            mirror.delete(&key);
            prop_assert_eq!(mirror.read().problems, [""; 0]);
        }
    }
}
