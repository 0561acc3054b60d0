//! Routes for the VIP ranges: what no hook translates, and networks that the node needs.

use std::process::Command;

use mesh_tests::{
    Mesh, binary,
    netns::{Host, Network},
    server::Server,
    service, text, wait_until,
};

const VIP: &str = "127.128.13.1";

/// What a socket outside the hooks, or of a kind that has none, gets for a VIP: an error, at once.
const PROBES: &str = r#"
import errno, socket, struct
UDPLITE = 136
def probe(name, make, act):
    name = f"v{4 if family == socket.AF_INET else 6} {name}"
    try:
        s = make()
    except OSError:
        print(name, "does not exist here")
        return
    s.settimeout(1)
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
    let probe = |mut python: Command, outside: &str| {
        let program = format!("OUTSIDE, PORT = {outside}, {}\n{PROBES}", everywhere.port());
        let output = python.args(["-c", &program]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    // Without IPv6, or a route for it, there is nothing to refuse.
    let is_refused = |line: &str| {
        line.ends_with("EHOSTUNREACH") || line.ends_with("not exist here") || line.ends_with("ENETUNREACH")
    };
    wait_until("outside the cgroup", || probe(Command::new("python3"), "True").lines().all(is_refused));
    let before = everywhere.hits();
    // A hook refuses some of them.
    let lines = probe(mesh.inside("python3"), "False");
    assert!(lines.lines().all(|line| is_refused(line) || line.ends_with("ECONNREFUSED")), "{lines}");

    // In a task's own namespace as soon as it has been seen.
    let network = Network::new();
    let host = network.host();
    let ip = |args: &[&str]| assert!(host.command("ip").args(args).status().unwrap().success());
    ip(&["address", "add", "2001:db8::1/64", "dev", "v0", "nodad"]);
    ip(&["route", "add", "default", "dev", "v0"]);
    ip(&["-6", "route", "add", "default", "dev", "v0"]);
    let lines = probe(host.command("python3"), "True");
    assert!(lines.contains("v4 udp went through") && lines.contains("v6 udp went through"), "{lines}");
    let mut task = mesh.on(&host, "sleep").arg("60").spawn().unwrap();
    wait_until("in the namespace", || {
        let lines = probe(host.command("python3"), "True");
        lines.lines().all(|line| is_refused(line) && !line.ends_with("ENETUNREACH"))
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
fn a_range_that_would_take_a_network_from_the_node_is_refused_and_named() {
    let network = Network::new();
    // At 10.213.0.1/24.
    let host = network.host();
    let mut mesh = Mesh::prepare("");
    let config = mesh.config.to_str().unwrap().to_owned();
    let on_host = |args: &[&str]| {
        host.command(binary().to_str().unwrap()).args(args).args(["--config", &config]).output().unwrap()
    };
    for (range, taken) in [
        ("10.0.0.0/8", "10.213.0.0/24"),
        ("10.213.0.0/24", "10.213.0.0/24"),
        ("10.213.0.0/30", "10.213.0.1/32"),
    ] {
        mesh.configure(&format!("[vip]\nranges = [{range:?}]\n"));
        let named = format!("range {range} would make {taken} unreachable");
        let (start, check) = (on_host(&["run"]), on_host(&["check", "--pre"]));
        assert!(!start.status.success() && text(&start).contains(&named), "{}", text(&start));
        assert!(!check.status.success() && text(&check).contains(&named), "{}", text(&check));
        assert!(!mesh.pin_dir.exists(), "nothing was done before");
    }
    // A part of a wider network may have been set aside for VIPs.
    mesh.configure("[vip]\nranges = [\"10.213.0.128/25\"]\n");
    let check = on_host(&["check", "--pre"]);
    assert!(
        check.status.success() && text(&check).contains("is a part of 10.213.0.0/24"),
        "{}",
        text(&check)
    );
    // Neither 127.0.0.0/8 counts, nor the routes that a daemon has set.
    mesh.configure("");
    mesh.launch();
    mesh.ready();
    let check = mesh.mesh(&["check", "--config", &config]).output().unwrap();
    assert!(text(&check).contains("take no network from this node"), "{}", text(&check));
}
