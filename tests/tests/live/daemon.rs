//! Starting, stopping, dying, and standing beside others.

use std::{
    fs,
    process::{Command, Stdio},
};

use mesh_tests::{Mesh, binary, figure, server::Server, service, text, wait_until};
use serde_json::Value;

const VIP: &str = "127.128.3.1";

fn dial(mesh: &Mesh) -> String {
    mesh.python(&format!(
        r#"
import errno, socket
try:
    s = socket.create_connection(("{VIP}", 80), 5)
    print(s.recv(9).decode())
except OSError as e:
    print(errno.errorcode[e.errno])
"#
    ))
}

/// What identifies everything mesh has in the kernel.
fn kernel_objects(mesh: &Mesh) -> (Value, Value, Vec<Value>) {
    let links =
        mesh.bpf("programs").as_array().unwrap().iter().map(|program| program["link"].clone()).collect();
    (mesh.bpf("lb"), mesh.bpf("maps"), links)
}

/// A VIP that no hook translates: nobody listens there, and where some daemon runs there is a route.
fn is_refused(answer: &str) -> bool {
    ["ECONNREFUSED", "EHOSTUNREACH"].contains(&answer)
}

#[test]
fn the_datapath_works_without_the_daemon_and_a_restart_changes_nothing() {
    let (a, b) = (Server::start("echo"), Server::start("echo"));
    let mut mesh =
        Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", a.port()), ("127.0.0.1", b.port())]));
    let before = kernel_objects(&mesh);
    mesh.kill();
    assert_eq!(dial(&mesh), "echo", "after kill -9");
    assert_eq!(kernel_objects(&mesh), before);
    mesh.launch();
    mesh.ready();
    assert_eq!(kernel_objects(&mesh), before, "adopted as it was: maps, links, ids and slots");
    assert_eq!(dial(&mesh), "echo");
    assert_eq!(mesh.stop(), Some(0));
    assert_eq!(dial(&mesh), "echo", "after SIGTERM");
    assert!(!mesh.socket.exists());
}

#[test]
fn a_restart_follows_what_changed_meanwhile() {
    let (old, new) = (Server::start("old"), Server::start("new"));
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", old.port())]));
    mesh.kill();
    mesh.write(&service("echo", 80, VIP, &[("127.0.0.1", new.port())]));
    assert_eq!(dial(&mesh), "old");
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "new");
    assert_eq!(
        mesh.json(&["status"])["maps"][2],
        serde_json::json!({"name": "BACKENDS", "used": 1, "max": 65536})
    );
}

#[test]
fn nothing_is_pruned_while_the_registry_cannot_be_read() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    mesh.kill();
    for broken in ["[[service]]\nname =", ""] {
        mesh.write(broken);
        mesh.launch();
        wait_until("the API answers", || mesh.mesh(&["status"]).output().unwrap().status.success());
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert_eq!(dial(&mesh), "echo", "with {broken:?}");
        mesh.kill();
    }
}

#[test]
fn cleanup_removes_everything_of_ours_and_nothing_else() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let refused = mesh.cleanup();
    assert!(
        !refused.status.success() && text(&refused).contains("in use by another mesh daemon"),
        "{}",
        text(&refused)
    );
    assert_eq!(dial(&mesh), "echo");

    mesh.stop();
    let foreign = mesh.pin_dir.join("not-ours");
    fs::create_dir(&foreign).unwrap();
    assert!(mesh.cleanup().status.success());
    assert!(is_refused(&dial(&mesh)), "the programs are gone");
    let left: Vec<_> = fs::read_dir(&mesh.pin_dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, std::slice::from_ref(&foreign));
    fs::remove_dir(foreign).unwrap();
    assert!(mesh.cleanup().status.success());
    assert!(!mesh.pin_dir.exists());
    assert!(mesh.cleanup().status.success(), "nothing to do is no error");
}

#[test]
fn two_daemons_run_side_by_side() {
    let (a, b) = (Server::start("A"), Server::start("B"));
    let one = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", a.port())]));
    let two = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", b.port())]));
    assert_eq!((dial(&one), dial(&two)), ("A".into(), "B".into()));
    drop(one);
    assert_eq!(dial(&two), "B");
}

#[test]
fn a_second_daemon_on_the_same_pin_folder_is_refused() {
    let server = Server::start("echo");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let before = kernel_objects(&mesh);
    let second = Command::new(binary()).args(["run", "--config"]).arg(&mesh.config).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let expected = format!("pin folder {} is in use by another mesh daemon", mesh.pin_dir.display());
    assert!(text(&second).contains(&expected), "{}", text(&second));
    assert_eq!(kernel_objects(&mesh), before);
    assert_eq!(dial(&mesh), "echo");
}

#[test]
fn a_daemon_for_another_cgroup_takes_its_programs_along() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    mesh.kill();
    let inner = mesh.cgroup.join("inner");
    fs::create_dir(&inner).unwrap();
    let config = fs::read_to_string(&mesh.config).unwrap();
    fs::write(&mesh.config, config.replacen(mesh.cgroup.to_str().unwrap(), inner.to_str().unwrap(), 1))
        .unwrap();
    mesh.launch();
    mesh.ready();
    assert!(is_refused(&dial(&mesh)), "no longer managed");
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec python3 -c 'import socket; print(socket.create_connection((\"{VIP}\", 80), 5).recv(9).decode())'",
        inner.display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(text(&output).trim(), "echo");
    mesh.stop();
    assert!(mesh.cleanup().status.success());
    wait_until("the inner cgroup goes", || fs::remove_dir(&inner).is_ok());
}

#[test]
fn a_lost_map_pin_is_made_good_at_the_next_start() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    mesh.kill();
    fs::remove_file(mesh.map_pin("SLOTS")).unwrap();
    assert_eq!(dial(&mesh), "echo", "the programs still hold their maps");
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "echo");
    assert_eq!(mesh.kernel_backends(&format!("{VIP}:80")), [format!("127.0.0.1:{}", server.port())]);
}

#[test]
fn a_start_that_fails_does_not_swap_in_programs_that_know_nothing() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    mesh.kill();
    // The maps must be made anew, but their content cannot be had: twice in a row.
    fs::remove_file(mesh.map_pin("SLOTS")).unwrap();
    mesh.write("[[service]]\nname = ");
    for _ in 0..2 {
        mesh.launch();
        wait_until("the API answers", || mesh.mesh(&["status"]).output().unwrap().status.success());
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert_eq!(dial(&mesh), "echo");
        mesh.kill();
    }
    mesh.write(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "echo");
}

/// Sizes come and go, also with a daemon that dies on the way, while connects go on.
#[test]
fn sizes_change_without_a_failed_connect_and_without_forgetting_a_socket() {
    let server = Server::start("echo");
    let filler: String = (0..20).map(|n| service(&format!("s{n}"), 80, "", &[("10.0.0.1", 80)])).collect();
    let text = service("echo", 80, VIP, &[("127.0.0.1", server.port())]) + &filler;
    let mut mesh = Mesh::prepare(&text);
    let sizes = |n: u32| format!("[datapath]\nmax_services = {n}\nmax_backends = {n}\n");
    mesh.configure(&sizes(50));
    mesh.launch();
    mesh.ready();
    let program = format!(
        r#"
import socket, sys
held = [socket.create_connection(("{VIP}", 80), 5) for _ in range(9)]
print("held", flush=True)
sys.stdin.readline()
print(all(s.getpeername() == ("{VIP}", 80) for s in held), flush=True)
sys.stdin.readline()
"#
    );
    let mut holder = mesh.dialogue(&program);
    assert_eq!(holder.hear(), "held");
    let mut client = mesh.inside(env!("CARGO_BIN_EXE_client"));
    client.args([&format!("{VIP}:80"), "2", "40000"]).stdout(Stdio::piped());
    let client = client.spawn().unwrap();
    let client = std::thread::spawn(|| client.wait_with_output().unwrap());
    let max = |mesh: &Mesh| {
        let maps = mesh.json(&["status"])["maps"].clone();
        maps.as_array().unwrap().iter().find(|map| map["name"] == "BACKENDS").unwrap()["max"]
            .as_u64()
            .unwrap()
    };
    let mut changes = 0;
    while !client.is_finished() || changes < 4 {
        let size = if changes % 2 == 0 { 3000 } else { 50 };
        mesh.configure(&sizes(size));
        mesh.kill();
        mesh.launch();
        if changes % 4 > 1 {
            // Dies at some point of its start, and starts once more.
            std::thread::sleep(std::time::Duration::from_millis(3 * changes % 80));
            mesh.kill();
            mesh.launch();
        }
        mesh.ready();
        assert_eq!(max(&mesh), u64::from(size));
        changes += 1;
    }
    let answers = String::from_utf8(client.join().unwrap().stdout).unwrap();
    let failed = answers.lines().filter(|line| !line.ends_with(" echo")).count();
    figure(&format!(
        "{} connects while sizes changed {changes} times, {failed} failed",
        answers.lines().count()
    ));
    assert_eq!((answers.lines().count(), failed), (40_000, 0));
    holder.go_on();
    assert_eq!(holder.hear(), "True");
    let active = || {
        let list = mesh.json(&["backend", "list"]);
        let echo = list.as_array().unwrap().iter().find(|backend| backend["service"] == "echo").unwrap();
        echo["connections"]["active"].as_u64().unwrap()
    };
    assert_eq!(active(), 9, "nothing is counted twice or lost");
    holder.end();
    wait_until("all are released", || active() == 0);

    // What would not fit keeps the maps as they are.
    mesh.configure(&sizes(10));
    mesh.kill();
    mesh.launch();
    mesh.ready();
    assert!(max(&mesh) > 10 && mesh.log().contains("keep their sizes"), "{}", mesh.log());
}

#[test]
fn a_configuration_without_registries_removes_nothing() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let config = fs::read_to_string(&mesh.config).unwrap();
    fs::write(&mesh.config, "").unwrap();
    mesh.hang_up();
    wait_until("the registry is gone", || mesh.json(&["registry", "list"]).as_array().unwrap().is_empty());
    wait_until("the service is forgotten", || mesh.json(&["service", "list"]).as_array().unwrap().is_empty());
    mesh.ready();
    assert_eq!(dial(&mesh), "echo");
    assert_eq!(mesh.json(&["explain", &format!("{VIP}:80")])[0]["verdict"], "translated");
    mesh.kill();
    fs::write(&mesh.config, config.split("[[registry]]").next().unwrap()).unwrap();
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "echo");
    fs::write(&mesh.config, config).unwrap();
}

#[test]
fn vips_are_kept_over_restarts() {
    let mut mesh = Mesh::start(&(service("a", 80, "", &[]) + &service("b", 80, "", &[])));
    let before = mesh.json(&["service", "list"]);
    let vips: Vec<_> = before.as_array().unwrap().iter().map(|service| service["vips"][0].clone()).collect();
    assert!(
        vips[0] != vips[1] && vips.iter().all(|vip| vip.as_str().unwrap().starts_with("127.1")),
        "{vips:?}"
    );
    mesh.stop();
    assert!(mesh.cleanup().status.success());
    mesh.write(&(service("b", 80, "", &[]) + &service("c", 80, "", &[]) + &service("a", 80, "", &[])));
    mesh.launch();
    mesh.ready();
    let after = mesh.json(&["service", "list"]);
    let vip =
        |name: &str| after.as_array().unwrap().iter().find(|s| s["name"] == name).unwrap()["vips"][0].clone();
    assert_eq!([vip("a"), vip("b")], vips[..]);
}

#[test]
fn a_hang_up_or_a_changed_file_reloads_the_configuration() {
    let server = Server::start("echo");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let metric = |value: &str| {
        let metrics =
            Command::new("curl").args(["-s", &format!("http://{}/metrics", mesh.web)]).output().unwrap();
        text(&metrics).contains(&format!("mesh_config_last_reload_successful {value}"))
    };
    // A second registry appears.
    let more = mesh.dir.path().join("more.yaml");
    fs::write(&more, "service: [{name: more, namespace: service.local, port: 90, vip: 127.128.3.9}]")
        .unwrap();
    mesh.configure(&format!("[[registry]]\ntype = \"file\"\npath = {more:?}\n"));
    wait_until("the new registry's service", || {
        mesh.json(&["service", "list"]).as_array().unwrap().len() == 2
    });
    assert!(metric("1"));

    // A mistake is refused, and everything stays.
    mesh.configure("[colour]\n");
    wait_until("the mistake is noticed", || metric("0"));
    assert!(mesh.log().contains("unknown field `colour`"), "{}", mesh.log());
    assert_eq!(mesh.json(&["service", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(dial(&mesh), "echo");

    mesh.configure("");
    mesh.hang_up();
    wait_until("the registry that was taken out is gone", || {
        mesh.json(&["service", "list"]).as_array().unwrap().len() == 1
    });
    assert!(metric("1"));
    assert_eq!(dial(&mesh), "echo");
}

#[test]
fn a_service_that_does_not_fit_is_named_and_the_others_work() {
    let server = Server::start("echo");
    let mut mesh = Mesh::prepare("");
    mesh.configure("[datapath]\nmax_services = 10\nmax_backends = 4\n");
    let many: Vec<_> = (1..=5).map(|port| ("10.0.0.1", port)).collect();
    mesh.write(
        &(service("big", 80, "127.128.3.7", &many)
            + &service("echo", 80, VIP, &[("127.0.0.1", server.port())])),
    );
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "echo");
    let problems = mesh.json(&["status"])["problems"].to_string();
    assert!(
        problems.contains("127.128.3.7") && problems.contains("BACKENDS") && problems.contains("of 4"),
        "{problems}"
    );
    assert_eq!(mesh.kernel_backends("127.128.3.7:80"), Vec::<String>::new());
}
