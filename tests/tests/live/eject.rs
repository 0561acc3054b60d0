//! Passive ejection: what failed connects do to a backend.

use std::{fs, os::unix::process::ExitStatusExt, process::Command, time::Instant};

use mesh_tests::{Dialogue, Mesh, figure, free_address, netns::Network, server::Server, service, wait_until};

const VIP: &str = "127.128.11.1";

fn port_of(address: &str) -> u16 {
    address.rsplit(':').next().unwrap().parse().unwrap()
}

/// A service of so many refusing ports behind these servers; its settings are `more`.
fn services(servers: &[Server], refusing: &[String], more: &str) -> String {
    let ports = servers.iter().map(Server::port).chain(refusing.iter().map(|address| port_of(address)));
    let instances: Vec<_> = ports.map(|port| ("127.0.0.1", port)).collect();
    service("echo", 80, VIP, &instances).replacen("policy", &format!("{more}\npolicy"), 1)
}

/// Dials so often, one after the other; how many were refused.
fn failures(mesh: &Mesh, times: usize) -> usize {
    let program = format!(
        r#"
import socket
failed = 0
for _ in range({times}):
    s = socket.socket()
    s.settimeout(5)
    failed += s.connect_ex(("{VIP}", 80)) != 0
    s.close()
print(failed)
"#
    );
    mesh.python(&program).parse().unwrap()
}

fn ejected(mesh: &Mesh) -> u64 {
    mesh.json(&["service", "list"])[0]["backends"]["ejected"].as_u64().unwrap()
}

#[test]
fn a_backend_is_avoided_after_so_many_failures_in_a_row() {
    let servers = [Server::start("a"), Server::start("b"), Server::start("c")];
    let eject = r#"eject = { failures = 3, base = "60s" }"#;
    let mesh = Mesh::start(&services(&servers, &[free_address()], eject));
    assert_eq!(failures(&mesh, 400), 3);
    assert_eq!(ejected(&mesh), 1);
    let states = mesh.json(&["backend", "list"]);
    let refusing = states.as_array().unwrap().iter().find(|b| b["instance"] == "echo-3").unwrap();
    assert_eq!(refusing["state"], "ejected");
    assert_eq!(refusing["connections"]["active"], 0);
}

#[test]
fn refused_mptcp_sockets_count_as_well_and_are_taken_off_the_count() {
    let servers = [Server::start("a"), Server::start("b")];
    let eject = r#"eject = { failures = 2, base = "60s" }"#;
    let mesh = Mesh::start(&services(&servers, &[free_address()], eject));
    let program = format!(
        r#"
import socket, sys
sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) for _ in range(100)]
print(sum(s.connect_ex(("{VIP}", 80)) != 0 for s in sockets), flush=True)
sys.stdin.readline()
"#
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "2");
    assert_eq!(ejected(&mesh), 1);
    let list = mesh.json(&["backend", "list"]);
    let active =
        list.as_array().unwrap().iter().map(|backend| backend["connections"]["active"].as_u64().unwrap());
    assert_eq!(active.sum::<u64>(), 98, "those that were refused are on no count, though they are open");
    client.end();
}

#[test]
fn every_policy_avoids_an_ejected_backend() {
    for policy in ["least-connections", "round-robin", "maglev", "random"] {
        let servers = [Server::start("a"), Server::start("b")];
        let eject = r#"eject = { failures = 1, base = "60s", max_percent = 100 }"#;
        let text = services(&servers, &[free_address()], eject).replace("\"random\"", &format!("{policy:?}"));
        let mesh = Mesh::start(&text);
        // With maglev all connects of this workload go to one backend, which may be another one.
        let failed = failures(&mesh, 100);
        assert!(failed <= 1 && (failed == 1 || policy == "maglev"), "{policy}: {failed}");
        assert_eq!(ejected(&mesh), failed as u64, "{policy}");
    }
}

#[test]
fn one_connect_tries_it_again_when_the_penalty_is_over() {
    let refusing = free_address();
    let eject = r#"eject = { failures = 1, base = "400ms", max = "800ms" }"#;
    let mesh = Mesh::start(&services(&[Server::start("a")], std::slice::from_ref(&refusing), eject));
    let start = Instant::now();
    assert_eq!(failures(&mesh, 200), 1);
    // As long as it refuses, each penalty costs one connect: 400 ms, then 800 ms each.
    let mut tried = 0;
    wait_until("it was tried twice", || {
        tried += failures(&mesh, 50);
        tried >= 2
    });
    assert!(start.elapsed().as_millis() >= 1200, "the second penalty is twice the first");
    // It works again: found out by one connect, and then it gets its share.
    let back = Server::start_at("back", &refusing);
    wait_until("it is back", || {
        assert_eq!(failures(&mesh, 50), 0);
        ejected(&mesh) == 0
    });
    let before = back.hits();
    assert_eq!(failures(&mesh, 100), 0);
    assert!(back.hits() - before > 20);
}

#[test]
fn no_more_than_the_configured_share_is_ejected() {
    let refusing = [free_address(), free_address(), free_address()];
    let eject = r#"eject = { failures = 2, base = "60s", max_percent = 50 }"#;
    let mesh = Mesh::start(&services(&[Server::start("a")], &refusing, eject));
    let failed = failures(&mesh, 400);
    assert_eq!(ejected(&mesh), 2, "two of four");
    // The third one goes on refusing: half of what is left.
    assert!((100..300).contains(&failed), "{failed}");
}

#[test]
fn a_lone_backend_is_never_ejected() {
    let refusing = free_address();
    let mesh = Mesh::start(&services(&[], std::slice::from_ref(&refusing), "eject = { failures = 1 }"));
    assert_eq!(failures(&mesh, 20), 20);
    assert_eq!(ejected(&mesh), 0);
    let _back = Server::start_at("back", &refusing);
    assert_eq!(failures(&mesh, 20), 0, "nothing keeps it from being dialled at once");
}

#[test]
fn ejection_can_be_switched_off_and_changed_while_it_runs() {
    let (servers, refusing) = ([Server::start("a")], [free_address()]);
    let mesh = Mesh::start(&services(&servers, &refusing, "eject = { failures = 0 }"));
    let failed = failures(&mesh, 100);
    assert!((20..80).contains(&failed), "{failed}");
    mesh.write(&services(&servers, &refusing, r#"eject = { failures = 2, base = "60s" }"#));
    wait_until("the new settings count", || failures(&mesh, 20) == 0);
    assert_eq!(ejected(&mesh), 1);
    // A backend that is gone takes its penalty along.
    mesh.write(&services(&servers, &[], ""));
    wait_until("it is gone", || mesh.used("BACKENDS") == 1);
    mesh.write(&services(&servers, &refusing, r#"eject = { failures = 2, base = "60s" }"#));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    assert_eq!(ejected(&mesh), 0);
    assert_eq!(failures(&mesh, 100), 2);
}

#[test]
fn an_ejection_outlives_the_daemon() {
    let servers = [Server::start("a"), Server::start("b")];
    let eject = r#"eject = { failures = 2, base = "60s" }"#;
    let mut mesh = Mesh::start(&services(&servers, &[free_address()], eject));
    assert_eq!(failures(&mesh, 100), 2);
    mesh.kill();
    assert_eq!(failures(&mesh, 50), 0);
    mesh.launch();
    mesh.ready();
    assert_eq!((failures(&mesh, 50), ejected(&mesh)), (0, 1));
}

/// A process that closes its socket, or is killed, in the middle of a handshake says nothing about the
/// backend; nor does a source address that cannot be used.
#[test]
fn local_errors_do_not_count() {
    // Nobody answers there: connects stay in SYN_SENT.
    let network = Network::new();
    let host = network.host();
    let eject = r#"eject = { failures = 1, base = "60s", max_percent = 100 }"#;
    let text =
        service("silent", 80, VIP, &[("10.213.0.77", 81)]).replacen("policy", &format!("{eject}\npolicy"), 1);
    let mesh = Mesh::start(&text);
    let program = format!(
        r#"
import errno, os, socket
for source in (None, "127.0.0.1"):
    s = socket.socket()
    s.setblocking(False)
    if source:
        s.bind((source, 0))
        assert s.connect_ex(("{VIP}", 80)) in (errno.EINVAL, errno.ENETUNREACH)
    else:
        assert s.connect_ex(("{VIP}", 80)) == errno.EINPROGRESS
    s.close()
s = socket.socket()
s.setblocking(False)
s.connect_ex(("{VIP}", 80))
os.kill(os.getpid(), 9)
"#
    );
    let output = mesh.on(&host, "python3").args(["-c", &program]).output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{}", mesh_tests::text(&output));
    assert_eq!(ejected(&mesh), 0);
    let health = mesh.json(&["backend", "list"])[0].clone();
    assert_eq!((&health["state"], &health["connections"]["active"]), (&"active".into(), &0.into()));
}

/// A socket whose connect to the VIP failed before its handshake says nothing of the backend by what
/// it dials next, neither for it nor against it.
#[test]
fn what_a_socket_dials_after_a_connect_that_failed_locally_does_not_count() {
    let network = Network::new();
    let (host, other) = (network.host(), network.host());
    let eject = r#"eject = { failures = 1, base = "60s", max_percent = 100 }"#;
    let text = service("echo", 80, VIP, &[(&other.address, 81), (&other.address, 82)]).replacen(
        "policy",
        &format!("{eject}\npolicy"),
        1,
    );
    let mesh = Mesh::start(&text);
    let program = format!(
        r#"
import errno, socket, sys
def dial(address, source=None):
    s = socket.socket()
    if source:
        s.bind((source, 0))
        assert s.connect_ex(("{VIP}", 80)) == errno.EINVAL
    return s.connect_ex(address)
listener = socket.create_server(("127.0.0.1", 0))
refusing = socket.socket()
refusing.bind(("127.0.0.1", 0))
for _ in range(5):
    assert dial(refusing.getsockname(), "127.0.0.1") == errno.ECONNREFUSED
print("refused elsewhere", flush=True)
sys.stdin.readline()
for _ in range(2):
    assert dial(("{VIP}", 80)) == errno.ECONNREFUSED
print("refused by both", flush=True)
sys.stdin.readline()
for _ in range(5):
    assert dial(listener.getsockname(), "127.0.0.1") == 0
print("accepted elsewhere", flush=True)
sys.stdin.readline()
"#
    );
    let mut python = mesh.on(&host, "python3");
    python.args(["-c", &program]);
    let mut client = Dialogue::start(python);
    for (said, count) in [("refused elsewhere", 0), ("refused by both", 2), ("accepted elsewhere", 2)] {
        assert_eq!(client.hear(), said);
        assert_eq!(ejected(&mesh), count, "{said}");
        client.go_on();
    }
    client.end();
}

/// 8 tasks with 5,000 connects a second in all, one backend of four refuses.
#[test]
fn under_load_only_the_allowed_failures_and_what_was_under_way_fail() {
    let servers = [Server::start("a"), Server::start("b"), Server::start("c")];
    let eject = r#"eject = { failures = 5, base = "60s" }"#;
    let mesh = Mesh::start(&services(&servers, &[free_address()], eject));
    let tasks: Vec<_> = (0..8)
        .map(|n| {
            let cgroup = mesh.cgroup.join(format!("task-{n}"));
            fs::create_dir(&cgroup).unwrap();
            let client = env!("CARGO_BIN_EXE_client");
            let script =
                format!("echo $$ > {}/cgroup.procs && exec {client} {VIP}:80 1 1250", cgroup.display());
            let mut task = Command::new("sh");
            task.args(["-c", &script]).stdout(std::process::Stdio::piped());
            task.spawn().unwrap()
        })
        .collect();
    let start = Instant::now();
    let mut failed = 0;
    let mut all = 0u32;
    for task in tasks {
        let output = task.wait_with_output().unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        all += u32::try_from(lines.lines().count()).unwrap();
        failed += lines.lines().filter(|line| line.ends_with("ConnectionRefused")).count();
        assert!(!lines.contains("TimedOut") && !lines.contains("wrong-peer"));
    }
    figure(&format!(
        "{all} connects of 8 tasks, {:.0} a second, one of four backends refusing: {failed} failed; 5 are allowed, and up to 7 may be under way",
        f64::from(all) / start.elapsed().as_secs_f64()
    ));
    assert_eq!(all, 10_000);
    assert!((5..=12).contains(&failed), "{failed}");
    assert_eq!(ejected(&mesh), 1);
}
