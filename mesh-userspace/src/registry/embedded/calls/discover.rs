//! Discovery: by names, with filters.

use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{
    error::{Error, Result},
    records::{Attributes, Instance, Namespace, Service, Status},
    state::State,
};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Discover {
    #[serde(flatten)]
    of: Names,
    max_results: Option<usize>,
    #[serde(default)]
    query_parameters: Attributes,
    #[serde(default)]
    optional_parameters: Attributes,
    #[serde(default)]
    health_status: Filter,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Names {
    namespace_name: String,
    service_name: String,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Filter {
    Healthy,
    Unhealthy,
    All,
    /// The default, says Cloud Map: all where none is healthy.
    #[default]
    HealthyOrElseAll,
}

fn fits(instance: &Instance, parameters: &Attributes) -> bool {
    parameters.iter().all(|(key, value)| instance.attributes.get(key) == Some(value))
}

impl State {
    fn named(&self, names: &Names) -> Result<(&Namespace, &Service)> {
        let name = &names.namespace_name;
        let namespace = self.namespace_named(name).ok_or_else(|| Error::no_namespace(name))?;
        let service = self.service_named(&namespace.id, &names.service_name);
        Ok((namespace, service.ok_or_else(|| Error::no_service(&names.service_name))?))
    }

    pub(super) fn discover(&self, input: &Discover) -> Result<Value> {
        let (namespace, service) = self.named(&input.of)?;
        let most = input.max_results.unwrap_or(100);
        if !(1..=1000).contains(&most) {
            return Err(Error::invalid(format!("MaxResults {most} is not from 1 to 1000")));
        }
        let asked = self.instances(&service.id).values();
        let mut found: Vec<_> = asked.filter(|one| fits(one, &input.query_parameters)).collect();
        // These narrow the choice only where something is left of it.
        if found.iter().any(|one| fits(one, &input.optional_parameters)) {
            found.retain(|one| fits(one, &input.optional_parameters));
        }
        let healthy = |one: &Instance| one.status != Status::Unhealthy;
        match input.health_status {
            Filter::All => {}
            Filter::Healthy => found.retain(|one| healthy(one)),
            Filter::Unhealthy => found.retain(|one| !healthy(one)),
            Filter::HealthyOrElseAll if found.iter().any(|one| healthy(one)) => {
                found.retain(|one| healthy(one));
            }
            Filter::HealthyOrElseAll => {}
        }
        let instances = found.into_iter().take(most).map(|one| {
            json!({
                "InstanceId": one.id, "NamespaceName": namespace.name, "ServiceName": service.name,
                "HealthStatus": one.status, "Attributes": one.attributes,
            })
        });
        Ok(json!({ "Instances": instances.collect::<Vec<_>>(), "InstancesRevision": service.revision }))
    }

    pub(super) fn discover_revision(&self, names: &Names) -> Result<Value> {
        Ok(json!({ "InstancesRevision": self.named(names)?.1.revision }))
    }
}
