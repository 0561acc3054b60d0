//! An imitation of Consul: what of its API the registry of that type uses. Blocking queries wait, each on a connection
//! of its own, for an index of what they ask for; the list of services has news whenever any instance is registered,
//! as Consul's has.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use mesh_tests::Mesh;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    http::Imitation,
    table::{Table, VIP},
};

/// What is said, and since which index.
#[derive(Clone, Default)]
struct Told {
    index: u64,
    body: Bytes,
}

#[derive(Default)]
struct Store {
    index: u64,
    list: watch::Sender<Told>,
    services: BTreeMap<String, watch::Sender<Told>>,
}

impl Store {
    /// Says something else of a service than before.
    fn put(&mut self, name: &str, instances: &Value) {
        self.index += 1;
        let told = |body: Bytes| Told { index: self.index, body };
        let body = instances.to_string().into();
        match self.services.get(name) {
            Some(service) => {
                service.send_replace(told(body));
                let list = self.list.borrow().body.clone();
                self.list.send_replace(told(list));
            }
            None => {
                self.services.insert(name.to_owned(), watch::Sender::new(told(body)));
            }
        }
    }

    /// To be said once all services are there.
    fn name_all(&mut self) {
        let names: BTreeMap<_, [&str; 0]> = self.services.keys().map(|name| (name, [])).collect();
        let body = json!(names).to_string().into();
        self.list.send_replace(Told { index: self.index, body });
    }
}

type Shared = Arc<Mutex<Store>>;
type Options = Query<HashMap<String, String>>;

pub(crate) struct Registry {
    store: Shared,
    server: Imitation,
    services: usize,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let store = Shared::default();
        let router = Router::new()
            .route("/v1/catalog/services", get(list))
            .route("/v1/health/service/{name}", get(health))
            .with_state(store.clone());
        Self { store, server: Imitation::serve(router), services: 0 }
    }
}

impl crate::Registry for Registry {
    fn settings(&self, _: Table) -> String {
        format!("[[registry]]\ntype = \"consul\"\naddress = \"http://{}\"\n", self.server.address)
    }

    fn fill(&mut self, table: Table, port: u16, _: &mut Mesh) {
        let mut store = self.store.lock().expect("no panic");
        for service in 0..table.services {
            let places = table.places(service, port).into_iter().enumerate();
            let entries = places.map(|(number, (address, port))| entry(service, number, &address, port));
            store.put(&format!("s{service}"), &entries.collect());
        }
        store.name_all();
        self.services = table.services;
    }

    fn put(&self, port: u16) {
        let entries = json!([entry(0, 0, "127.0.0.1", port.into())]);
        self.store.lock().expect("no panic").put("s0", &entries);
    }

    /// A blocking query is asked again after 60 seconds, and as many as there are connections are most of what is done.
    fn turn(&self) -> Duration {
        Duration::from_secs(if self.services > 100 { 65 } else { 5 })
    }
}

/// An instance as `/v1/health/service` has it.
fn entry(service: usize, number: usize, address: &str, port: usize) -> Value {
    let mut meta = json!({ "mesh.port": "80" });
    if service == 0 {
        meta["mesh.vip"] = VIP.into();
    }
    json!({
        "Node": { "Node": format!("n{number}"), "Address": address },
        "Service": {
            "ID": format!("s{service}-i{number}"), "Service": format!("s{service}"), "Address": address, "Port": port,
            "Tags": [], "Meta": meta, "Weights": { "Passing": 1, "Warning": 1 }, "CreateIndex": service + 1,
        },
        "Checks": [
            { "CheckID": "serfHealth", "Status": "passing" },
            { "CheckID": format!("service:s{service}-i{number}"), "Status": "passing" },
        ],
    })
}

async fn list(State(store): State<Shared>, options: Options) -> Response {
    let told = store.lock().expect("no panic").list.subscribe();
    answer(told, &options).await
}

async fn health(State(store): State<Shared>, Path(name): Path<String>, options: Options) -> Response {
    let told = store.lock().expect("no panic").services.get(&name).map(watch::Sender::subscribe);
    match told {
        Some(told) => answer(told, &options).await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// At once, or when there is something newer than an index, or when the time to wait is over.
async fn answer(mut told: watch::Receiver<Told>, options: &Options) -> Response {
    let number = |key: &str| options.get(key).and_then(|text| text.trim_end_matches('s').parse::<u64>().ok());
    if let (Some(index), Some(wait)) = (number("index"), number("wait")) {
        // Consul adds up to a sixteenth, at random.
        let wait = wait * 1000 + wait * 1000 / 16 * (mesh_tests::now() % 1000) / 1000;
        let newer = told.wait_for(|told| told.index > index);
        let _ = tokio::time::timeout(Duration::from_millis(wait), newer).await;
    }
    let Told { index, body } = told.borrow().clone();
    let headers = [("X-Consul-Index", index.to_string()), ("Content-Type", "application/json".into())];
    (headers, body).into_response()
}
