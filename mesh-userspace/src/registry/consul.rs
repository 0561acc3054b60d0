//! The Consul registry: the list of services, and the health of each, by blocking queries.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    num::NonZeroU16,
    path::PathBuf,
    time::Duration,
};

use reqwest::Url;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{
    Rules,
    embedded::translate,
    file::format,
    remote::{self, Body, Ledger, Said, Tls, jitter, reason, secret},
    rules,
};
use crate::model::{Instance, Service};

/// How long Consul may wait for news: of the list, so short that its silence is noticed within 10 seconds.
const LIST: Duration = Duration::from_secs(4);
const HEALTH: Duration = Duration::from_secs(60);

/// After an answer without news: an index may move for other reasons.
const PAUSE: Duration = Duration::from_millis(20);

/// After a question about one service that was not answered.
const AGAIN: Duration = Duration::from_secs(1);

/// The largest answer, in bytes.
const MAX: usize = 64 << 20;

/// As many services are read at a time at the start.
const AT_ONCE: usize = 64;

/// The keys in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    address: String,
    token: Option<String>,
    token_file: Option<PathBuf>,
    #[serde(default)]
    tls: Tls,
    datacenter: Option<String>,
    /// Only instances with this tag.
    tag: Option<String>,
    #[serde(default = "namespace")]
    namespace: String,
}

fn namespace() -> String {
    "service.local".into()
}

impl Settings {
    pub fn check(&self, rules: &Rules) -> Result<(), String> {
        rules::dns_name("namespace", &self.namespace)?;
        if self.url(rules)?.scheme() == "http" && !self.tls.is_empty() {
            return Err("tls is given, but address is not https://HOST:PORT".into());
        }
        if self.token.is_some() && self.token_file.is_some() {
            return Err("token and token_file are both given".into());
        }
        self.access(rules).map(drop)
    }

    /// Reads the files.
    fn access(&self, rules: &Rules) -> Result<Access, String> {
        let url = self.url(rules)?;
        let tls = (url.scheme() == "https").then_some(&self.tls);
        // Of thousands of connections, one for each service, none asks whether Consul is there: the list does.
        let http = remote::http(&rules.vip_ranges, tls, None)?;
        let token = match &self.token_file {
            Some(path) => Some(secret("token_file", path)?),
            None => self.token.clone(),
        };
        Ok(Access { http, url, token })
    }

    fn url(&self, rules: &Rules) -> Result<Url, String> {
        let text = if self.address.contains("://") {
            self.address.clone()
        } else {
            format!("http://{}", self.address)
        };
        remote::url(&text, &rules.vip_ranges).map_err(|why| format!("address: {why}"))
    }

    /// Without the token.
    pub fn source(&self) -> String {
        let all = [Some(&self.address), self.datacenter.as_ref(), self.tag.as_ref(), Some(&self.namespace)];
        all.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" ")
    }
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Question {
    List,
    Health(String),
}

/// An answer, and the index from which on the next one is news.
struct Told {
    index: u64,
    body: Vec<u8>,
}

/// Where Consul is asked, and with which token.
struct Access {
    http: reqwest::Client,
    url: Url,
    token: Option<String>,
}

pub struct Client {
    settings: Settings,
    /// Of the connection that there is.
    access: Option<Access>,
    rules: Rules,
    /// What it listed last: it says so again whenever anything has changed.
    listed: Vec<u8>,
    /// The names in it, also those that are none.
    names: BTreeSet<String>,
    /// By the index at which the first instance was made.
    ledger: Ledger<String, u64>,
    questions: JoinSet<(Question, u64, Result<Told, String>)>,
}

impl Client {
    /// With settings that were checked.
    pub fn new(settings: Settings, rules: Rules) -> Self {
        Self {
            settings,
            access: None,
            rules,
            listed: Vec::new(),
            names: BTreeSet::new(),
            ledger: Ledger::default(),
            questions: JoinSet::new(),
        }
    }

    /// Asks after a pause for what is newer than an index; for what there is, where that is zero.
    fn ask(&mut self, question: Question, index: u64, pause: Duration) {
        let (path, mut query, wait) = match &question {
            Question::List => ("v1/catalog/services".to_owned(), Vec::new(), LIST),
            Question::Health(name) => {
                let tag = self.settings.tag.iter().map(|tag| ("tag", tag.clone()));
                (format!("v1/health/service/{name}"), tag.collect(), HEALTH)
            }
        };
        query.extend(self.settings.datacenter.iter().map(|name| ("dc", name.clone())));
        let mut patience = remote::ANSWER;
        if index > 0 {
            query.extend([("index", index.to_string()), ("wait", format!("{}s", wait.as_secs()))]);
            // Consul adds up to a sixteenth.
            patience = wait + wait / 16 + Duration::from_secs(3);
        }
        let request = self.access.as_ref().and_then(|Access { http, url, token }| {
            let mut url = url.join(&path).ok()?;
            url.query_pairs_mut().extend_pairs(query);
            let request = http.get(url);
            Some(match token {
                Some(token) => request.header("X-Consul-Token", token),
                None => request,
            })
        });
        self.questions.spawn(async move {
            tokio::time::sleep(pause).await;
            let Some(request) = request else { return (question, index, Err("this is no address".into())) };
            let told = tokio::time::timeout(patience, told(request)).await;
            (question, index, told.unwrap_or_else(|_| Err("no answer in time".into())))
        });
    }

    /// Waits for an answer, and asks on; whether it changes anything.
    async fn answer(&mut self) -> Result<bool, String> {
        let Some(done) = self.questions.join_next().await else { return Err("nothing is asked for".into()) };
        let (question, before, told) = done.map_err(|error| error.to_string())?;
        if let Question::Health(name) = &question
            && !self.names.contains(name)
        {
            return Ok(false);
        }
        let told = match (told, &question) {
            (Ok(told), _) => told,
            (Err(why), Question::List) => return Err(self.failed(&why)),
            // Whether Consul is still there is for the list to say. What fails twice is named.
            (Err(why), Question::Health(name)) => {
                let news = before == 0
                    && self.ledger.complain(name, vec![format!("service {name}: {}", rules::shown(&why))]);
                self.ask(question, 0, jitter(AGAIN));
                return Ok(news);
            }
        };
        let changed = match &question {
            Question::List => {
                let (news, new) = self.list(&told.body).map_err(|why| self.failed(&why))?;
                new.into_iter().for_each(|name| self.ask(Question::Health(name), 0, Duration::ZERO));
                news
            }
            Question::Health(name) => self.take(name, &told.body),
        };
        // One that goes backwards is no index of this Consul's any more; zero would be answered at once.
        let index = if told.index < before { 0 } else { told.index.max(1) };
        self.ask(question, index, if changed { Duration::ZERO } else { PAUSE });
        Ok(changed)
    }

    /// Follows the list of services; whether that is news by itself, and which ones are to be asked for.
    fn list(&mut self, body: &[u8]) -> Result<(bool, Vec<String>), String> {
        if self.listed == body {
            return Ok((false, Vec::new()));
        }
        let list: BTreeMap<String, Vec<String>> =
            serde_json::from_slice(body).map_err(|error| format!("what it says is not Consul's: {error}"))?;
        let has_tag = |tags: &Vec<String>| self.settings.tag.as_ref().is_none_or(|tag| tags.contains(tag));
        let names: BTreeSet<_> =
            list.into_iter().filter(|(_, tags)| has_tag(tags)).map(|(name, _)| name).collect();
        let gone = self.names.difference(&names);
        let mut news = gone.map(|name| self.ledger.remove(name)).count() > 0;
        let mut new = Vec::new();
        for name in names.difference(&self.names) {
            // It is part of a path.
            match rules::dns_name("name", name) {
                Ok(()) => new.push(name.clone()),
                Err(why) => {
                    news |= self.ledger.complain(name, vec![format!("service {name:?}: {why}")]);
                }
            }
        }
        self.names = names;
        self.listed = body.into();
        Ok((news, new))
    }

    /// Whether what is said of a service is something else than before.
    fn take(&mut self, name: &str, body: &[u8]) -> bool {
        let name = name.to_owned();
        let known = self.ledger.services(&name).first();
        match read(&name, body, known.map(|known| &**known), &self.settings.namespace, &self.rules) {
            Ok((service, created, problems)) => {
                self.ledger.put(name, created, service.into_iter().collect(), problems)
            }
            // What works stays until there is something better.
            Err(why) => self.ledger.complain(&name, vec![why]),
        }
    }

    fn failed(&self, why: &str) -> String {
        format!("consul {}: {why}", self.settings.address)
    }
}

impl remote::Client for Client {
    async fn connect(&mut self) -> Result<(), String> {
        self.questions = JoinSet::new();
        self.access = Some(self.settings.access(&self.rules).map_err(|why| self.failed(&why))?);
        self.ask(Question::List, 0, Duration::ZERO);
        let Some(Ok((_, _, told))) = self.questions.join_next().await else {
            return Err(self.failed("it was not asked"));
        };
        let list = told.map_err(|why| self.failed(&why))?;
        self.list(&list.body).map_err(|why| self.failed(&why))?;
        // Asked for a few at a time, and only then for news.
        let names: Vec<_> =
            self.names.iter().filter(|name| rules::dns_name("name", name).is_ok()).cloned().collect();
        let mut names = names.into_iter();
        let mut read = Vec::new();
        loop {
            for name in names.by_ref().take(AT_ONCE - self.questions.len()) {
                self.ask(Question::Health(name), 0, Duration::ZERO);
            }
            let Some(done) = self.questions.join_next().await else { break };
            let (question, _, told) = done.map_err(|error| error.to_string())?;
            let told = told.map_err(|why| self.failed(&why))?;
            if let Question::Health(name) = &question {
                self.take(name, &told.body);
            }
            read.push((question, told.index.max(1)));
        }
        for (question, index) in read {
            self.ask(question, index, PAUSE);
        }
        self.ask(Question::List, list.index.max(1), PAUSE);
        Ok(())
    }

    async fn news(&mut self) -> Result<bool, String> {
        self.answer().await
    }

    fn read(&mut self) -> Said {
        self.ledger.read()
    }
}

async fn told(request: reqwest::RequestBuilder) -> Result<Told, String> {
    let answer = request.send().await.map_err(reason)?;
    let status = answer.status();
    let index = answer.headers().get("X-Consul-Index").and_then(|index| index.to_str().ok()?.parse().ok());
    let body = remote::body(answer, MAX).await.map_err(|error| match error {
        Body::TooLarge => format!("an answer has more than {MAX} bytes"),
        Body::Failed(why) => why,
    })?;
    if !status.is_success() {
        let text = String::from_utf8_lossy(&body[..body.len().min(200)]).escape_debug().to_string();
        return Err(format!("{status}: {text}"));
    }
    Ok(Told { index: index.ok_or("an answer has no X-Consul-Index")?, body })
}

/// An instance, as `/v1/health/service` has it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Registered,
    #[serde(default)]
    checks: Vec<Check>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    #[serde(default)]
    node: String,
    #[serde(default)]
    address: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Registered {
    #[serde(rename = "ID")]
    id: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    port: i64,
    #[serde(default)]
    weights: Weights,
    #[serde(default)]
    meta: Option<BTreeMap<String, String>>,
    #[serde(default)]
    locality: Option<Locality>,
    #[serde(default)]
    create_index: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Weights {
    passing: i64,
    warning: i64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { passing: 1, warning: 1 }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Locality {
    zone: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct Check {
    #[serde(rename = "CheckID")]
    id: String,
    status: String,
}

impl Entry {
    /// As a services file has it. Ids are those of a node's agent.
    fn instance(&self, rules: &Rules) -> Result<Instance, String> {
        let Self { node, service, checks } = self;
        let is = |status: &str| checks.iter().any(|check| check.status == status);
        let health = if checks.iter().any(|check| check.id.contains("_maintenance")) {
            "draining"
        } else if is("critical") {
            "unhealthy"
        } else {
            "healthy"
        };
        let address = if service.address.is_empty() { &node.address } else { &service.address };
        if address.parse::<IpAddr>().is_err() {
            return Err(format!("address {address:?} is no IP address"));
        }
        let mut record = json!({
            "id": format!("{}/{}", node.node, service.id),
            "address": address,
            "port": service.port,
            "weight": if is("warning") { service.weights.warning } else { service.weights.passing },
            "health": health,
        });
        if let Some(zone) =
            service.locality.as_ref().map(|locality| &locality.zone).filter(|zone| !zone.is_empty())
        {
            record["zone"] = zone.as_str().into();
        }
        format::instance(record, rules)
    }
}

/// The service, the index at which it was made, and what of it is left out.
type Read = (Option<Service>, u64, Vec<String>);

fn read(
    name: &str,
    body: &[u8],
    known: Option<&Service>,
    namespace: &str,
    rules: &Rules,
) -> Result<Read, String> {
    let label = format!("service {name}.{namespace}");
    let entries: Vec<Value> = serde_json::from_slice(body).map_err(|error| format!("{label}: {error}"))?;
    let (mut instances, mut problems) = (Vec::new(), Vec::new());
    let (mut ids, mut places) = (HashSet::new(), HashSet::new());
    let (mut meta, mut created) = (BTreeMap::new(), u64::MAX);
    for entry in entries {
        let id = entry["Service"]["ID"].as_str().unwrap_or_default().escape_debug().to_string();
        let instance = serde_json::from_value::<Entry>(entry).map_err(|error| error.to_string());
        let instance = instance.and_then(|entry| {
            let instance = entry.instance(rules)?;
            created = created.min(entry.service.create_index);
            meta.extend(entry.service.meta.unwrap_or_default());
            Ok(instance)
        });
        match instance {
            Ok(one) if !ids.insert(one.id.clone()) => {
                problems.push(format!("{label}: instance {id}: the id is used twice"));
            }
            Ok(one) if places.insert((one.address, one.port)) => instances.push(one),
            Ok(one) => problems
                .push(format!("{label}: instance {id}: {} port {} is used twice", one.address, one.port)),
            Err(why) => problems.push(format!("{label}: instance {id}: {why}")),
        }
    }
    let mut record = translate::fields(meta.iter().map(|(key, text)| (key.as_str(), text.as_str())))
        .map_err(|why| format!("{label}: {why}"))?;
    if !record.contains_key("port") {
        let Some(port) = port_of(&instances, known) else {
            if instances.is_empty() {
                return Ok((None, created, problems));
            }
            return Err(format!("{label}: its instances have no port in common, and mesh.port is not set"));
        };
        record.insert("port".into(), port.get().into());
    }
    record.insert("name".into(), name.into());
    record.insert("namespace".into(), namespace.into());
    let service = format::service(record.into(), rules)?;
    if instances.iter().all(|instance| instance.weight == 0) {
        instances.clear();
    }
    Ok((Some(Service { instances, ..service }), created, problems))
}

/// The port that clients dial: what the instances have in common, else what they had.
fn port_of(instances: &[Instance], known: Option<&Service>) -> Option<NonZeroU16> {
    match instances {
        [] => known.map(|service| service.id.port),
        [first, rest @ ..] => rest.iter().all(|one| one.port == first.port).then_some(first.port),
    }
}

/// The list of services, and on each further line what is said of one of them.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let settings = serde_json::from_value(json!({ "address": "10.0.0.1:8500" })).expect("it is whole");
    let mut client = Client::new(settings, rules::for_tests());
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut names = match client.list(lines.next().unwrap_or_default()) {
        Ok((_, names)) => names,
        Err(why) => return super::fuzz::problems(&[why]),
    };
    names.truncate(4);
    for (line, name) in lines.zip(names.iter().cycle()) {
        client.take(name, line);
        super::fuzz::said(&remote::Client::read(&mut client));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Health;

    fn entry(id: &str, address: &str, port: i64, status: &str) -> Value {
        json!({
            "Node": { "Node": "n1", "Address": "10.0.0.9" },
            "Service": {
                "ID": id, "Service": "echo", "Address": address, "Port": port, "CreateIndex": 7,
                "Weights": { "Passing": 10, "Warning": 1 }, "Meta": { "version": "1" },
                "Locality": { "Region": "r", "Zone": "r1" },
            },
            "Checks": [{ "CheckID": "c", "Status": status }],
        })
    }

    fn said(entries: &[Value], known: Option<&Service>) -> Result<Read, String> {
        let body = serde_json::to_vec(entries).unwrap();
        read("echo", &body, known, "service.local", &rules::for_tests())
    }

    #[test]
    fn checks_weights_and_zones_are_followed() {
        let entries = [
            entry("a", "10.0.0.1", 8080, "passing"),
            entry("b", "10.0.0.2", 8080, "warning"),
            entry("c", "", 8080, "critical"),
        ];
        let (service, created, problems) = said(&entries, None).unwrap();
        let service = service.unwrap();
        assert_eq!((service.id.port.get(), created, problems.len()), (8080, 7, 0), "{problems:?}");
        let all: Vec<_> =
            service.instances.iter().map(|one| (one.address.to_string(), one.weight, one.health)).collect();
        let expected = [
            ("10.0.0.1", 10, Health::Healthy),
            ("10.0.0.2", 1, Health::Healthy),
            ("10.0.0.9", 10, Health::Unhealthy),
        ];
        assert_eq!(all, expected.map(|(address, weight, health)| (address.to_owned(), weight, health)));
        assert_eq!(service.instances[0].zone.as_deref(), Some("r1"));
        assert_eq!(service.instances[0].id, "n1/a");

        // Without instances it keeps the port that it had.
        assert_eq!(said(&[], Some(&service)).unwrap().0.unwrap().id.port.get(), 8080);
        assert_eq!(said(&[], None).unwrap().0, None);
    }

    #[test]
    fn a_name_that_is_none_is_named_once_and_not_asked_for() {
        let settings = json!({ "address": "10.0.0.1:8500", "tag": "live" });
        let mut client = Client::new(serde_json::from_value(settings).unwrap(), rules::for_tests());
        let list = br#"{"echo": ["live"], "../kv": ["live"], "other": []}"#;
        assert_eq!(client.list(list), Ok((true, vec!["echo".into()])));
        assert_eq!(client.list(list), Ok((false, vec![])));
        let problems = remote::Client::read(&mut client).problems;
        assert!(problems.len() == 1 && problems[0].starts_with("service \"../kv\": "), "{problems:?}");
        assert_eq!(client.list(br#"{"echo": ["live"]}"#), Ok((true, vec![])));
    }

    #[test]
    fn maintenance_drains_and_settings_are_in_the_meta() {
        let mut one = entry("a", "10.0.0.1", 8080, "passing");
        one["Checks"] = json!([{ "CheckID": "_service_maintenance:a", "Status": "critical" }]);
        one["Service"]["Meta"] = json!({ "mesh.port": "80", "mesh.policy": "random" });
        let other = entry("b", "10.0.0.2", 8081, "passing");
        let service = said(&[one, other], None).unwrap().0.unwrap();
        assert_eq!((service.id.port.get(), service.instances[0].health), (80, Health::Draining));
    }

    #[test]
    fn a_record_that_breaks_a_rule_is_left_out_alone() {
        for (bad, why) in [
            (entry("bad", "127.128.0.1", 8080, "passing"), "VIP range"),
            (entry("bad", "169.254.169.254", 8080, "passing"), "link-local"),
            (entry("bad", "10.0.0.2", -1, "passing"), "-1"),
            (entry("bad", "10.0.0.2", 0, "passing"), "0"),
            (entry("bad", "db.example", 8080, "passing"), "db.example"),
            (entry("ü", "10.0.0.2", 8080, "passing"), "instance id"),
            (json!({ "Service": { "ID": "bad" } }), "Node"),
            (json!(7), "invalid type"),
        ] {
            let (service, _, problems) = said(&[entry("a", "10.0.0.1", 8080, "passing"), bad], None).unwrap();
            assert_eq!(service.unwrap().instances.len(), 1);
            assert!(problems.len() == 1 && problems[0].contains(why), "{why}: {problems:?}");
        }
        let mixed = [entry("a", "10.0.0.1", 8080, "passing"), entry("b", "10.0.0.2", 8081, "passing")];
        assert!(said(&mixed, None).unwrap_err().contains("no port in common"));
    }

    proptest! {
        #[test]
        fn no_answer_does_harm(body in prop::collection::vec(any::<u8>(), 0..100), port in any::<i64>(), text in ".{0,9}") {
            let rules = rules::for_tests();
            let _ = read("echo", &body, None, "service.local", &rules);
            let odd = [entry(&text, "10.0.0.1", port, &text), entry("a", &text, 80, "passing")];
            let _ = said(&odd, None);
        }
    }
}
