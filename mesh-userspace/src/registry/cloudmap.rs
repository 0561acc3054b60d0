//! AWS Cloud Map, through its API.
//!
//! Cloud Map tells nobody of changes. Services are asked for their revisions, one after the other; one whose
//! revision has moved is read again, and now and then each is, because health does not move the revision.

use std::{
    collections::BTreeMap,
    error::Error,
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

use aws_config::{BehaviorVersion, Region};
use aws_sdk_servicediscovery::{
    Client as Api,
    config::{
        ConfigBag, Intercept, RuntimeComponents, interceptors::BeforeTransmitInterceptorContextMut,
        retry::RetryConfig, timeout::TimeoutConfig,
    },
    error::{BoxError, ProvideErrorMetadata, SdkError},
    types::{
        FilterCondition, HealthStatus, HealthStatusFilter, HttpInstanceSummary, NamespaceSummary,
        NamespaceType, ServiceFilter, ServiceFilterName, ServiceSummary, ServiceType,
    },
};
use serde::Deserialize;
use tokio::task::JoinSet;

use super::{
    Rules,
    embedded::{
        records::{self, Attributes, Instance, Status},
        translate,
    },
    remote::{self, Said, jitter},
    rules,
};
use crate::model;

/// How often namespaces and services are listed.
const LIST: Duration = Duration::from_secs(15);

/// How often each service's revision is asked for, if there are no more services than calls are made in that
/// time: Cloud Map allows an account 1,000 a second, which all its nodes share.
const POLL: Duration = Duration::from_secs(1);
const CALLS_PER_SECOND: u32 = 20;

/// As many services are read at a time at the start.
const AT_ONCE: usize = 16;

/// As many instances of a service are told at most.
const INSTANCES: i32 = 1000;

/// Health intervals that make sense: checks of Route 53 take 10 seconds at least.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(3600);

/// With [`POLL`] well below the 10 seconds within which a registry that has fallen silent is noticed.
const CONNECT: Duration = Duration::from_secs(2);
const ATTEMPT: Duration = Duration::from_secs(4);
const CALL: Duration = Duration::from_secs(7);

/// The keys in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    region: Option<String>,
    /// Names; all if there are none.
    #[serde(default)]
    namespaces: Vec<String>,
    endpoint_url: Option<String>,
    #[serde(default = "health_interval", with = "humantime_serde")]
    health_interval: Duration,
}

fn health_interval() -> Duration {
    Duration::from_secs(10)
}

impl Settings {
    pub fn check(&self, rules: &Rules) -> Result<(), String> {
        if !(SHORTEST..=LONGEST).contains(&self.health_interval) {
            return Err("health_interval is not from 1s to 1h".into());
        }
        match &self.endpoint_url {
            Some(url) => {
                remote::url(url, &rules.vip_ranges).map_err(|why| format!("endpoint_url: {why}")).map(drop)
            }
            None => Ok(()),
        }
    }

    pub fn source(&self) -> String {
        let place =
            self.endpoint_url.as_ref().or(self.region.as_ref()).map_or("default region", |place| place);
        let names: Vec<_> = self.namespaces.iter().map(String::as_str).collect();
        [&[place], &names[..]].concat().join(" ")
    }
}

pub struct Client {
    settings: Settings,
    rules: Rules,
    api: Option<Api>,
    /// By id.
    services: BTreeMap<String, Known>,
    listed: Option<Instant>,
    /// The service that was asked for last.
    last: String,
    /// When the next call is made.
    next: Instant,
    /// Whether anything has changed that nobody was told of.
    changed: bool,
}

/// A service and what was last read of it.
#[derive(Clone)]
struct Known {
    namespace: records::Namespace,
    service: records::Service,
    revision: Option<i64>,
    read: Option<Instant>,
    translated: Option<Arc<model::Service>>,
    problems: Vec<String>,
}

/// What a service says when it is read.
struct Read {
    instances: Vec<HttpInstanceSummary>,
    revision: Option<i64>,
    attributes: Option<Attributes>,
}

/// Why a call has failed.
enum Failed {
    /// What it is about is gone.
    Gone,
    /// Who asks has no credentials, or none that are good any more.
    Stranger(String),
    Call(String),
}

/// What Cloud Map says of credentials that are not good.
const STRANGER: [&str; 7] = [
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "UnrecognizedClientException",
];

impl<E: ProvideErrorMetadata + Error + 'static, R: std::fmt::Debug> From<SdkError<E, R>> for Failed {
    fn from(error: SdkError<E, R>) -> Self {
        match &error {
            SdkError::ServiceError(_) => {}
            // Neither the network nor time: there is nothing to sign with.
            SdkError::DispatchFailure(why) if why.is_other() => return Self::Stranger(reasons(&error)),
            _ => return Self::Call(reasons(&error)),
        }
        match error.code().unwrap_or("unknown error") {
            "ServiceNotFound" | "NamespaceNotFound" => Self::Gone,
            code => {
                let why = error.message().unwrap_or("no reason is given");
                let why = rules::shown(&format!("{code}: {why}"));
                if STRANGER.contains(&code) { Self::Stranger(why) } else { Self::Call(why) }
            }
        }
    }
}

/// What an error says, and what is behind it: of each the first line, as lists follow.
fn reasons(error: &dyn Error) -> String {
    let (mut all, mut behind) = (Vec::new(), Some(error));
    while let Some(error) = behind {
        all.extend(error.to_string().lines().next().map(ToOwned::to_owned));
        behind = error.source();
    }
    all.join(": ")
}

impl Client {
    /// With settings that were checked.
    pub fn new(settings: Settings, rules: Rules) -> Self {
        Self {
            settings,
            rules,
            api: None,
            services: BTreeMap::new(),
            listed: None,
            last: String::new(),
            next: Instant::now(),
            changed: false,
        }
    }

    async fn api(&mut self) -> Api {
        if let Some(api) = &self.api {
            return api.clone();
        }
        let times = TimeoutConfig::builder()
            .connect_timeout(CONNECT)
            .operation_attempt_timeout(ATTEMPT)
            .operation_timeout(CALL)
            .build();
        let mut config = aws_config::defaults(BehaviorVersion::latest())
            // Slows down before Cloud Map says that it must.
            .retry_config(RetryConfig::adaptive())
            .timeout_config(times);
        if let Some(region) = &self.settings.region {
            config = config.region(Region::new(region.clone()));
        }
        if let Some(url) = &self.settings.endpoint_url {
            config = config.endpoint_url(url);
        }
        let config = config.load().await;
        let mut config = aws_sdk_servicediscovery::config::Builder::from(&config);
        if let Some(url) = &self.settings.endpoint_url {
            config = config.interceptor(AsConfigured::new(url));
        }
        self.api.insert(Api::from_conf(config.build())).clone()
    }

    /// Which services there are.
    async fn list(&mut self) -> Result<(), Failed> {
        let api = self.api().await;
        let mut services = BTreeMap::new();
        let mut namespaces = Vec::new();
        let mut pages = api.list_namespaces().into_paginator().send();
        while let Some(page) = pages.next().await {
            namespaces.extend(page?.namespaces().iter().filter_map(as_namespace));
        }
        let wanted = &self.settings.namespaces;
        namespaces.retain(|namespace| wanted.is_empty() || wanted.contains(&namespace.name));
        for namespace in &namespaces {
            let of_namespace = ServiceFilter::builder()
                .name(ServiceFilterName::NamespaceId)
                .values(&namespace.id)
                .condition(FilterCondition::Eq)
                .build()
                .map_err(|error| Failed::Call(error.to_string()))?;
            let mut pages = api.list_services().filters(of_namespace).into_paginator().send();
            while let Some(page) = pages.next().await {
                let page = page?;
                for service in page.services().iter().filter_map(|service| as_service(service, &namespace.id))
                {
                    let known = self.services.get(&service.id).cloned();
                    let known = known.unwrap_or_else(|| Known::new(namespace.clone(), service));
                    services.insert(known.service.id.clone(), known);
                }
            }
        }
        self.changed |= self.services.keys().any(|id| !services.contains_key(id));
        self.services = services;
        self.listed = Some(Instant::now());
        Ok(())
    }

    /// Reads services, several at a time.
    async fn read(&mut self, ids: Vec<String>) -> Result<(), Failed> {
        let api = self.api().await;
        let mut reading = JoinSet::new();
        let mut ids = ids.into_iter();
        loop {
            for id in ids.by_ref().take(AT_ONCE - reading.len()) {
                let Some(known) = self.services.get(&id) else { continue };
                let (api, known) = (api.clone(), known.clone());
                reading.spawn(async move { (id, read(&api, &known).await) });
            }
            let Some(done) = reading.join_next().await else { return Ok(()) };
            let (id, read) = done.map_err(|error| Failed::Call(error.to_string()))?;
            match read {
                Ok(read) => {
                    let known = self.services.get_mut(&id).expect("nobody took it away");
                    self.changed |= known.take(read, &self.rules);
                }
                // The list will say so.
                Err(Failed::Gone) => self.listed = None,
                Err(failed) => return Err(failed),
            }
        }
    }

    /// One call, or as many as it takes.
    async fn step(&mut self) -> Result<(), Failed> {
        if self.listed.is_none_or(|listed| listed.elapsed() > LIST) {
            self.list().await?;
            let new = self.services.values().filter(|known| known.read.is_none());
            return self.read(new.map(|known| known.service.id.clone()).collect()).await;
        }
        let after = (Bound::Excluded(&*self.last), Bound::Unbounded);
        let next = self.services.range::<str, _>(after).next().or_else(|| self.services.first_key_value());
        let Some((id, known)) = next else { return Ok(()) };
        let (id, known) = (id.clone(), known.clone());
        if known.read.is_none_or(|read| read.elapsed() > self.settings.health_interval)
            || self.has_moved(&known).await?
        {
            self.read(vec![id.clone()]).await?;
        }
        self.last = id;
        Ok(())
    }

    /// Whether a service's revision is another one.
    async fn has_moved(&mut self, known: &Known) -> Result<bool, Failed> {
        let asked = self.api().await.discover_instances_revision();
        let asked = asked.namespace_name(&known.namespace.name).service_name(&known.service.name);
        match asked.send().await.map_err(Failed::from) {
            Ok(told) => Ok(told.instances_revision() != known.revision),
            Err(Failed::Gone) => {
                self.listed = None;
                Ok(false)
            }
            Err(failed) => Err(failed),
        }
    }

    /// The time from one call to the next.
    fn pace(&self) -> Duration {
        let services = u32::try_from(self.services.len()).unwrap_or(u32::MAX).max(1);
        jitter((POLL / services).max(Duration::from_secs(1) / CALLS_PER_SECOND))
    }

    fn failed(&mut self, failed: &Failed) -> String {
        let why = match failed {
            Failed::Gone => "what it listed is not there",
            Failed::Stranger(why) => {
                // The SDK reads its files once.
                self.api = None;
                why
            }
            Failed::Call(why) => why,
        };
        format!("cloudmap {}: {why}", self.settings.source())
    }
}

impl remote::Client for Client {
    async fn connect(&mut self) -> Result<(), String> {
        self.listed = None;
        for known in self.services.values_mut() {
            known.read = None;
        }
        self.step().await.map_err(|failed| self.failed(&failed))
    }

    async fn news(&mut self) -> Result<bool, String> {
        tokio::time::sleep_until(self.next.into()).await;
        self.step().await.map_err(|failed| self.failed(&failed))?;
        self.next = Instant::now() + self.pace();
        Ok(std::mem::take(&mut self.changed))
    }

    fn read(&mut self) -> Said {
        let problems = self.services.values().flat_map(|known| known.problems.clone());
        let age = |known: &Known| Duration::try_from_secs_f64(known.service.created).unwrap_or_default();
        let services = self.services.values();
        let services = services.filter_map(|known| Some((age(known), known.translated.clone()?)));
        Said::by_age(services.collect(), problems.collect())
    }
}

async fn read(api: &Api, known: &Known) -> Result<Read, Failed> {
    let (namespace, service) = (&known.namespace.name, &known.service.name);
    let attributes = match api.get_service_attributes().service_id(&known.service.id).send().await {
        Ok(told) => {
            told.service_attributes.and_then(|all| all.attributes).map(|all| all.into_iter().collect())
        }
        Err(error) => match Failed::from(error) {
            // An older Cloud Map, or no right to read them.
            Failed::Call(why) if why.starts_with("UnknownOperation") || why.starts_with("AccessDenied") => {
                None
            }
            failed => return Err(failed),
        },
    };
    let asked = api.discover_instances().namespace_name(namespace).service_name(service);
    let told = asked.max_results(INSTANCES).health_status(HealthStatusFilter::All).send().await?;
    let revision = told.instances_revision();
    Ok(Read { instances: told.instances.unwrap_or_default(), revision, attributes })
}

impl Known {
    fn new(namespace: records::Namespace, service: records::Service) -> Self {
        Self { namespace, service, revision: None, read: None, translated: None, problems: Vec::new() }
    }

    /// Whether that is something else than before.
    fn take(&mut self, Read { instances, revision, attributes }: Read, rules: &Rules) -> bool {
        (self.read, self.revision) = (Some(Instant::now()), revision);
        self.service.attributes = attributes.unwrap_or_default();
        let instances: BTreeMap<_, _> = instances.into_iter().filter_map(as_instance).collect();
        let all_known = i32::try_from(instances.len()).is_ok_and(|count| count < INSTANCES);
        let (translated, mut problems) =
            match translate::service(&self.namespace, &self.service, &instances, rules) {
                Ok((translated, problems)) => (translated.map(Arc::new), problems),
                // What works stays until there is something better.
                Err(why) => (self.translated.clone(), vec![why]),
            };
        if !all_known {
            let Known { namespace, service, .. } = &self;
            problems.push(rules::shown(&format!(
                "service {}.{}: Cloud Map tells no more than {INSTANCES} instances",
                service.name, namespace.name
            )));
        }
        if let Some(port) = translated.as_ref().map(|translated| translated.id.port.get()) {
            // Kept for when there are no instances to say so.
            self.service.port = Some(port);
        }
        let changed = (&self.translated, &self.problems) != (&translated, &problems);
        (self.translated, self.problems) = (translated, problems);
        changed
    }
}

fn as_namespace(summary: &NamespaceSummary) -> Option<records::Namespace> {
    Some(records::Namespace {
        id: summary.id()?.into(),
        name: summary.name()?.into(),
        kind: match summary.r#type()? {
            NamespaceType::Http => records::NamespaceType::Http,
            _ => records::NamespaceType::DnsPrivate,
        },
        description: None,
        vpc: None,
        ttl: None,
        created: 0.0,
        creator: None,
        operation: String::new(),
        tags: Attributes::new(),
    })
}

fn as_service(summary: &ServiceSummary, namespace: &str) -> Option<records::Service> {
    Some(records::Service {
        id: summary.id()?.into(),
        namespace: namespace.into(),
        name: summary.name()?.into(),
        description: None,
        dns: None,
        http_only: summary.r#type() == Some(&ServiceType::Http),
        check: None,
        custom_check: None,
        created: summary
            .create_date()
            .map_or(0.0, aws_sdk_servicediscovery::primitives::DateTime::as_secs_f64),
        creator: None,
        tags: Attributes::new(),
        attributes: Attributes::new(),
        revision: 0,
        port: None,
    })
}

fn as_instance(summary: HttpInstanceSummary) -> Option<(String, Instance)> {
    let status = match summary.health_status() {
        Some(HealthStatus::Healthy) => Status::Healthy,
        Some(HealthStatus::Unhealthy) => Status::Unhealthy,
        _ => Status::Unknown,
    };
    let id = summary.instance_id?;
    let attributes = summary.attributes.unwrap_or_default().into_iter().collect();
    let instance = Instance { id: id.clone(), attributes, creator: None, status, operation: String::new() };
    Some((id, instance))
}

/// Asks where it was told to. Some calls go to a host of their own in AWS, whose name begins with `data-`;
/// other endpoints have no such host.
#[derive(Debug)]
struct AsConfigured {
    prefixed: String,
    configured: String,
}

impl AsConfigured {
    fn new(url: &str) -> Self {
        let configured = url.trim_end_matches('/').to_owned();
        Self { prefixed: configured.replacen("://", "://data-", 1), configured }
    }
}

impl Intercept for AsConfigured {
    fn name(&self) -> &'static str {
        "AsConfigured"
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        if let Some(path) = request.uri().strip_prefix(&self.prefixed).map(ToOwned::to_owned) {
            request.set_uri(format!("{}{path}", self.configured))?;
        }
        Ok(())
    }
}

#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        let namespace = NamespaceSummary::builder().id("ns-1").name("service.local");
        let service = ServiceSummary::builder().id("srv-1").name("echo").r#type(ServiceType::Http);
        let namespace = as_namespace(&namespace.r#type(NamespaceType::Http).build()).unwrap();
        let service = as_service(&service.build(), &namespace.id).unwrap();
        Known::new(namespace, service)
    }

    fn instance(id: &str, attributes: &[(&str, &str)], health: HealthStatus) -> HttpInstanceSummary {
        let instance = HttpInstanceSummary::builder().instance_id(id).health_status(health);
        attributes.iter().fold(instance, |instance, (key, value)| instance.attributes(*key, *value)).build()
    }

    fn read(instances: &[HttpInstanceSummary]) -> Read {
        Read { instances: instances.to_vec(), revision: Some(1), attributes: None }
    }

    #[test]
    fn a_record_that_breaks_a_rule_is_left_out_alone() {
        let rules = rules::for_tests();
        let mut known = known();
        let at = |ip| [("AWS_INSTANCE_IPV4", ip), ("AWS_INSTANCE_PORT", "8080")];
        let good = instance("good", &at("10.0.0.1"), HealthStatus::Unhealthy);
        let hostile = [
            instance("vip", &at("127.128.0.1"), HealthStatus::Healthy),
            instance("metadata", &at("169.254.169.254"), HealthStatus::Healthy),
            instance(
                "zero",
                &[("AWS_INSTANCE_IPV4", "10.0.0.2"), ("AWS_INSTANCE_PORT", "0")],
                HealthStatus::Healthy,
            ),
            instance(
                "text",
                &[("AWS_INSTANCE_IPV4", "ü"), ("AWS_INSTANCE_PORT", "8080")],
                HealthStatus::Healthy,
            ),
        ];
        assert!(known.take(read(&[&hostile[..], std::slice::from_ref(&good)].concat()), &rules));
        let service = known.translated.clone().unwrap();
        assert_eq!(service.instances.len(), 1);
        assert_eq!(
            (&*service.instances[0].id, service.instances[0].health),
            ("good", model::Health::Unhealthy)
        );
        assert_eq!(known.problems.len(), 4, "{:?}", known.problems);
        assert!(
            known.problems.iter().all(|problem| problem.starts_with("service echo.service.local: instance "))
        );
        assert!(!known.take(read(&[&hostile[..], &[good]].concat()), &rules), "that is no news");

        // Without instances it keeps the port that it had.
        assert!(known.take(read(&[]), &rules));
        assert_eq!(known.translated.unwrap().id.port.get(), 8080);
    }

    #[test]
    fn a_service_that_cannot_be_understood_stays_as_it_was() {
        let rules = rules::for_tests();
        let mut known = known();
        let good = instance(
            "a",
            &[("AWS_INSTANCE_IPV4", "10.0.0.1"), ("AWS_INSTANCE_PORT", "80")],
            HealthStatus::Healthy,
        );
        known.take(read(std::slice::from_ref(&good)), &rules);
        let before = known.translated.clone();
        let attributes = Attributes::from([("mesh.vip".into(), "8.8.8.8".into())]);
        assert!(known.take(Read { attributes: Some(attributes), ..read(&[good]) }, &rules));
        assert_eq!(known.translated, before);
        assert!(known.problems[0].contains("outside the configured ranges"), "{:?}", known.problems);
    }
}
