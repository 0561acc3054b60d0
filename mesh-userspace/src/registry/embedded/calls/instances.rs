//! Instances and their health.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    super::{
        error::{Error, Result},
        records::{Attributes, Instance, RecordType, Service, Status},
        state::State,
        translate,
    },
    ByServiceId, check_attributes,
    pages::Page,
};
use crate::registry::Rules;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Register {
    service_id: String,
    instance_id: String,
    creator_request_id: Option<String>,
    attributes: Attributes,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ByInstance {
    service_id: String,
    instance_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct List {
    #[serde(flatten)]
    service: ByServiceId,
    #[serde(flatten)]
    page: Page,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct SetHealth {
    service_id: String,
    instance_id: String,
    status: Status,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ListHealth {
    service_id: String,
    #[serde(default)]
    instances: Vec<String>,
    #[serde(flatten)]
    page: Page,
}

/// What a service's DNS records need of its instances, by Cloud Map's rules.
fn check_records(service: &Service, attributes: &Attributes) -> Result<()> {
    let has = |key: &str| attributes.contains_key(key);
    let records = service.dns.iter().flat_map(|dns| &dns.dns_records).map(|record| record.kind);
    if has("AWS_ALIAS_DNS_NAME") || has("AWS_EC2_INSTANCE_ID") {
        return Ok(());
    }
    for record in records {
        let missing = match record {
            RecordType::A if !has("AWS_INSTANCE_IPV4") => "AWS_INSTANCE_IPV4",
            RecordType::Aaaa if !has("AWS_INSTANCE_IPV6") => "AWS_INSTANCE_IPV6",
            RecordType::Cname if !has("AWS_INSTANCE_CNAME") => "AWS_INSTANCE_CNAME",
            RecordType::Srv if !has("AWS_INSTANCE_PORT") => "AWS_INSTANCE_PORT",
            _ => continue,
        };
        return Err(Error::invalid(format!(
            "service {} has {record:?} records: attribute {missing} is missing",
            service.name
        )));
    }
    Ok(())
}

impl State {
    pub(super) fn register_instance(&mut self, input: Register, rules: &Rules) -> Result<Value> {
        let service = self.service(&input.service_id)?.clone();
        let Register { instance_id: id, creator_request_id: creator, attributes, .. } = input;
        crate::registry::rules::instance_id(&id).map_err(Error::invalid)?;
        if id.len() > 64 {
            return Err(Error::invalid(format!("instance {id:?}: an id has at most 64 characters")));
        }
        let named = |why: String| Error::invalid(format!("instance {id} of {}: {why}", service.name));
        check_attributes(&attributes)?;
        if attributes.keys().filter(|key| !key.starts_with("AWS_")).count() > 30 {
            return Err(named("more than 30 attributes".into()));
        }
        check_records(&service, &attributes)?;
        let endpoint = translate::endpoint(&id, &attributes, rules).map_err(named)?;
        translate::lease(&attributes).map_err(named)?;
        let known = self.instances(&service.id).get(&id);
        let init = match attributes.get("AWS_INIT_HEALTH_STATUS").map(String::as_str) {
            None | Some("HEALTHY") => Status::Healthy,
            Some("UNHEALTHY") => Status::Unhealthy,
            Some(other) => {
                return Err(named(format!(
                    "AWS_INIT_HEALTH_STATUS {other:?} is neither HEALTHY nor UNHEALTHY"
                )));
            }
        };
        if let Some(known) = known.filter(|known| known.attributes == attributes) {
            // Said again: nothing changes, and nothing has to be written.
            return Ok(json!({ "OperationId": known.operation }));
        }
        let status = match (&service.custom_check, known) {
            (None, _) => Status::Unknown,
            (Some(_), Some(known)) if known.status != Status::Unknown => known.status,
            (Some(_), _) => init,
        };
        let targets = [("SERVICE", service.id.as_str()), ("INSTANCE", &id)];
        let operation = self.done("REGISTER_INSTANCE", &targets);
        let port = endpoint.and_then(|endpoint| endpoint.port).or(service.port);
        let instance = Instance { id: id.clone(), attributes, creator, status, operation: operation.clone() };
        self.put_instance(Service { port, ..service }, &id, Some(instance));
        Ok(json!({ "OperationId": operation }))
    }

    pub(super) fn deregister_instance(&mut self, input: &ByInstance) -> Result<Value> {
        let (service, instance) = self.instance(&input.service_id, &input.instance_id)?;
        let (service, id) = (service.clone(), instance.id.clone());
        let operation = self.done("DEREGISTER_INSTANCE", &[("SERVICE", &service.id), ("INSTANCE", &id)]);
        self.put_instance(service, &id, None);
        Ok(json!({ "OperationId": operation }))
    }

    pub(super) fn get_instance(&self, input: &ByInstance) -> Result<Value> {
        let (_, instance) = self.instance(&input.service_id, &input.instance_id)?;
        let mut json = instance.json();
        if let Some(creator) = &instance.creator {
            json["CreatorRequestId"] = creator.as_str().into();
        }
        Ok(json!({ "ResourceOwner": Self::owner(), "Instance": json }))
    }

    pub(super) fn list_instances(&self, input: &List) -> Result<Value> {
        let service = self.service(&input.service.service_id)?;
        let all = self.instances(&service.id).iter();
        let mut page = input.page.of("Instances", all, |_, _| None, Instance::json)?;
        page["ResourceOwner"] = Self::owner().into();
        Ok(page)
    }

    pub(super) fn update_health(&mut self, input: &SetHealth) -> Result<Value> {
        let (service, instance) = self.instance(&input.service_id, &input.instance_id)?;
        if service.custom_check.is_none() {
            let message = format!("service {} ({}) has no HealthCheckCustomConfig", service.name, service.id);
            return Err(Error::new("CustomHealthNotFound", message));
        }
        if input.status == Status::Unknown {
            return Err(Error::invalid("Status is neither HEALTHY nor UNHEALTHY"));
        }
        if instance.status != input.status {
            let instance = Instance { status: input.status, ..instance.clone() };
            self.put_instance(service.clone(), &input.instance_id, Some(instance));
        }
        Ok(json!({}))
    }

    pub(super) fn get_health(&self, input: &ListHealth) -> Result<Value> {
        let service = self.service(&input.service_id)?;
        let instances = self.instances(&service.id);
        if let Some(missing) = input.instances.iter().find(|id| !instances.contains_key(*id)) {
            return Err(Error::no_instance(service, missing));
        }
        let asked =
            instances.iter().filter(|(id, _)| input.instances.is_empty() || input.instances.contains(id));
        let pair = |instance: &Instance| json!([instance.id, instance.status]);
        let mut page = input.page.of("Status", asked, |_, _| None, pair)?;
        let pairs = page["Status"].take();
        let status: Map<_, _> = pairs
            .as_array()
            .into_iter()
            .flatten()
            .map(|pair| (pair[0].as_str().unwrap_or_default().to_owned(), pair[1].clone()))
            .collect();
        page["Status"] = status.into();
        Ok(page)
    }
}
