//! The Consul registry. Consul itself is not to be had here: `clients/consul.py` imitates what is used of its API,
//! and HashiCorp's double of that API says things as Consul does, but made up.

use std::{
    collections::HashSet,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use mesh_tests::{
    Mesh,
    certificates::Certificates,
    done, figure,
    netns::{Host, Network, Place},
    server::Server,
    text, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    between::Between,
    outage::{self, Outage},
    traffic::Traffic,
};

const VIP: &str = "127.128.42.1";
const TOKEN: &str = "b1gs33cr3t";

struct Consul {
    place: Place,
    address: String,
    certificates: Option<Certificates>,
    server: Child,
}

impl Consul {
    fn start() -> Self {
        Self::launch(Place::here(), None)
    }

    fn launch(place: Place, certificates: Option<Certificates>) -> Self {
        let address = place.free_address();
        let server = serve(&place, &address, certificates.as_ref());
        let consul = Self { place, address, certificates, server };
        consul.wait();
        consul
    }

    fn wait(&self) {
        wait_until("it listens", || self.place.listens(&self.address));
    }

    /// `kill -9`; what it held is gone.
    fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    fn restart(&mut self) {
        self.server = serve(&self.place, &self.address, self.certificates.as_ref());
        self.wait();
    }

    fn url(&self) -> String {
        format!("{}://{}", if self.certificates.is_some() { "https" } else { "http" }, self.address)
    }

    fn put(&self, path: &str, body: &Value) {
        let mut curl = self.place.command("curl");
        curl.args(["-sf", "-X", "PUT", "-d", &body.to_string(), &format!("{}{path}", self.url())]);
        if let Some(Certificates { ca, .. }) = &self.certificates {
            curl.arg("--cacert").arg(ca);
        }
        done(&mut curl);
    }

    fn register(&self, id: &str, address: &str, port: u16, status: &str) {
        let meta = json!({ "mesh.port": "80", "mesh.vip": VIP });
        let service = json!({
            "ID": id, "Service": "echo", "Address": address, "Port": port, "Tags": ["live"], "Meta": meta,
        });
        let check = json!({ "CheckID": "up", "Status": status });
        let body = json!({ "Node": "n1", "Address": "127.0.0.9", "Service": service, "Check": check });
        self.put("/v1/catalog/register", &body);
    }

    fn deregister(&self, id: &str) {
        self.put("/v1/catalog/deregister", &json!({ "ServiceID": id }));
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.server), signal).unwrap();
    }

    fn mesh(&self, token: &str) -> Mesh {
        let mut mesh = prepare(&self.url(), token);
        mesh.launch();
        mesh
    }
}

/// A daemon that has not been started.
fn prepare(url: &str, token: &str) -> Mesh {
    let mesh = Mesh::prepare("service = []");
    mesh.configure(&format!(
        "[[registry]]\ntype = \"consul\"\naddress = {url:?}\ntoken = {token:?}\ntag = \"live\"\n"
    ));
    mesh
}

fn serve(place: &Place, address: &str, certificates: Option<&Certificates>) -> Child {
    let (host, port) = address.split_once(':').unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/consul.py");
    let mut server = place.command("python3");
    server.args([script, host, port, TOKEN]);
    if let Some(Certificates { cert, key, .. }) = certificates {
        server.arg(cert).arg(key);
    }
    server.stdin(Stdio::null()).spawn().unwrap()
}

impl Drop for Consul {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn dial(mesh: &Mesh) -> String {
    mesh.dial(&format!("{VIP}:80"))
}

#[test]
fn what_is_registered_is_followed_and_silence_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let consul = Consul::start();
    consul.register("one", "127.0.0.1", one.port(), "passing");
    let mesh = consul.mesh(TOKEN);
    mesh.ready();
    wait_until("the first", || dial(&mesh) == "one");
    let traffic = Traffic::start(&mesh, VIP);

    consul.register("two", "127.0.0.1", two.port(), "critical");
    wait_until("its health", || {
        let backends = mesh.json(&["backend", "list"]);
        backends
            .as_array()
            .unwrap()
            .iter()
            .any(|one| one["instance"] == "n1/two" && one["state"] == "unhealthy")
    });
    assert_eq!(dial(&mesh), "one");
    consul.register("two", "127.0.0.1", two.port(), "passing");
    consul.deregister("one");
    wait_until("the second", || dial(&mesh) == "two");
    consul.register("bad", "169.254.169.254", 80, "passing");
    let problem = "service echo.service.local: instance bad: address 169.254.169.254 is link-local";
    wait_until("it is named", || mesh.registry()["problems"].to_string().contains(problem));
    assert_eq!((&mesh.registry()["state"], &mesh.registry()["instances"]), (&"synced".into(), &1.into()));

    // As after a snapshot was restored.
    consul.put("/restore/5", &Value::Null);
    consul.register("one", "127.0.0.1", one.port(), "passing");
    wait_until("what is new since", || mesh.registry()["instances"] == 2);

    consul.signal(Signal::STOP);
    let silent = mesh_tests::now();
    wait_until("it is missed", || mesh.registry()["state"] == "stale");
    figure(&format!("consul silent: noticed after {} ms", (mesh_tests::now() - silent) / 1_000_000));
    consul.signal(Signal::CONT);
    wait_until("it is back", || mesh.registry()["state"] == "synced");
    consul.deregister("two");
    wait_until("who is left", || dial(&mesh) == "one");
    figure(&format!("consul: {} connects, none failed", traffic.end(&["one", "two"])));
}

#[test]
fn a_consul_behind_a_black_hole_is_noticed_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let network = Network::new();
    let [node, far]: [Host; 2] = std::array::from_fn(|_| network.host());
    let consul = Consul::launch(far.place(), None);
    consul.register("x", "127.0.0.1", one.port(), "passing");
    let mut mesh = prepare(&consul.url(), TOKEN);
    outage::launch_on(&node, &mut mesh);
    assert!(far.connections() > 0, "it is connected");
    let change = || consul.register("x", "127.0.0.1", two.port(), "passing");
    outage::in_a_black_hole("consul", &mesh, VIP, &far, change);
}

#[test]
fn a_consul_that_says_a_byte_a_second_or_nonsense_is_noticed_and_fails_no_connect() {
    let servers = [Server::start("one"), Server::start("two")];
    let consul = Consul::start();
    let change = |server: usize| consul.register("x", "127.0.0.1", servers[server].port(), "passing");
    change(0);
    let between = Between::start(&consul.address);
    let mut mesh = prepare(&format!("http://{}", between.address), TOKEN);
    mesh.launch();
    mesh.ready();
    between.endure("consul", &mesh, VIP, ["no answer in time", "HTTP"], change);
}

#[test]
fn a_kill_and_a_return_with_nothing_fail_no_connect_and_a_daemon_starts_meanwhile() {
    let servers = [Server::start("one"), Server::start("two")];
    let mut consul = Consul::start();
    consul.register("x", "127.0.0.1", servers[0].port(), "passing");
    let mut mesh = consul.mesh(TOKEN);
    mesh.ready();
    wait_until("the instance", || dial(&mesh) == "one");
    let traffic = Traffic::start(&mesh, VIP);
    for (server, name) in [(&servers[1], "two"), (&servers[0], "one")] {
        consul.kill();
        mesh.wait_for_registry("stale");
        consul.restart();
        let back = Instant::now();
        wait_until("the fuse", || mesh.registry()["error"].to_string().contains("only 0 instances"));
        figure(&format!("consul back with nothing: heard after {} ms", back.elapsed().as_millis()));
        consul.register("x", "127.0.0.1", server.port(), "passing");
        mesh.wait_for_registry("synced");
        wait_until("the change", || dial(&mesh) == name);
    }
    figure(&format!("consul killed twice: {} connects, none failed", traffic.end(&["one", "two"])));
    consul.kill();
    outage::starts_without_it(&mut mesh, VIP, ("one", servers[0].port()), Mesh::launch);
}

#[test]
fn a_token_that_ends_is_noticed_and_read_again_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let consul = Consul::start();
    consul.register("x", "127.0.0.1", one.port(), "passing");
    let mut mesh = Mesh::prepare("service = []");
    let token = mesh.services.with_file_name("token");
    fs::write(&token, TOKEN).unwrap();
    mesh.configure(&format!(
        "[[registry]]\ntype = \"consul\"\naddress = {:?}\ntoken_file = {token:?}\n",
        consul.url()
    ));
    mesh.launch();
    mesh.ready();
    let error = "ACL not found";
    let outage =
        Outage { what: "consul with another token", mesh: &mesh, vip: VIP, error, servers: ["one", "two"] };
    outage.endure(
        || consul.put("/token", &json!("an0ther")),
        || consul.register("x", "127.0.0.1", two.port(), "passing"),
        |()| fs::write(&token, "an0ther").unwrap(),
    );
    assert!(!mesh.log().contains(TOKEN) && !mesh.log().contains("an0ther"));
}

#[test]
fn a_wrong_token_is_said_so_and_not_shown() {
    let consul = Consul::start();
    let mesh = consul.mesh("wr0ng");
    let list = || text(&mesh.mesh(&["registry", "list"]).output().unwrap());
    wait_until("it says so", || list().contains("403 Forbidden: \\\"Permission denied\\\""));
    assert!(!list().contains("wr0ng") && !mesh.log().contains("wr0ng"));
}

#[test]
fn consul_is_asked_over_tls_with_a_token_from_a_file() {
    let one = Server::start("one");
    let consul = Consul::launch(Place::here(), Some(Certificates::make()));
    consul.register("one", "127.0.0.1", one.port(), "passing");
    let mut mesh = Mesh::prepare("service = []");
    let token = mesh.services.with_file_name("token");
    fs::write(&token, TOKEN).unwrap();
    let settings =
        format!("[[registry]]\ntype = \"consul\"\naddress = {:?}\ntoken_file = {token:?}\n", consul.url());
    // Whom this machine believes did not make its certificate.
    mesh.configure(&settings);
    mesh.launch();
    let list = || text(&mesh.mesh(&["registry", "list"]).output().unwrap());
    wait_until("it says so", || list().contains("invalid peer certificate: UnknownIssuer"));
    mesh.kill();
    let ca = &consul.certificates.as_ref().unwrap().ca;
    mesh.configure(&format!("{settings}tls = {{ ca_file = {ca:?} }}\n"));
    mesh.launch();
    mesh.ready();
    wait_until("the instance", || dial(&mesh) == "one");
}

/// HashiCorp's double of Consul's API, which makes up another answer each time. It lists no services.
struct Double {
    address: String,
    server: Child,
    _templates: TempDir,
}

impl Double {
    fn start() -> Self {
        let packages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/node/node_modules/@hashicorp");
        assert!(packages.exists(), "no {}: run `cargo xtask setup`", packages.display());
        let templates = TempDir::with_prefix("mesh-consul-double").unwrap();
        let made = Command::new("cp")
            .arg("--recursive")
            .arg(packages.join("consul-api-double/v1"))
            .arg(templates.path())
            .status();
        assert!(made.unwrap().success());
        let v1 = templates.path().join("v1");
        fs::write(v1.join("catalog/services"), r#"{"echo": []}"#).unwrap();
        // What gives answers an index.
        fs::copy(v1.join("health/service/.config"), v1.join("catalog/.config")).unwrap();
        let place = Place::here();
        let address = place.free_address();
        let mut node = place.command("node");
        node.arg(packages.join("api-double/bin/index.js")).arg("--dir").arg(templates.path());
        node.args(["--port", address.rsplit(':').next().unwrap()]);
        // One instance; each answer, also a blocking one, comes after so many milliseconds.
        node.envs([("CONSUL_NODE_COUNT", "1"), ("CONSUL_LATENCY", "100")]);
        let server = node.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let double = Self { address, server, _templates: templates };
        wait_until("it listens", || place.listens(&double.address));
        double
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[test]
fn what_hashicorp_s_double_makes_up_is_followed() {
    let double = Double::start();
    let mut mesh = Mesh::prepare("service = []");
    mesh.configure(&format!("[[registry]]\ntype = \"consul\"\naddress = {:?}\n", double.address));
    mesh.launch();
    mesh.ready();
    let instance = || {
        let list = mesh.json(&["backend", "list"]);
        let [one] = &list.as_array().unwrap()[..] else { return None };
        // Two of its checks are always critical.
        let is_ours = one["service"] == "echo" && one["instance"] == "node-0/echo-with-id";
        (is_ours && one["state"] == "unhealthy").then(|| one["port"].as_u64())?
    };
    let mut ports = HashSet::new();
    wait_until("some answers", || {
        ports.extend(instance());
        ports.len() > 3
    });
    mesh.wait_for_registry("synced");
}
