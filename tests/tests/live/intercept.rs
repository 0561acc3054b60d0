//! Tasks' queries come to the daemon, whichever name server they ask, as long as it lives.

use std::{fs, process::Command};

use mesh_tests::{
    Dialogue, Mesh,
    netns::{Host, Network},
    server::{self, Dns},
    service, wait_until,
};

const VIP: &str = "127.128.28.1";

/// Answers `elsewhere.test` with another address than the daemon's name server does.
const UPSTREAM: &str = "192.0.2.1";
const ORIGINAL: &str = "192.0.2.2";

/// A host with a name server, which tasks are told to ask, and one with a service.
struct Place {
    network: Network,
    mesh: Mesh,
    resolver: Host,
    _dialogues: Vec<Dialogue>,
    _upstream: Dns,
}

impl Place {
    fn prepare() -> Self {
        let network = Network::new();
        let (resolver, backend) = (network.host(), network.host());
        let upstream = Dns::with(&[&format!("--address=/elsewhere.test/{UPSTREAM}")]);
        let mut dnsmasq = resolver.command("dnsmasq");
        dnsmasq.args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            "--conf-file=/dev/null",
            "--pid-file=",
        ]);
        dnsmasq.args([
            &format!("--address=/elsewhere.test/{ORIGINAL}"),
            &format!("--listen-address={}", resolver.address),
        ]);
        let served = server::on(&backend, r#"s.sendall(b"echo"); s.close()"#);
        let text = service("echo", 8080, VIP, &[(&backend.address, 8080)]);
        let mut mesh = Mesh::prepare(&text.replacen("port", "aliases = [\"short\"]\nport", 1));
        mesh.dns = format!("listen = []\nupstream = [\"127.0.0.1:{}\"]", upstream.port);
        mesh.configure("");
        Self {
            network,
            mesh,
            resolver,
            _dialogues: vec![Dialogue::start(dnsmasq), served],
            _upstream: upstream,
        }
    }

    /// A program in a namespace of its own, with a resolv.conf of its own.
    fn command(&self, host: &Host, program: &str) -> Command {
        let resolv = self.mesh.dir.path().join("resolv.conf");
        fs::write(&resolv, format!("nameserver {}\noptions timeout:1\n", self.resolver.address)).unwrap();
        let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.display());
        let mut command = self.mesh.on(host, "unshare");
        command.args(["--mount", "sh", "-c", &script, "sh", program]);
        command
    }
}

/// Looks up each name that it is given, and says the address or why there is none.
const LOOKUP: &str = r#"
import socket, sys
for line in sys.stdin:
    try:
        print(socket.getaddrinfo(line.strip(), 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0], flush=True)
    except OSError as error:
        print(error, flush=True)
"#;

#[test]
fn queries_come_to_the_daemon_and_go_where_they_are_sent_once_it_is_gone() {
    let mut place = Place::prepare();
    let host = place.network.host();
    let mut python = place.command(&host, "python3");
    python.args(["-c", LOOKUP]);
    let mut task = Dialogue::start(python);
    let mut look_up = |name: &str| {
        task.say(name);
        task.hear()
    };
    wait_until("the name server is up", || look_up("elsewhere.test") == ORIGINAL);
    for round in 0..2 {
        place.mesh.launch();
        place.mesh.ready();
        wait_until("the daemon listens", || look_up("elsewhere.test") == UPSTREAM);
        for name in ["echo.service.local", "short.service.local", "short", "ECHO.Service.Local"] {
            assert_eq!(look_up(name), VIP, "{name}");
        }
        let output = place
            .command(&host, "curl")
            .args(["--silent", "--http0.9", "http://short:8080"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "echo", "{output:?}");
        place.mesh.kill();
        assert_eq!(look_up("elsewhere.test"), ORIGINAL, "after kill {round}");
        assert_ne!(look_up("echo.service.local"), VIP);
    }
}
