//! How backends are chosen, and how connections are counted.

use mesh_tests::{
    Mesh, datagram_service, free_address, server::Server, service, wait_until, weighted_service,
};

const VIP: &str = "127.128.10.1";

/// A service with these weights and this policy, on as many servers.
fn start(policy: &str, weights: &[u16]) -> (Mesh, Vec<Server>) {
    let servers: Vec<_> = weights.iter().map(|_| Server::start("x")).collect();
    let instances: Vec<_> =
        servers.iter().zip(weights).map(|(server, weight)| ("127.0.0.1", server.port(), *weight)).collect();
    let text = weighted_service("echo", 80, VIP, &instances).replace("\"random\"", &format!("{policy:?}"));
    (Mesh::start(&text), servers)
}

fn dial(mesh: &Mesh, times: usize) {
    let program = format!(
        "import socket\nfor _ in range({times}):\n    s = socket.create_connection(('{VIP}', 80), 5); s.recv(9); s.close()"
    );
    mesh.python(&program);
}

/// Open connections of each backend, by its port.
fn active(mesh: &Mesh, servers: &[Server]) -> Vec<u64> {
    let list = mesh.json(&["backend", "list"]);
    let of = |server: &Server| {
        let backend = list.as_array().unwrap().iter().find(|backend| backend["port"] == server.port());
        backend.unwrap()["connections"]["active"].as_u64().unwrap()
    };
    servers.iter().map(of).collect()
}

fn all_idle(mesh: &Mesh) -> bool {
    let list = mesh.json(&["backend", "list"]);
    list.as_array().unwrap().iter().all(|backend| backend["connections"]["active"] == 0)
}

#[test]
fn round_robin_takes_turns() {
    let (mesh, servers) = start("round-robin", &[100, 100, 100]);
    dial(&mesh, 300);
    let hits: Vec<_> = servers.iter().map(Server::hits).collect();
    assert_eq!(hits, [100, 100, 100]);
}

#[test]
fn round_robin_follows_the_weights() {
    let (mesh, servers) = start("round-robin", &[100, 200, 500]);
    dial(&mesh, 800);
    for (server, expected) in servers.iter().zip([100, 200, 500]) {
        assert!(server.hits().abs_diff(expected) <= 8, "{} instead of {expected}", server.hits());
    }
}

#[test]
fn random_is_even_by_chi_square() {
    let chi_square = || {
        let (mesh, servers) = start("random", &[100, 200, 300, 400]);
        dial(&mesh, 5000);
        let term = |(server, expected): (&Server, f64)| (server.hits() as f64 - expected).powi(2) / expected;
        servers.iter().zip([500.0, 1000.0, 1500.0, 2000.0]).map(term).sum::<f64>()
    };
    // 3 degrees of freedom: above 16.3 once in 1,000 runs by chance, so a second look is taken.
    let first = chi_square();
    assert!(first < 16.3 || chi_square() < 16.3, "{first}");
}

#[test]
fn least_connections_avoids_the_one_that_is_busy() {
    let (mesh, servers) = start("least-connections", &[100, 100, 100]);
    // Connections that stay open are spread more evenly than chance would.
    let program = format!(
        r#"
import socket, sys
held = [socket.create_connection(("{VIP}", 80), 5) for _ in range(300)]
print("held", flush=True)
sys.stdin.readline()
"#
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "held");
    let counts = active(&mesh, &servers);
    assert_eq!(counts.iter().sum::<u64>(), 300);
    // The servers may still be accepting.
    wait_until("the servers have seen as many", || {
        servers.iter().map(Server::hits).eq(counts.iter().copied())
    });
    // By chance the largest of three would be about 7 above 100, and 25 at times.
    assert!(counts.iter().all(|count| count.abs_diff(100) <= 5), "{counts:?}");
    client.end();
    wait_until("every connection is released", || all_idle(&mesh));
}

#[test]
fn every_socket_is_counted_once_and_released_once() {
    let server = Server::start("echo");
    let udp = Server::datagrams("echo", "127.0.0.1:0");
    let nobody: u16 = free_address().rsplit(':').next().unwrap().parse().unwrap();
    let services = service("echo", 80, VIP, &[("127.0.0.1", server.port())])
        + &service("dead", 81, VIP, &[("127.0.0.1", nobody)])
        + &datagram_service("udp", 82, VIP, &[("127.0.0.1", udp.port())]);
    let mesh = Mesh::start(&services);
    let active = |name: &str| {
        let list = mesh.json(&["backend", "list"]);
        let backend = list.as_array().unwrap().iter().find(|backend| backend["service"] == name).unwrap();
        backend["connections"]["active"].as_u64().unwrap()
    };
    let program = format!(
        r#"
import os, socket, sys
VIP = "{VIP}"
def tell(): print("at", flush=True); sys.stdin.readline()
held = [socket.create_connection((VIP, 80), 5) for _ in range(7)]
mptcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); mptcp.connect((VIP, 80)); held.append(mptcp)
refused = socket.socket()
for _ in range(3):
    # The same socket three times, and once more to where somebody listens.
    assert refused.connect_ex((VIP, 81)) != 0
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.connect((VIP, 82)); u.connect((VIP, 82))
tell()                                                       # 8 echo, 0 dead (refused), 1 udp
assert refused.connect_ex((VIP, 80)) == 0
copy = held[0].dup()
held[0].close()                                              # a second descriptor still has it
tell()                                                       # 9 echo, 0 dead, 1 udp
if os.fork() == 0:
    tell()
    os._exit(0)                                              # sockets shared with the parent
os.wait()
for s in held[1:4]:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"); s.close()   # reset
tell()                                                       # 6 echo
os.kill(os.getpid(), 9)
"#
    );
    let mut client = mesh.dialogue(&program);
    for expected in [[8, 0, 1], [9, 0, 1], [9, 0, 1], [6, 0, 1]] {
        assert_eq!(client.hear(), "at");
        assert_eq!([active("echo"), active("dead"), active("udp")], expected);
        client.go_on();
    }
    client.end();
    wait_until("a killed process releases everything", || all_idle(&mesh));
}

#[test]
fn counts_survive_the_daemon_and_are_not_inherited() {
    let (old, new) = (Server::start("old"), Server::start("new"));
    let only = |server: &Server| service("echo", 80, VIP, &[("127.0.0.1", server.port())]);
    let mut mesh = Mesh::start(&only(&old));
    let program = format!(
        "import socket, sys\ns = [socket.create_connection(('{VIP}', 80), 5) for _ in range(5)]\nprint('held', flush=True)\nsys.stdin.readline()"
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "held");

    mesh.kill();
    mesh.launch();
    mesh.ready();
    let first = mesh.json(&["backend", "list"])[0].clone();
    assert_eq!(first["connections"]["active"], 5);
    mesh.kill();
    mesh.write(&only(&new));
    mesh.launch();
    mesh.ready();
    let second = mesh.json(&["backend", "list"])[0].clone();
    assert_eq!(second["connections"]["active"], 0, "a new backend begins at zero");
    assert_ne!(second["id"], first["id"]);
    client.end();
}
