//! The Cloud Map registry. AWS itself is not to be had here: its API is spoken by moto, which others wrote, and
//! by the embedded registry of another daemon.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use mesh_tests::{
    Mesh, binary, done, figure, free_address,
    netns::{Host, Network, Place},
    now,
    server::Server,
    text, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::{
    between::Between,
    embedded::{Embedded, Moto, program},
    outage::{self, Outage},
    traffic::Traffic,
};

const VIP: &str = "127.128.44.1";

/// A server that speaks Cloud Map's API, as those see it who fill it.
struct CloudMap {
    place: Place,
    url: String,
}

impl CloudMap {
    fn here(url: String) -> Self {
        Self { place: Place::here(), url }
    }

    /// One call of boto3, whose arguments are Python's.
    fn call(&self, call: &str) {
        let script = format!(
            r#"
import boto3
from botocore.config import Config
aws = boto3.client("servicediscovery", endpoint_url="{}", region_name="us-east-1", aws_access_key_id="any",
                   aws_secret_access_key="any", config=Config(inject_host_prefix=False))
def id(kind, name):
    return next(one["Id"] for one in getattr(aws, "list_" + kind)()[kind.capitalize()] if one["Name"] == name)
aws.{call}
"#,
            self.url
        );
        done(self.place.command(program("python")).args(["-c", &script]));
    }

    /// A service `echo` with custom health checks, which clients dial at port 80.
    fn create(&self) {
        self.call("create_http_namespace(Name='service.local')");
        self.call(
            "create_service(Name='echo', NamespaceId=id('namespaces', 'service.local'), \
             HealthCheckCustomConfig={'FailureThreshold': 1})",
        );
        let attributes = format!("{{'mesh.port': '80', 'mesh.vip': '{VIP}'}}");
        self.call(&format!(
            "update_service_attributes(ServiceId=id('services', 'echo'), Attributes={attributes})"
        ));
    }

    fn register(&self, id: &str, port: u16) {
        let attributes = format!("{{'AWS_INSTANCE_IPV4': '127.0.0.1', 'AWS_INSTANCE_PORT': '{port}'}}");
        self.call(&format!(
            "register_instance(ServiceId=id('services', 'echo'), InstanceId='{id}', Attributes={attributes})"
        ));
    }

    fn deregister(&self, id: &str) {
        self.call(&format!("deregister_instance(ServiceId=id('services', 'echo'), InstanceId='{id}')"));
    }
}

/// A daemon that reads Cloud Map at an address, with keys as ECS would give it.
fn prepare(url: &str) -> Mesh {
    let mesh = Mesh::prepare("service = []");
    mesh.configure(&format!(
        "[[registry]]\ntype = \"cloudmap\"\nregion = \"us-east-1\"\nnamespaces = [\"service.local\"]\n\
         endpoint_url = {url:?}\nhealth_interval = \"1s\"\n"
    ));
    mesh
}

fn launch(mesh: &mut Mesh, place: &Place) {
    let mut command = place.command(binary());
    command.envs([("AWS_ACCESS_KEY_ID", "any"), ("AWS_SECRET_ACCESS_KEY", "any")]);
    // Nobody is to be asked for other ones.
    command.env("AWS_EC2_METADATA_DISABLED", "true");
    mesh.launch_as(command);
}

fn start(url: &str) -> Mesh {
    let mut mesh = prepare(url);
    launch(&mut mesh, &Place::here());
    mesh.ready();
    mesh
}

fn dial(mesh: &Mesh) -> String {
    mesh.dial(&format!("{VIP}:80"))
}

/// What is registered and deregistered at `url`, and its health, which does not move the revision; then the
/// server, which is process `pid`, falls silent for a while.
fn is_followed(cloud_map: &CloudMap, pid: u32) {
    let (one, two) = (Server::start("one"), Server::start("two"));
    cloud_map.create();
    cloud_map.register("one", one.port());
    let mut mesh = start(&cloud_map.url);
    wait_until("the first", || dial(&mesh) == "one");
    cloud_map.register("two", two.port());
    cloud_map.deregister("one");
    let deregistered = now();
    wait_until("the second", || dial(&mesh) == "two");
    figure(&format!("cloudmap: a change is seen after {} ms", (now() - deregistered) / 1_000_000));

    cloud_map.register("one", one.port());
    wait_until("both", || mesh.registry()["instances"] == 2);
    let unhealthy = "InstanceId='two', Status='UNHEALTHY'";
    cloud_map.call(&format!(
        "update_instance_custom_health_status(ServiceId=id('services', 'echo'), {unhealthy})"
    ));
    wait_until("its health", || {
        let backends = mesh.json(&["backend", "list"]);
        backends.as_array().unwrap().iter().any(|one| one["instance"] == "two" && one["state"] == "unhealthy")
    });
    assert_eq!((dial(&mesh), mesh.registry()["state"].as_str()), ("one".into(), Some("synced")));

    let process = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    let silent = now();
    wait_until("it is missed", || mesh.registry()["state"] == "stale");
    figure(&format!("cloudmap silent: noticed after {} ms", (now() - silent) / 1_000_000));
    let error = mesh.registry()["error"].to_string();
    assert!(error.starts_with(&format!("\"cloudmap {}", cloud_map.url)), "{error}");
    mesh.kill();
    launch(&mut mesh, &Place::here());
    mesh.ready();
    assert_eq!(dial(&mesh), "one", "as it said last");
    kill_process(process, Signal::CONT).unwrap();
    wait_until("it is back", || mesh.registry()["state"] == "synced");
    assert_eq!(dial(&mesh), "one");
    cloud_map.deregister("one");
    wait_until("who is left", || dial(&mesh) == "two");
}

#[test]
fn another_node_s_embedded_registry_is_followed() {
    let embedded = Embedded::start();
    is_followed(&CloudMap::here(embedded.url()), embedded.mesh.pid());
}

#[test]
fn moto_s_cloud_map_is_followed_and_a_record_that_breaks_a_rule_is_left_out_alone() {
    let moto = Moto::start();
    let cloud_map = CloudMap::here(moto.url());
    is_followed(&cloud_map, moto.pid());
    let one = Server::start("one");
    cloud_map.register("one", one.port());
    cloud_map.register("bad", 0);
    let mesh = start(&cloud_map.url);
    let problem = "service echo.service.local: instance bad: AWS_INSTANCE_PORT is 0";
    wait_until("it is named", || mesh.registry()["problems"].to_string().contains(problem));
    assert_eq!(dial(&mesh), "one");
}

#[test]
fn a_cloud_map_behind_a_black_hole_is_noticed_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let network = Network::new();
    let [node, far]: [Host; 2] = std::array::from_fn(|_| network.host());
    let moto = Moto::start_at(far.place());
    let cloud_map = CloudMap { place: far.place(), url: moto.url() };
    cloud_map.create();
    cloud_map.register("x", one.port());
    let mut mesh = prepare(&cloud_map.url);
    launch(&mut mesh, &node.place());
    mesh.ready();
    outage::in_a_black_hole("cloudmap", &mesh, VIP, &far, || cloud_map.register("x", two.port()));
}

#[test]
fn a_cloud_map_that_says_a_byte_a_second_or_nonsense_is_noticed_and_fails_no_connect() {
    let servers = [Server::start("one"), Server::start("two")];
    let moto = Moto::start();
    let cloud_map = CloudMap::here(moto.url());
    cloud_map.create();
    cloud_map.register("x", servers[0].port());
    let between = Between::start(&moto.address);
    let mesh = start(&format!("http://{}", between.address));
    let change = |server: usize| cloud_map.register("x", servers[server].port());
    between.endure("cloudmap", &mesh, VIP, ["", ""], change);
}

#[test]
fn a_kill_and_a_return_with_nothing_fail_no_connect_and_a_daemon_starts_meanwhile() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut moto = Moto::start();
    let cloud_map = CloudMap::here(moto.url());
    cloud_map.create();
    cloud_map.register("x", one.port());
    let mut mesh = start(&cloud_map.url);
    wait_until("the instance", || dial(&mesh) == "one");
    let traffic = Traffic::start(&mesh, VIP);
    moto.kill();
    mesh.wait_for_registry("stale");
    moto.restart();
    let back = now();
    wait_until("the fuse", || mesh.registry()["error"].to_string().contains("only 0 instances"));
    figure(&format!("cloudmap back with nothing: heard after {} ms", (now() - back) / 1_000_000));
    cloud_map.create();
    cloud_map.register("x", two.port());
    mesh.wait_for_registry("synced");
    wait_until("the change", || dial(&mesh) == "two");
    figure(&format!("cloudmap killed: {} connects, none failed", traffic.end(&["one", "two"])));
    moto.kill();
    let launch = |mesh: &mut Mesh| launch(mesh, &Place::here());
    outage::starts_without_it(&mut mesh, VIP, ("two", two.port()), launch);
}

/// What stands before moto, which asks nobody for keys.
struct Keys {
    address: String,
    server: Child,
}

impl Keys {
    /// Only this one is accepted.
    fn start(moto: &Moto, key: &str) -> Self {
        let address = free_address();
        let (host, port) = address.split_once(':').unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/keys.py");
        let server = Command::new("python3").args([script, host, port, &moto.url()]).spawn().unwrap();
        let keys = Self { address, server };
        wait_until("it listens", || Place::here().listens(&keys.address));
        keys.accept(key, "");
        keys
    }

    /// Others are told this.
    fn accept(&self, key: &str, error: &str) {
        let body = json!({ "key": key, "error": error }).to_string();
        done(Command::new("curl").args(["-sf", "-X", "PUT", "-d", &body, &self.url()]));
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A daemon whose keys are in the AWS SDK's own file; and that file.
fn launch_with_file(url: &str) -> (Mesh, PathBuf) {
    let mut mesh = prepare(url);
    let file = mesh.services.with_file_name("credentials");
    let mut command = Command::new(binary());
    command.env("AWS_SHARED_CREDENTIALS_FILE", &file).env("AWS_EC2_METADATA_DISABLED", "true");
    command.env("HOME", "/nowhere");
    mesh.launch_as(command);
    (mesh, file)
}

fn write_key(file: &Path, key: &str) {
    let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = s3cr3t\n");
    fs::write(file, text).unwrap();
}

#[test]
fn credentials_that_end_are_noticed_and_read_again_and_fail_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let moto = Moto::start();
    let cloud_map = CloudMap::here(moto.url());
    cloud_map.create();
    cloud_map.register("x", one.port());
    let keys = Keys::start(&moto, "AKIDFIRST");
    let (mesh, file) = launch_with_file(&keys.url());
    // There are none at first.
    let list = || text(&mesh.mesh(&["registry", "list"]).output().unwrap());
    wait_until("it says so", || list().contains("credentials"));
    write_key(&file, "AKIDFIRST");
    mesh.ready();
    let outage = |what, error, servers| Outage { what, mesh: &mesh, vip: VIP, error, servers };
    outage("cloudmap with another key", "ExpiredTokenException: ", ["one", "two"]).endure(
        || keys.accept("AKIDSECOND", "ExpiredTokenException"),
        || cloud_map.register("x", two.port()),
        |()| write_key(&file, "AKIDSECOND"),
    );
    outage("cloudmap that forgets a key for a while", "UnrecognizedClientException: ", ["two", "one"])
        .endure(
            || keys.accept("AKIDOTHER", "UnrecognizedClientException"),
            || cloud_map.register("x", one.port()),
            |()| keys.accept("AKIDSECOND", ""),
        );
    assert!(!mesh.log().contains("s3cr3t"));
}

#[test]
fn a_daemon_without_keys_says_so() {
    let mut mesh = Mesh::prepare("service = []");
    let url = format!("http://{}", free_address());
    mesh.configure(&format!(
        "[[registry]]\ntype = \"cloudmap\"\nregion = \"us-east-1\"\nendpoint_url = {url:?}\n"
    ));
    let mut command = Command::new(binary());
    command.env("AWS_EC2_METADATA_DISABLED", "true").env("HOME", "/nowhere");
    mesh.launch_as(command);
    wait_until("it says so", || {
        let list = text(&mesh.mesh(&["registry", "list"]).output().unwrap());
        list.contains(&url) && list.contains("credentials")
    });
}
