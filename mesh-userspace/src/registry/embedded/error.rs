//! What a call is refused with: the exceptions of Cloud Map's own API.

use serde_json::{Value, json};

use super::records::{Namespace, Operation, Service};

/// An exception, as SDKs know it by `__type`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct Error {
    pub kind: &'static str,
    pub message: String,
    /// What the exception has besides a message.
    more: Option<(&'static str, String)>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(kind: &'static str, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), more: None }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new("InvalidInput", message)
    }

    pub fn no_namespace(id: &str) -> Self {
        Self::new("NamespaceNotFound", format!("there is no namespace {id:?}"))
    }

    pub fn no_service(id: &str) -> Self {
        Self::new("ServiceNotFound", format!("there is no service {id:?}"))
    }

    pub fn no_instance(service: &Service, id: &str) -> Self {
        let message = format!("service {} ({}) has no instance {id:?}", service.name, service.id);
        Self::new("InstanceNotFound", message)
    }

    pub fn no_operation(id: &str) -> Self {
        Self::new("OperationNotFound", format!("there is no operation {id:?}, or it was too long ago"))
    }

    pub fn no_resource(arn: &str) -> Self {
        Self::new("ResourceNotFoundException", format!("there is no resource {arn:?}"))
    }

    pub fn in_use(message: String) -> Self {
        Self::new("ResourceInUse", message)
    }

    pub fn namespace_exists(namespace: &Namespace) -> Self {
        let message = format!("namespace {:?} exists already: {}", namespace.name, namespace.id);
        Self {
            more: Some(("NamespaceId", namespace.id.clone())),
            ..Self::new("NamespaceAlreadyExists", message)
        }
    }

    pub fn service_exists(service: &Service) -> Self {
        let message = format!("service {:?} exists already: {}", service.name, service.id);
        Self { more: Some(("ServiceId", service.id.clone())), ..Self::new("ServiceAlreadyExists", message) }
    }

    pub fn duplicate(operation: &Operation) -> Self {
        let message = "another request had the same CreatorRequestId".to_owned();
        let id = operation.id.clone();
        Self { more: Some(("DuplicateOperationId", id)), ..Self::new("DuplicateRequest", message) }
    }

    /// Not the caller's fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new("InternalFailure", message)
    }

    pub fn is_internal(&self) -> bool {
        self.kind == "InternalFailure"
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        let mut body = json!({ "__type": self.kind, "Message": self.message });
        if let Some((key, value)) = &self.more {
            body[*key] = value.as_str().into();
        }
        body
    }
}
