//! Another version of mesh, whose maps have another layout, takes over from this one, and this one from
//! it: `cargo xtask test` builds it (`xtask/src/other.rs`).

use std::process::Command;

use mesh_tests::{
    Dialogue, Mesh, binary, datagram_service, figure, free_address, other_binary, server::Server, service,
    wait_until,
};

use crate::watchdog::Load;

const VIP: &str = "127.128.26.1";

const HELD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/held.py");

/// Connects under load never fail, established sockets are not noticed to change hands, counts are
/// exact, and what is ejected stays ejected.
#[test]
fn upgrades_and_downgrades_fail_no_connect_and_forget_no_socket() {
    const COUNT: u64 = 100;
    let server = Server::start("echo");
    let mut mesh = Mesh::prepare("");
    let mut python = mesh.inside("python3");
    let count = COUNT.to_string();
    python.args([HELD, VIP, "81", &count, "0", &count]);
    let mut client = Dialogue::start(python);
    let ports: Vec<u16> = client.hear().split(' ').map(|port| port.parse().unwrap()).collect();
    let refusing: u16 = free_address().rsplit(':').next().unwrap().parse().unwrap();
    let held = ports.iter().map(|port| ("127.0.0.1", *port)).collect::<Vec<_>>();
    let eject = r#"eject = { failures = 1, base = "300s" }"#;
    let echo = service("echo", 80, VIP, &[("127.0.0.1", server.port()), ("127.0.0.1", refusing)]);
    mesh.write(&format!(
        "{}\n{}\n{}",
        echo.replacen("policy", &format!("{eject}\npolicy"), 1),
        service("held", 81, VIP, &held),
        datagram_service("held", 81, VIP, &held),
    ));
    mesh.launch();
    mesh.ready();
    let ejected = |mesh: &Mesh| {
        let services = mesh.json(&["service", "list"]);
        services.as_array().unwrap().iter().map(|s| s["backends"]["ejected"].as_u64().unwrap()).sum::<u64>()
    };
    wait_until("the refusing one is ejected", || {
        mesh.python(&format!("import socket\nprint(socket.socket().connect_ex(('{VIP}', 80)))"));
        ejected(&mesh) == 1
    });
    client.go_on();
    assert_eq!(client.hear(), "all well");

    let load = Load::start(&mesh, VIP);
    let mut changes = 0;
    while load.runs() || changes < 4 {
        mesh.kill();
        mesh.launch_as(Command::new(if changes % 2 == 0 { other_binary() } else { binary() }));
        mesh.ready();
        changes += 1;
        client.go_on();
        assert_eq!(client.hear(), "all well", "after {changes} changes");
        assert_eq!(ejected(&mesh), 1, "after {changes} changes");
    }
    // A connection that is made in the moment of a change may show its backend.
    let connects = load.end(&["echo", "wrong-peer"]);
    figure(&format!("{connects} connects, {changes} upgrades and downgrades to another layout, none failed"));
    let active = |mesh: &Mesh| {
        let list = mesh.json(&["backend", "list"]);
        list.as_array().unwrap().iter().map(|b| b["connections"]["active"].as_u64().unwrap()).sum::<u64>()
    };
    wait_until("the counts are exact", || active(&mesh) == 2 * COUNT);
    client.end();
    wait_until("nothing is counted", || active(&mesh) == 0);
}
