//! What `deploy` holds, judged by others' validators, and what its systemd unit asks of the daemon.

use std::{
    fs,
    io::Write,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use mesh_tests::{Mesh, binary, netns::Network, server::Server, service, text, wait_until};

use crate::embedded::python;

const TRANSLATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/deploy.py");

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

/// What a validator says of its input, once it has found nothing wrong.
fn pass(command: &mut Command, input: &str) -> String {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    // One that has no use for it closes it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

fn unit() -> String {
    fs::read_to_string(deploy("systemd/mesh.service")).unwrap()
}

#[test]
fn every_configuration_is_valid() {
    for place in ["systemd", "docker", "kubernetes", "ecs"] {
        let file = deploy(place).join("mesh.toml");
        pass(Command::new(binary()).args(["config", "validate"]).arg(file), "");
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.service");
    // It looks for the program, too.
    fs::write(&path, unit().replace("/usr/local/bin/mesh", binary().to_str().unwrap())).unwrap();
    // A key that it does not know is only a warning.
    assert_eq!(pass(Command::new("systemd-analyze").arg("verify").arg(path), ""), "");
}

#[test]
fn the_unit_s_rights_are_enough() {
    let unit = unit();
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let rights: Vec<_> = line.split(' ').map(|right| right.to_lowercase().replacen("cap_", "+", 1)).collect();

    let server = Server::start("echo");
    let mut mesh = Mesh::prepare(&service("echo", 80, "127.128.31.1", &[("127.0.0.1", server.port())]));
    let mut limited = Command::new("setpriv");
    limited.arg(format!("--bounding-set=-all,{}", rights.join(",")));
    limited.args(["--inh-caps=-all", "--no-new-privs"]).arg(binary());
    mesh.launch_as(limited);
    mesh.ready();
    let said = mesh
        .python("import socket; print(socket.create_connection(('127.128.31.1', 80), 5).recv(9).decode())");
    assert_eq!(said, "echo");

    // A task of another user, in a namespace of its own.
    let network = Network::new();
    let host = network.host();
    let mut task = mesh.on(&host, "setpriv");
    let mut task =
        task.args(["--reuid=65534", "--regid=65534", "--clear-groups", "sleep", "60"]).spawn().unwrap();
    wait_until("the task's namespace has the routes", || {
        let routes =
            host.command("ip").args(["route", "show", "table", "local", "proto", "109"]).output().unwrap();
        text(&routes).contains("unreachable 127.128.0.0/10")
    });
    task.kill().unwrap();
    task.wait().unwrap();
    assert!(!mesh.log().contains("cannot"), "{}", mesh.log());
}

#[test]
fn systemd_is_told_that_the_daemon_is_ready_and_that_it_stops() {
    // A registry that says nothing keeps it from being ready.
    let mut mesh = Mesh::prepare("no services file");
    let place = mesh.dir.path().join("notify");
    let socket = UnixDatagram::bind(&place).unwrap();
    let hear = |patience| {
        socket.set_read_timeout(Some(patience)).unwrap();
        let mut bytes = [0; 64];
        let length = socket.recv(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes[..length]).into_owned())
    };
    let mut command = Command::new(binary());
    command.env("NOTIFY_SOCKET", &place);
    mesh.launch_as(command);
    wait_until("the API answers", || mesh.mesh(&["status"]).output().unwrap().status.success());
    assert_eq!(mesh.json(&["status"])["ready"], false);
    assert!(hear(Duration::from_millis(500)).is_err(), "told too early");

    mesh.write("service = []");
    assert_eq!(hear(Duration::from_secs(20)).unwrap(), "READY=1");
    assert_eq!(mesh.json(&["status"])["ready"], true);
    assert_eq!(mesh.stop(), Some(0));
    assert_eq!(hear(Duration::from_secs(20)).unwrap(), "STOPPING=1");
}

#[test]
fn the_dockerfile_passes_its_linter() {
    assert_eq!(pass(python("hadolint").arg(deploy("docker/Dockerfile")), ""), "");
}

#[test]
fn kubernetes_would_take_the_manifests() {
    let all = pass(Command::new("kubectl").arg("kustomize").arg(deploy("kubernetes")), "");
    let said = pass(python("kubernetes-validate").args(["--strict", "-"]), &all);
    assert!(said.contains("passed for resource daemonset/mesh"), "{said}");
}

#[test]
fn aws_would_take_the_task_definition_and_the_policy() {
    let files = ["ecs/task-definition.json", "ecs/iam-policy.json"].map(deploy);
    let template = pass(python("python").arg(TRANSLATE).args(files), "");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("template.json");
    fs::write(&path, template).unwrap();
    assert_eq!(pass(python("cfn-lint").args(["--regions", "us-east-1", "--"]).arg(path), ""), "");
}
