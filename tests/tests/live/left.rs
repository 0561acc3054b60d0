//! Sockets left behind on backends that are gone.

use std::process::Command;

use mesh_tests::{
    Dialogue, Mesh, datagram_service,
    netns::{Host, Network},
    server::{self, Server},
    service, wait_until,
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

#[test]
fn connected_sockets_to_a_removed_backend_are_closed_after_its_drain_time() {
    let tcp = Server::keeping();
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
    let listening = server::on(&server, "kept.append(s)");
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
    let listening = server::on(&server, "kept.append(s)");
    let mut client = waiting(&mesh, &client);
    server.unplug();
    mesh.write(&drained(&service("t", 80, VIP, &[])));
    // Without that it would wait for as long as its keepalive is, or for ever.
    assert_eq!(client.hear(), "ECONNABORTED");
    client.end();
    listening.end();
}

const TCP: u16 = 6;
const MPTCP: u16 = 262;

/// A socket each at these ports of the VIP, and whether they are open as often as it is asked.
fn sockets_at(mesh: &Mesh, protocol: u16, ports: &[u16]) -> Dialogue {
    let program = format!(
        r#"
import socket, sys
sockets = [socket.socket(proto={protocol}) for _ in {ports:?}]
for s, port in zip(sockets, {ports:?}):
    s.settimeout(5)
    s.connect(("{VIP}", port))
    s.recv(9)
    s.setblocking(False)
def state(s):
    try:
        s.recv(9)
    except BlockingIOError:
        return "open"
    except OSError:
        pass
    return "closed"
print("up", flush=True)
for _ in sys.stdin:
    print(*map(state, sockets), flush=True)
"#
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "up");
    client
}

fn states(client: &mut Dialogue) -> String {
    client.go_on();
    client.hear()
}

/// Services at ports from 80 on, each with a drain time and one backend or, without a port, none.
fn draining(services: &[(&str, Option<u16>)]) -> String {
    let service = |(place, (drain, port)): (u16, &(&str, Option<u16>))| {
        let instances: Vec<_> = port.iter().map(|port| ("127.0.0.1", *port)).collect();
        service(&format!("s{place}"), 80 + place, VIP, &instances)
            .replace("policy", &format!("drain = {drain:?}\npolicy"))
    };
    (0..).zip(services).map(service).collect()
}

#[test]
fn a_backend_that_comes_back_in_time_keeps_its_sockets_until_it_leaves_for_good() {
    let (one, other) = (Server::keeping(), Server::keeping());
    let text = |there: [bool; 2]| {
        draining(&[("3s", there[0].then(|| one.port())), ("3s", there[1].then(|| other.port()))])
    };
    let mesh = Mesh::start(&text([true, true]));
    let mut client = sockets_at(&mesh, TCP, &[80, 81]);
    let wait = |port: u16, count| mesh.wait_for_backends(&format!("{VIP}:{port}"), count);
    mesh.write(&text([false, false]));
    wait(80, 0);
    mesh.write(&text([true, false]));
    wait(80, 1);
    // Both were due at the same time.
    wait_until("the other one's socket is closed", || states(&mut client) == "open closed");
    mesh.write(&text([false, false]));
    wait(80, 0);
    // Its id is not the one that the socket is counted on.
    wait_until("its socket is closed as well", || states(&mut client) == "closed closed");
    assert!(client.end().success());
}

#[test]
fn a_restart_keeps_the_drain_times_and_what_is_back() {
    let servers = [Server::keeping(), Server::keeping(), Server::keeping()];
    let text = |there: [bool; 3]| {
        let port = |n: usize| there[n].then(|| servers[n].port());
        draining(&[("3s", port(0)), ("4s", port(1)), ("1h", port(2))])
    };
    let mut mesh = Mesh::start(&text([true; 3]));
    let mut client = sockets_at(&mesh, TCP, &[80, 81, 82]);
    mesh.write(&text([false; 3]));
    // Their ids rest for as long as sockets are counted on them.
    wait_until("they are gone", || {
        (80..83).all(|port| mesh.kernel_backends(&format!("{VIP}:{port}")).is_empty())
    });
    mesh.kill();
    assert_eq!(states(&mut client), "open open open");
    mesh.write(&text([true, false, false]));
    mesh.launch();
    mesh.ready();
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    // The first one's time was over before.
    wait_until("one is closed, and only that", || states(&mut client) == "open closed open");
    mesh.write(&text([false; 3]));
    wait_until("the one that was back has gone for good", || states(&mut client) == "closed closed open");
    assert!(client.end().success());
}

#[test]
fn sockets_that_have_no_place_are_closed_too_also_after_a_restart() {
    let servers = [Server::keeping(), Server::keeping(), Server::keeping()];
    let text = |there: bool| {
        let port = |n: usize| there.then(|| servers[n].port());
        draining(&[("300ms", port(0)), ("4s", port(1)), ("1h", port(2))])
    };
    let mut mesh = Mesh::start(&text(true));
    let mut client = sockets_at(&mesh, MPTCP, &[80, 81, 82]);
    mesh.write(&text(false));
    wait_until("one is closed, and only that", || states(&mut client) == "closed open open");
    mesh.kill();
    mesh.launch();
    mesh.ready();
    wait_until("one more is closed", || states(&mut client) == "closed closed open");
    assert!(client.end().success());
}

#[test]
fn a_count_that_does_not_fit_the_sockets_is_set_right() {
    let servers = [Server::keeping(), Server::keeping()];
    let text = draining(&[("1h", Some(servers[0].port())), ("1h", Some(servers[1].port()))]);
    let mut mesh = Mesh::start(&text);
    let mut tcp = sockets_at(&mesh, TCP, &[80, 81]);
    let mut mptcp = sockets_at(&mesh, MPTCP, &[80]);
    let active = |mesh: &Mesh| -> Vec<u64> {
        let list = mesh.json(&["backend", "list"]);
        list.as_array().unwrap().iter().map(|b| b["connections"]["active"].as_u64().unwrap()).collect()
    };
    assert_eq!(active(&mesh), [2, 1]);
    // As if a daemon had ended between two of its writes.
    let ids: Vec<_> =
        mesh.json(&["backend", "list"]).as_array().unwrap().iter().map(|b| b["id"].clone()).collect();
    mesh.kill();
    for (id, wrong) in ids.iter().zip([7u64, u64::MAX]) {
        let key = u32::try_from(id.as_u64().unwrap()).unwrap().to_ne_bytes();
        let bytes = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>();
        let mut update = Command::new("bpftool");
        update.args(["map", "update", "pinned"]).arg(mesh.map_pin("LOAD")).arg("key").args(bytes(&key));
        let update = update.arg("value").args(bytes(&wrong.to_ne_bytes())).output().unwrap();
        assert!(update.status.success(), "{}", mesh_tests::text(&update));
    }
    mesh.launch();
    mesh.ready();
    wait_until("the counts are those of the sockets", || active(&mesh) == [2, 1]);
    assert_eq!((states(&mut tcp), states(&mut mptcp)), ("open open".into(), "open".into()));
    assert!(tcp.end().success() && mptcp.end().success());
    wait_until("nothing is counted", || active(&mesh) == [0, 0]);
}

#[test]
fn a_socket_in_a_namespace_that_only_a_thread_is_in_is_closed_too() {
    let mesh = Mesh::start(&drained(&service("t", 80, VIP, &[("127.0.0.1", 8080)])));
    let program = format!(
        r#"
import ctypes, errno, fcntl, socket, struct, threading
def run():
    CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1
    assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
    with socket.socket() as s:
        fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    listener = socket.create_server(("127.0.0.1", 8080))
    s = socket.create_connection(("{VIP}", 80), 5)
    print("up", flush=True)
    s.settimeout(40)
    try:
        s.recv(9)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error), flush=True)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"#
    );
    let mut client = mesh.dialogue(&program);
    assert_eq!(client.hear(), "up");
    mesh.write(&drained(&service("t", 80, VIP, &[])));
    assert_eq!(client.hear(), "ECONNABORTED");
    assert!(client.end().success());
}

#[test]
fn a_backend_that_gets_the_id_of_one_that_left_keeps_its_sockets() {
    let (first, second, other) = (Server::keeping(), Server::keeping(), Server::keeping());
    let text = |port: Option<u16>, other: Option<u16>| draining(&[("3s", port), ("3s", other)]);
    let mesh = Mesh::start(&text(Some(first.port()), Some(other.port())));
    let id = || mesh.json(&["backend", "list"])[0]["id"].clone();
    let wait = |port: u16, count| mesh.wait_for_backends(&format!("{VIP}:{port}"), count);
    let before = id();
    let mut witness = sockets_at(&mesh, TCP, &[81]);
    mesh.write(&text(None, None));
    wait(80, 0);
    wait_until("the id that no socket is counted on is free", || mesh.used("BACKENDS") == 1);
    mesh.write(&text(Some(second.port()), None));
    wait(80, 1);
    assert_eq!(id(), before, "it has the id of the one before");
    let mut client = sockets_at(&mesh, TCP, &[80]);
    // Both were due at the same time.
    wait_until("the time of those that left is over", || states(&mut witness) == "closed");
    assert_eq!(states(&mut client), "open");
    assert!(client.end().success() && witness.end().success());
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

#[test]
fn a_socket_that_ended_unseen_is_taken_off_the_count() {
    let tcp = Server::keeping();
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
