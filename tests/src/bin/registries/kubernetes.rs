//! An imitation of Kubernetes' API server: Services and EndpointSlices, in pages and then watched from a version on. It
//! speaks no TLS, and asks nobody who he is.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    ops::Bound,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use mesh_tests::Mesh;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::{sync::watch, time::Instant};

use crate::{
    http::Imitation,
    table::{Table, VIP},
};

/// Objects of one kind.
struct Kind {
    name: &'static str,
    objects: BTreeMap<String, String>,
    /// What has changed, as watches have it, and the version that came of it.
    history: Vec<(u64, Bytes)>,
    /// The last version.
    version: watch::Sender<u64>,
}

impl Kind {
    fn new(name: &'static str) -> Shared {
        let (objects, history, version) = (BTreeMap::new(), Vec::new(), watch::Sender::new(1));
        Arc::new(Mutex::new(Self { name, objects, history, version }))
    }

    fn put(&mut self, mut object: Value) {
        let version = *self.version.borrow() + 1;
        let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let what = if self.objects.contains_key(&name) { "MODIFIED" } else { "ADDED" };
        let event = format!("{}\n", json!({ "type": what, "object": object }));
        self.history.push((version, event.into()));
        self.objects.insert(name, object.to_string());
        self.version.send_replace(version);
    }

    /// The events after a version, and the last version of them.
    fn since(&self, version: u64) -> (u64, Vec<u8>) {
        let start = self.history.partition_point(|(at, _)| *at <= version);
        let events: Vec<_> = self.history[start..].iter().map(|(_, event)| &event[..]).collect();
        (*self.version.borrow(), events.concat())
    }
}

type Shared = Arc<Mutex<Kind>>;
type Options = Query<HashMap<String, String>>;

pub(crate) struct Registry {
    services: Shared,
    slices: Shared,
    _server: Imitation,
    kubeconfig: NamedTempFile,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let (services, slices) = (Kind::new("Service"), Kind::new("EndpointSlice"));
        let router = Router::new()
            .route("/livez", get(async || "ok"))
            .route("/api/v1/services", get(answer).with_state(services.clone()))
            .route("/apis/discovery.k8s.io/v1/endpointslices", get(answer).with_state(slices.clone()))
            .fallback(async || (StatusCode::NOT_FOUND, Json(json!({ "kind": "Status", "code": 404 }))));
        let server = Imitation::serve(router);
        let kubeconfig = NamedTempFile::new().expect("a file");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": { "server": format!("http://{}", server.address) } }],
            "users": [{ "name": "mesh", "user": {} }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "mesh" } }],
        });
        std::fs::write(kubeconfig.path(), text.to_string()).expect("it can be written");
        Self { services, slices, _server: server, kubeconfig }
    }
}

impl crate::Registry for Registry {
    fn settings(&self, _: Table) -> String {
        format!(
            "[[registry]]\ntype = \"kubernetes\"\nkubeconfig = {:?}\nnode = \"n1\"\n",
            self.kubeconfig.path()
        )
    }

    fn fill(&mut self, table: Table, port: u16, _: &mut Mesh) {
        for number in 0..table.services {
            self.services.lock().expect("no panic").put(service(number));
            let slice = slice(number, &table.places(number, port));
            self.slices.lock().expect("no panic").put(slice);
        }
    }

    fn put(&self, port: u16) {
        let slice = slice(0, &[("127.0.0.1".into(), port.into())]);
        self.slices.lock().expect("no panic").put(slice);
    }
}

fn service(number: usize) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "namespace": "default", "name": format!("s{number}"), "creationTimestamp": "2026-01-02T03:04:05Z",
        },
        "spec": {
            "type": "ClusterIP",
            "ports": [{ "name": "web", "port": 80, "targetPort": "web", "protocol": "TCP" }],
        },
    });
    if number == 0 {
        service["spec"]["clusterIPs"] = json!([VIP]);
    }
    service
}

fn slice(service: usize, places: &[(String, usize)]) -> Value {
    let endpoint = |(number, (address, _)): (usize, &(String, usize))| {
        json!({
            "addresses": [address], "nodeName": format!("n{number}"), "zone": "z1",
            "targetRef": { "kind": "Pod", "namespace": "default", "name": format!("s{service}-{number}") },
            "conditions": { "ready": true, "serving": true, "terminating": false },
        })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": format!("s{service}-abcde"),
            "labels": { "kubernetes.io/service-name": format!("s{service}") },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "web", "port": places[0].1, "protocol": "TCP" }],
        "endpoints": places.iter().enumerate().map(endpoint).collect::<Vec<_>>(),
    })
}

async fn answer(State(kind): State<Shared>, options: Options) -> Response {
    if options.get("watch").is_some_and(|watch| watch == "true") {
        return follow(kind, &options);
    }
    let limit = options.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
    let kind = kind.lock().expect("no panic");
    // Nothing changes while it is listed, so that the last name is all that a token needs.
    let after = options.get("continue").map_or(Bound::Unbounded, |name| Bound::Excluded(name.as_str()));
    let mut rest = kind.objects.range::<str, _>((after, Bound::Unbounded));
    let page: Vec<_> = rest.by_ref().take(limit).collect();
    let more = rest.next().and(page.last()).map(|(name, _)| *name);
    let items: Vec<_> = page.iter().map(|(_, object)| object.as_str()).collect();
    let metadata = json!({ "resourceVersion": kind.version.borrow().to_string(), "continue": more });
    let body =
        format!(r#"{{"kind": "{}List", "metadata": {metadata}, "items": [{}]}}"#, kind.name, items.join(","));
    ([("Content-Type", "application/json")], body).into_response()
}

/// Events as they come, until the time that was asked for is over.
fn follow(kind: Shared, options: &Options) -> Response {
    let number = |key: &str| options.get(key).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let end = Instant::now() + Duration::from_secs(number("timeoutSeconds"));
    let news = kind.lock().expect("no panic").version.subscribe();
    let start = (kind, news, number("resourceVersion"));
    let events = futures_util::stream::unfold(start, move |(kind, mut news, since)| async move {
        let newer = tokio::time::timeout_at(end, news.wait_for(|version| *version > since)).await;
        newer.ok()?.ok()?;
        let (version, events) = kind.lock().expect("no panic").since(since);
        Some((Ok::<_, Infallible>(events), (kind, news, version)))
    });
    ([("Content-Type", "application/json")], Body::from_stream(events)).into_response()
}
