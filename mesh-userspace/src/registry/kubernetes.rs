//! The Kubernetes registry: Services and EndpointSlices, listed once and then watched.

use std::{path::PathBuf, time::Duration};

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper_util::{
    client::legacy::{Client as Http, connect::HttpConnector, connect::dns::Name},
    rt::TokioExecutor,
};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Client as Api, Config, Resource,
    api::{GetParams, ListParams, WatchParams},
    client::{Body, ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
    core::Request,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    Rules,
    remote::{self, Lines, Said, jitter},
    rules,
};

mod mirror;

use mirror::{Mirror, Place};

/// As many objects are asked for at a time; fewer where they hold so much that the answer is too large.
const PAGE: u32 = 500;

/// The largest answer, and the largest event, in bytes. An object may have 1.5 MiB.
const MAX: usize = 32 << 20;

/// The longest time for one page, however slowly it comes.
const PAGE_TIME: Duration = Duration::from_secs(8);

/// A watch ends after half to all of this, and is taken up where it ended.
const WATCH: Duration = Duration::from_secs(600);

/// One that ends sooner was not meant to.
const SHORTEST: Duration = Duration::from_secs(1);

/// As many messages wait to be read; then the server waits.
const WAITING: usize = 64;

const LATE: &str = "no answer in time";
const GONE: &str = "history is gone: everything is read again";

/// The keys in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Without one, what a pod is given.
    kubeconfig: Option<PathBuf>,
    /// Names; all if there are none.
    #[serde(default)]
    namespaces: Vec<String>,
    /// What comes after a namespace's name.
    #[serde(default = "domain")]
    domain: String,
    /// The name that this node has there.
    node: Option<String>,
}

fn domain() -> String {
    "svc.cluster.local".into()
}

impl Settings {
    pub fn check(&self) -> Result<(), String> {
        rules::dns_name("domain", &self.domain)?;
        // They are parts of a path.
        self.namespaces.iter().try_for_each(|name| rules::dns_name("namespaces:", name))?;
        self.node.iter().try_for_each(|name| rules::dns_name("node", name))
    }

    pub fn source(&self) -> String {
        let place = self.kubeconfig.as_ref().map_or("in-cluster".into(), |path| path.display().to_string());
        [&[place, self.domain.clone()], &self.namespaces[..]].concat().join(" ")
    }

    fn node(&self) -> String {
        let given = self.node.clone().or_else(|| std::env::var("NODE_NAME").ok());
        given.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
    }
}

/// Objects of one kind, in one namespace or all of them.
#[derive(Clone, Debug)]
struct Scope {
    kind: Kind,
    path: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Service,
    Slice,
}

impl Scope {
    fn new(kind: Kind, namespace: Option<&str>) -> Self {
        let path = match kind {
            Kind::Service => Service::url_path(&(), namespace),
            Kind::Slice => EndpointSlice::url_path(&(), namespace),
        };
        Self { kind, path }
    }
}

pub struct Client {
    settings: Settings,
    rules: Rules,
    /// The zone in the configuration.
    zone: Option<String>,
    mirror: Mirror,
    /// The server that was asked last.
    server: String,
    /// Watches, and the question whether the server is still there.
    tasks: JoinSet<()>,
    told: Option<mpsc::Receiver<Told>>,
}

/// What has changed; nothing, where the server was only heard.
type Told = Result<Vec<Change>, String>;

struct Change {
    kind: Kind,
    gone: bool,
    object: Value,
}

impl Client {
    /// With settings that were checked, on a node in this zone.
    pub fn new(settings: Settings, zone: Option<String>, rules: Rules) -> Self {
        let mirror = Mirror::new(settings.domain.clone(), rules.clone());
        let (server, tasks, told) = (settings.source(), JoinSet::new(), None);
        Self { settings, rules, zone, mirror, server, tasks, told }
    }

    fn scopes(&self) -> Vec<Scope> {
        let of = |kind| {
            let some = self.settings.namespaces.iter().map(move |name| Scope::new(kind, Some(name)));
            let all = self.settings.namespaces.is_empty().then(|| Scope::new(kind, None));
            some.chain(all)
        };
        of(Kind::Service).chain(of(Kind::Slice)).collect()
    }

    async fn open(&mut self) -> Result<(), String> {
        (self.tasks, self.told) = (JoinSet::new(), None);
        let config = config(self.settings.kubeconfig.as_ref()).await?;
        // Without what else may be in its URL.
        let host = config.cluster_url.host().unwrap_or_default();
        self.server = config.cluster_url.port().map_or(host.into(), |port| format!("{host}:{port}"));
        let api = api(&config, &self.rules)?;
        let node = self.settings.node();
        let zone = match &self.zone {
            Some(zone) => Some(zone.clone()),
            None => zone_of(&api, &node).await?,
        };
        self.mirror.begin(Place { node, zone });
        let mut listed = Vec::new();
        for scope in self.scopes() {
            let version = self.list(&api, &scope).await?;
            listed.push((scope, version));
        }
        self.mirror.listed();
        let (tell, told) = mpsc::channel(WAITING);
        for (scope, version) in listed {
            let answer = begin(&api, &scope, &version).await?;
            self.tasks.spawn(watch(api.clone(), scope, version, answer, tell.clone()));
        }
        self.tasks.spawn(alive(api, tell));
        self.told = Some(told);
        Ok(())
    }

    /// Reads all objects; the version that this is.
    async fn list(&mut self, api: &Api, scope: &Scope) -> Result<String, String> {
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let request = Request::new(&scope.path).list(&params).map_err(|error| error.to_string())?;
            let page = timeout(PAGE_TIME, ask(api, request)).await.map_err(|_| "no whole answer in time")?;
            let page = match (page, params.limit) {
                (Ok(body), _) => parse::<Page>(&body)?,
                (Err(Failed::TooLarge), Some(limit @ 2..)) => {
                    params.limit = Some(limit / 2);
                    continue;
                }
                (Err(failed), _) => return Err(failed.into()),
            };
            for object in page.items {
                self.mirror.put(scope.kind, object);
            }
            params.continue_token = page.metadata.more.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                return Ok(page.metadata.version);
            }
        }
    }
}

impl remote::Client for Client {
    async fn connect(&mut self) -> Result<(), String> {
        self.open().await.map_err(|why| self.failed(&why))
    }

    async fn news(&mut self) -> Result<bool, String> {
        let told = match &mut self.told {
            Some(told) => told.recv().await,
            None => None,
        };
        let changes = told.unwrap_or_else(|| Err("not connected".into()));
        let changes = changes.map_err(|why| self.failed(&why))?;
        let changed = !changes.is_empty();
        for Change { kind, gone, object } in changes {
            if gone {
                self.mirror.delete(kind, &object);
            } else {
                self.mirror.put(kind, object);
            }
        }
        Ok(changed)
    }

    fn read(&mut self) -> Said {
        self.mirror.read()
    }
}

impl Client {
    fn failed(&self, why: &str) -> String {
        format!("kubernetes {}: {why}", self.server)
    }
}

async fn config(kubeconfig: Option<&PathBuf>) -> Result<Config, String> {
    let Some(path) = kubeconfig else {
        return Config::incluster().map_err(|error| error.to_string());
    };
    let file = Kubeconfig::read_from(path).map_err(|error| error.to_string())?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    let config = config.map_err(|error| format!("{}: {error}", path.display()))?;
    let user = &config.auth_info;
    let why = if user.exec.is_some() || user.auth_provider.is_some() {
        "its user is a program to run: give it a token, a tokenFile or a certificate instead"
    } else if config.proxy_url.is_some() {
        "it names a proxy"
    } else {
        return Ok(config);
    };
    Err(format!("{}: {why}", path.display()))
}

/// As [`remote::http`] does: never through a proxy, to where no VIP is.
fn api(config: &Config, rules: &Rules) -> Result<Api, String> {
    remote::host(config.cluster_url.host().unwrap_or_default(), &rules.vip_ranges)?;
    let vip_ranges = rules.vip_ranges.clone();
    let resolver = tower::service_fn(move |name: Name| {
        let vip_ranges = vip_ranges.clone();
        async move { remote::resolve(name.as_str(), &vip_ranges).await }
    });
    let mut connector = HttpConnector::new_with_resolver(resolver);
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(remote::CONNECT));
    connector.set_keepalive(Some(remote::PERIOD));
    connector.set_keepalive_interval(Some(remote::KEEPALIVE));
    connector.set_keepalive_retries(Some(remote::KEEPALIVES));
    connector.set_tcp_user_timeout(Some(remote::ANSWER));
    let connector = config.rustls_https_connector_with_connector(connector);
    let http = Http::builder(TokioExecutor::new()).build(connector.map_err(|error| error.to_string())?);
    // As the layer that adds credentials has it.
    let http = tower::util::MapErr::new(http, tower::BoxError::from);
    let builder = ClientBuilder::new(http, &config.default_namespace).with_layer(&config.base_uri_layer());
    Ok(match config.auth_layer().map_err(|error| error.to_string())? {
        Some(layer) => builder.with_layer(&layer).build(),
        None => builder.build(),
    })
}

/// What the node's own object says, if it may be read.
async fn zone_of(api: &Api, node: &str) -> Result<Option<String>, String> {
    let request = Request::new(Node::url_path(&(), None)).get(node, &GetParams::default());
    // A name that is none has no zone.
    let Ok(request) = request else { return Ok(None) };
    match timeout(remote::ANSWER, ask(api, request)).await.map_err(|_| LATE)? {
        Ok(body) => {
            let labels = parse::<Node>(&body)?.metadata.labels;
            Ok(labels.and_then(|mut labels| labels.remove("topology.kubernetes.io/zone")))
        }
        Err(Failed::Status(403 | 404, _)) => Ok(None),
        Err(failed) => Err(failed.into()),
    }
}

/// A watch of what changes after a version.
async fn begin(api: &Api, scope: &Scope, version: &str) -> Result<Body, String> {
    let seconds = u32::try_from(jitter(WATCH).as_secs()).unwrap_or_default();
    let params = WatchParams { timeout: Some(seconds), ..WatchParams::default() };
    let request = Request::new(&scope.path).watch(&params, version).map_err(|error| error.to_string())?;
    match timeout(remote::ANSWER, send(api, request)).await.map_err(|_| LATE)? {
        Ok(answer) => Ok(answer),
        Err(Failed::Status(410, _)) => Err(GONE.into()),
        Err(failed) => Err(failed.into()),
    }
}

/// Tells what changes, until that fails.
async fn watch(api: Api, scope: Scope, mut version: String, mut answer: Body, tell: mpsc::Sender<Told>) {
    let why = loop {
        let began = Instant::now();
        if let Err(why) = follow(answer, scope.kind, &mut version, &tell).await {
            break why;
        }
        if began.elapsed() < SHORTEST {
            break "the watch has ended at once".into();
        }
        answer = match begin(&api, &scope, &version).await {
            Ok(answer) => answer,
            Err(why) => break why,
        };
    };
    let _ = tell.send(Err(why)).await;
}

/// One watch, until it ends.
async fn follow(
    mut answer: Body,
    kind: Kind,
    version: &mut String,
    tell: &mpsc::Sender<Told>,
) -> Result<(), String> {
    let mut lines = Lines::default();
    while let Some(frame) = answer.frame().await {
        let Ok(bytes) = frame.map_err(|error| reason(&error))?.into_data() else { continue };
        let lines = lines.push(&bytes, MAX).ok_or_else(|| format!("an event has more than {MAX} bytes"))?;
        let mut changes = Vec::new();
        for line in lines {
            changes.extend(told(&line, kind, version)?);
        }
        if !changes.is_empty() && tell.send(Ok(changes)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// What a line of a watch changes, and the version that it takes everything to.
fn told(line: &[u8], kind: Kind, version: &mut String) -> Result<Option<Change>, String> {
    let Event { what, object } = parse(line)?;
    let gone = match &*what {
        "ADDED" | "MODIFIED" => Some(false),
        "DELETED" => Some(true),
        "BOOKMARK" => None,
        "ERROR" if object["code"] == 410 => return Err(GONE.into()),
        _ => return Err(format!("the watch has failed: {}", shown(&object["message"]))),
    };
    if let Some(new) = object["metadata"]["resourceVersion"].as_str() {
        new.clone_into(version);
    }
    Ok(gone.map(|gone| Change { kind, gone, object }))
}

/// Asks now and then whether the server still answers: any answer will do.
async fn alive(api: Api, tell: mpsc::Sender<Told>) {
    let livez = match Request::new("").get("livez", &GetParams::default()) {
        Ok(request) => request,
        Err(error) => return drop(tell.send(Err(error.to_string())).await),
    };
    loop {
        sleep(jitter(remote::PERIOD)).await;
        let told = match timeout(remote::ANSWER, ask(&api, livez.clone())).await {
            Err(_) => Err(LATE.into()),
            Ok(Ok(_) | Err(Failed::Status(..))) => Ok(Vec::new()),
            Ok(Err(failed)) => Err(failed.into()),
        };
        let failed = told.is_err();
        if tell.send(told).await.is_err() || failed {
            return;
        }
    }
}

/// Why there is no answer.
enum Failed {
    Status(u16, String),
    TooLarge,
    Call(String),
}

impl From<Failed> for String {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Status(status, why) => format!("status {status}: {why}"),
            Failed::TooLarge => format!("an answer has more than {MAX} bytes"),
            Failed::Call(why) => why,
        }
    }
}

async fn send(api: &Api, request: hyper::Request<Vec<u8>>) -> Result<Body, Failed> {
    let answer = api.send(request.map(Body::from)).await.map_err(|error| Failed::Call(reason(&error)))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer.into_body());
    }
    let body = Limited::new(answer.into_body(), 1 << 16).collect().await;
    let told = body.ok().and_then(|body| serde_json::from_slice::<Value>(&body.to_bytes()).ok());
    let told = told.unwrap_or_default();
    Err(Failed::Status(status.as_u16(), shown(&told["message"])))
}

async fn ask(api: &Api, request: hyper::Request<Vec<u8>>) -> Result<Vec<u8>, Failed> {
    let body = Limited::new(send(api, request).await?, MAX).collect().await;
    body.map(|body| body.to_bytes().into()).map_err(|error| {
        if error.is::<LengthLimitError>() { Failed::TooLarge } else { Failed::Call(reason(&*error)) }
    })
}

/// Of what an error says, the innermost: the rest repeats the address.
fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// Whatever somebody says, on one line.
fn shown(text: &Value) -> String {
    text.as_str().map_or("no reason is given".into(), |text| text.escape_debug().take(200).collect())
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    serde_json::from_slice(text).map_err(|error| format!("what it says is not Kubernetes': {error}"))
}

/// A part of a list. Objects are looked at one by one: a bad one is left out alone.
#[derive(Deserialize)]
struct Page {
    metadata: PageMeta,
    items: Vec<Value>,
}

#[derive(Deserialize)]
struct PageMeta {
    #[serde(rename = "resourceVersion")]
    version: String,
    #[serde(rename = "continue")]
    more: Option<String>,
}

/// A line of a watch.
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    what: String,
    object: Value,
}

#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
