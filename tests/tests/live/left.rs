//! Sockets left behind on backends that are gone, and what no hook translates.

use std::process::Command;

use mesh_tests::{
    Dialogue, Mesh, datagram_service,
    netns::{Host, Network},
    server::Server,
    service, text, wait_until,
};

const VIP: &str = "127.128.13.1";

fn drained(services: &str) -> String {
    services.replace("policy", "drain = \"300ms\"\npolicy")
}

/// A client with a connected TCP and UDP socket and an unconnected one; it says what became of them.
const CLIENT: &str = r#"
import errno, socket, sys
VIP = "127.128.13.1"
def ask():
    print("at", flush=True)
    sys.stdin.readline()
t = socket.create_connection((VIP, 80), 5); t.recv(9)
plain = socket.create_connection(PLAIN, 5); plain.recv(9)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect((VIP, 81)); u.send(b"x"); u.recv(9)
free = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); free.sendto(b"x", (VIP, 81)); free.recv(9)
port = free.getsockname()[1]
moved = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); moved.connect((VIP, 81)); moved.connect(ELSEWHERE)
ask()
t.settimeout(5)
u.settimeout(5)
try:
    t.recv(9); print("tcp eof", flush=True)
except OSError as error:
    print("tcp", errno.errorcode[error.errno], flush=True)
try:
    u.send(b"x"); print("udp sent", flush=True)
except OSError as error:
    print("udp", errno.errorcode[error.errno], flush=True)
assert free.getsockname()[1] == port
plain.send(b"still there")
moved.settimeout(5); moved.send(b"x"); assert moved.recv(9) == b"elsewhere"
t.close(); u.close(); free.close(); plain.close()
print("rest untouched", flush=True)
"#;

/// The server keeps its connections open.
fn keeper(address: &str) -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = std::io::Write::write_all(&mut stream, b"x");
            all.push(stream);
        }
    });
    address
}

#[test]
fn connected_sockets_to_a_removed_backend_are_closed_after_its_drain_time() {
    let tcp = keeper("127.0.0.1:0");
    let udp = Server::datagrams("x", "127.0.0.1:0");
    let services = service("t", 80, VIP, &[("127.0.0.1", tcp.port())])
        + &datagram_service("u", 81, VIP, &[("127.0.0.1", udp.port())]);
    let mesh = Mesh::start(&drained(&services));
    let elsewhere = Server::datagrams("elsewhere", "127.0.0.1:0");
    let plain = format!(
        "PLAIN = (\"127.0.0.1\", {})\nELSEWHERE = (\"127.0.0.1\", {})\n",
        tcp.port(),
        elsewhere.port()
    );
    let mut client = mesh.dialogue(&(plain + CLIENT));
    assert_eq!(client.hear(), "at");
    mesh.write(&drained(&(service("t", 80, VIP, &[]) + &datagram_service("u", 81, VIP, &[]))));
    // The log says how many at a time.
    let closed = || {
        let log = mesh.log();
        let counts =
            log.split("closed ").skip(1).filter_map(|rest| rest.split(' ').next()?.parse::<u32>().ok());
        counts.sum::<u32>()
    };
    wait_until("they are closed", || closed() == 2);
    client.go_on();
    assert_eq!(client.hear(), "tcp ECONNABORTED");
    assert!(["udp EDESTADDRREQ", "udp ENOTCONN", "udp ECONNABORTED"].contains(&client.hear().as_str()));
    assert_eq!(client.hear(), "rest untouched");
    assert!(client.end().success());
}

/// A server that accepts one connection and says nothing.
fn accepting(host: &Host) -> Dialogue {
    let program = format!(
        r#"
import socket, sys
s = socket.create_server(("{}", 8080))
print("up", flush=True)
c, _ = s.accept()
sys.stdin.readline()
"#,
        host.address
    );
    let mut server = host.command("python3");
    server.args(["-c", &program]);
    let mut server = Dialogue::start(server);
    assert_eq!(server.hear(), "up");
    server
}

/// A client that has sent something, waits for an answer, and says how that ends.
fn waiting(mesh: &Mesh, host: &Host) -> Dialogue {
    let program = format!(
        r#"
import errno, socket
s = socket.create_connection(("{VIP}", 80), 5)
s.send(b"x")
print("up", flush=True)
s.settimeout(40)
try:
    s.recv(9)
except OSError as error:
    print(errno.errorcode.get(error.errno, error), flush=True)
"#
    );
    let mut client = mesh.on(host, "python3");
    client.args(["-c", &program]);
    let mut client = Dialogue::start(client);
    assert_eq!(client.hear(), "up");
    client
}

#[test]
fn sockets_in_other_namespaces_are_closed_too_also_after_a_restart() {
    let network = Network::new();
    let (client, server) = (network.host(), network.host());
    let mut mesh = Mesh::start(&drained(&service("t", 80, VIP, &[(&server.address, 8080)])));
    let listening = accepting(&server);
    let mut client = waiting(&mesh, &client);
    mesh.kill();
    mesh.write(&drained(&service("t", 80, VIP, &[])));
    mesh.launch();
    mesh.ready();
    assert_eq!(client.hear(), "ECONNABORTED");
    client.end();
    listening.end();
}

#[test]
fn a_connection_to_a_backend_that_fell_silent_ends_when_the_registry_drops_it() {
    let network = Network::new();
    let (client, server) = (network.host(), network.host());
    let mesh = Mesh::start(&drained(&service("t", 80, VIP, &[(&server.address, 8080)])));
    let listening = accepting(&server);
    let mut client = waiting(&mesh, &client);
    server.unplug();
    mesh.write(&drained(&service("t", 80, VIP, &[])));
    // Without that it would wait for as long as its keepalive is, or for ever.
    assert_eq!(client.hear(), "ECONNABORTED");
    client.end();
    listening.end();
}

#[test]
fn a_backend_that_comes_back_in_time_keeps_its_sockets() {
    let tcp = keeper("127.0.0.1:0");
    let with = drained(&service("t", 80, VIP, &[("127.0.0.1", tcp.port())]));
    let mesh = Mesh::start(&with);
    let program = format!(
        "import socket, sys\ns = socket.create_connection((\"{VIP}\", 80), 5)\ns.recv(9)\nprint(\"up\", flush=True)\n\
         sys.stdin.readline()\ns.send(b\"x\")\ns.setblocking(False)\ntry:\n    s.recv(9)\nexcept BlockingIOError:\n    print(\"open\", flush=True)"
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "up");
    mesh.write(&drained(&service("t", 80, VIP, &[])));
    mesh.wait_for_backends(&format!("{VIP}:80"), 0);
    mesh.write(&with);
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    std::thread::sleep(std::time::Duration::from_millis(800));
    client.go_on();
    assert_eq!(client.hear(), "open");
    client.end();
}

#[test]
fn a_backend_that_gets_the_id_of_one_that_left_keeps_its_sockets() {
    let (first, second) = (keeper("127.0.0.1:0"), keeper("127.0.0.1:0"));
    let text = |instances: &[(&str, u16)]| {
        service("t", 80, VIP, instances).replace("policy", "drain = \"2s\"\npolicy")
    };
    let mesh = Mesh::start(&text(&[("127.0.0.1", first.port())]));
    let id = || mesh.json(&["backend", "list"])[0]["id"].clone();
    let frontend = format!("{VIP}:80");
    let before = id();
    mesh.write(&text(&[]));
    mesh.wait_for_backends(&frontend, 0);
    mesh.write(&text(&[("127.0.0.1", second.port())]));
    mesh.wait_for_backends(&frontend, 1);
    assert_eq!(id(), before, "it has the id of the one before");
    let program = format!(
        "import socket, sys\ns = socket.create_connection((\"{VIP}\", 80), 5)\ns.recv(9)\nprint(\"up\", flush=True)\n\
         sys.stdin.readline()\ns.setblocking(False)\ntry:\n    s.recv(9)\nexcept BlockingIOError:\n    print(\"open\", flush=True)"
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "up");
    std::thread::sleep(std::time::Duration::from_millis(3500));
    client.go_on();
    assert_eq!(client.hear(), "open");
    client.end();
}

#[test]
fn a_socket_that_dialled_something_else_is_taken_off_the_count() {
    let (udp, elsewhere) = (Server::datagrams("x", "127.0.0.1:0"), Server::datagrams("y", "127.0.0.1:0"));
    let mut mesh = Mesh::start(&datagram_service("u", 81, VIP, &[("127.0.0.1", udp.port())]));
    let program = format!(
        r#"
import socket, sys
kept, moved = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
kept.connect(("{VIP}", 81))
moved.connect(("{VIP}", 81))
moved.connect(("127.0.0.1", {}))
print("up", flush=True)
sys.stdin.readline()
assert kept.getpeername() == ("{VIP}", 81)
print("kept", flush=True)
sys.stdin.readline()
"#,
        elsewhere.port()
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "up");
    // A start begins with a look at all sockets.
    mesh.stop();
    mesh.launch();
    mesh.ready();
    let active = || mesh.json(&["backend", "list"])[0]["connections"]["active"].clone();
    wait_until("only one is counted", || active() == 1);
    client.go_on();
    assert_eq!(client.hear(), "kept");
    client.end();
    wait_until("none is", || active() == 0);
}

/// What a socket outside the hooks, or of a kind that has none, gets for a VIP: an error, at once.
const PROBES: &str = r#"
import errno, socket, struct
UDPLITE = 136
def probe(name, make, act):
    try:
        s = make()
    except OSError:
        print(name, "EHOSTUNREACH")
        return
    s.settimeout(5)
    try:
        act(s); print(name, "went through")
    except OSError as error:
        print(name, errno.errorcode.get(error.errno, error))
for family, vip in ((socket.AF_INET, "127.128.13.1"), (socket.AF_INET6, "fd00:6d65:7368::1")):
    icmp = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    echo = struct.pack("!BBHHH", 8 if family == socket.AF_INET else 128, 0, 0, 1, 1)
    probe("udplite", lambda: socket.socket(family, socket.SOCK_DGRAM, UDPLITE), lambda s: s.connect((vip, PORT)))
    probe("udplite-sendto", lambda: socket.socket(family, socket.SOCK_DGRAM, UDPLITE), lambda s: s.sendto(b"x", (vip, PORT)))
    probe("raw", lambda: socket.socket(family, socket.SOCK_RAW, icmp), lambda s: s.sendto(echo, (vip, 0)))
    if OUTSIDE:
        probe("tcp", lambda: socket.socket(family), lambda s: s.connect((vip, PORT)))
        probe("udp", lambda: socket.socket(family, socket.SOCK_DGRAM), lambda s: s.sendto(b"x", (vip, PORT)))
"#;

#[test]
fn what_cannot_be_translated_fails_at_once_and_locally() {
    // Somebody listens on all addresses.
    let everywhere = Server::start_at("everywhere", "0.0.0.0:0");
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let refused = |output: std::process::Output| {
        assert!(output.status.success(), "{}", text(&output));
        let lines = String::from_utf8(output.stdout).unwrap();
        assert!(lines.lines().count() >= 6, "{lines}");
        let errors = ["EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED"];
        lines.lines().all(|line| errors.iter().any(|error| line.ends_with(error)))
    };
    let probes = |outside: &str| format!("OUTSIDE, PORT = {outside}, {}\n{PROBES}", everywhere.port());
    wait_until("outside the cgroup", || {
        refused(Command::new("python3").args(["-c", &probes("True")]).output().unwrap())
    });
    let before = everywhere.hits();
    assert!(refused(mesh.inside("python3").args(["-c", &probes("False")]).output().unwrap()));

    // In a task's own namespace as soon as it has been seen.
    let network = Network::new();
    let host = network.host();
    let mut task = mesh.on(&host, "sleep").arg("60").spawn().unwrap();
    wait_until("in the namespace", || {
        refused(host.command("python3").args(["-c", &probes("True")]).output().unwrap())
    });
    task.kill().unwrap();
    task.wait().unwrap();
    assert_eq!(everywhere.hits(), before);

    // It goes with the rest, and takes no other daemon's along.
    let routes = |host: Option<&Host>| {
        let args = ["route", "show", "table", "local", "proto", "109"];
        let output = match host {
            Some(host) => host.command("ip").args(args).output().unwrap(),
            None => Command::new("ip").args(args).output().unwrap(),
        };
        String::from_utf8(output.stdout).unwrap()
    };
    let other = Mesh::start("");
    let before = routes(None);
    assert!(before.contains("unreachable 127.128.0.0/10"), "{before}");
    wait_until("the other daemon has its own", || routes(None).lines().count() >= 2);
    mesh.stop();
    assert!(mesh.cleanup().status.success());
    assert_eq!(routes(Some(&host)), "");
    assert!(routes(None).contains("unreachable 127.128.0.0/10"));
    drop(other);
}

#[test]
fn a_socket_that_ended_unseen_is_taken_off_the_count() {
    let tcp = keeper("127.0.0.1:0");
    let mut mesh = Mesh::start(&service("t", 80, VIP, &[("127.0.0.1", tcp.port())]));
    let client = |count: usize| {
        format!(
            r#"
import socket, sys
s = [socket.create_connection(("{VIP}", 80), 5) for _ in range({count})]
print("up", flush=True)
sys.stdin.readline()
"#
        )
    };
    let (mut lost, mut kept) = (mesh.dialogue(&client(3)), mesh.dialogue(&client(3)));
    assert_eq!((lost.hear(), kept.hear()), ("up".into(), "up".into()));
    // Nobody sees these end, as soon as the kernel has let the program go.
    mesh.kill();
    std::fs::remove_file(mesh.pin_dir.join("link/mesh_release")).unwrap();
    wait_until("a socket's end goes unseen", || {
        mesh.python(&client(1));
        mesh.used("SOCKETS") == 7
    });
    lost.end();
    assert_eq!(mesh.used("SOCKETS"), 7);
    mesh.launch();
    mesh.ready();
    let active = || mesh.json(&["backend", "list"])[0]["connections"]["active"].clone();
    wait_until("two looks agree that four are gone", || active() == 3);
    kept.end();
    wait_until("the others are seen", || active() == 0);
}
