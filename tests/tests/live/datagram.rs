//! Datagrams on unconnected sockets.

use mesh_tests::{
    Mesh, datagram_service,
    server::{Dns, Server},
    text,
};

const VIP: &str = "127.128.8.1";

/// `ask(socket, vip, port)` sends a datagram and returns who answered; the answer must come from
/// the address that was asked.
const ASK: &str = r#"
import errno, socket, sys
def udp(family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(5)
    return s
def ask(s, vip, port):
    s.sendto(b"?", (vip, port))
    name, source = s.recvfrom(64)
    assert source[:2] == (vip, port), source
    return name.decode()
"#;

fn run(mesh: &Mesh, program: &str) -> String {
    mesh.python(&format!("{ASK}\nVIP = {VIP:?}\n{program}"))
}

#[test]
fn the_reply_comes_from_the_vip_and_a_socket_keeps_its_backend() {
    let (a, b) = (Server::datagrams("A", "127.0.0.1:0"), Server::datagrams("B", "127.0.0.1:0"));
    let mesh =
        Mesh::start(&datagram_service("echo", 53, VIP, &[("127.0.0.1", a.port()), ("127.0.0.1", b.port())]));
    let lines =
        run(&mesh, "for _ in range(32):\n    s = udp(); print(''.join(ask(s, VIP, 53) for _ in range(10)))");
    for line in lines.lines() {
        assert!(line == "A".repeat(10) || line == "B".repeat(10), "a socket hopped: {line}");
    }
    assert_eq!(a.hits() + b.hits(), 320);
    assert!(a.hits() > 0 && b.hits() > 0);
}

#[test]
fn a_socket_moves_when_its_backend_goes_and_keeps_its_source_port() {
    let (a, b) = (Server::datagrams("A", "127.0.0.1:0"), Server::datagrams("B", "127.0.0.1:0"));
    let only = |server: &Server| datagram_service("echo", 53, VIP, &[("127.0.0.1", server.port())]);
    let mesh = Mesh::start(&only(&a));
    let program = format!(
        "{ASK}\ns = udp()\nfor _ in sys.stdin:\n    print(ask(s, {VIP:?}, 53), s.getsockname()[1], flush=True)"
    );
    let mut client = mesh.dialogue(&program);
    let mut ask = || {
        client.go_on();
        client.hear()
    };
    let first = ask();
    mesh.write(&only(&b));
    mesh_tests::wait_until("B is in the maps", || {
        mesh.kernel_backends(&format!("{VIP}:53")) == [format!("127.0.0.1:{}", b.port())]
    });
    let second = ask();
    assert_eq!((&first[..1], &second[..1]), ("A", "B"));
    assert_eq!(first[1..], second[1..], "the source port");
    assert!(client.end().success());
}

#[test]
fn an_unhealthy_backend_loses_its_sockets_to_a_healthy_one() {
    let (a, b) = (Server::datagrams("A", "127.0.0.1:0"), Server::datagrams("B", "127.0.0.1:0"));
    let both = datagram_service("echo", 53, VIP, &[("127.0.0.1", a.port()), ("127.0.0.1", b.port())]);
    let mark = |port: u16| {
        both.replace(&format!("port = {port}\n"), &format!("port = {port}\nhealth = \"unhealthy\"\n"))
    };
    let mesh = Mesh::start(&mark(b.port()));
    assert_eq!(run(&mesh, "s = udp(); print(ask(s, VIP, 53))"), "A");
    // One socket across the change: it asks until the other one answers.
    let (unhealthy, services) = (mark(a.port()), mesh.services.display().to_string());
    let program = format!(
        "import os, time\ns = udp(); before = ask(s, VIP, 53)\nopen({services:?} + '.n', 'w').write({unhealthy:?})\n\
         os.rename({services:?} + '.n', {services:?})\nend = time.time() + 10\n\
         while time.time() < end and ask(s, VIP, 53) == before: pass\nprint(before, ask(s, VIP, 53))"
    );
    assert_eq!(run(&mesh, &program), "A B");
}

#[test]
fn one_socket_talks_to_many_vips() {
    let servers = ["0", "1", "2", "3", "4", "5", "6", "7"].map(|name| Server::datagrams(name, "127.0.0.1:0"));
    let services = servers.iter().enumerate().map(|(n, server)| {
        datagram_service(
            &format!("s{n}"),
            53,
            &format!("127.128.8.{}", n + 10),
            &[("127.0.0.1", server.port())],
        )
    });
    let mesh = Mesh::start(&services.collect::<String>());
    let answers = run(
        &mesh,
        r#"
s = udp()
for _ in range(3):
    for n in range(8):
        s.sendto(b"?", (f"127.128.8.{n + 10}", 53))
    for _ in range(8):
        name, (vip, port) = s.recvfrom(64)
        assert vip == f"127.128.8.{int(name) + 10}" and port == 53, (name, vip)
print("ok")
"#,
    );
    assert_eq!(answers, "ok");
}

#[test]
fn ipv6_and_v4_mapped_sockets() {
    let (six, four) = (Server::datagrams("six", "[::1]:0"), Server::datagrams("four", "127.0.0.1:0"));
    let vip6 = "fd00:6d65:7368::53";
    let services = datagram_service("six", 53, vip6, &[("::1", six.port())])
        + &datagram_service("four", 53, VIP, &[("127.0.0.1", four.port())]);
    let mesh = Mesh::start(&services);
    let program = format!(
        "s = udp(socket.AF_INET6); print(ask(s, {vip6:?}, 53), ask(s, '::ffff:' + VIP, 53), ask(s, {vip6:?}, 53))"
    );
    assert_eq!(run(&mesh, &program), "six four six");
}

#[test]
fn datagrams_on_a_connected_socket() {
    let (a, b) = (Server::datagrams("A", "127.0.0.1:0"), Server::datagrams("B", "127.0.0.1:0"));
    let services = datagram_service("a", 53, VIP, &[("127.0.0.1", a.port())])
        + &datagram_service("b", 53, "127.128.8.2", &[("127.0.0.1", b.port())]);
    let mesh = Mesh::start(&services);
    // recvfrom on a connected socket runs the hook, recv does not; sendto elsewhere runs it too.
    let program = r#"
s = udp()
s.connect((VIP, 53))
s.send(b"?")
print(s.recvfrom(64))
s.send(b"?")
print(s.recv(64))
print(s.getpeername())
s.sendto(b"?", (VIP, 53))
print(s.recvfrom(64))
s.sendto(b"?", ("127.128.8.2", 53))
print(s.getpeername())
s.send(b"?")
print(s.recv(64))
"#;
    let expected = [
        &format!("(b'A', ('{VIP}', 53))"),
        "b'A'",
        &format!("('{VIP}', 53)"),
        &format!("(b'A', ('{VIP}', 53))"),
        // The other VIP got its datagram; its answer is not for a socket that is connected elsewhere.
        &format!("('{VIP}', 53)"),
        "b'A'",
    ];
    assert_eq!(run(&mesh, program).lines().collect::<Vec<_>>(), expected);
    mesh_tests::wait_until("the other VIP's backend has it", || b.hits() == 1);
}

#[test]
fn what_is_no_service_is_refused_and_what_is_no_vip_passes() {
    let direct = Server::datagrams("direct", "0.0.0.0:0");
    let mesh = Mesh::start(&datagram_service("empty", 53, VIP, &[]));
    let port = direct.port();
    let program = format!(
        r#"
for target in ((VIP, 53), (VIP, {port}), ("127.128.99.9", {port})):
    try:
        udp().sendto(b"?", target)
        print("sent")
    except OSError as e:
        print(errno.errorcode[e.errno])
print(ask(udp(), "127.0.0.1", {port}))
"#
    );
    assert_eq!(run(&mesh, &program), "ECONNREFUSED\nECONNREFUSED\nECONNREFUSED\ndirect");
    assert_eq!(direct.hits(), 1);
}

#[test]
fn glibc_s_resolver_accepts_the_reply() {
    // glibc's resolver checks where a reply comes from; asked through a VIP it must be content.
    let dns = Dns::start("a.test", "192.0.2.7");
    let mesh = Mesh::start(&datagram_service("dns", 53, VIP, &[("127.0.0.1", dns.port)]));
    let resolv = mesh.dir.path().join("resolv.conf");
    std::fs::write(&resolv, format!("nameserver {VIP}\noptions timeout:2 attempts:1\n")).unwrap();
    let script = format!(
        "mount --bind {} /etc/resolv.conf && python3 -c 'import socket; print(socket.getaddrinfo(\"a.test\", 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])'",
        resolv.display()
    );
    let output = mesh.inside("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    assert_eq!(text(&output).trim(), "192.0.2.7");
}
