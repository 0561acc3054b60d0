//! The embedded registry, of the daemon itself; and Cloud Map, which is that of another daemon.

use std::{collections::BTreeMap, fs, time::Duration};

use mesh_tests::{Mesh, free_address};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    http::Caller,
    launch,
    table::{Table, VIP},
};

/// Calls that wait for their answers at a time.
const AT_ONCE: usize = 200;

/// Calls Cloud Map's API.
struct Api {
    caller: Caller,
    address: String,
    /// The id of the first service.
    first: String,
}

impl Api {
    fn new() -> Self {
        Self { caller: Caller::new(), address: free_address(), first: String::new() }
    }

    fn settings(&self) -> String {
        format!("[[registry]]\ntype = \"embedded\"\nlisten = {:?}\n", self.address)
    }

    fn fill(&mut self, table: Table, port: u16) {
        self.call("CreateHttpNamespace", &json!({ "Name": "service.local" }));
        let list = self.call("ListNamespaces", &json!({}));
        let namespace = list["Namespaces"][0]["Id"].clone();
        let create = |n| json!({ "Name": format!("s{n}"), "NamespaceId": namespace });
        let created = self.calls("CreateService", (0..table.services).map(create));
        let of_service = |answer: &Value| {
            let text = |key: &str| answer["Service"][key].as_str().expect("a service").to_owned();
            (text("Name"), text("Id"))
        };
        let ids: BTreeMap<_, _> = created.iter().map(of_service).collect();
        self.first = ids["s0"].clone();
        let attributes = json!({ "mesh.port": "80", "mesh.vip": VIP });
        self.call("UpdateServiceAttributes", &json!({ "ServiceId": self.first, "Attributes": attributes }));
        let places = (0..table.services).flat_map(|service| {
            let places = table.places(service, port).into_iter().enumerate();
            places.map(move |(number, place)| (service, number, place))
        });
        let register = |(service, number, (address, port)): (usize, usize, (String, usize))| {
            instance(&ids[&format!("s{service}")], number, &address, port)
        };
        self.calls("RegisterInstance", places.map(register));
    }

    fn put(&self, port: u16) {
        self.call("RegisterInstance", &instance(&self.first, 0, "127.0.0.1", port.into()));
    }

    fn request(&self, operation: &str, input: &Value) -> reqwest::RequestBuilder {
        let request = self.caller.http.post(format!("http://{}", self.address)).body(input.to_string());
        let request = request.header("X-Amz-Target", format!("Route53AutoNaming_v20170314.{operation}"));
        request.header("Content-Type", "application/x-amz-json-1.1")
    }

    fn call(&self, operation: &str, input: &Value) -> Value {
        self.caller.runtime.block_on(answer(self.request(operation, input)))
    }

    /// The answers come in any order.
    fn calls(&self, operation: &str, mut inputs: impl Iterator<Item = Value>) -> Vec<Value> {
        self.caller.runtime.block_on(async {
            let (mut calls, mut answers) = (JoinSet::new(), Vec::new());
            loop {
                for input in inputs.by_ref().take(AT_ONCE - calls.len()) {
                    calls.spawn(answer(self.request(operation, &input)));
                }
                let Some(answer) = calls.join_next().await else { return answers };
                answers.push(answer.expect("no panic"));
            }
        })
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Value {
    let answer = request.send().await.expect("the registry answers");
    let status = answer.status();
    let body = answer.text().await.expect("a body");
    assert!(status.is_success(), "{status}: {body}");
    serde_json::from_str(&body).expect("JSON")
}

fn instance(service: &str, number: usize, address: &str, port: usize) -> Value {
    let attributes = json!({ "AWS_INSTANCE_IPV4": address, "AWS_INSTANCE_PORT": port.to_string() });
    json!({ "ServiceId": service, "InstanceId": format!("i{number}"), "Attributes": attributes })
}

pub(crate) struct Registry(Api);

impl Registry {
    pub(crate) fn new() -> Self {
        Self(Api::new())
    }
}

impl crate::Registry for Registry {
    fn settings(&self, _: Table) -> String {
        self.0.settings()
    }

    /// By an earlier run of the daemon, of which only the registry's own file is left.
    fn fill(&mut self, table: Table, port: u16, mesh: &mut Mesh) {
        launch(mesh);
        self.0.fill(table, port);
        mesh.stop();
        assert!(mesh.cleanup().status.success(), "what it left in the kernel");
        let state = mesh.dir.path().join("state");
        for entry in fs::read_dir(state).expect("its state").flatten() {
            if entry.file_name() != "embedded.redb" {
                let path = entry.path();
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            }
        }
    }

    fn put(&self, port: u16) {
        self.0.put(port);
    }
}

pub(crate) struct CloudMap {
    api: Api,
    server: Mesh,
}

impl CloudMap {
    pub(crate) fn new() -> Self {
        Self { api: Api::new(), server: Mesh::prepare("service = []") }
    }
}

impl crate::Registry for CloudMap {
    fn settings(&self, _: Table) -> String {
        format!(
            "[[registry]]\ntype = \"cloudmap\"\nregion = \"us-east-1\"\nendpoint_url = \"http://{}\"\n",
            self.api.address
        )
    }

    fn fill(&mut self, table: Table, port: u16, _: &mut Mesh) {
        self.server.configure(&(table.datapath() + &self.api.settings()));
        launch(&mut self.server);
        self.api.fill(table, port);
    }

    fn put(&self, port: u16) {
        self.api.put(port);
    }

    /// All services are listed every 15 seconds.
    fn turn(&self) -> Duration {
        Duration::from_secs(15)
    }
}
