//! `mesh instance`: the embedded registry, by its own API.

use std::{net::IpAddr, num::NonZeroU16, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, client::conn::http1::handshake};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::net::TcpStream;

use super::output::{TableFormat, or_dash, print, table};
use crate::api::{client, objects};

/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Subcommand)]
pub(super) enum InstanceCommand {
    /// All instances, or those of one service.
    List {
        /// NAME.NAMESPACE
        service: Option<String>,
        #[command(flatten)]
        endpoint: Endpoint,
        #[arg(short, long, default_value = "table")]
        output: TableFormat,
        #[arg(long)]
        no_headers: bool,
    },
    /// Register an instance, or renew its lease; makes its namespace and service where there are none.
    Register {
        /// NAME.NAMESPACE, with :PORT to set the port that clients dial.
        service: String,
        #[arg(long)]
        address: IpAddr,
        #[arg(long)]
        port: NonZeroU16,
        /// [default: ADDRESS:PORT]
        #[arg(long)]
        id: Option<String>,
        /// Its share of new connections [default: 100]
        #[arg(long)]
        weight: Option<u16>,
        #[arg(long)]
        zone: Option<String>,
        /// KEY=VALUE; may be given several times.
        #[arg(long, value_name = "KEY=VALUE")]
        attribute: Vec<String>,
        /// Deregister it unless it is registered again within this time.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        lease: Option<Duration>,
        #[command(flatten)]
        endpoint: Endpoint,
    },
    /// Deregister an instance.
    Deregister {
        /// NAME.NAMESPACE
        service: String,
        id: String,
        #[command(flatten)]
        endpoint: Endpoint,
    },
}

#[derive(Args, Debug)]
pub(super) struct Endpoint {
    /// Where the registry listens [default: what the daemon says]
    #[arg(long, value_name = "URL")]
    endpoint_url: Option<String>,
}

#[derive(Debug, Serialize)]
struct Instance {
    service: String,
    namespace: String,
    id: String,
    address: Option<String>,
    port: Option<u16>,
    weight: u16,
    zone: Option<String>,
    /// As Cloud Map says it; UNKNOWN where nobody does.
    health: String,
    lease: Option<String>,
    attributes: Map<String, Value>,
}

pub(super) async fn run(socket: &Path, command: InstanceCommand) -> anyhow::Result<ExitCode> {
    match command {
        InstanceCommand::List { service, endpoint, output, no_headers } => {
            let registry = Registry::at(socket, &endpoint).await?;
            let instances = registry.instances(service.as_deref()).await?;
            let (format, wide) = output.split();
            print(format, &instances, |instances| text(instances, wide, no_headers))?;
        }
        InstanceCommand::Register {
            service,
            address,
            port,
            id,
            weight,
            zone,
            attribute,
            lease,
            endpoint,
        } => {
            let registry = Registry::at(socket, &endpoint).await?;
            let (name, namespace, dialled) = split(&service)?;
            let id = id.unwrap_or_else(|| format!("{address}:{port}"));
            let family = if address.is_ipv4() { "AWS_INSTANCE_IPV4" } else { "AWS_INSTANCE_IPV6" };
            let mut attributes = json!({ family: address, "AWS_INSTANCE_PORT": port.to_string() });
            let given = [
                ("mesh.weight", weight.map(|weight| weight.to_string())),
                ("AVAILABILITY_ZONE", zone),
                ("mesh.lease", lease.map(|lease| humantime::format_duration(lease).to_string())),
            ];
            for (key, value) in given.into_iter().filter_map(|(key, value)| Some((key, value?))) {
                attributes[key] = value.into();
            }
            for pair in &attribute {
                let (key, value) =
                    pair.split_once('=').with_context(|| format!("{pair:?} is not KEY=VALUE"))?;
                attributes[key] = value.into();
            }
            let service = registry.make_service(name, namespace).await?;
            if let Some(port) = dialled {
                let set = json!({ "ServiceId": service, "Attributes": { "mesh.port": port.to_string() } });
                registry.call("UpdateServiceAttributes", &set).await?;
            }
            let instance = json!({ "ServiceId": service, "InstanceId": id, "Attributes": attributes });
            registry.call("RegisterInstance", &instance).await?;
            eprintln!("registered {id} of {name}.{namespace}");
        }
        InstanceCommand::Deregister { service, id, endpoint } => {
            let registry = Registry::at(socket, &endpoint).await?;
            let (name, namespace, _) = split(&service)?;
            let service = registry.service(name, namespace).await?;
            let service = service.with_context(|| format!("there is no service {name}.{namespace}"))?;
            let instance = json!({ "ServiceId": service, "InstanceId": id });
            registry.call("DeregisterInstance", &instance).await?;
            eprintln!("deregistered {id} of {name}.{namespace}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn text(instances: &[Instance], wide: bool, no_headers: bool) -> String {
    let rows = instances.iter().map(|one| {
        let mut row = vec![
            format!("{}.{}", one.service, one.namespace),
            one.id.clone(),
            or_dash(one.address.clone()),
            or_dash(one.port),
            one.health.clone(),
        ];
        if wide {
            row.extend([one.weight.to_string(), or_dash(one.zone.clone()), or_dash(one.lease.clone())]);
        }
        row
    });
    let mut headers = vec!["SERVICE", "ID", "ADDRESS", "PORT", "HEALTH"];
    if wide {
        headers.extend(["WEIGHT", "ZONE", "LEASE"]);
    }
    table(if no_headers { &[] } else { &headers }, rows)
}

/// Name, namespace and port of `NAME.NAMESPACE[:PORT]`.
fn split(service: &str) -> anyhow::Result<(&str, &str, Option<NonZeroU16>)> {
    let (full, port) = match service.rsplit_once(':') {
        Some((full, port)) => (full, Some(port.parse().with_context(|| format!("{port:?} is not a port"))?)),
        None => (service, None),
    };
    let (name, namespace) = full
        .split_once('.')
        .with_context(|| format!("{service:?} is not NAME.NAMESPACE or NAME.NAMESPACE:PORT"))?;
    Ok((name, namespace, port))
}

/// The embedded registry, at HOST:PORT.
struct Registry(String);

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    id: String,
    name: String,
}

impl Registry {
    async fn at(socket: &Path, endpoint: &Endpoint) -> anyhow::Result<Self> {
        if let Some(url) = &endpoint.endpoint_url {
            let host = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
            if host.contains('/') || !host.contains(':') {
                bail!("--endpoint-url {url:?} is not http://HOST:PORT");
            }
            return Ok(Self(host.into()));
        }
        let registries: Vec<objects::Registry> = client::get(socket, "/v1/registries").await?;
        let embedded = registries.into_iter().find(|registry| registry.r#type == "embedded");
        Ok(Self(embedded.context("the daemon has no registry of type embedded")?.source))
    }

    async fn call(&self, operation: &str, input: &Value) -> anyhow::Result<Value> {
        let answer = tokio::time::timeout(PATIENCE, self.ask(operation, input)).await;
        answer.with_context(|| format!("the registry at {} does not answer", self.0))?
    }

    async fn ask(&self, operation: &str, input: &Value) -> anyhow::Result<Value> {
        let stream = TcpStream::connect(&self.0).await;
        let stream = stream.with_context(|| format!("cannot reach the registry at {}", self.0))?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::post("/")
            .header("host", &self.0)
            .header("content-type", "application/x-amz-json-1.1")
            .header("x-amz-target", format!("Route53AutoNaming_v20170314.{operation}"))
            .body(Full::<Bytes>::from(serde_json::to_vec(input)?))?;
        let response = sender.send_request(request).await?;
        let worked = response.status().is_success();
        let body = response.into_body().collect().await?.to_bytes();
        let body: Value = serde_json::from_slice(&body)
            .with_context(|| format!("what answers at {} is not the embedded registry", self.0))?;
        if !worked {
            let text = |key: &str| body[key].as_str().unwrap_or("?").to_owned();
            bail!("{operation}: {} ({})", text("Message"), text("__type"));
        }
        Ok(body)
    }

    /// Every page of a list.
    async fn list(&self, operation: &str, key: &str, mut input: Value) -> anyhow::Result<Vec<Value>> {
        let mut all = Vec::new();
        loop {
            let mut page = self.call(operation, &input).await?;
            match page[key].take() {
                Value::Array(items) => all.extend(items),
                // A map, of which each entry is an item.
                Value::Object(items) => all.extend(items.into_iter().map(|(key, value)| json!([key, value]))),
                _ => {}
            }
            match page.get_mut("NextToken") {
                Some(token) if !token.is_null() => input["NextToken"] = token.take(),
                _ => return Ok(all),
            }
        }
    }

    async fn named(&self, operation: &str, key: &str, input: Value) -> anyhow::Result<Vec<Named>> {
        let all = self.list(operation, key, input).await?;
        all.into_iter().map(|one| Ok(serde_json::from_value(one)?)).collect()
    }

    async fn namespaces(&self) -> anyhow::Result<Vec<Named>> {
        self.named("ListNamespaces", "Namespaces", json!({})).await
    }

    async fn services(&self, namespace: &str) -> anyhow::Result<Vec<Named>> {
        let filter = json!({ "Filters": [{ "Name": "NAMESPACE_ID", "Values": [namespace] }] });
        self.named("ListServices", "Services", filter).await
    }

    /// The id of a service, where there is one.
    async fn service(&self, name: &str, namespace: &str) -> anyhow::Result<Option<String>> {
        let Some(namespace) = id_of(self.namespaces().await?, namespace) else { return Ok(None) };
        Ok(id_of(self.services(&namespace).await?, name))
    }

    async fn make_service(&self, name: &str, namespace: &str) -> anyhow::Result<String> {
        let known = id_of(self.namespaces().await?, namespace);
        if known.is_none() {
            let input = json!({ "Name": namespace, "Vpc": "local" });
            self.call("CreatePrivateDnsNamespace", &input).await?;
        }
        let known = known.or(id_of(self.namespaces().await?, namespace));
        let namespace_id = known.with_context(|| format!("namespace {namespace} vanished"))?;
        if let Some(service) = id_of(self.services(&namespace_id).await?, name) {
            return Ok(service);
        }
        let input = json!({
            "Name": name, "NamespaceId": namespace_id, "HealthCheckCustomConfig": { "FailureThreshold": 1 },
        });
        let service = self.call("CreateService", &input).await?;
        Ok(service["Service"]["Id"].as_str().context("a new service has an id")?.to_owned())
    }

    async fn instances(&self, service: Option<&str>) -> anyhow::Result<Vec<Instance>> {
        let wanted = service.map(split).transpose()?;
        let mut all = Vec::new();
        for namespace in self.namespaces().await? {
            for service in self.services(&namespace.id).await? {
                let is = |(name, of, _): (&str, &str, _)| (name, of) == (&*service.name, &*namespace.name);
                if wanted.is_none_or(is) {
                    all.extend(self.instances_of(&namespace, &service).await?);
                }
            }
        }
        if let (Some(service), true) = (service, all.is_empty()) {
            let (name, namespace, _) = split(service)?;
            let known = self.service(name, namespace).await?;
            known.with_context(|| format!("there is no service {name}.{namespace}"))?;
        }
        Ok(all)
    }

    async fn instances_of(&self, namespace: &Named, service: &Named) -> anyhow::Result<Vec<Instance>> {
        let input = json!({ "ServiceId": service.id });
        let health = self.list("GetInstancesHealthStatus", "Status", input.clone()).await?;
        let health: Map<_, _> = health
            .into_iter()
            .filter_map(|pair| Some((pair[0].as_str()?.to_owned(), pair[1].clone())))
            .collect();
        let instances = self.list("ListInstances", "Instances", input).await?;
        let instance = |one: Value| {
            let text = |key: &str| one["Attributes"][key].as_str().map(ToOwned::to_owned);
            let id = one["Id"].as_str().unwrap_or_default().to_owned();
            Instance {
                service: service.name.clone(),
                namespace: namespace.name.clone(),
                address: text("AWS_INSTANCE_IPV4").or_else(|| text("AWS_INSTANCE_IPV6")),
                port: text("AWS_INSTANCE_PORT").and_then(|port| port.parse().ok()),
                weight: text("mesh.weight").and_then(|weight| weight.parse().ok()).unwrap_or(100),
                zone: text("AVAILABILITY_ZONE"),
                health: health.get(&id).and_then(Value::as_str).unwrap_or("UNKNOWN").into(),
                lease: text("mesh.lease"),
                attributes: one["Attributes"].as_object().cloned().unwrap_or_default(),
                id,
            }
        };
        Ok(instances.into_iter().map(instance).collect())
    }
}

fn id_of(all: Vec<Named>, name: &str) -> Option<String> {
    all.into_iter().find(|one| one.name.eq_ignore_ascii_case(name)).map(|one| one.id)
}
