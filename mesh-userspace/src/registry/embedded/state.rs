//! Everything the registry holds, and what of it is not on disk yet.

use std::collections::BTreeMap;

use serde::{Serialize, de::DeserializeOwned};

use super::{
    error::{Error, Result},
    records::{Attributes, Instance, Namespace, Operation, Service},
};

/// Operations that can still be asked about; they are done when they are answered.
const OPERATIONS: usize = 1000;

/// The key under which the counter of ids is stored.
const NEXT: &str = "next";

/// A record's key and its new content, `None` if it is gone.
pub type Change = (String, Option<Vec<u8>>);

/// Changed by calls, each of which is refused before it has changed anything.
#[derive(Debug, Default)]
pub struct State {
    /// Ids are counted, and never used again.
    next: u64,
    pub namespaces: BTreeMap<String, Namespace>,
    pub services: BTreeMap<String, Service>,
    /// Service id → instance id → instance.
    instances: BTreeMap<String, BTreeMap<String, Instance>>,
    pub operations: BTreeMap<String, Operation>,
    changes: Vec<Change>,
}

impl State {
    /// Takes a record as it was stored.
    pub fn load(&mut self, key: &str, value: &[u8]) -> std::result::Result<(), String> {
        fn parse<T: DeserializeOwned>(key: &str, value: &[u8]) -> std::result::Result<T, String> {
            serde_json::from_slice(value).map_err(|error| format!("record {key:?}: {error}"))
        }
        match key.split_once(['-', '/']) {
            _ if key == NEXT => self.next = parse(key, value)?,
            Some(("ns", _)) => drop(self.namespaces.insert(key.into(), parse(key, value)?)),
            Some(("op", _)) => drop(self.operations.insert(key.into(), parse(key, value)?)),
            Some(("srv", _)) => match key.split_once('/') {
                None => drop(self.services.insert(key.into(), parse(key, value)?)),
                Some((service, id)) => {
                    self.instances.entry(service.into()).or_default().insert(id.into(), parse(key, value)?);
                }
            },
            _ => return Err(format!("record {key:?} is of no known kind")),
        }
        Ok(())
    }

    /// What changed since this was last asked.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    fn changed(&mut self, key: String, record: &impl Serialize) {
        let record = serde_json::to_vec(record).expect("records have keys that are strings");
        self.changes.push((key, Some(record)));
    }

    pub fn new_id(&mut self, prefix: &str) -> String {
        self.next += 1;
        let next = self.next;
        self.changed(NEXT.into(), &next);
        format!("{prefix}-{next:016x}")
    }

    pub fn namespace(&self, id: &str) -> Result<&Namespace> {
        self.namespaces.get(last_part(id)).ok_or_else(|| Error::no_namespace(id))
    }

    pub fn namespace_named(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.values().find(|namespace| namespace.name.eq_ignore_ascii_case(name))
    }

    pub fn service(&self, id: &str) -> Result<&Service> {
        self.services.get(last_part(id)).ok_or_else(|| Error::no_service(id))
    }

    pub fn services_of<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Service> {
        self.services.values().filter(move |service| service.namespace == namespace)
    }

    pub fn service_named(&self, namespace: &str, name: &str) -> Option<&Service> {
        let named = |service: &&Service| service.name.eq_ignore_ascii_case(name);
        self.services.values().find(|service| service.namespace == namespace && named(service))
    }

    pub fn instances(&self, service: &str) -> &BTreeMap<String, Instance> {
        static NONE: BTreeMap<String, Instance> = BTreeMap::new();
        self.instances.get(service).unwrap_or(&NONE)
    }

    pub fn all_instances(&self) -> impl Iterator<Item = (&str, &Instance)> {
        self.instances.iter().flat_map(|(service, all)| all.values().map(move |one| (service.as_str(), one)))
    }

    pub fn instance(&self, service: &str, id: &str) -> Result<(&Service, &Instance)> {
        let service = self.service(service)?;
        let instance = self.instances(&service.id).get(id);
        Ok((service, instance.ok_or_else(|| Error::no_instance(service, id))?))
    }

    pub fn put_namespace(&mut self, namespace: Namespace) {
        self.changed(namespace.id.clone(), &namespace);
        self.namespaces.insert(namespace.id.clone(), namespace);
    }

    pub fn put_service(&mut self, service: Service) {
        self.changed(service.id.clone(), &service);
        self.services.insert(service.id.clone(), service);
    }

    pub fn remove_namespace(&mut self, id: &str) {
        self.namespaces.remove(id);
        self.changes.push((id.into(), None));
    }

    pub fn remove_service(&mut self, id: &str) {
        self.services.remove(id);
        self.instances.remove(id);
        self.changes.push((id.into(), None));
    }

    /// Puts an instance in its place, or takes it out of there; `service` is the new form of its service.
    pub fn put_instance(&mut self, mut service: Service, id: &str, instance: Option<Instance>) {
        service.revision += 1;
        let key = format!("{}/{id}", service.id);
        let instances = self.instances.entry(service.id.clone()).or_default();
        match instance {
            Some(instance) => {
                instances.insert(id.into(), instance.clone());
                self.changed(key, &instance);
            }
            None => {
                instances.remove(id);
                self.changes.push((key, None));
            }
        }
        self.put_service(service);
    }

    /// Notes an operation as done; its id.
    pub fn done(&mut self, kind: &str, targets: &[(&str, &str)]) -> String {
        let id = self.new_id("op");
        let targets: Attributes = targets.iter().map(|(kind, id)| ((*kind).into(), (*id).into())).collect();
        let operation = Operation { id: id.clone(), kind: kind.into(), created: super::seconds(), targets };
        self.changed(id.clone(), &operation);
        self.operations.insert(id.clone(), operation);
        while self.operations.len() > OPERATIONS {
            let (oldest, _) = self.operations.pop_first().expect("there are some");
            self.changes.push((oldest, None));
        }
        id
    }
}

/// An id, also of an ARN.
fn last_part(id: &str) -> &str {
    if id.starts_with("arn:") { id.rsplit('/').next().unwrap_or(id) } else { id }
}
