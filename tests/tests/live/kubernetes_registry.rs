//! The Kubernetes registry. Kubernetes itself is not to be had here: `clients/kubernetes.py` imitates what is used of its API,
//! and kmock, which others wrote, is a mock of it without versions.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use mesh_tests::{
    Dialogue, Mesh, done, figure, free_address,
    netns::{Host, Network, Place},
    server::Server,
    text, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    between::Between,
    embedded::python,
    outage::{self, Outage},
    traffic::Traffic,
};

const VIP: &str = "127.128.43.1";
const TOKEN: &str = "b1gs33cr3t";

/// A certificate that no authority signed.
const CERTIFICATE: &str = "
[req]
distinguished_name = name
x509_extensions = more
prompt = no
[name]
CN = kubernetes
[more]
basicConstraints = CA:FALSE
subjectAltName = IP:ADDRESS
";

/// An API server.
struct Kubernetes {
    place: Place,
    address: String,
    dir: TempDir,
    server: Child,
}

impl Kubernetes {
    fn start() -> Self {
        Self::start_at(Place::here())
    }

    fn start_at(place: Place) -> Self {
        let dir = TempDir::with_prefix("mesh-kubernetes").unwrap();
        let file = |name: &str| dir.path().join(name);
        fs::write(file("openssl.cnf"), CERTIFICATE.replace("ADDRESS", &place.address)).unwrap();
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        openssl.arg("-config").arg(file("openssl.cnf"));
        done(openssl.arg("-out").arg(file("cert.pem")).arg("-keyout").arg(file("key.pem")));
        let address = place.free_address();
        let kubernetes = Self { server: launch(&place, &address, &dir), place, address, dir };
        kubernetes.wait();
        kubernetes
    }

    /// A config of its only user, whose token is in a file.
    fn kubeconfig(&self, token: &str) -> String {
        self.kubeconfig_at(&self.address, token)
    }

    fn kubeconfig_at(&self, address: &str, token: &str) -> String {
        let cluster = json!({
            "server": format!("https://{address}"), "certificate-authority": "cert.pem",
        });
        fs::write(self.dir.path().join("token"), token).unwrap();
        let path = self.dir.path().join("kubeconfig");
        fs::write(&path, kubeconfig(&cluster, &json!({ "tokenFile": "token" })).to_string()).unwrap();
        path.display().to_string()
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
        self.server = launch(&self.place, &self.address, &self.dir);
        self.wait();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.server), signal).unwrap();
    }

    fn tell(&self, what: &str, body: &Value) {
        let mut curl = self.place.command("curl");
        curl.arg("-sf").arg("--cacert").arg(self.dir.path().join("cert.pem"));
        curl.args(["-X", "PUT", "-d", &body.to_string(), &format!("https://{}/{what}", self.address)]);
        done(&mut curl);
    }

    fn put(&self, object: &Value) {
        self.tell("objects", object);
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn launch(place: &Place, address: &str, dir: &TempDir) -> Child {
    let (host, port) = address.split_once(':').unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/kubernetes.py");
    let mut server = place.command("python3");
    server.args([script, host, port, TOKEN]).arg(dir.path().join("cert.pem")).arg(dir.path().join("key.pem"));
    server.stdin(Stdio::null()).spawn().unwrap()
}

fn kubeconfig(cluster: &Value, user: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": cluster }],
        "users": [{ "name": "mesh", "user": user }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "mesh" } }],
    })
}

/// Service `echo`, whose endpoints are chosen at random.
fn echo() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "namespace": "default", "name": "echo", "creationTimestamp": "2026-01-02T03:04:05Z",
            "annotations": { "mesh.policy": "random", "mesh.drain": "200ms" },
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": VIP, "clusterIPs": [VIP],
            "ports": [{ "name": "web", "port": 80, "targetPort": "web", "protocol": "TCP" }],
        },
    })
}

/// Ready, serving and terminating.
type Conditions = (bool, bool, bool);
const READY: Conditions = (true, true, false);
const UNREADY: Conditions = (false, false, false);
const TERMINATING: Conditions = (false, true, true);

/// A slice of `echo` with one Pod, which the server is.
fn pod(name: &str, server: &Server, conditions: Conditions) -> Value {
    let (ready, serving, terminating) = conditions;
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": format!("echo-{name}"),
            "labels": { "kubernetes.io/service-name": "echo" },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "web", "port": server.port(), "protocol": "TCP" }],
        "endpoints": [{
            "addresses": ["127.0.0.1"], "nodeName": "n1", "zone": "z1",
            "targetRef": { "kind": "Pod", "namespace": "default", "name": name },
            "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
        }],
    })
}

fn prepare(kubeconfig: &str, more: &str) -> Mesh {
    let mesh = Mesh::prepare("service = []");
    mesh.configure(&format!(
        "[[registry]]\ntype = \"kubernetes\"\nkubeconfig = {kubeconfig:?}\nnode = \"n1\"\n{more}"
    ));
    mesh
}

/// A server that knows `echo` with these Pods, and a daemon that follows it.
fn start(pods: &[(&str, &Server)]) -> (Kubernetes, Mesh) {
    let kubernetes = Kubernetes::start();
    kubernetes.put(&echo());
    for (name, server) in pods {
        kubernetes.put(&pod(name, server, READY));
    }
    let mut mesh = prepare(&kubernetes.kubeconfig(TOKEN), "");
    mesh.launch();
    mesh.ready();
    (kubernetes, mesh)
}

fn dial(mesh: &Mesh) -> String {
    mesh.dial(&format!("{VIP}:80"))
}

/// The state of each instance.
fn states(mesh: &Mesh) -> BTreeMap<String, String> {
    let backends = mesh.json(&["backend", "list"]);
    let text = |one: &Value, key: &str| one[key].as_str().unwrap().to_owned();
    backends.as_array().unwrap().iter().map(|one| (text(one, "instance"), text(one, "state"))).collect()
}

#[test]
fn services_and_slices_are_followed_and_what_is_not_ready_or_ends_leaves() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let (kubernetes, mesh) = start(&[]);
    let refused = dial(&mesh);
    assert!(refused.contains("refused"), "{refused}");
    kubernetes.put(&pod("one", &one, READY));
    wait_until("the first Pod", || dial(&mesh) == "one");
    let service = &mesh.json(&["service", "list"])[0];
    assert_eq!(
        (&service["name"], &service["namespace"], &service["vips"]),
        (&"echo".into(), &"default.svc.cluster.local".into(), &json!([VIP]))
    );
    kubernetes.put(&pod("two", &two, READY));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);

    let traffic = Traffic::start(&mesh, VIP);
    kubernetes.put(&pod("one", &one, UNREADY));
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!((dial(&mesh), states(&mesh)["one"].as_str()), ("two".into(), "unhealthy"));

    // Nor does one that ends get new ones, as long as there is another.
    kubernetes.put(&pod("one", &one, READY));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    kubernetes.put(&pod("two", &two, TERMINATING));
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!((dial(&mesh), states(&mesh)["two"].as_str()), ("one".into(), "draining"));
    kubernetes.tell("delete", &pod("one", &one, READY));
    wait_until("who ends is the last", || dial(&mesh) == "two");
    kubernetes.put(&pod("one", &one, READY));
    kubernetes.tell("delete", &pod("two", &two, READY));
    wait_until("only one is left", || states(&mesh).keys().collect::<Vec<_>>() == ["one"]);
    figure(&format!("kubernetes: {} connects, none failed", traffic.end(&["one", "two"])));

    // Nobody is ready: refused, as kube-proxy does, and not an accident.
    kubernetes.put(&pod("one", &one, UNREADY));
    wait_until("nobody is ready", || dial(&mesh).contains("refused"));
    assert_eq!(mesh.registry()["error"], Value::Null);
    // Nor is anything said that is wrong.
    assert_eq!(mesh.json(&["status"])["problems"], json!([]));
}

/// Says "connected", then for each line whether it still is.
const HELD: &str = r#"
import socket, sys
s = socket.create_connection((sys.argv[1], 80), 5)
s.recv(9)
print("connected", flush=True)
s.settimeout(0.05)
for _ in sys.stdin:
    try:
        print("more" if s.recv(9) else "closed by the server", flush=True)
    except TimeoutError:
        print("connected", flush=True)
    except OSError as error:
        print(error, flush=True)
"#;

#[test]
fn a_pod_that_is_not_ready_keeps_the_connections_that_it_has_until_it_is_gone() {
    let one = Server::keeping();
    let (kubernetes, mesh) = start(&[("one", &one)]);
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    let mut client = mesh.inside("python3");
    client.args(["-c", HELD, VIP]);
    let mut client = Dialogue::start(client);
    assert_eq!(client.hear(), "connected");
    kubernetes.put(&pod("one", &one, UNREADY));
    mesh.wait_for_backends(&format!("{VIP}:80"), 0);
    // Ten times its drain time.
    std::thread::sleep(Duration::from_secs(2));
    client.go_on();
    assert_eq!(client.hear(), "connected");
    // Another one stands in for it, so that it may go.
    kubernetes.put(&pod("two", &Server::start("two"), READY));
    kubernetes.tell("delete", &pod("one", &one, UNREADY));
    wait_until("its drain time is over", || {
        client.go_on();
        client.hear() != "connected"
    });
}

#[test]
fn hints_follow_the_zone_of_the_node_and_namespaces_are_chosen() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let kubernetes = Kubernetes::start();
    let labels = json!({ "topology.kubernetes.io/zone": "z1" });
    kubernetes.put(&json!({ "kind": "Node", "metadata": { "name": "n1", "labels": labels } }));
    let hinted = |name, server, zone| {
        let mut pod = pod(name, server, READY);
        pod["endpoints"][0]["hints"] = json!({ "forZones": [{ "name": zone }] });
        pod
    };
    let mut elsewhere = echo();
    elsewhere["metadata"]["namespace"] = "other".into();
    elsewhere["spec"]["clusterIPs"] = json!(["127.128.43.2"]);
    for object in [echo(), elsewhere, hinted("one", &one, "z1"), hinted("two", &two, "z2")] {
        kubernetes.put(&object);
    }
    let mut mesh =
        prepare(&kubernetes.kubeconfig(TOKEN), "namespaces = [\"default\"]\ndomain = \"k8s.test\"\n");
    mesh.launch();
    mesh.ready();
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!(dial(&mesh), "one");
    let services = mesh.json(&["service", "list"]);
    assert_eq!(
        (services.as_array().unwrap().len(), &services[0]["namespace"]),
        (1, &"default.k8s.test".into())
    );
    // Nobody is meant for here: all are.
    kubernetes.put(&hinted("one", &one, "z2"));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
}

#[test]
fn a_kill_and_a_return_with_another_history_fail_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let (mut kubernetes, mesh) = start(&[("one", &one)]);
    wait_until("the Pod", || dial(&mesh) == "one");
    let traffic = Traffic::start(&mesh, VIP);
    for round in 0..3 {
        kubernetes.kill();
        mesh.wait_for_registry("stale");
        let error = mesh.registry()["error"].to_string();
        assert!(error.starts_with(&format!("\"kubernetes {}: ", kubernetes.address)), "{error}");
        // Long enough for the longest pause between attempts.
        std::thread::sleep(Duration::from_secs(2));
        kubernetes.restart();
        let back = Instant::now();
        // It knows nothing, and its versions begin anew: that is no reason to drop what works.
        wait_until("the fuse", || mesh.registry()["error"].to_string().contains("only 0 instances"));
        let (name, server) = if round % 2 == 0 { ("two", &two) } else { ("one", &one) };
        kubernetes.put(&echo());
        kubernetes.put(&pod(name, server, READY));
        mesh.wait_for_registry("synced");
        figure(&format!("kubernetes back: synced again after {} ms", back.elapsed().as_millis()));
        wait_until("the change", || dial(&mesh) == name);
    }
    figure(&format!("kubernetes killed 3 times: {} connects, none failed", traffic.end(&["one", "two"])));
}

#[test]
fn silence_is_noticed_and_fails_no_connect_and_a_daemon_that_starts_then_serves_what_was_said_last() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let (kubernetes, mut mesh) = start(&[("one", &one)]);
    wait_until("the Pod", || dial(&mesh) == "one");
    let traffic = Traffic::start(&mesh, VIP);
    kubernetes.signal(Signal::STOP);
    let silent = Instant::now();
    mesh.wait_for_registry("stale");
    figure(&format!("kubernetes silent: noticed after {} ms", silent.elapsed().as_millis()));
    let error = mesh.registry()["error"].to_string();
    assert!(error.contains("no answer in time") || error.contains("deadline"), "{error}");
    assert!(traffic.end(&["one"]) > 0);
    // As after a reboot.
    mesh.kill();
    assert!(mesh.cleanup().status.success());
    mesh.launch();
    mesh.ready();
    assert_eq!((dial(&mesh), mesh.registry()["state"].as_str()), ("one".into(), Some("stale")));
    kubernetes.signal(Signal::CONT);
    mesh.wait_for_registry("synced");
    kubernetes.put(&pod("one", &two, READY));
    wait_until("what it says now", || dial(&mesh) == "two");
}

#[test]
fn a_kubernetes_behind_a_black_hole_is_noticed_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let network = Network::new();
    let [node, far]: [Host; 2] = std::array::from_fn(|_| network.host());
    let kubernetes = Kubernetes::start_at(far.place());
    kubernetes.put(&echo());
    kubernetes.put(&pod("x", &one, READY));
    let mut mesh = prepare(&kubernetes.kubeconfig(TOKEN), "");
    outage::launch_on(&node, &mut mesh);
    assert!(far.connections() > 0, "it is connected");
    let change = || kubernetes.put(&pod("x", &two, READY));
    outage::in_a_black_hole("kubernetes", &mesh, VIP, &far, change);
}

#[test]
fn a_kubernetes_that_says_a_byte_a_second_or_nonsense_is_noticed_and_fails_no_connect() {
    let servers = [Server::start("one"), Server::start("two")];
    let kubernetes = Kubernetes::start();
    kubernetes.put(&echo());
    kubernetes.put(&pod("x", &servers[0], READY));
    let between = Between::start(&kubernetes.address);
    let mut mesh = prepare(&kubernetes.kubeconfig_at(&between.address, TOKEN), "");
    mesh.launch();
    mesh.ready();
    let change = |server: usize| kubernetes.put(&pod("x", &servers[server], READY));
    between.endure("kubernetes", &mesh, VIP, ["", ""], change);
}

#[test]
fn a_token_that_ends_is_noticed_and_read_again_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let (kubernetes, mesh) = start(&[("x", &one)]);
    let outage = Outage {
        what: "kubernetes with another token",
        mesh: &mesh,
        vip: VIP,
        error: "status 401: Unauthorized",
        servers: ["one", "two"],
    };
    let end = || {
        kubernetes.tell("token", &json!("an0ther"));
        // Who watches already goes on.
        kubernetes.tell("end", &Value::Null);
    };
    let change = || kubernetes.put(&pod("x", &two, READY));
    outage.endure(end, change, |()| drop(kubernetes.kubeconfig("an0ther")));
    assert!(!mesh.log().contains(TOKEN) && !mesh.log().contains("an0ther"));
}

#[test]
fn watches_that_end_or_say_nonsense_and_history_that_is_gone_fail_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let (kubernetes, mesh) = start(&[("one", &one)]);
    wait_until("the Pod", || dial(&mesh) == "one");
    let traffic = Traffic::start(&mesh, VIP);
    let gone = "history is gone: everything is read again";
    // Watches shorter than a second were not meant to end.
    let settle = || std::thread::sleep(Duration::from_millis(1200));
    let follows = |what: &str| {
        for (server, name) in [(&two, "two"), (&one, "one")] {
            kubernetes.put(&pod("one", server, READY));
            wait_until(what, || dial(&mesh) == name);
        }
    };
    settle();
    kubernetes.tell("end", &Value::Null);
    follows("a change after the watches have ended");
    // They are taken up from where a bookmark was, which history still has.
    settle();
    let unrelated = json!({ "kind": "Node", "metadata": { "name": "n2" } });
    kubernetes.put(&unrelated);
    kubernetes.tell("bookmark", &Value::Null);
    kubernetes.tell("compact", &Value::Null);
    kubernetes.tell("end", &Value::Null);
    follows("a change after a bookmark");
    assert!(!mesh.log().contains("ERROR"), "{}", mesh.log());

    // Without a bookmark it is gone.
    settle();
    kubernetes.put(&unrelated);
    kubernetes.tell("compact", &Value::Null);
    kubernetes.tell("end", &Value::Null);
    wait_until("it says so", || mesh.log().contains(gone));
    follows("a change after history was gone");
    mesh.wait_for_registry("synced");

    kubernetes.tell("garbage", &Value::Null);
    wait_until("it says so", || mesh.log().contains("what it says is not Kubernetes'"));
    follows("a change after garbage");
    mesh.wait_for_registry("synced");
    figure(&format!("kubernetes' watches: {} connects, none failed", traffic.end(&["one", "two"])));
}

#[test]
fn somebody_else_at_its_address_removes_nothing() {
    let one = Server::start("one");
    let (mut kubernetes, mesh) = start(&[("one", &one)]);
    wait_until("the Pod", || dial(&mesh) == "one");
    let traffic = Traffic::start(&mesh, VIP);
    kubernetes.kill();
    mesh.wait_for_registry("stale");
    {
        let _other = Server::start_at("no such protocol", &kubernetes.address);
        wait_until("it says so", || {
            let error = mesh.registry()["error"].to_string();
            error.contains("corrupt") || error.contains("InvalidMessage") || error.contains("invalid")
        });
    }
    assert!(traffic.end(&["one"]) > 0);
}

#[test]
fn a_bad_record_and_a_wrong_token_are_named() {
    let one = Server::start("one");
    let (kubernetes, mesh) = start(&[("one", &one)]);
    let mut bad = pod("bad", &one, READY);
    bad["endpoints"][0]["addresses"] = json!(["169.254.169.254"]);
    kubernetes.put(&bad);
    let problem = "EndpointSlice default/echo-bad: endpoint";
    wait_until("it is named", || mesh.registry()["problems"].to_string().contains(problem));
    assert_eq!((&mesh.registry()["state"], &mesh.registry()["instances"]), (&"synced".into(), &1.into()));
    assert_eq!(dial(&mesh), "one");

    let mut mesh = prepare(&kubernetes.kubeconfig("wr0ng"), "");
    mesh.launch();
    let list = || text(&mesh.mesh(&["registry", "list"]).output().unwrap());
    wait_until("it says so", || list().contains("status 401: Unauthorized"));
    assert!(!mesh.log().contains("wr0ng") && !list().contains("wr0ng"), "{}", mesh.log());
    // One that has expired is replaced.
    kubernetes.kubeconfig(TOKEN);
    wait_until("the Pod", || dial(&mesh) == "one");
    mesh.wait_for_registry("synced");
}

#[test]
fn kmock_s_kubernetes_is_followed() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let address = free_address();
    let (host, port) = address.split_once(':').unwrap();
    let mut server = python("python");
    server.args([concat!(env!("CARGO_MANIFEST_DIR"), "/clients/kmock_server.py"), host, port]);
    let mut server = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("it listens", || TcpStream::connect(&address).is_ok());
    let call = |method: &str, path: &str, body: &Value| {
        let mut curl = Command::new("curl");
        curl.args(["-sf", "-X", method, "-H", "Content-Type: application/json", "-d", &body.to_string()]);
        done(curl.arg(format!("http://{address}/{path}")));
    };
    let (services, slices) =
        ("api/v1/namespaces/default/services", "apis/discovery.k8s.io/v1/namespaces/default/endpointslices");
    call("POST", services, &echo());
    call("POST", slices, &pod("one", &one, READY));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kubeconfig");
    let cluster = json!({ "server": format!("http://{address}") });
    fs::write(&path, kubeconfig(&cluster, &json!({})).to_string()).unwrap();
    let mut mesh = prepare(path.to_str().unwrap(), "");
    mesh.launch();
    mesh.ready();
    wait_until("the Pod", || dial(&mesh) == "one");
    call("POST", slices, &pod("two", &two, READY));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    call("PATCH", &format!("{slices}/echo-one"), &pod("one", &one, UNREADY));
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!(dial(&mesh), "two");
    call("DELETE", &format!("{slices}/echo-one"), &Value::Null);
    wait_until("it is gone", || states(&mesh).keys().collect::<Vec<_>>() == ["two"]);
    server.kill().unwrap();
    server.wait().unwrap();
    mesh.wait_for_registry("stale");
    assert_eq!(dial(&mesh), "two");
}
