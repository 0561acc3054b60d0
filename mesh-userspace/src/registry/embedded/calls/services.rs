//! Services and their attributes.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    super::{
        error::{Error, Result},
        records::{Attributes, DnsConfig, RecordType, Service, arn},
        seconds,
        state::State,
        translate,
    },
    ById, ByServiceId, Tag, at_most, check_attributes,
    pages::Page,
    tags,
};
use crate::registry::{Rules, rules};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Create {
    name: String,
    namespace_id: Option<String>,
    creator_request_id: Option<String>,
    description: Option<String>,
    dns_config: Option<DnsConfig>,
    health_check_config: Option<Value>,
    health_check_custom_config: Option<Value>,
    tags: Option<Vec<Tag>>,
    r#type: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Update {
    id: String,
    service: Changes,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Changes {
    description: Option<String>,
    dns_config: Option<DnsChange>,
    health_check_config: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DnsChange {
    dns_records: Vec<super::super::records::DnsRecord>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct SetAttributes {
    service_id: String,
    attributes: Attributes,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DeleteAttributes {
    service_id: String,
    attributes: Vec<String>,
}

fn check_dns(dns: &DnsConfig) -> Result<()> {
    let has = |kind| dns.dns_records.iter().any(|record| record.kind == kind);
    if dns.dns_records.is_empty() {
        return Err(Error::invalid("DnsConfig has no DnsRecords"));
    }
    if has(RecordType::Cname) && dns.dns_records.len() > 1 {
        return Err(Error::invalid("DnsConfig: a CNAME record stands alone"));
    }
    Ok(())
}

impl State {
    pub(super) fn create_service(&mut self, input: Create, rules: &Rules) -> Result<Value> {
        rules::dns_name("service", &input.name).map_err(Error::invalid)?;
        at_most("Description", input.description.as_deref().unwrap_or_default(), 1024)?;
        input.dns_config.as_ref().map_or(Ok(()), check_dns)?;
        if input.health_check_config.is_some() && input.health_check_custom_config.is_some() {
            return Err(Error::invalid("HealthCheckConfig and HealthCheckCustomConfig exclude each other"));
        }
        if input.r#type.as_deref().is_some_and(|kind| kind != "HTTP") {
            return Err(Error::invalid("Type can only be HTTP"));
        }
        let of_dns = input.dns_config.as_ref().and_then(|dns| dns.namespace_id.as_deref());
        let namespace = input.namespace_id.as_deref().or(of_dns);
        let namespace = self.namespace(namespace.ok_or_else(|| Error::invalid("NamespaceId is missing"))?)?;
        if let Some(known) = self.service_named(&namespace.id, &input.name) {
            if input.creator_request_id.is_some() && known.creator == input.creator_request_id {
                return Ok(self.service_json(known));
            }
            return Err(Error::service_exists(known));
        }
        let namespace = namespace.id.clone();
        let mut service = Service {
            id: String::new(),
            namespace,
            name: input.name,
            description: input.description,
            http_only: input.r#type.is_some(),
            dns: input.dns_config,
            check: input.health_check_config,
            custom_check: input.health_check_custom_config,
            created: seconds(),
            creator: input.creator_request_id,
            tags: tags(input.tags)?,
            attributes: Attributes::new(),
            revision: 0,
            port: None,
        };
        self.check_settings(&service, rules)?;
        service.id = self.new_id("srv");
        let answer = self.service_json(&service);
        self.put_service(service);
        Ok(answer)
    }

    /// Whether what the service says of itself to us can be followed.
    pub(super) fn check_settings(&self, service: &Service, rules: &Rules) -> Result<()> {
        let namespace = self.namespace(&service.namespace)?;
        let settings = translate::settings(namespace, service, rules).map_err(Error::invalid)?;
        let Some(vip) = settings.vip else { return Ok(()) };
        let others = self.services.values().filter(|other| other.id != service.id);
        for other in others.filter(|other| other.setting("mesh.vip").is_some()) {
            let namespace = self.namespace(&other.namespace)?;
            let Ok(known) = translate::settings(namespace, other, rules) else { continue };
            let port = |service: &Service| translate::port_of(service, self.instances(&service.id));
            if known.vip == Some(vip)
                && known.id.protocol == settings.id.protocol
                && (port(other) == port(service) || port(service).is_none())
            {
                return Err(Error::invalid(format!(
                    "mesh.vip {vip} belongs to service {}.{}",
                    other.name, namespace.name
                )));
            }
        }
        Ok(())
    }

    fn service_json(&self, service: &Service) -> Value {
        json!({ "Service": service.json(self.instances(&service.id).len()) })
    }

    pub(super) fn get_service(&self, input: &ById) -> Result<Value> {
        Ok(self.service_json(self.service(&input.id)?))
    }

    pub(super) fn list_services(&self, page: &Page) -> Result<Value> {
        let field = |service: &&Service, name: &str| match name {
            "NAMESPACE_ID" => Some(service.namespace.clone()),
            "RESOURCE_OWNER" => Some("SELF".into()),
            _ => None,
        };
        let json = |service: &Service| service.json(self.instances(&service.id).len());
        page.of("Services", self.services.iter(), field, json)
    }

    pub(super) fn update_service(&mut self, input: Update) -> Result<Value> {
        let mut service = self.service(&input.id)?.clone();
        let Changes { description, dns_config, health_check_config } = input.service;
        at_most("Description", description.as_deref().unwrap_or_default(), 1024)?;
        service.description = description.or(service.description);
        // What is left out of these two is deleted, says Cloud Map.
        service.check = health_check_config;
        service.dns = dns_config.map(|DnsChange { dns_records }| {
            let old = service.dns.take();
            DnsConfig {
                namespace_id: old.as_ref().and_then(|old| old.namespace_id.clone()),
                routing_policy: old.map(|old| old.routing_policy).unwrap_or_default(),
                dns_records,
            }
        });
        service.dns.as_ref().map_or(Ok(()), check_dns)?;
        let operation = self.done("UPDATE_SERVICE", &[("SERVICE", &service.id)]);
        self.put_service(service);
        Ok(json!({ "OperationId": operation }))
    }

    pub(super) fn delete_service(&mut self, input: &ById) -> Result<Value> {
        let service = self.service(&input.id)?;
        let (id, name) = (service.id.clone(), &service.name);
        let instances = self.instances(&id).len();
        if instances > 0 {
            return Err(Error::in_use(format!("service {name} ({id}) still has {instances} instances")));
        }
        self.remove_service(&id);
        Ok(json!({}))
    }

    pub(super) fn get_service_attributes(&self, input: &ByServiceId) -> Result<Value> {
        let service = self.service(&input.service_id)?;
        Ok(json!({ "ServiceAttributes": {
            "ServiceArn": arn("service", &service.id), "ResourceOwner": Self::owner(),
            "Attributes": service.attributes,
        } }))
    }

    pub(super) fn update_service_attributes(&mut self, input: SetAttributes, rules: &Rules) -> Result<Value> {
        let mut service = self.service(&input.service_id)?.clone();
        service.attributes.extend(input.attributes);
        check_attributes(&service.attributes)?;
        if service.attributes.len() > 30 {
            let message = format!("{} attributes; the limit is 30", service.attributes.len());
            return Err(Error::new("ServiceAttributesLimitExceededException", message));
        }
        self.check_settings(&service, rules)?;
        self.put_service(service);
        Ok(json!({}))
    }

    pub(super) fn delete_service_attributes(
        &mut self,
        input: &DeleteAttributes,
        rules: &Rules,
    ) -> Result<Value> {
        let mut service = self.service(&input.service_id)?.clone();
        service.attributes.retain(|key, _| !input.attributes.contains(key));
        self.check_settings(&service, rules)?;
        self.put_service(service);
        Ok(json!({}))
    }
}
