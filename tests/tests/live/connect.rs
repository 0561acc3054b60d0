//! What a single `connect()` does.

use mesh_tests::{Mesh, datagram_service, server::Server, service, weighted_service};

const VIP: &str = "127.128.1.1";

#[test]
fn a_connect_to_the_vip_reaches_a_backend_and_getpeername_shows_the_vip() {
    let (a, b) = (Server::start("A"), Server::start("B"));
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", a.port()), ("127.0.0.1", b.port())]));
    let answers = mesh.python(&format!(
        r#"
import socket
for _ in range(64):
    s = socket.create_connection(("{VIP}", 80), 5)
    assert s.getpeername() == ("{VIP}", 80), s.getpeername()
    print(s.recv(9).decode(), end="")
"#
    ));
    assert_eq!(answers.len(), 64);
    assert_eq!((a.hits() + b.hits(), answers.matches('A').count() as u64), (64, a.hits()));
    assert!(a.hits() > 0 && b.hits() > 0);
}

#[test]
fn an_ipv6_vip_leads_to_an_ipv6_backend() {
    let server = Server::start_at("six", "[::1]:0");
    let vip = "fd00:6d65:7368::9";
    let mesh = Mesh::start(&service("six", 80, vip, &[("::1", server.port())]));
    let answer = mesh.python(&format!(
        r#"
import socket
s = socket.create_connection(("{vip}", 80), 5)
assert s.getpeername()[:2] == ("{vip}", 80), s.getpeername()
print(s.recv(9).decode())
"#
    ));
    assert_eq!(answer, "six");
}

#[test]
fn a_v4_mapped_dial_of_a_v4_vip_stays_v4_mapped() {
    let server = Server::start("mapped");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let answer = mesh.python(&format!(
        r#"
import socket
s = socket.socket(socket.AF_INET6)
s.connect(("::ffff:{VIP}", 80))
assert s.getpeername()[:2] == ("::ffff:{VIP}", 80), s.getpeername()
print(s.recv(9).decode())
"#
    ));
    assert_eq!(answer, "mapped");
}

#[test]
fn an_ipv6_vip_alone_serves_ipv4_backends() {
    let server = Server::start("four");
    let vip = "fd00:6d65:7368::a";
    let mesh = Mesh::start(&service("four", 80, vip, &[("127.0.0.1", server.port())]));
    let answer = mesh.python(&format!(
        r#"
import socket
s = socket.create_connection(("{vip}", 80), 5)
assert s.getpeername()[:2] == ("{vip}", 80), s.getpeername()
print(s.recv(9).decode())
"#
    ));
    assert_eq!(answer, "four");
}

#[test]
fn refusals_are_connection_refused_and_come_at_once() {
    // Somebody listens on all addresses: an unknown port of a VIP must not reach it.
    let everywhere = Server::start_at("everywhere", "0.0.0.0:0");
    let server = Server::start("echo");
    let services =
        service("empty", 81, "127.128.1.2", &[]) + &service("echo", 80, VIP, &[("127.0.0.1", server.port())]);
    let mesh = Mesh::start(&services);
    let port = everywhere.port();
    let errors = mesh.python(&format!(
        r#"
import errno, socket
for target in (("127.128.1.2", 81), ("{VIP}", {port}), ("127.128.9.9", {port}), ("fd00:6d65:7368::1", {port})):
    try:
        socket.create_connection(target, 5)
        print("connected", target)
    except OSError as e:
        print(errno.errorcode[e.errno])
"#
    ));
    assert_eq!(errors.lines().collect::<Vec<_>>(), ["ECONNREFUSED"; 4]);
    assert_eq!(everywhere.hits(), 0);
}

#[test]
fn addresses_outside_the_ranges_pass_untouched() {
    let server = Server::start("direct");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[]));
    let port = server.port();
    let answer = mesh.python(&format!(
        r#"
import socket
s = socket.create_connection(("127.0.0.1", {port}), 5)
assert s.getpeername() == ("127.0.0.1", {port})
print(s.recv(9).decode())
"#
    ));
    assert_eq!(answer, "direct");
}

#[test]
fn a_socket_created_outside_the_cgroup_is_not_translated() {
    let server = Server::start("echo");
    let mesh = Mesh::start(&service("echo", server.port(), VIP, &[("127.0.0.1", server.port())]));
    let target = format!("{VIP}:{}", server.port());
    assert!(std::net::TcpStream::connect(target).is_err());
    assert_eq!(server.hits(), 0);
    // With the socket made outside and the process moved in, it is the socket that counts.
    let cgroup = mesh.cgroup.display();
    let program = format!(
        r#"
import errno, os, socket
s = socket.socket()
open("{cgroup}/cgroup.procs", "w").write(str(os.getpid()))
try:
    s.connect(("{VIP}", {}))
    print("connected")
except OSError as error:
    assert error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH), error
    print("refused")
"#,
        server.port()
    );
    let output = std::process::Command::new("python3").args(["-c", &program]).output().unwrap();
    assert_eq!(mesh_tests::text(&output).trim(), "refused");
}

#[test]
fn getpeername_tells_the_truth_about_a_socket_that_dialled_something_else_later() {
    let refusing = mesh_tests::free_address();
    let port: u16 = refusing.rsplit(':').next().unwrap().parse().unwrap();
    let direct = Server::start("direct");
    let mesh = Mesh::start(&service("dead", 80, VIP, &[("127.0.0.1", port)]));
    let direct = direct.port();
    let answer = mesh.python(&format!(
        r#"
import socket
s = socket.socket()
try:
    s.connect(("{VIP}", 80))
    print("connected")
except ConnectionRefusedError:
    pass
s.connect(("127.0.0.1", {direct}))
print(s.getpeername() == ("127.0.0.1", {direct}), s.recv(9).decode())
"#
    ));
    assert_eq!(answer, "True direct");
}

#[test]
fn a_non_blocking_connect_is_translated() {
    let server = Server::start("async");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let answer = mesh.python(&format!(
        r#"
import asyncio
async def main():
    reader, writer = await asyncio.wait_for(asyncio.open_connection("{VIP}", 80), 5)
    assert writer.get_extra_info("peername") == ("{VIP}", 80)
    print((await reader.read()).decode())
asyncio.run(main())
"#
    ));
    assert_eq!(answer, "async");
}

#[test]
fn tcp_and_udp_on_one_port_are_two_services() {
    let server = Server::start("tcp");
    let udp = Server::datagrams("udp", "127.0.0.1:0");
    let udp_service = datagram_service("echo", 80, VIP, &[("127.0.0.1", udp.port())]);
    let mesh = Mesh::start(&(service("echo", 80, VIP, &[("127.0.0.1", server.port())]) + &udp_service));
    let answers = mesh.python(&format!(
        r#"
import socket
t = socket.create_connection(("{VIP}", 80), 5)
u = socket.socket(type=socket.SOCK_DGRAM)
u.settimeout(5)
u.connect(("{VIP}", 80))
assert u.getpeername() == ("{VIP}", 80)
u.send(b"hello")
print(t.recv(9).decode(), u.recv(64).decode())
"#
    ));
    assert_eq!(answers, "tcp udp");
}

#[test]
fn unhealthy_and_draining_backends_get_nothing_while_there_are_others() {
    let servers = ["healthy", "unhealthy", "draining"].map(Server::start);
    let instances = servers.each_ref().map(|server| ("127.0.0.1", server.port()));
    let text = service("echo", 80, VIP, &instances);
    let mark = |text: &str, n: usize, health: &str| {
        let port = format!("port = {}\n", servers[n].port());
        text.replace(&port, &format!("{port}health = \"{health}\"\n"))
    };
    let text = mark(&mark(&text, 1, "unhealthy"), 2, "draining");
    let mesh = Mesh::start(&text);
    let dial = || {
        mesh.python(&format!(
            "import socket\nfor _ in range(50): print(socket.create_connection(('{VIP}', 80), 5).recv(9).decode())"
        ))
    };
    assert_eq!(dial().lines().collect::<Vec<_>>(), ["healthy"; 50]);

    // Nothing healthy is left: health is ignored rather than everything refused.
    mesh.write(&mark(&text, 0, "unhealthy"));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    assert!(dial().lines().all(|name| name == "healthy" || name == "unhealthy"));
    assert_eq!(servers[2].hits(), 0);
}

#[test]
fn a_weight_of_zero_gets_nothing_and_double_weight_twice_as_much() {
    let servers = ["one", "two", "zero"].map(Server::start);
    let [one, two, zero] = &servers;
    let instances =
        [("127.0.0.1", one.port(), 100), ("127.0.0.1", two.port(), 200), ("127.0.0.1", zero.port(), 0)];
    let mesh = Mesh::start(&weighted_service("echo", 80, VIP, &instances));
    let lb = mesh.lb();
    let shares = lb[0]["backends"].as_array().unwrap();
    let share = |server: &Server| {
        let of = shares.iter().find(|share| share["port"] == server.port());
        of.map_or(0.0, |share| share["share"].as_f64().unwrap())
    };
    for (server, expected) in [(one, 1.0 / 3.0), (two, 2.0 / 3.0), (zero, 0.0)] {
        assert!((share(server) - expected).abs() < 1e-4, "{lb}");
    }
    mesh.python(&format!(
        "import socket\nfor _ in range(300): socket.create_connection(('{VIP}', 80), 5).recv(9)"
    ));
    assert_eq!((one.hits() + two.hits(), zero.hits()), (300, 0));
    // 200 expected of "two", and 6 sigma are 49.
    assert!((151..=249).contains(&two.hits()), "{} and {}", one.hits(), two.hits());
}

#[test]
fn mptcp_is_translated_and_getpeername_shows_the_vip() {
    let server = Server::start("fallback");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let answers = mesh.python(&format!(
        r#"
import socket
IPPROTO_MPTCP = 262
for family, vip in ((socket.AF_INET, "{VIP}"), (socket.AF_INET6, "::ffff:{VIP}")):
    s = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
    s.connect((vip, 80))
    assert s.getpeername()[:2] == (vip, 80), s.getpeername()
    print(s.recv(9).decode())
"#
    ));
    assert_eq!(answers, "fallback\nfallback");
}

#[test]
fn mptcp_on_both_ends() {
    let mut mesh = Mesh::prepare("");
    let program = format!(
        r#"
import socket, sys
l = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
l.bind(("127.0.0.1", 0)); l.listen()
print(l.getsockname()[1], flush=True)
sys.stdin.readline()
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
s.connect(("{VIP}", 80))
c, _ = l.accept()
c.send(b"both")
MPTCP_INFO, SOL_MPTCP = 1, 284
assert s.getsockopt(SOL_MPTCP, MPTCP_INFO, 64), "fell back to TCP"
print(s.getpeername(), s.recv(9).decode(), flush=True)
"#
    );
    let mut client = mesh.dialogue(&program);
    let port: u16 = client.hear().parse().unwrap();
    mesh.write(&service("echo", 80, VIP, &[("127.0.0.1", port)]));
    mesh.launch();
    mesh.ready();
    client.go_on();
    assert_eq!(client.hear(), format!("('{VIP}', 80) both"));
    assert!(client.end().success());
}
