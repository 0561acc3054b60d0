//! Namespaces.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    super::{
        error::{Error, Result},
        records::{Namespace, NamespaceType, OWNER},
        seconds,
        state::State,
    },
    ById, Tag, at_most,
    pages::Page,
    tags,
};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Create {
    name: String,
    creator_request_id: Option<String>,
    description: Option<String>,
    vpc: Option<String>,
    tags: Option<Vec<Tag>>,
    properties: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Update {
    id: String,
    namespace: Changes,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Changes {
    description: Option<String>,
    properties: Option<Value>,
}

fn ttl(properties: Option<&Value>) -> Option<u64> {
    properties?.pointer("/DnsProperties/SOA/TTL")?.as_u64()
}

impl State {
    pub(super) fn create_http_namespace(&mut self, input: Create) -> Result<Value> {
        self.create_namespace(NamespaceType::Http, input)
    }

    pub(super) fn create_private_dns_namespace(&mut self, input: Create) -> Result<Value> {
        if input.vpc.is_none() {
            return Err(Error::invalid("Vpc is missing; any text will do"));
        }
        self.create_namespace(NamespaceType::DnsPrivate, input)
    }

    fn create_namespace(&mut self, kind: NamespaceType, input: Create) -> Result<Value> {
        let Create { name, creator_request_id: creator, description, vpc, tags: tag_list, properties } =
            input;
        // Cloud Map takes more for an HTTP namespace; but a name of ours is a DNS name.
        crate::registry::rules::dns_name("namespace", &name).map_err(Error::invalid)?;
        at_most("Description", description.as_deref().unwrap_or_default(), 1024)?;
        let tags = tags(tag_list)?;
        let same = |known: &&Namespace| creator.is_some() && known.creator == creator;
        if let Some(known) = self.namespaces.values().find(same) {
            if (&known.name, known.kind) == (&name, kind) {
                return Ok(json!({ "OperationId": known.operation }));
            }
            if let Some(operation) = self.operations.get(&known.operation) {
                return Err(Error::duplicate(operation));
            }
        }
        if let Some(known) = self.namespace_named(&name) {
            return Err(Error::namespace_exists(known));
        }
        let id = self.new_id("ns");
        let operation = self.done("CREATE_NAMESPACE", &[("NAMESPACE", &id)]);
        let ttl = ttl(properties.as_ref());
        let created = seconds();
        let answer = json!({ "OperationId": operation });
        self.put_namespace(Namespace {
            id,
            name,
            kind,
            description,
            vpc,
            ttl,
            created,
            creator,
            operation,
            tags,
        });
        Ok(answer)
    }

    pub(super) fn get_namespace(&self, input: &ById) -> Result<Value> {
        let namespace = self.namespace(&input.id)?;
        Ok(json!({ "Namespace": namespace.json(self.services_of(&namespace.id).count()) }))
    }

    pub(super) fn list_namespaces(&self, page: &Page) -> Result<Value> {
        let field = |namespace: &&Namespace, name: &str| match name {
            "TYPE" => serde_json::to_value(namespace.kind).ok()?.as_str().map(ToOwned::to_owned),
            "NAME" | "HTTP_NAME" => Some(namespace.name.clone()),
            // SELF or OTHER_ACCOUNTS: everything is one's own.
            "RESOURCE_OWNER" => Some("SELF".into()),
            _ => None,
        };
        let json = |namespace: &Namespace| namespace.json(self.services_of(&namespace.id).count());
        page.of("Namespaces", self.namespaces.iter(), field, json)
    }

    pub(super) fn update_namespace(&mut self, input: Update) -> Result<Value> {
        let mut namespace = self.namespace(&input.id)?.clone();
        let Changes { description, properties } = input.namespace;
        at_most("Description", description.as_deref().unwrap_or_default(), 1024)?;
        namespace.description = description.or(namespace.description);
        namespace.ttl = ttl(properties.as_ref()).or(namespace.ttl);
        let operation = self.done("UPDATE_NAMESPACE", &[("NAMESPACE", &namespace.id)]);
        self.put_namespace(namespace);
        Ok(json!({ "OperationId": operation }))
    }

    pub(super) fn delete_namespace(&mut self, input: &ById) -> Result<Value> {
        let namespace = self.namespace(&input.id)?;
        let (id, name) = (namespace.id.clone(), &namespace.name);
        let services = self.services_of(&id).count();
        if services > 0 {
            return Err(Error::in_use(format!("namespace {name} ({id}) still has {services} services")));
        }
        self.remove_namespace(&id);
        Ok(json!({ "OperationId": self.done("DELETE_NAMESPACE", &[("NAMESPACE", &id)]) }))
    }

    /// Whose resources these are.
    pub(super) fn owner() -> &'static str {
        OWNER
    }
}
