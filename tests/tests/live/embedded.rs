//! The embedded registry, driven by the AWS SDK for Python, the AWS CLI and `mesh instance`.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use mesh_tests::{
    Mesh, figure, free_address, is_long, netns::Place, server::Server, service, text, wait_until,
};
use serde_json::{Value, json};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/cloudmap.py");

/// A program of the Python that set-up makes.
pub(crate) fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/python/bin").join(name);
    assert!(path.exists(), "no {}: run `cargo xtask setup`", path.display());
    path
}

pub(crate) fn python(name: &str) -> Command {
    Command::new(program(name))
}

pub(crate) struct Embedded {
    pub(crate) mesh: Mesh,
    address: String,
}

impl Embedded {
    /// Beside a file registry that holds nothing.
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    fn start_with(more: &str) -> Self {
        let address = free_address();
        let mut mesh = Mesh::prepare("service = []");
        mesh.configure(&format!("[[registry]]\ntype = \"embedded\"\nlisten = {address:?}\n{more}"));
        mesh.launch();
        mesh.ready();
        Self { mesh, address }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn instance(&self, args: &[&str]) -> Output {
        self.mesh.mesh(&[&["instance"], args].concat()).output().unwrap()
    }

    fn register(&self, service: &str, port: u16, more: &[&str]) {
        let port = port.to_string();
        let output = self
            .instance(&[&["register", service, "--address", "127.0.0.1", "--port", &port], more].concat());
        assert!(output.status.success(), "{}", text(&output));
    }

    /// An operation in JSON; the answer's status and body.
    fn call(&self, operation: &str, input: &Value) -> (u16, Value) {
        let target = format!("X-Amz-Target: Route53AutoNaming_v20170314.{operation}");
        let (status, body) = self.curl(&["-H", &target], &input.to_string());
        (status, serde_json::from_str(&body).unwrap())
    }

    fn curl(&self, args: &[&str], body: &str) -> (u16, String) {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-w", "\n%{http_code}"]).args(args);
        if !args.iter().any(|arg| arg.starts_with("Content-Type")) {
            curl.args(["-H", "Content-Type: application/x-amz-json-1.1"]);
        }
        curl.args(["--data-binary", "@-", &self.url()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = curl.spawn().unwrap();
        // Refused before it was read, perhaps.
        let _ = child.stdin.take().unwrap().write_all(body.as_bytes());
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let (body, status) = output.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.into())
    }

    fn vip(&self, service: &str) -> String {
        let mut vip = None;
        wait_until("the service has a VIP", || {
            let services = self.mesh.json(&["service", "list"]);
            let found = services.as_array().unwrap().iter().find(|one| one["name"] == service);
            vip = found.and_then(|one| one["vips"][0].as_str()).map(ToOwned::to_owned);
            vip.is_some()
        });
        vip.unwrap()
    }

    fn dial(&self, vip: &str, port: u16) -> String {
        self.mesh.dial(&format!("{vip}:{port}"))
    }
}

fn steps(url: &str, more: &[&str]) -> Vec<String> {
    let output = python("python").arg(SCRIPT).arg(url).args(more).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap().lines().map(ToOwned::to_owned).collect()
}

#[test]
fn boto3_goes_through_the_whole_life() {
    let embedded = Embedded::start();
    let steps = steps(&embedded.url(), &[]);
    for expected in [
        "namespaces: [('dns.example', 'DNS_PRIVATE'), ('http.example', 'HTTP')]",
        "same request id: DuplicateRequest",
        "namespace again: NamespaceAlreadyExists",
        "service again: ServiceAlreadyExists",
        "in use: ResourceInUse",
        "health: [('a', 'HEALTHY'), ('b', 'UNHEALTHY')]",
        "HEALTHY: ['a']",
        "UNHEALTHY: ['b', 'c']",
        "HEALTHY_OR_ELSE_ALL: ['a']",
        "optional: (['c'], ['a', 'b', 'c'])",
        "else all: ['c']",
        "by pages: 3",
        "address 169.254.169.254: InvalidInput",
        "port -1: InvalidInput",
        "nothing left: []",
    ] {
        assert!(steps.iter().any(|step| step == expected), "{expected} is not among {steps:#?}");
    }
    assert!(!steps.iter().any(|step| step.ends_with("not refused")), "{steps:#?}");
    figure(&format!("boto3: {} steps of Cloud Map's API", steps.len()));
}

/// moto's imitation of AWS.
pub(crate) struct Moto {
    place: Place,
    pub(crate) address: String,
    server: Child,
}

impl Moto {
    pub(crate) fn start() -> Self {
        Self::start_at(Place::here())
    }

    pub(crate) fn start_at(place: Place) -> Self {
        let address = place.free_address();
        let moto = Self { server: serve(&place, &address), place, address };
        moto.wait();
        moto
    }

    /// `kill -9`; what it held is gone.
    pub(crate) fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    pub(crate) fn restart(&mut self) {
        self.server = serve(&self.place, &self.address);
        self.wait();
    }

    fn wait(&self) {
        wait_until("moto listens", || self.place.listens(&self.address));
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.server.id()
    }
}

fn serve(place: &Place, address: &str) -> Child {
    let (host, port) = address.split_once(':').unwrap();
    let mut server = place.command(program("moto_server"));
    server.args(["-H", host, "-p", port]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Where moto knows a call, too, both must say the same.
#[test]
fn moto_s_cloud_map_says_the_same() {
    let moto = Moto::start();
    let theirs = steps(&moto.url(), &["--moto"]);
    let embedded = Embedded::start();
    let ours = steps(&embedded.url(), &[]);
    let differ: Vec<_> = theirs.iter().filter(|step| !ours.contains(step)).collect();
    assert!(differ.is_empty(), "moto: {differ:#?}\nours: {ours:#?}");
    figure(&format!("moto: {} steps end as here", theirs.len()));
}

#[test]
fn the_aws_cli_works() {
    let embedded = Embedded::start();
    let aws = |args: &[&str]| {
        let mut aws = python("aws");
        aws.args(["--endpoint-url", &embedded.url(), "--region", "us-east-1", "servicediscovery"]).args(args);
        aws.envs([("AWS_ACCESS_KEY_ID", "any"), ("AWS_SECRET_ACCESS_KEY", "any")]);
        let output = aws.env("AWS_DISABLE_HOST_PREFIX_INJECTION", "true").output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
    };
    aws(&["create-http-namespace", "--name", "cli.example"]);
    let namespaces = aws(&["list-namespaces"]);
    let namespace = namespaces["Namespaces"][0]["Id"].as_str().unwrap();
    let service = aws(&["create-service", "--name", "echo", "--namespace-id", namespace]);
    let service = service["Service"]["Id"].as_str().unwrap();
    let attributes = "AWS_INSTANCE_IPV4=10.0.0.1,AWS_INSTANCE_PORT=80";
    aws(&["register-instance", "--service-id", service, "--instance-id", "a", "--attributes", attributes]);
    let found = aws(&["discover-instances", "--namespace-name", "cli.example", "--service-name", "echo"]);
    assert_eq!(found["Instances"][0]["InstanceId"], "a", "{found}");
}

#[test]
fn what_is_registered_is_dialled_and_how_soon() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let embedded = Embedded::start();
    embedded.register("echo.service.local:80", one.port(), &["--id", "one"]);
    let vip = embedded.vip("echo");
    wait_until("the first", || embedded.dial(&vip, 80) == "one");

    // From the answer to RegisterInstance to a connect that picks the new one, which is the only one.
    let mut client = embedded.mesh.dialogue(&format!(
        r#"
import socket
import sys
for line in sys.stdin:
    wanted = line.strip()
    while True:
        try:
            if socket.create_connection(("{vip}", 80), 5).recv(9).decode() == wanted: break
        except OSError: pass
    print(wanted, flush=True)
"#
    ));
    // Python has started.
    client.say("one");
    assert_eq!(client.hear(), "one");
    let services = embedded.call("ListServices", &json!({})).1;
    let id = services["Services"][0]["Id"].clone();
    let mut times = Vec::new();
    for round in 0..if is_long() { 200 } else { 20 } {
        let (server, name) = if round % 2 == 0 { (&two, "two") } else { (&one, "one") };
        let attributes =
            json!({ "AWS_INSTANCE_IPV4": "127.0.0.1", "AWS_INSTANCE_PORT": server.port().to_string() });
        // The same id at another address.
        let input = json!({ "ServiceId": id, "InstanceId": "one", "Attributes": attributes });
        assert_eq!(embedded.call("RegisterInstance", &input).0, 200);
        let start = Instant::now();
        client.say(name);
        assert_eq!(client.hear(), name);
        times.push(start.elapsed());
    }
    times.sort();
    figure(&format!(
        "from RegisterInstance's answer to a connect that reaches the new backend: median {:?}, longest {:?} of {}",
        times[times.len() / 2],
        times[times.len() - 1],
        times.len()
    ));

    // Health, as Cloud Map's callers set it.
    embedded.register("echo.service.local", two.port(), &["--id", "two", "--weight", "50", "--zone", "z1"]);
    wait_until("both", || embedded.mesh.kernel_backends(&format!("{vip}:80")).len() == 2);
    let sick = json!({ "ServiceId": id, "InstanceId": "one", "Status": "UNHEALTHY" });
    assert_eq!(embedded.call("UpdateInstanceCustomHealthStatus", &sick).0, 200);
    let list = embedded.mesh.json(&["instance", "list", "echo.service.local"]);
    assert_eq!((&list[0]["health"], &list[1]["weight"]), (&json!("UNHEALTHY"), &json!(50)), "{list}");
    wait_until("one is not dialled", || (0..8).all(|_| embedded.dial(&vip, 80) == "two"));
    let gone = embedded.instance(&["deregister", "echo.service.local", "two"]);
    assert!(gone.status.success(), "{}", text(&gone));
    let gone = embedded.instance(&["deregister", "echo.service.local", "two"]);
    assert!(
        text(&gone).contains("has no instance \"two\"") && gone.status.code() == Some(1),
        "{}",
        text(&gone)
    );
    drop(client);
}

#[test]
fn a_lease_that_is_not_renewed_ends() {
    let server = Server::start("echo");
    let embedded = Embedded::start();
    embedded.register("echo.service.local:80", server.port(), &["--id", "kept"]);
    embedded.register("echo.service.local", 9, &["--id", "leased", "--lease", "2s"]);
    let ids = || {
        let list = embedded.mesh.json(&["instance", "list"]);
        list.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(800));
        embedded.register("echo.service.local", 9, &["--id", "leased", "--lease", "2s"]);
        assert_eq!(ids(), ["kept", "leased"], "it was renewed");
    }
    wait_until("the lease ends", || ids() == ["kept"]);
    let vip = embedded.vip("echo");
    wait_until("it is not dialled", || embedded.mesh.kernel_backends(&format!("{vip}:80")).len() == 1);
}

/// Registers without a pause while the daemon is killed: what was answered is there afterwards.
#[test]
fn a_kill_at_any_moment_loses_nothing_that_was_answered() {
    let mut embedded = Embedded::start();
    embedded.register("echo.service.local:80", 1, &["--id", "first"]);
    let (_, services) = embedded.call("ListServices", &json!({}));
    let id = services["Services"][0]["Id"].as_str().unwrap().to_owned();
    let writer = r#"
import sys, boto3
from botocore.config import Config
aws = boto3.client("servicediscovery", endpoint_url=sys.argv[1], region_name="us-east-1", aws_access_key_id="a",
    aws_secret_access_key="a", config=Config(retries={"total_max_attempts": 1}))
round = sys.argv[3]
try:
    for n in range(100000):
        aws.register_instance(ServiceId=sys.argv[2], InstanceId=f"{round}-{n}",
            Attributes={"AWS_INSTANCE_IPV4": f"10.{round}.{n >> 8}.{n & 255}", "AWS_INSTANCE_PORT": "80"})
        print(f"{round}-{n}", flush=True)
except Exception:
    pass
"#;
    let mut answered: Vec<String> = Vec::new();
    let rounds = if is_long() { 50 } else { 6 };
    for round in 0..rounds {
        let mut client = python("python");
        client.args(["-c", writer, &embedded.url(), &id, &round.to_string()]);
        let child = client.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("it writes", || {
            let (_, service) = embedded.call("GetService", &json!({ "Id": id }));
            service["Service"]["InstanceCount"].as_u64().unwrap() > answered.len() as u64 + 20
        });
        std::thread::sleep(Duration::from_millis(17 * round));
        embedded.mesh.kill();
        let output = child.wait_with_output().unwrap();
        answered.extend(String::from_utf8(output.stdout).unwrap().lines().map(ToOwned::to_owned));
        embedded.mesh.launch();
        embedded.mesh.ready();
        let list = embedded.mesh.json(&["instance", "list"]);
        let list: Vec<_> = list.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
        let lost: Vec<_> = answered.iter().filter(|id| !list.contains(&id.as_str())).collect();
        assert!(lost.is_empty(), "round {round}: {lost:?}");
        // One more may be there, whose answer the kill cut off; it counts from now on.
        assert!(list.len() <= answered.len() + 2 + usize::try_from(round).unwrap());
    }
    figure(&format!(
        "{rounds} kills while instances were registered: {} answered, none lost",
        answered.len()
    ));
}

#[test]
fn web_pages_large_and_slow_requests_are_refused() {
    let embedded = Embedded::start();
    let list = "X-Amz-Target: Route53AutoNaming_v20170314.ListNamespaces";
    assert_eq!(embedded.curl(&["-H", list], "{}"), (200, "{\"Namespaces\":[]}".into()));
    for (args, status, why) in [
        (&["-H", list, "-H", "Origin: http://attacker.example"][..], 403, "Origin"),
        (&["-H", list, "-H", "Host: attacker.example:9465"], 403, "attacker.example"),
        (&["-H", list, "-H", "Content-Type: text/plain"], 400, "Content-Type"),
        (&["-H", list, "-X", "GET"], 400, "POST"),
        (&["-H", "X-Amz-Target: Other.ListNamespaces"], 400, "X-Amz-Target"),
    ] {
        let (given, body) = embedded.curl(args, "{}");
        assert!(given == status && body.contains(why), "{args:?}: {given} {body}");
    }
    for body in ["{", "[]", "\"\"", &"[".repeat(100_000)] {
        let (status, answer) = embedded.curl(&["-H", list], body);
        assert!(status == 400, "{status} {answer}");
    }
    let (status, _) = embedded.curl(&["-H", list, "-H", "Expect:"], &" ".repeat(1 << 20));
    assert!(status == 400 || status == 0, "{status}");
    // Those that say nothing keep nobody out.
    let idle: Vec<_> = (0..200).map(|_| TcpStream::connect(&embedded.address).unwrap()).collect();
    assert_eq!(embedded.curl(&["-H", list], "{}").0, 200);
    drop(idle);
}

#[test]
fn a_registry_file_that_is_lost_takes_nothing_along() {
    let server = Server::start("echo");
    let mut embedded = Embedded::start();
    embedded.register("echo.service.local:80", server.port(), &[]);
    let vip = embedded.vip("echo");
    wait_until("it is dialled", || embedded.dial(&vip, 80) == "echo");
    embedded.mesh.stop();
    let file: PathBuf = embedded.mesh.dir.path().join("state/embedded.redb");
    std::fs::rename(&file, file.with_extension("away")).unwrap();
    embedded.mesh.launch();
    embedded.mesh.ready();
    assert_eq!(embedded.dial(&vip, 80), "echo");
    let registry = embedded.mesh.json(&["registry", "list"])[1].clone();
    assert!(registry["error"].as_str().unwrap().contains("it holds nothing"), "{registry}");
    // A file that is none is named, and what it held is served.
    embedded.mesh.kill();
    std::fs::write(&file, "nonsense").unwrap();
    embedded.mesh.launch();
    embedded.mesh.ready();
    assert_eq!(embedded.dial(&vip, 80), "echo");
    let registry = embedded.mesh.json(&["registry", "list"])[1].clone();
    assert!(registry["error"].as_str().unwrap().contains("embedded.redb"), "{registry}");
    embedded.mesh.kill();
    std::fs::rename(file.with_extension("away"), &file).unwrap();
    embedded.mesh.launch();
    embedded.mesh.ready();
    wait_until("it is well again", || embedded.mesh.json(&["registry", "list"])[1]["state"] == "synced");
    assert_eq!(embedded.dial(&vip, 80), "echo");
}

/// Many clients at a time, whose requests are written together.
#[test]
fn many_instances_are_registered_listed_and_written() {
    let count: usize = if is_long() { 100_000 } else { 4_000 };
    let clients = 64;
    let mut embedded = Embedded::start_with("[datapath]\nmax_backends = 131072\n");
    embedded.register("echo.service.local:80", 80, &["--id", "first"]);
    let (_, services) = embedded.call("ListServices", &json!({}));
    let id = services["Services"][0]["Id"].as_str().unwrap().to_owned();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..clients {
            let (id, address) = (&id, &embedded.address);
            scope.spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                for n in (client..count).step_by(clients) {
                    let at = format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
                    let attributes = json!({ "AWS_INSTANCE_IPV4": at, "AWS_INSTANCE_PORT": "80" });
                    let input = json!({ "ServiceId": id, "InstanceId": format!("i-{n}"), "Attributes": attributes });
                    let input = input.to_string();
                    let head = "POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/x-amz-json-1.1\r\n\
                                X-Amz-Target: Route53AutoNaming_v20170314.RegisterInstance\r\n";
                    write!(stream, "{head}Content-Length: {}\r\n\r\n{input}", input.len()).unwrap();
                    answered(&mut reader);
                }
            });
        }
    });
    let took = start.elapsed();
    let vip = embedded.vip("echo");
    let written =
        |embedded: &Embedded| embedded.mesh.kernel_backends(&format!("{vip}:80")).len() == count + 1;
    wait_until("all are in the maps", || written(&embedded));
    figure(&format!(
        "{count} instances registered by {clients} clients in {took:?}, in the maps {:?} after the last answer",
        start.elapsed() - took
    ));
    assert_eq!(embedded.mesh.json(&["instance", "list"]).as_array().unwrap().len(), count + 1);
    let input = json!({ "NamespaceName": "service.local", "ServiceName": "echo", "MaxResults": 1000 });
    let found = embedded.call("DiscoverInstances", &input).1;
    assert_eq!(found["Instances"].as_array().unwrap().len(), 1000);
    let bad = json!({ "AWS_INSTANCE_IPV4": "169.254.169.254", "AWS_INSTANCE_PORT": "80" });
    let bad = json!({ "ServiceId": id, "InstanceId": "bad", "Attributes": bad });
    let (status, error) = embedded.call("RegisterInstance", &bad);
    assert!(status == 400 && error["Message"].as_str().unwrap().contains("169.254.169.254"), "{error}");
    embedded.mesh.kill();
    embedded.mesh.launch();
    embedded.mesh.ready();
    assert!(written(&embedded));
    assert_eq!(embedded.mesh.json(&["instance", "list"]).as_array().unwrap().len(), count + 1);
}

/// Reads one answer, which must be that it worked.
fn answered(reader: &mut impl BufRead) {
    let mut length = 0;
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 200 "), "{line}");
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    reader.read_exact(&mut vec![0; length]).unwrap();
}

/// A service that the file registry names first is not the embedded registry's to take.
#[test]
fn another_registry_s_vip_cannot_be_taken() {
    let server = Server::start("echo");
    let embedded = Embedded::start();
    embedded.mesh.write(&service("echo", 80, "127.128.20.1", &[("127.0.0.1", server.port())]));
    wait_until("it is dialled", || embedded.dial("127.128.20.1", 80) == "echo");
    embedded.register("thief.service.local:80", 9, &[]);
    let services = embedded.call("ListServices", &json!({})).1;
    let theft =
        json!({ "ServiceId": services["Services"][0]["Id"], "Attributes": { "mesh.vip": "127.128.20.1" } });
    assert_eq!(embedded.call("UpdateServiceAttributes", &theft).0, 200);
    wait_until("the theft is named", || {
        let status = text(&embedded.mesh.mesh(&["status"]).output().unwrap());
        status.contains("thief.service.local:80/tcp: vip 127.128.20.1 port 80/tcp is already taken")
    });
    assert_eq!(embedded.dial("127.128.20.1", 80), "echo");
}

#[test]
fn an_http_namespace_has_no_names_but_aliases() {
    let embedded = Embedded::start();
    let server = Server::start("echo");
    let create = |operation: &str, namespace: &str| {
        let operation = embedded.call(operation, &json!({ "Name": namespace, "Vpc": "any" })).1;
        let id = embedded.call("GetOperation", &operation).1;
        let tags = json!([{ "Key": "mesh.aliases", "Value": format!("at-{namespace}, full.{namespace}") }]);
        let namespace = &id["Operation"]["Targets"]["NAMESPACE"];
        let input = json!({ "Name": "echo", "NamespaceId": namespace, "Tags": tags });
        let service = embedded.call("CreateService", &input).1["Service"]["Id"].clone();
        let attributes =
            json!({ "AWS_INSTANCE_IPV4": "127.0.0.1", "AWS_INSTANCE_PORT": server.port().to_string() });
        let input = json!({ "ServiceId": service, "InstanceId": "a", "Attributes": attributes });
        assert_eq!(embedded.call("RegisterInstance", &input).0, 200);
    };
    create("CreateHttpNamespace", "api");
    create("CreatePrivateDnsNamespace", "named");
    let ask = |name: &str| {
        let answer = embedded.mesh.json(&["dns", "query", name, "A"]);
        (answer[0]["answer"] == "own")
            .then(|| answer[0]["records"][0]["data"].as_str().map(ToOwned::to_owned))
    };
    wait_until("the aliases", || ask("at-api").flatten().is_some() && ask("at-named").flatten().is_some());
    let (api, named) = (ask("at-api"), ask("at-named"));
    assert_ne!(api, named);
    assert_eq!(embedded.dial(api.as_ref().unwrap().as_ref().unwrap(), server.port()), "echo");
    for (name, expected) in [
        ("full.api", &api),
        ("echo.api", &None),
        ("at-api.api", &None),
        ("echo.named", &named),
        ("at-named.named", &named),
    ] {
        assert_eq!(ask(name), *expected, "{name}");
    }
    // Below the namespace with names everything stays here; below the other one nothing does.
    assert_eq!((ask("x.named"), ask("x.api")), (Some(None), None));
}
