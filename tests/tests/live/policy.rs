//! How backends are chosen, and how connections are counted.

use std::process::Stdio;

use mesh_tests::{
    Mesh, datagram_service, figure, free_address, is_long, server::Server, service, wait_until,
    weighted_service,
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

/// How far shares are from what is expected.
fn chi_square(hits: &[u64], expected_shares: &[f64]) -> f64 {
    let total = hits.iter().sum::<u64>() as f64;
    let term = |(hits, share): (&u64, &f64)| (*hits as f64 - share * total).powi(2) / (share * total);
    hits.iter().zip(expected_shares).map(term).sum()
}

/// With 3 degrees of freedom, chance alone goes above this once in 1,000 runs.
const CHI_SQUARE_3: f64 = 16.27;

/// By chance one run in 1,000 fails, so a second look is taken before that counts.
fn is_even(what: &str, mut run: impl FnMut() -> f64) {
    let first = run();
    figure(&format!("{what}: chi-square {first:.1}; chance alone passes {CHI_SQUARE_3} once in 1,000 runs"));
    assert!(first < CHI_SQUARE_3 || run() < CHI_SQUARE_3, "{what}: {first}");
}

/// Four backends stay, with weights 1 to 4; a fifth comes and goes all the time.
#[test]
fn shares_follow_the_weights_by_chi_square_while_a_backend_comes_and_goes() {
    const WEIGHTS: [u16; 4] = [100, 200, 300, 400];
    let connects = if is_long() { 100_000 } else { 10_000 };
    for policy in ["random", "least-connections", "round-robin"] {
        let (mesh, servers) = start(policy, &WEIGHTS);
        let fifth = Server::start("x");
        let text = |with_fifth: bool| {
            let weighted = servers.iter().zip(WEIGHTS).chain(with_fifth.then_some((&fifth, 250)));
            let instances: Vec<_> =
                weighted.map(|(server, weight)| ("127.0.0.1", server.port(), weight)).collect();
            weighted_service("echo", 80, VIP, &instances).replace("\"random\"", &format!("{policy:?}"))
        };
        is_even(&format!("{policy} over weights 1 to 4 beside a backend that comes and goes"), || {
            let before: Vec<_> = servers.iter().map(Server::hits).collect();
            let mut client = mesh.inside(env!("CARGO_BIN_EXE_client"));
            let connects = connects.to_string();
            client.args([&format!("{VIP}:80"), "1", &connects]).stdout(Stdio::piped());
            let client = client.spawn().unwrap();
            let client = std::thread::spawn(|| client.wait_with_output().unwrap());
            let (mut changes, hits) = (0, fifth.hits());
            while !client.is_finished() {
                changes += 1;
                mesh.write(&text(changes % 2 == 1));
                mesh.wait_for_backends(&format!("{VIP}:80"), 4 + changes % 2);
            }
            let answers = String::from_utf8(client.join().unwrap().stdout).unwrap();
            assert!(answers.lines().all(|line| line.ends_with(" x")), "a connect failed");
            assert!(changes > 4 && fifth.hits() > hits, "it came and went {changes} times");
            let hits: Vec<_> =
                servers.iter().zip(before).map(|(server, before)| server.hits() - before).collect();
            chi_square(&hits, &[0.1, 0.2, 0.3, 0.4])
        });
    }
}

/// Who answers each of so many workloads.
fn answers_of_workloads(mesh: &Mesh, count: usize) -> Vec<String> {
    // One process that becomes one workload after the other: a workload is a cgroup.
    let program = format!(
        r#"
import os, socket
root = "{}"
for n in range({count}):
    group = f"{{root}}/w{{n}}"
    os.makedirs(group, exist_ok=True)
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
    with socket.create_connection(("{VIP}", 80), 5) as s:
        print(s.recv(9).decode())
open(root + "/cgroup.procs", "w").write(str(os.getpid()))
"#,
        mesh.cgroup.display()
    );
    mesh.python(&program).lines().map(str::to_owned).collect()
}

#[test]
fn maglev_spreads_workloads_by_weight_and_moves_only_those_of_a_backend_that_leaves() {
    let workloads = if is_long() { 20_000 } else { 2000 };
    let servers = ["a", "b", "c", "d", "e"].map(Server::start);
    let text = |weights: &[u16]| {
        let weighted = servers.iter().zip(weights);
        let instances: Vec<_> =
            weighted.map(|(server, weight)| ("127.0.0.1", server.port(), *weight)).collect();
        weighted_service("echo", 80, VIP, &instances).replace("\"random\"", "\"maglev\"")
    };
    let mesh = Mesh::start(&text(&[100, 200, 300, 400]));
    let count =
        |answers: &[String], name: &str| answers.iter().filter(|answer| *answer == name).count() as u64;
    let lb = mesh.lb();
    let share = |server: &Server| {
        let backends = lb[0]["backends"].as_array().unwrap();
        backends.iter().find(|b| b["port"] == server.port()).unwrap()["share"].as_f64().unwrap()
    };
    let shares: Vec<_> = servers[..4].iter().map(share).collect();
    // Which slots of the table a backend has depends on its address, and a test's ports are anybody's.
    let off =
        shares.iter().zip([0.1, 0.2, 0.3, 0.4]).map(|(share, weight)| (share - weight).powi(2) / weight);
    assert!(off.sum::<f64>() * 8191.0 < CHI_SQUARE_3 * 2.0, "{shares:?}");
    // The workloads follow the table.
    let answers = answers_of_workloads(&mesh, workloads);
    let hits = ["a", "b", "c", "d"].map(|name| count(&answers, name));
    let chi_square = chi_square(&hits, &shares);
    figure(&format!("maglev, {workloads} workloads over weights 1 to 4: chi-square {chi_square:.1}"));
    // Ids of cgroups are not random: this is the same on every run but for where they begin.
    assert!(chi_square < CHI_SQUARE_3 * 2.0, "{hits:?} for {shares:?}");

    mesh.write(&text(&[100; 5]));
    mesh.wait_for_backends(&format!("{VIP}:80"), 5);
    let before = answers_of_workloads(&mesh, workloads);
    mesh.write(&text(&[100; 4]));
    mesh.wait_for_backends(&format!("{VIP}:80"), 4);
    let after = answers_of_workloads(&mesh, workloads);
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    let strays = before.iter().zip(&after).filter(|(a, b)| a != b && *a != "e").count();
    figure(&format!(
        "maglev, one of five backends leaves: {moved} of {workloads} workloads move, {strays} of them had another one"
    ));
    assert_eq!(moved as u64, count(&before, "e") + strays as u64);
    assert_eq!(strays, 0, "none moves but those that must");
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
