//! One workload does its worst; another one's connects go on.

use std::fs;

use mesh_tests::{Mesh, datagram_service, figure, is_long, server::Server, service, wait_until};

const VIP: &str = "127.128.16.1";

/// Of one process.
const SOCKETS: u64 = 18_000;

/// Answers of a workload of its own that dials again and again until it is told to stop.
fn victim() -> String {
    format!(
        r#"
import select, socket, sys
print("up", flush=True)
count = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    s = socket.create_connection(("{VIP}", 80), 5)
    assert s.getpeername() == ("{VIP}", 80), s.getpeername()
    assert s.recv(9) == b"echo"
    s.close()
    count += 1
print(count, flush=True)
"#
    )
}

#[test]
fn a_workload_with_more_sockets_than_there_are_places_costs_no_other_a_connect() {
    let (server, udp) = (Server::start("echo"), Server::datagrams("x", "127.0.0.1:0"));
    let services = service("echo", 80, VIP, &[("127.0.0.1", server.port())])
        + &datagram_service("udp", 81, VIP, &[("127.0.0.1", udp.port())]);
    let mesh = Mesh::start(&services);
    let mut victim = mesh.dialogue(&victim());
    assert_eq!(victim.hear(), "up");

    // There are 32,768 places. Each process holds as many sockets as a usual limit on open files
    // allows, on an address of its own.
    let processes = if is_long() { 28 } else { 2 };
    let attack = |n: u64| {
        format!(
            r#"
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({SOCKETS} + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = []
for _ in range({SOCKETS}):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("127.1.{n}.1", 0))
    s.connect(("{VIP}", 81))
    held.append(s)
assert all(s.getpeername() == ("{VIP}", 81) for s in held)
print("held", flush=True)
sys.stdin.readline()
"#
        )
    };
    let mut attackers: Vec<_> = (0..processes).map(|n| mesh.dialogue(&attack(n))).collect();
    attackers.iter_mut().for_each(|attacker| assert_eq!(attacker.hear(), "held"));
    let active = || {
        let list = mesh.json(&["backend", "list"]);
        let backend = list.as_array().unwrap().iter().find(|backend| backend["service"] == "udp");
        backend.unwrap()["connections"]["active"].as_u64().unwrap()
    };
    assert_eq!(active(), processes * SOCKETS);
    victim.go_on();
    let dialled: u64 = victim.hear().parse().unwrap();
    figure(&format!(
        "{dialled} connects beside {} sockets of another workload, none failed",
        processes * SOCKETS
    ));
    assert!(dialled > 100 && victim.end().success());
    for attacker in attackers {
        attacker.end();
    }
    wait_until("every socket is released", || active() == 0);
}

#[test]
fn more_workloads_than_affinity_has_room_for_cost_no_other_a_connect() {
    let server = Server::start("echo");
    let text = service("echo", 80, VIP, &[("127.0.0.1", server.port())]);
    let mut mesh = Mesh::prepare(&text.replace("policy", "affinity = \"1h\"\npolicy"));
    mesh.configure("[datapath]\nmax_services = 64\n");
    mesh.launch();
    mesh.ready();
    let mut victim = mesh.dialogue(&victim());
    assert_eq!(victim.hear(), "up");
    let workloads = if is_long() { 100_000 } else { 2000 };
    // A process that becomes one workload after the other.
    let program = format!(
        r#"
import os, socket
root = "{}"
for n in range({workloads}):
    group = f"{{root}}/w{{n}}"
    os.mkdir(group)
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
    s = socket.create_connection(("{VIP}", 80), 5)
    assert s.recv(9) == b"echo"
    s.close()
    open(root + "/cgroup.procs", "w").write(str(os.getpid()))
    os.rmdir(group)
"#,
        mesh.cgroup.display()
    );
    mesh.python(&program);
    victim.go_on();
    let dialled: u64 = victim.hear().parse().unwrap();
    figure(&format!("{dialled} connects beside {workloads} workloads with affinity, none failed"));
    assert!(dialled > 100 && victim.end().success());
    assert!(fs::read_dir(&mesh.cgroup).unwrap().flatten().all(|entry| !entry.path().is_dir()));
}
