//! Sockets that were set up in unusual ways, or are many.

use mesh_tests::{
    Dialogue, Mesh, datagram_service, free_address,
    netns::{Host, Network},
    server::{self, Server},
    service, text, wait_until,
};

const VIP: &str = "127.128.17.1";

/// Runs a Python program on a host, inside; it has the VIP as `VIP` and what it prints is returned.
fn run(mesh: &Mesh, host: &Host, program: &str) -> String {
    let program = format!("import errno, select, socket\nVIP = {VIP:?}\n{program}");
    let output = mesh.on(host, "python3").args(["-c", &program]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A server on a host that tells each client its address.
fn telling(host: &Host) -> Dialogue {
    server::on(host, "s.send(source[0].encode()); s.shutdown(socket.SHUT_WR); kept.append(s)")
}

#[test]
fn a_socket_bound_to_a_device_is_translated_and_stays_bound() {
    let network = Network::new();
    let (client, server) = (network.host(), network.host());
    let _server = telling(&server);
    let mesh = Mesh::start(&service("tell", 80, VIP, &[(&server.address, 8080)]));
    let program = r#"
s = socket.socket()
s.settimeout(5)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"v0\0")
s.connect((VIP, 80))
print(s.getpeername(), s.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16), s.recv(16).decode())
"#;
    assert_eq!(run(&mesh, &client, program), format!("('{VIP}', 80) b'v0\\x00' {}", client.address));
}

#[test]
fn a_socket_bound_to_an_address_keeps_it_and_fails_as_it_would_without_mesh() {
    let network = Network::new();
    let (client, server) = (network.host(), network.host());
    let _server = telling(&server);
    let mesh = Mesh::start(&service("tell", 80, VIP, &[(&server.address, 8080)]));
    let program = format!(
        r#"
for source in "{}", "127.0.0.1":
    for target in ("{}", 8080), (VIP, 80):
        s = socket.socket()
        s.settimeout(5)
        s.bind((source, 0))
        try:
            s.connect(target)
            assert s.getpeername() == target
            print(s.getsockname()[0], s.recv(16).decode())
        except OSError as error:
            print(errno.errorcode[error.errno])
"#,
        client.address, server.address
    );
    let answer = run(&mesh, &client, &program);
    let [direct, vip, loopback_direct, loopback_vip] = answer.lines().collect::<Vec<_>>()[..] else {
        panic!("{answer}");
    };
    let both = format!("{0} {0}", client.address);
    assert_eq!((direct, vip), (&*both, &*both), "what getsockname shows, and what the server sees");
    assert_eq!((loopback_direct, loopback_vip), ("EINVAL", "EINVAL"));
}

#[test]
fn the_failure_of_a_non_blocking_connect_comes_later() {
    let network = Network::new();
    let (client, server) = (network.host(), network.host());
    // Nobody listens there.
    let mesh = Mesh::start(&service("dead", 80, VIP, &[(&server.address, 8080)]));
    let program = r#"
s = socket.socket()
s.setblocking(False)
print(errno.errorcode[s.connect_ex((VIP, 80))])
print(select.select([], [s], [], 5)[1] == [s])
print(errno.errorcode[s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)])
"#;
    assert_eq!(run(&mesh, &client, program), "EINPROGRESS\nTrue\nECONNREFUSED");
    assert_eq!(mesh.json(&["backend", "list"])[0]["connections"]["active"], 0);
}

#[test]
fn many_sockets_opened_and_closed_leave_nothing_behind() {
    let (tcp, udp) = (Server::start("x"), Server::datagrams("x", "127.0.0.1:0"));
    let refusing: u16 = free_address().rsplit(':').next().unwrap().parse().unwrap();
    let services = service("t", 80, VIP, &[("127.0.0.1", tcp.port())])
        + &service("dead", 81, VIP, &[("127.0.0.1", refusing)])
        + &datagram_service("u", 80, VIP, &[("127.0.0.1", udp.port())]);
    let mesh = Mesh::start(&services);
    let program = format!(
        r#"
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (5000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for _ in range(10):
    held = [socket.socket(type=kind) for kind in [socket.SOCK_STREAM, socket.SOCK_DGRAM] * 1000]
    for s in held:
        s.connect(("{VIP}", 80))
        assert s.getpeername() == ("{VIP}", 80)
    print("held", flush=True)
    sys.stdin.readline()
    for s in held:
        # Without waiting, so that no port is missing in the end.
        if s.type == socket.SOCK_STREAM:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        s.close()
    for _ in range(1000):
        s = socket.socket()
        assert s.connect_ex(("{VIP}", 81)) != 0
        s.close()
"#
    );
    let mut client = mesh.dialogue(&program);
    for _ in 0..10 {
        assert_eq!(client.hear(), "held");
        assert_eq!(mesh.used("SOCKETS"), 2000, "what the rounds before held is gone");
        client.go_on();
    }
    assert!(client.end().success());
    wait_until("nothing is left", || mesh.used("SOCKETS") == 0);
    for backend in mesh.json(&["backend", "list"]).as_array().unwrap() {
        assert_eq!(backend["connections"]["active"], 0, "{backend}");
    }
}
