//! The Cloud Map registry. AWS itself is not to be had here: its API is spoken by moto, which others wrote, and
//! by the embedded registry of another daemon.

use std::process::Command;

use mesh_tests::{
    Mesh, binary, done, figure, free_address,
    netns::{Host, Network, Place},
    now,
    server::Server,
    text, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    black_hole,
    embedded::{Embedded, Moto, program},
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
    black_hole::is_endured("cloudmap", &mesh, &far, VIP, || cloud_map.register("x", two.port()));
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
