//! What is stored, in the words of Cloud Map.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The account that everything belongs to.
pub const OWNER: &str = "000000000000";

pub type Attributes = BTreeMap<String, String>;

pub fn arn(kind: &str, id: &str) -> String {
    format!("arn:aws:servicediscovery:local:{OWNER}:{kind}/{id}")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum NamespaceType {
    DnsPrivate,
    Http,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Namespace {
    pub id: String,
    pub name: String,
    pub kind: NamespaceType,
    pub description: Option<String>,
    pub vpc: Option<String>,
    /// Of the SOA record, in seconds; kept, and of no effect.
    pub ttl: Option<u64>,
    pub created: f64,
    pub creator: Option<String>,
    pub operation: String,
    pub tags: Attributes,
}

impl Namespace {
    pub fn json(&self, services: usize) -> Value {
        let dns = match self.kind {
            NamespaceType::DnsPrivate => json!({ "SOA": { "TTL": self.ttl.unwrap_or(15) } }),
            NamespaceType::Http => Value::Null,
        };
        without_null(json!({
            "Id": self.id, "Arn": arn("namespace", &self.id), "ResourceOwner": OWNER, "Name": self.name,
            "Type": self.kind, "Description": self.description, "ServiceCount": services,
            "Properties": without_null(json!({ "DnsProperties": dns, "HttpProperties": { "HttpName": self.name } })),
            "CreateDate": self.created, "CreatorRequestId": self.creator,
        }))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum RecordType {
    A,
    Aaaa,
    Cname,
    Srv,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsRecord {
    #[serde(rename = "Type")]
    pub kind: RecordType,
    #[serde(rename = "TTL")]
    pub ttl: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum RoutingPolicy {
    #[default]
    Multivalue,
    Weighted,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DnsConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace_id: Option<String>,
    #[serde(default)]
    pub routing_policy: RoutingPolicy,
    pub dns_records: Vec<DnsRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    pub id: String,
    pub namespace: String,
    pub name: String,
    pub description: Option<String>,
    pub dns: Option<DnsConfig>,
    /// Whether it may only be discovered by calls.
    pub http_only: bool,
    /// HealthCheckConfig; kept, and of no effect.
    pub check: Option<Value>,
    /// HealthCheckCustomConfig: whether callers set the instances' health.
    pub custom_check: Option<Value>,
    pub created: f64,
    pub creator: Option<String>,
    pub tags: Attributes,
    pub attributes: Attributes,
    /// Counts the changes of its instances.
    pub revision: u64,
    /// The port of an instance registered once: its own where nothing else says one.
    pub port: Option<u16>,
}

impl Service {
    pub fn json(&self, instances: usize) -> Value {
        let kind = match (&self.dns, self.http_only) {
            (Some(_), _) => "DNS_HTTP",
            (None, _) => "HTTP",
        };
        without_null(json!({
            "Id": self.id, "Arn": arn("service", &self.id), "ResourceOwner": OWNER, "CreatedByAccount": OWNER,
            "Name": self.name, "NamespaceId": self.namespace, "Description": self.description,
            "InstanceCount": instances, "DnsConfig": self.dns, "Type": kind,
            "HealthCheckConfig": self.check, "HealthCheckCustomConfig": self.custom_check,
            "CreateDate": self.created, "CreatorRequestId": self.creator,
        }))
    }

    /// A setting of ours: from its attributes, else from its tags.
    pub fn setting(&self, key: &str) -> Option<&str> {
        self.attributes.get(key).or_else(|| self.tags.get(key)).map(String::as_str)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    Healthy,
    Unhealthy,
    /// Nobody says.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    pub id: String,
    pub attributes: Attributes,
    pub creator: Option<String>,
    pub status: Status,
    /// The operation that registered it.
    pub operation: String,
}

impl Instance {
    pub fn json(&self) -> Value {
        json!({ "Id": self.id, "Attributes": self.attributes, "CreatedByAccount": OWNER })
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Operation {
    pub id: String,
    pub kind: String,
    pub created: f64,
    /// NAMESPACE, SERVICE, INSTANCE → id.
    pub targets: Attributes,
}

impl Operation {
    pub fn json(&self) -> Value {
        json!({
            "Id": self.id, "OwnerAccount": OWNER, "Type": self.kind, "Status": "SUCCESS",
            "CreateDate": self.created, "UpdateDate": self.created, "Targets": self.targets,
        })
    }
}

pub fn without_null(mut object: Value) -> Value {
    if let Some(object) = object.as_object_mut() {
        object.retain(|_, value| !value.is_null());
    }
    object
}
