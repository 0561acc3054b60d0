//! The etcd registry, through etcd's JSON gateway: everything is listed once, then watched from that
//! revision on; after an interruption from the last change that was told, if that is still what happened then.

use std::{path::PathBuf, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use reqwest::Url;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{
    Rules,
    remote::{self, Body, Lines, Said, Tls, jitter, reason, secret},
    rules,
};

mod mirror;

use mirror::Mirror;

/// As many keys are asked for at a time; fewer where they hold so much that the answer is too large.
const PAGE: usize = 10_000;

/// The largest answer, and the largest message of a watch, in bytes. etcd takes requests of 1.5 MiB.
const MAX: usize = 16 << 20;

const LATE: &str = "no answer in time";

/// The longest time for one page, however slowly it comes.
const PAGE_TIME: Duration = Duration::from_secs(8);

/// The keys in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    endpoints: Vec<String>,
    #[serde(default = "prefix")]
    prefix: String,
    #[serde(default)]
    tls: Tls,
    username: Option<String>,
    password_file: Option<PathBuf>,
}

fn prefix() -> String {
    "/mesh".into()
}

impl Settings {
    pub fn check(&self, rules: &Rules) -> Result<(), String> {
        if self.endpoints.is_empty() {
            return Err("endpoints names no server".into());
        }
        if self.prefix.is_empty() || self.prefix.ends_with('/') {
            return Err(format!("prefix {:?} must not be empty or end with a slash", self.prefix));
        }
        self.endpoints.iter().try_for_each(|endpoint| {
            remote::url(endpoint, &rules.vip_ranges).map_err(|why| format!("endpoints: {why}")).map(drop)
        })?;
        if !self.is_secure() && !self.tls.is_empty() {
            return Err("tls is given, but no endpoint is https://".into());
        }
        if self.username.is_some() != self.password_file.is_some() {
            return Err("username and password_file go together".into());
        }
        self.password()?;
        self.http(rules).map(drop)
    }

    fn is_secure(&self) -> bool {
        self.endpoints.iter().any(|endpoint| endpoint.starts_with("https:"))
    }

    fn http(&self, rules: &Rules) -> Result<reqwest::Client, String> {
        remote::http(&rules.vip_ranges, self.is_secure().then_some(&self.tls), Some(remote::PERIOD))
    }

    fn password(&self) -> Result<Option<String>, String> {
        self.password_file.as_ref().map(|path| secret("password_file", path)).transpose()
    }

    pub fn source(&self) -> String {
        format!("{} {}", self.endpoints.join(","), self.prefix)
    }
}

pub struct Client {
    settings: Settings,
    rules: Rules,
    endpoints: Vec<Url>,
    /// The one to ask.
    endpoint: usize,
    mirror: Mirror,
    /// The last change that is in the mirror, if it was a put.
    last: Option<Kv>,
    watch: Option<Watch>,
    /// The question whether the server is still there.
    alive: JoinSet<Result<(), String>>,
}

/// How a server is asked, and as whom.
#[derive(Clone)]
struct Access {
    http: reqwest::Client,
    token: Option<String>,
}

/// What is told of changes.
struct Watch {
    access: Access,
    answer: reqwest::Response,
    lines: Lines,
}

impl Client {
    /// With settings that were checked.
    pub fn new(settings: Settings, rules: Rules) -> Self {
        let endpoints = settings.endpoints.iter().filter_map(|text| Url::parse(text).ok()).collect();
        let mirror = Mirror::new(&settings.prefix, rules.clone());
        let (last, watch, alive) = (None, None, JoinSet::new());
        Self { settings, rules, endpoints, endpoint: 0, mirror, last, watch, alive }
    }

    fn url(&self) -> &Url {
        &self.endpoints[self.endpoint]
    }

    /// Reads the files anew, and shows who asks, where somebody is to be shown.
    async fn access(&self) -> Result<Access, String> {
        #[derive(Deserialize)]
        struct Authenticated {
            token: String,
        }
        let access = Access { http: self.settings.http(&self.rules)?, token: None };
        let (Some(name), Some(password)) = (&self.settings.username, self.settings.password()?) else {
            return Ok(access);
        };
        let request = json!({ "name": name, "password": password });
        let answer = async {
            let answer = access.post(self.url(), "v3/auth/authenticate", &request).await?;
            remote::body(answer, MAX).await.map_err(|_| "no whole answer".to_owned())
        };
        let body = tokio::time::timeout(remote::ANSWER, answer).await.map_err(|_| LATE)??;
        Ok(Access { token: Some(parse::<Authenticated>(&body)?.token), ..access })
    }

    async fn open(&mut self) -> Result<Watch, String> {
        let access = self.access().await?;
        if let Some(revision) = self.known(&access).await
            && let Ok(watch) = self.watch(access.clone(), revision).await
        {
            return Ok(watch);
        }
        let revision = self.list(&access).await?;
        self.watch(access, revision).await
    }

    /// The revision of the last change, if it is there as it was told: an etcd that was restored from a backup may
    /// have gone another way since.
    async fn known(&self, access: &Access) -> Option<i64> {
        let last = self.last.as_ref()?;
        let key = BASE64_STANDARD.encode(&last.key.0);
        let request = json!({ "key": key, "revision": last.mod_revision.to_string() });
        let answer = async {
            let answer = access.post(self.url(), "v3/kv/range", &request).await.ok()?;
            remote::body(answer, MAX).await.ok()
        };
        let body = tokio::time::timeout(remote::ANSWER, answer).await.ok()??;
        let page: Page = parse(&body).ok()?;
        (page.kvs.first() == Some(last)).then_some(last.mod_revision)
    }

    /// What is told of changes after a revision.
    async fn watch(&mut self, access: Access, revision: i64) -> Result<Watch, String> {
        let from = json!({ "start_revision": (revision + 1).to_string() });
        let request = json!({ "create_request": self.range(self.start(), from) });
        let sent = access.post(self.url(), "v3/watch", &request);
        let answer = tokio::time::timeout(remote::ANSWER, sent).await.map_err(|_| LATE)??;
        let mut watch = Watch { access, answer, lines: Lines::default() };
        // The first message says that it watches.
        let first = tokio::time::timeout(remote::ANSWER, watch.messages()).await;
        for message in first.map_err(|_| LATE)?? {
            self.take(message)?;
        }
        Ok(watch)
    }

    /// Reads everything; the revision that this is.
    async fn list(&mut self, access: &Access) -> Result<i64, String> {
        let mut from = self.start();
        let mut limit = PAGE;
        let mut revision = None;
        self.mirror.begin();
        let mut newest: Option<Kv> = None;
        loop {
            let at = json!({ "limit": limit.to_string(), "revision": revision.unwrap_or(0).to_string() });
            let request = self.range(from.clone(), at);
            let page = async {
                let answer = access.post(self.url(), "v3/kv/range", &request).await;
                let answer = answer.map_err(Body::Failed)?;
                remote::body(answer, MAX).await
            };
            let page: Page = match tokio::time::timeout(PAGE_TIME, page).await {
                Err(_) => return Err("no whole answer in time".into()),
                Ok(Err(Body::TooLarge)) if limit > 1 => {
                    limit /= 2;
                    continue;
                }
                Ok(Err(Body::TooLarge)) => return Err(format!("a key holds more than {MAX} bytes")),
                Ok(Err(Body::Failed(why))) => return Err(why),
                Ok(Ok(body)) => parse(&body)?,
            };
            // All pages are of the revision of the first.
            let revision = *revision.get_or_insert(page.header.revision);
            let last = page.kvs.last().map(|kv| kv.key.0.clone());
            // Only the whole is a state to go on from.
            self.last = None;
            for kv in page.kvs {
                self.mirror.put(&kv.key.0, &kv.value.0, kv.create_revision);
                if newest.as_ref().is_none_or(|newest| newest.mod_revision < kv.mod_revision) {
                    newest = Some(kv);
                }
            }
            match last.filter(|_| page.more) {
                None => {
                    self.mirror.listed();
                    self.last = newest;
                    return Ok(revision);
                }
                Some(last) => {
                    from = last;
                    from.push(0);
                }
            }
        }
    }

    fn start(&self) -> Vec<u8> {
        format!("{}/", self.settings.prefix).into()
    }

    /// The keys from `from` to the last one below the prefix.
    fn range(&self, from: Vec<u8>, mut more: Value) -> Value {
        more["key"] = BASE64_STANDARD.encode(from).into();
        // The byte after a slash.
        more["range_end"] = BASE64_STANDARD.encode(format!("{}0", self.settings.prefix)).into();
        more
    }

    /// Asks in a while whether the server still answers.
    fn ask(&self, access: Access) -> impl Future<Output = Result<(), String>> + Send + 'static {
        let url = self.url().clone();
        let request = self.range(self.start(), json!({ "count_only": true }));
        async move {
            tokio::time::sleep(jitter(remote::PERIOD)).await;
            let answer = async {
                let answer = access.post(&url, "v3/kv/range", &request).await?;
                remote::body(answer, MAX).await.map(drop).map_err(|_| "no whole answer".to_owned())
            };
            tokio::time::timeout(remote::ANSWER, answer).await.map_err(|_| LATE)?
        }
    }

    /// Whether a message changed anything. After one that is not understood all is to be read again.
    fn take(&mut self, message: Message) -> Result<bool, String> {
        let last = self.last.take();
        if let Some(error) = message.error {
            return Err(format!("the watch has failed: {}", rules::shown(&error)));
        }
        let told = message.result;
        if told.canceled {
            return Err(match told.compact_revision {
                0 => format!("the watch was cancelled: {}", rules::shown(&told.cancel_reason)),
                revision => {
                    format!("history is compacted up to revision {revision}: everything is read again")
                }
            });
        }
        let changed = !told.events.is_empty();
        self.last = last;
        for Event { kind, kv } in told.events {
            self.last = match &*kind {
                "DELETE" => {
                    self.mirror.delete(&kv.key.0);
                    None
                }
                _ => {
                    self.mirror.put(&kv.key.0, &kv.value.0, kv.create_revision);
                    Some(kv)
                }
            };
        }
        Ok(changed)
    }

    async fn wait(&mut self) -> Result<bool, String> {
        let access = self.watch.as_ref().map(|watch| watch.access.clone());
        if let Some(access) = access.filter(|_| self.alive.is_empty()) {
            self.alive.spawn(self.ask(access));
        }
        let watch = self.watch.as_mut().ok_or("not connected")?;
        let messages = tokio::select! {
            messages = watch.messages() => messages?,
            Some(alive) = self.alive.join_next() => {
                alive.map_err(|error| error.to_string())??;
                Vec::new()
            }
        };
        let mut changed = false;
        for message in messages {
            changed |= self.take(message)?;
        }
        Ok(changed)
    }
}

impl remote::Client for Client {
    async fn connect(&mut self) -> Result<(), String> {
        if self.watch.take().is_some() {
            // Asked for while all is well: somebody wants everything to be read.
            self.last = None;
        }
        self.alive = JoinSet::new();
        let mut errors = Vec::new();
        for _ in 0..self.endpoints.len() {
            match self.open().await {
                Ok(watch) => {
                    self.watch = Some(watch);
                    return Ok(());
                }
                Err(why) => errors.push(self.failed(&why)),
            }
        }
        Err(errors.join("; "))
    }

    async fn news(&mut self) -> Result<bool, String> {
        let news = self.wait().await;
        if news.is_err() {
            self.watch = None;
        }
        news.map_err(|why| self.failed(&why))
    }

    fn read(&mut self) -> Said {
        self.mirror.read()
    }
}

impl Client {
    /// Turns to the next endpoint.
    fn failed(&mut self, why: &str) -> String {
        let error = format!("etcd {}: {why}", self.url().as_str().trim_end_matches('/'));
        self.endpoint = (self.endpoint + 1) % self.endpoints.len();
        error
    }
}

impl Watch {
    /// The next whole messages. Nothing is lost when the wait is given up.
    async fn messages(&mut self) -> Result<Vec<Message>, String> {
        loop {
            let chunk = self.answer.chunk().await.map_err(reason)?.ok_or("the watch has ended")?;
            let lines = self.lines.push(&chunk, MAX);
            let lines = lines.ok_or_else(|| format!("a message of the watch has more than {MAX} bytes"))?;
            if !lines.is_empty() {
                return lines.iter().map(|line| parse(line)).collect();
            }
        }
    }
}

impl Access {
    async fn post(&self, url: &Url, path: &str, body: &Value) -> Result<reqwest::Response, String> {
        let url = url.join(path).map_err(|error| error.to_string())?;
        let mut request = self.http.post(url).body(body.to_string());
        if let Some(token) = &self.token {
            request = request.header("Authorization", token);
        }
        let answer = request.send().await.map_err(reason)?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let text = remote::body(answer, 1 << 16).await.unwrap_or_default();
        let told = serde_json::from_slice::<Value>(&text).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[..text.len().min(200)]);
        let why = told["error"].as_str().unwrap_or(text.trim());
        Err(format!("{status}: {}", rules::shown(&why)))
    }
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    serde_json::from_slice(text).map_err(|error| format!("what it says is not etcd's: {error}"))
}

/// The answer to a range request.
#[derive(Deserialize)]
struct Page {
    header: Header,
    #[serde(default)]
    kvs: Vec<Kv>,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct Header {
    #[serde(deserialize_with = "int64")]
    revision: i64,
}

#[derive(Deserialize, PartialEq)]
struct Kv {
    key: Bytes,
    #[serde(default)]
    value: Bytes,
    #[serde(default, deserialize_with = "int64")]
    create_revision: i64,
    #[serde(default, deserialize_with = "int64")]
    mod_revision: i64,
}

/// A line of a watch.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    result: Told,
    error: Option<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Told {
    canceled: bool,
    #[serde(deserialize_with = "int64")]
    compact_revision: i64,
    cancel_reason: String,
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    /// Not given for a put, which is protobuf's zero.
    #[serde(default, rename = "type")]
    kind: String,
    kv: Kv,
}

#[derive(Default, PartialEq)]
struct Bytes(Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// Protobuf's JSON has these as texts.
fn int64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
