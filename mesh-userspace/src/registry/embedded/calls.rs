//! The operations of Cloud Map's API, without sockets and without a disk.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    error::{Error, Result},
    records::Attributes,
    state::State,
};
use crate::registry::Rules;

mod discover;
mod instances;
mod namespaces;
mod pages;
mod services;
mod tags;

impl State {
    /// Answers one call. A call that is refused has changed nothing.
    pub fn call(&mut self, operation: &str, input: Value, rules: &Rules) -> Result<Value> {
        match operation {
            "CreateHttpNamespace" => self.create_http_namespace(parse(input)?),
            "CreatePrivateDnsNamespace" => self.create_private_dns_namespace(parse(input)?),
            "GetNamespace" => self.get_namespace(&parse(input)?),
            "ListNamespaces" => self.list_namespaces(&parse(input)?),
            "DeleteNamespace" => self.delete_namespace(&parse(input)?),
            "UpdateHttpNamespace" | "UpdatePrivateDnsNamespace" => self.update_namespace(parse(input)?),
            "CreateService" => self.create_service(parse(input)?, rules),
            "GetService" => self.get_service(&parse(input)?),
            "UpdateService" => self.update_service(parse(input)?),
            "ListServices" => self.list_services(&parse(input)?),
            "DeleteService" => self.delete_service(&parse(input)?),
            "GetServiceAttributes" => self.get_service_attributes(&parse(input)?),
            "UpdateServiceAttributes" => self.update_service_attributes(parse(input)?, rules),
            "DeleteServiceAttributes" => self.delete_service_attributes(&parse(input)?, rules),
            "RegisterInstance" => self.register_instance(parse(input)?, rules),
            "DeregisterInstance" => self.deregister_instance(&parse(input)?),
            "GetInstance" => self.get_instance(&parse(input)?),
            "ListInstances" => self.list_instances(&parse(input)?),
            "UpdateInstanceCustomHealthStatus" => self.update_health(&parse(input)?),
            "GetInstancesHealthStatus" => self.get_health(&parse(input)?),
            "DiscoverInstances" => self.discover(&parse(input)?),
            "DiscoverInstancesRevision" => self.discover_revision(&parse(input)?),
            "GetOperation" => self.get_operation(&parse(input)?),
            "ListOperations" => self.list_operations(&parse(input)?),
            "TagResource" => self.tag_resource(parse(input)?, rules),
            "UntagResource" => self.untag_resource(&parse(input)?, rules),
            "ListTagsForResource" => self.list_tags(&parse(input)?),
            _ => Err(Error::new("UnknownOperationException", format!("there is no operation {operation:?}"))),
        }
    }
}

fn parse<T: DeserializeOwned>(input: Value) -> Result<T> {
    serde_json::from_value(input).map_err(|error| Error::invalid(error.to_string()))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ById {
    id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ByServiceId {
    service_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Tag {
    key: String,
    value: String,
}

/// Tags as they are kept.
fn tags(tags: Option<Vec<Tag>>) -> Result<Attributes> {
    let tags: Attributes = tags.into_iter().flatten().map(|Tag { key, value }| (key, value)).collect();
    if tags.len() > 50 {
        return Err(Error::new("TooManyTagsException", format!("{} tags; the limit is 50", tags.len())));
    }
    for (key, value) in &tags {
        at_most("a tag's key", key, 128)?;
        at_most("a tag's value", value, 256)?;
    }
    Ok(tags)
}

fn at_most(what: &str, text: &str, most: usize) -> Result<()> {
    if text.chars().count() > most {
        return Err(Error::invalid(format!("{what} has more than {most} characters")));
    }
    Ok(())
}

/// Attributes of services and instances: printable ASCII, within Cloud Map's limits.
fn check_attributes(attributes: &Attributes) -> Result<()> {
    for (key, value) in attributes {
        if !(1..=255).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::invalid(format!(
                "attribute {key:?}: a key is 1 to 255 printable ASCII characters without blanks"
            )));
        }
        if value.len() > 1024 || !value.bytes().all(|b| b.is_ascii_graphic() || b == b' ' || b == b'\t') {
            return Err(Error::invalid(format!(
                "attribute {key}: a value is at most 1024 printable ASCII characters"
            )));
        }
    }
    let size: usize = attributes.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > 5000 {
        return Err(Error::invalid(format!("the attributes have {size} characters; the limit is 5000")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
