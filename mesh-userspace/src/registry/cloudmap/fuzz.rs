//! What Cloud Map says of services and their instances.

use super::*;
use crate::registry::{fuzz, rules::for_tests, services as by_id};

/// On each line what is read of one service: `{"name", "attributes": {}, "instances": [{"id", "health",
/// "attributes": {}}]}`. AWS's SDK reads the wire.
pub(crate) fn services(bytes: &[u8]) {
    #[derive(Deserialize)]
    struct Line {
        name: Option<String>,
        attributes: Option<Attributes>,
        #[serde(default)]
        instances: Vec<Told>,
    }
    #[derive(Deserialize)]
    struct Told {
        id: String,
        #[serde(default)]
        health: String,
        #[serde(default)]
        attributes: Attributes,
    }
    let namespace = NamespaceSummary::builder().id("ns-1").name("service.local").r#type(NamespaceType::Http);
    let service = ServiceSummary::builder().id("srv-1").name("echo").r#type(ServiceType::Http);
    let namespace = as_namespace(&namespace.build()).expect("it has all");
    let service = as_service(&service.build(), "ns-1").expect("it has all");
    let mut known = Known::new(namespace, service);
    for line in bytes.split(|byte| *byte == b'\n') {
        let Ok(Line { name, attributes, instances }) = serde_json::from_slice(line) else { continue };
        known.service.name = name.unwrap_or(known.service.name);
        let instances = instances.into_iter().map(|Told { id, health, attributes }| {
            let instance =
                HttpInstanceSummary::builder().instance_id(id).health_status(health.as_str().into());
            attributes.into_iter().fold(instance, |all, (key, value)| all.attributes(key, value)).build()
        });
        known.take(Read { instances: instances.collect(), revision: None, attributes }, &for_tests());
        fuzz::services(&by_id(known.translated.clone()));
        fuzz::problems(&known.problems);
    }
}
