//! The Cloud Map registry. AWS itself is not to be had here: its API is spoken by moto, which others wrote, and
//! by the embedded registry of another daemon.

use std::process::Command;

use mesh_tests::{Mesh, binary, figure, free_address, now, server::Server, text, wait_until};
use rustix::process::{Pid, Signal, kill_process};

use crate::embedded::{Embedded, Moto, python};

/// One call of boto3, whose arguments are Python's.
fn aws(url: &str, call: &str) -> String {
    let program = format!(
        r#"
import boto3
from botocore.config import Config
aws = boto3.client("servicediscovery", endpoint_url="{url}", region_name="us-east-1", aws_access_key_id="any",
                   aws_secret_access_key="any", config=Config(inject_host_prefix=False))
def id(kind, name):
    return next(one["Id"] for one in getattr(aws, "list_" + kind)()[kind.capitalize()] if one["Name"] == name)
aws.{call}
"#
    );
    let output = python("python").args(["-c", &program]).output().unwrap();
    assert!(output.status.success(), "{call}: {}", text(&output));
    text(&output)
}

fn register(url: &str, id: &str, port: u16) {
    let attributes = format!("{{'AWS_INSTANCE_IPV4': '127.0.0.1', 'AWS_INSTANCE_PORT': '{port}'}}");
    aws(
        url,
        &format!(
            "register_instance(ServiceId=id('services', 'echo'), InstanceId='{id}', Attributes={attributes})"
        ),
    );
}

fn deregister(url: &str, id: &str) {
    aws(url, &format!("deregister_instance(ServiceId=id('services', 'echo'), InstanceId='{id}')"));
}

/// A service `echo` with custom health checks, which clients dial at port 80.
fn create(url: &str) {
    aws(url, "create_http_namespace(Name='service.local')");
    aws(
        url,
        "create_service(Name='echo', NamespaceId=id('namespaces', 'service.local'), \
         HealthCheckCustomConfig={'FailureThreshold': 1})",
    );
    aws(url, "update_service_attributes(ServiceId=id('services', 'echo'), Attributes={'mesh.port': '80'})");
}

/// A daemon that reads Cloud Map at an address, with keys as ECS would give it.
fn start(url: &str) -> Mesh {
    let mut mesh = Mesh::prepare("service = []");
    mesh.configure(&format!(
        "[[registry]]\ntype = \"cloudmap\"\nregion = \"us-east-1\"\nnamespaces = [\"service.local\"]\n\
         endpoint_url = {url:?}\nhealth_interval = \"1s\"\n"
    ));
    launch(&mut mesh);
    mesh.ready();
    mesh
}

fn launch(mesh: &mut Mesh) {
    let mut command = Command::new(binary());
    command.envs([("AWS_ACCESS_KEY_ID", "any"), ("AWS_SECRET_ACCESS_KEY", "any")]);
    // Nobody is to be asked for other ones.
    command.env("AWS_EC2_METADATA_DISABLED", "true");
    mesh.launch_as(command);
}

fn dial(mesh: &Mesh) -> String {
    let vip = mesh.json(&["service", "list"])[0]["vips"][0].as_str().unwrap_or_default().to_owned();
    mesh.dial(&format!("{vip}:80"))
}

/// What is registered and deregistered at `url`, and its health, which does not move the revision; then the
/// server, which is process `pid`, falls silent for a while.
fn is_followed(url: &str, pid: u32) {
    let (one, two) = (Server::start("one"), Server::start("two"));
    create(url);
    register(url, "one", one.port());
    let mut mesh = start(url);
    wait_until("the first", || dial(&mesh) == "one");
    register(url, "two", two.port());
    deregister(url, "one");
    let deregistered = now();
    wait_until("the second", || dial(&mesh) == "two");
    figure(&format!("cloudmap: a change is seen after {} ms", (now() - deregistered) / 1_000_000));

    register(url, "one", one.port());
    wait_until("both", || mesh.registry()["instances"] == 2);
    let unhealthy = "InstanceId='two', Status='UNHEALTHY'";
    aws(url, &format!("update_instance_custom_health_status(ServiceId=id('services', 'echo'), {unhealthy})"));
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
    assert!(error.starts_with(&format!("\"cloudmap {url}")), "{error}");
    mesh.kill();
    launch(&mut mesh);
    mesh.ready();
    assert_eq!(dial(&mesh), "one", "as it said last");
    kill_process(process, Signal::CONT).unwrap();
    wait_until("it is back", || mesh.registry()["state"] == "synced");
    assert_eq!(dial(&mesh), "one");
    aws(url, "deregister_instance(ServiceId=id('services', 'echo'), InstanceId='one')");
    wait_until("who is left", || dial(&mesh) == "two");
}

#[test]
fn another_node_s_embedded_registry_is_followed() {
    let embedded = Embedded::start();
    is_followed(&embedded.url(), embedded.mesh.pid());
}

#[test]
fn moto_s_cloud_map_is_followed_and_a_record_that_breaks_a_rule_is_left_out_alone() {
    let moto = Moto::start();
    is_followed(&moto.url(), moto.pid());
    let (url, one) = (moto.url(), Server::start("one"));
    register(&url, "one", one.port());
    register(&url, "bad", 0);
    let mesh = start(&url);
    let problem = "service echo.service.local: instance bad: AWS_INSTANCE_PORT is 0";
    wait_until("it is named", || mesh.registry()["problems"].to_string().contains(problem));
    assert_eq!(dial(&mesh), "one");
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
