//! Services files: TOML, YAML and JSON, with the line of every record.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    num::NonZeroU16,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize, Serializer, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    model::{Answer, DRAIN, Eject, Health, Instance, Policy, Protocol, Service, ServiceId},
    registry::{
        Claims, Snapshot,
        rules::{self, Rules},
    },
};

/// What is wrong with a services file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{}: {message}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
pub struct FileError {
    pub path: PathBuf,
    /// Counted from 1.
    pub line: Option<u64>,
    pub message: String,
}

impl FileError {
    pub fn new(path: &Path, message: impl Into<String>) -> Self {
        Self { path: path.into(), line: None, message: message.into() }
    }

    fn at(path: &Path, line: Option<u64>, message: &str) -> Self {
        Self { line, ..Self::new(path, rules::shown(&message)) }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Format {
    Toml,
    Yaml,
    Json,
}

impl Format {
    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "toml" => Some(Self::Toml),
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<S> {
    service: Option<Vec<S>>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, bound(deserialize = "I: DeserializeOwned"))]
struct RawService<I> {
    name: String,
    namespace: String,
    #[serde(default = "tcp")]
    protocol: Protocol,
    port: NonZeroU16,
    // Left out, as the next ones are, where they say nothing: older programs read what is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    port_name: Option<String>,
    vip: Option<IpAddr>,
    #[serde(default)]
    aliases: Vec<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    answer: Answer,
    #[serde(default, skip_serializing_if = "is_default")]
    api_only: bool,
    #[serde(default)]
    policy: Policy,
    affinity: Option<Span>,
    drain: Option<Span>,
    #[serde(skip_serializing)]
    retry: Option<Retry>,
    eject: Option<RawEject>,
    #[serde(skip_serializing)]
    check: Option<Check>,
    slow_start: Option<Span>,
    #[serde(default)]
    panic_percent: u8,
    #[serde(default = "Vec::new")]
    instance: Vec<I>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn tcp() -> Protocol {
    Protocol::Tcp
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawInstance {
    id: String,
    address: IpAddr,
    port: NonZeroU16,
    #[serde(default = "hundred")]
    weight: u16,
    zone: Option<String>,
    #[serde(default)]
    health: Health,
}

fn hundred() -> u16 {
    100
}

/// A time like `20s`.
#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(transparent)]
struct Span(#[serde(with = "humantime_serde")] Duration);

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawEject {
    failures: Option<u16>,
    base: Option<Span>,
    max: Option<Span>,
    max_percent: Option<u8>,
}

impl RawEject {
    fn checked(self) -> Result<Eject, String> {
        let default = Eject::default();
        let base = self.base.map_or(default.base, |span| span.0);
        let eject = Eject {
            failures: self.failures.unwrap_or(default.failures),
            base,
            max: self.max.map_or(default.max.max(base), |span| span.0),
            max_percent: self.max_percent.unwrap_or(default.max_percent),
        };
        if eject.max_percent > 100 {
            return Err(format!("eject: max_percent {} is more than 100", eject.max_percent));
        }
        if eject.max < eject.base || eject.max > LONGEST {
            return Err("eject: max must lie between base and 7 days".into());
        }
        Ok(eject)
    }
}

/// The longest time a service can ask for: map entries hold it in 32 bits of milliseconds.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

// The settings below are checked now and acted on later, so that a file that one version takes,
// the next one takes too.

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only its form is checked so far")]
struct Retry {
    attempts: Option<u8>,
    syn_timeout: Option<Span>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only its form is checked so far")]
struct Check {
    r#type: CheckType,
    interval: Option<Span>,
    timeout: Option<Span>,
    path: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum CheckType {
    Tcp,
    Http,
}

#[expect(clippy::cast_possible_truncation, reason = "32 MiB")]
const MAX_NODES: usize = super::MAX_FILE as usize;

/// A value with the line it starts on.
struct Located<T> {
    line: u64,
    value: T,
}

/// What a format wraps a record in to say where it is.
trait At<T> {
    fn located(self, lines: &mut Lines) -> Located<T>;
}

impl<T> At<T> for toml::Spanned<T> {
    fn located(self, lines: &mut Lines) -> Located<T> {
        Located { line: lines.of(self.span().start), value: self.into_inner() }
    }
}

impl<T> At<T> for serde_saphyr::Spanned<T> {
    fn located(self, _: &mut Lines) -> Located<T> {
        Located { line: self.defined.line(), value: self.value }
    }
}

/// A record of a text whose lines nobody asks for.
#[derive(Deserialize)]
#[serde(transparent)]
struct Anywhere<T>(T);

impl<T> At<T> for Anywhere<T> {
    fn located(self, _: &mut Lines) -> Located<T> {
        Located { line: 0, value: self.0 }
    }
}

/// Services as [`ToRecords`] wrote them, not checked yet.
#[derive(Deserialize)]
#[serde(transparent)]
pub(in crate::registry) struct Records(Vec<Anywhere<RawService<Anywhere<RawInstance>>>>);

/// The services that fulfil the rules, and what is wrong with the others.
pub(in crate::registry) fn check(Records(services): Records, rules: &Rules) -> (Vec<Service>, Vec<String>) {
    let records = records(Document { service: Some(services) }, &mut Lines::new(""));
    let mut checked = Checked::default();
    let mut refused = Vec::new();
    for record in records.into_iter().flatten() {
        refused.extend(checked.add(record, rules).err().map(|(_, message)| message));
    }
    (checked.services, refused)
}

/// One service, in the form of JSON.
pub(in crate::registry) fn service(record: Value, rules: &Rules) -> Result<Service, String> {
    let name = record["name"].as_str().unwrap_or_default().to_owned();
    let records = serde_json::from_value(Value::Array(vec![record]));
    let records = records.map_err(|error| format!("service {name:?}: {}", rules::shown(&error)))?;
    let (mut services, mut refused) = check(records, rules);
    services.pop().ok_or_else(|| refused.pop().unwrap_or_default())
}

/// One instance, in the form of JSON.
pub(in crate::registry) fn instance(record: Value, rules: &Rules) -> Result<Instance, String> {
    let record: RawInstance = serde_json::from_value(record).map_err(|error| rules::shown(&error))?;
    record.checked(rules)
}

/// Writes all services of a snapshot as a services file has them.
pub(in crate::registry) struct ToRecords<'a>(pub &'a Snapshot);

impl Serialize for ToRecords<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.all().map(|service| RawService::from(&**service)))
    }
}

impl From<&Service> for RawService<RawInstance> {
    fn from(service: &Service) -> Self {
        // Every field is named: a new one must not be forgotten here.
        let Service {
            id,
            port_name,
            vip,
            aliases,
            answer,
            api_only,
            policy,
            affinity,
            drain,
            eject,
            slow_start,
            panic_percent,
            instances,
        } = service;
        let Eject { failures, base, max, max_percent } = *eject;
        let ServiceId { namespace, name, protocol, port } = id;
        Self {
            name: name.clone(),
            namespace: namespace.clone(),
            protocol: *protocol,
            port: *port,
            port_name: port_name.clone(),
            vip: *vip,
            aliases: aliases.clone(),
            answer: *answer,
            api_only: *api_only,
            policy: *policy,
            affinity: affinity.map(Span),
            drain: Some(Span(*drain)),
            retry: None,
            eject: Some(RawEject {
                failures: Some(failures),
                base: Some(Span(base)),
                max: Some(Span(max)),
                max_percent: Some(max_percent),
            }),
            check: None,
            slow_start: slow_start.map(Span),
            panic_percent: *panic_percent,
            instance: instances.iter().map(RawInstance::from).collect(),
        }
    }
}

impl From<&Instance> for RawInstance {
    fn from(instance: &Instance) -> Self {
        let Instance { id, address, port, weight, zone, health } = instance.clone();
        Self { id, address, port, weight, zone, health }
    }
}

/// Counts lines up to growing offsets.
struct Lines<'a> {
    text: &'a str,
    counted: usize,
    line: u64,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, counted: 0, line: 1 }
    }

    fn of(&mut self, offset: usize) -> u64 {
        if offset < self.counted {
            *self = Self::new(self.text);
        }
        let offset = offset.min(self.text.len());
        let newlines = self.text.as_bytes()[self.counted..offset].iter().filter(|byte| **byte == b'\n');
        self.line += newlines.count() as u64;
        self.counted = offset;
        self.line
    }
}

type Toml<T> = toml::Spanned<T>;
type Record = Located<RawService<Located<RawInstance>>>;

/// The services of a file; `None` if it has no list of services at all.
pub(crate) fn parse(path: &Path, text: &str, rules: &Rules) -> Result<Option<Vec<Service>>, FileError> {
    let Some(format) = Format::of(path) else {
        return Err(FileError::new(path, "the file's name must end in .toml, .yaml, .yml or .json"));
    };
    if text.trim().is_empty() {
        return Ok(None);
    }
    let mut lines = Lines::new(text);
    let records = match format {
        Format::Toml => {
            let document = toml::from_str::<Document<Toml<RawService<Toml<RawInstance>>>>>(text);
            document.map(|document| records(document, &mut lines)).map_err(|error| {
                let line = error.span().map(|span| lines.of(span.start));
                FileError::at(path, line, error.message())
            })?
        }
        Format::Yaml => yaml(path, text)?,
        Format::Json => {
            // JSON is YAML, and only the YAML reader knows lines; but it would take too much.
            serde_json::from_str::<serde::de::IgnoredAny>(text)
                .map_err(|error| FileError::at(path, Some(error.line() as u64), &error.to_string()))?;
            yaml(path, text)?
        }
    };
    let Some(records) = records else { return Ok(None) };
    let mut checked = Checked::default();
    for record in records {
        let line = record.line;
        checked.add(record, rules).map_err(|(line, message)| FileError::at(path, Some(line), &message))?;
        let no_weight =
            |one: &&Service| !one.instances.is_empty() && one.instances.iter().all(|i| i.weight == 0);
        if let Some(service) = checked.services.last().filter(no_weight) {
            let message = format!("service {}: every instance has weight 0", service.id);
            return Err(FileError::at(path, Some(line), &message));
        }
    }
    if !checked.later.is_empty() {
        let keys: Vec<_> = checked.later.into_iter().collect();
        tracing::warn!(
            "{}: this version does not act on these keys yet: {}",
            path.display(),
            keys.join(", ")
        );
    }
    Ok(Some(checked.services))
}

fn yaml(path: &Path, text: &str) -> Result<Option<Vec<Record>>, FileError> {
    // As much as the largest file can hold; depth and aliases stay limited as they are.
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: MAX_NODES, max_nodes: MAX_NODES, max_total_scalar_bytes: MAX_NODES,
        },
    };
    type Yaml<T> = serde_saphyr::Spanned<T>;
    let document =
        serde_saphyr::from_str_with_options::<Document<Yaml<RawService<Yaml<RawInstance>>>>>(text, options);
    match document {
        Ok(document) => Ok(records(document, &mut Lines::new(text))),
        Err(error) => {
            let line = error.location().map(|location| location.line());
            let message = error.without_snippet().to_string();
            Err(FileError::at(path, line, message.lines().next().unwrap_or_default()))
        }
    }
}

fn records<S, I>(document: Document<S>, lines: &mut Lines) -> Option<Vec<Record>>
where
    S: At<RawService<I>>,
    I: At<RawInstance>,
{
    let mut locate = |service: S| {
        let Located { line, value } = service.located(lines);
        let instance = value.instance.into_iter().map(|instance| instance.located(lines)).collect();
        let RawService {
            name,
            namespace,
            protocol,
            port,
            port_name,
            vip,
            aliases,
            answer,
            api_only,
            policy,
            ..
        } = value;
        let RawService { affinity, drain, retry, eject, check, slow_start, panic_percent, .. } = value;
        let value = RawService {
            name,
            namespace,
            protocol,
            port,
            port_name,
            vip,
            aliases,
            answer,
            api_only,
            policy,
            affinity,
            drain,
            retry,
            eject,
            check,
            slow_start,
            panic_percent,
            instance,
        };
        Located { line, value }
    };
    Some(document.service?.into_iter().map(&mut locate).collect())
}

/// Services checked so far, and what later ones must not repeat.
#[derive(Default)]
struct Checked {
    services: Vec<Service>,
    claims: Claims,
    /// Keys in use that nothing acts on yet.
    later: BTreeSet<&'static str>,
}

type Problem = (u64, String);

impl Checked {
    fn add(&mut self, record: Record, rules: &Rules) -> Result<(), Problem> {
        let Located { line, value: raw } = record;
        let id =
            ServiceId { namespace: raw.namespace, name: raw.name, protocol: raw.protocol, port: raw.port };
        // Unchecked names are hostile: shown quoted and escaped until they are known to be names.
        let quoted = |what: String| (line, format!("service {:?}: {what}", id.name));
        rules::dns_name("name", &id.name).map_err(quoted)?;
        rules::dns_name("namespace", &id.namespace).map_err(quoted)?;
        let label = id.to_string();
        let problem = |message: String| (line, format!("service {label}: {message}"));

        if let Some(vip) = raw.vip {
            rules.vip(vip).map_err(problem)?;
        }
        if let Some(name) = &raw.port_name {
            rules::port_name(name).map_err(problem)?;
        }
        for alias in &raw.aliases {
            rules::dns_name("alias", alias).map_err(problem)?;
        }
        let instances = instances(raw.instance, &id, rules)?;
        for (key, set) in [("retry", raw.retry.is_some()), ("check", raw.check.is_some())] {
            if set {
                self.later.insert(key);
            }
        }
        let vip = raw.vip.map(|vip| vip.to_canonical());
        for (key, span) in [("affinity", raw.affinity), ("drain", raw.drain), ("slow_start", raw.slow_start)]
        {
            if span.is_some_and(|span| span.0 > LONGEST) {
                return Err(problem(format!("{key} is longer than 7 days")));
            }
        }
        if raw.panic_percent > 100 {
            return Err(problem(format!("panic_percent {} is more than 100", raw.panic_percent)));
        }
        let service = Service {
            id,
            vip,
            port_name: raw.port_name.map(|name| name.to_lowercase()),
            aliases: raw.aliases,
            answer: raw.answer,
            api_only: raw.api_only,
            policy: raw.policy,
            // An affinity of no time is none.
            affinity: raw.affinity.map(|span| span.0).filter(|time| !time.is_zero()),
            drain: raw.drain.map_or(DRAIN, |span| span.0),
            eject: raw.eject.map_or_else(|| Ok(Eject::default()), RawEject::checked).map_err(problem)?,
            slow_start: raw.slow_start.map(|span| span.0),
            panic_percent: raw.panic_percent,
            instances,
        };
        self.claims.add(&service).map_err(problem)?;
        self.services.push(service);
        Ok(())
    }
}

fn instances(
    raw: Vec<Located<RawInstance>>,
    service: &ServiceId,
    rules: &Rules,
) -> Result<Vec<Instance>, Problem> {
    let (mut ids, mut endpoints) = (HashSet::new(), HashSet::new());
    let mut instances = Vec::with_capacity(raw.len());
    for Located { line, value: raw } in raw {
        let id = raw.id.clone();
        let problem = |message: &str| (line, format!("service {service}: instance {id:?}: {message}"));
        let instance = raw.checked(rules).map_err(|message| problem(&message))?;
        if !ids.insert(instance.id.clone()) {
            return Err(problem("the id is used twice"));
        }
        let Instance { address, port, .. } = instance;
        if !endpoints.insert((address, port)) {
            return Err(problem(&format!("{address} port {port} is used twice")));
        }
        instances.push(instance);
    }
    Ok(instances)
}

impl RawInstance {
    fn checked(self, rules: &Rules) -> Result<Instance, String> {
        let Self { id, address, port, weight, zone, health } = self;
        rules::instance_id(&id)?;
        rules.backend(address)?;
        if let Some(zone) = &zone {
            rules::dns_name("zone", zone)?;
        }
        Ok(Instance { id, address: address.to_canonical(), port, weight, zone, health })
    }
}
