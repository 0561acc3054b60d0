//! The DNS registry, against a real dnsmasq.

use std::{ffi::OsStr, fs};

use mesh_tests::{
    Mesh, figure,
    netns::{Host, Network, Place},
    server::{Dns, Server},
    text, wait_until,
};

use crate::{between::Between, outage, traffic::Traffic};

const VIP: &str = "127.128.41.1";

/// A name server whose addresses can be changed.
struct Zone {
    place: Place,
    address: String,
    hosts: tempfile::NamedTempFile,
    options: Vec<String>,
}

impl Zone {
    /// `backend` has both servers behind one SRV name: the first at `a.example`, the other at `b.example`.
    fn new(one: &Server, two: &Server) -> Self {
        Self::at(Place::here(), one, two)
    }

    fn at(place: Place, one: &Server, two: &Server) -> Self {
        let srv = |host: &str, server: &Server, weight: u16| {
            format!("--srv-host=_http._tcp.backend.example,{host}.example,{},1,{weight}", server.port())
        };
        let hosts = tempfile::NamedTempFile::new().unwrap();
        let mut options = vec![srv("a", one, 10), srv("b", two, 10)];
        options.push(format!("--addn-hosts={}", hosts.path().display()));
        options.extend(["--local=/example/", "--local-ttl=1"].map(Into::into));
        // Asked, and never answered for.
        options.push("--server=/broken.example/127.0.0.1#1".into());
        let zone = Self { address: place.free_address(), place, hosts, options };
        zone.write(&[("a", "127.0.0.1"), ("b", "127.0.0.2"), ("db", "127.0.0.1")]);
        zone
    }

    fn write(&self, hosts: &[(&str, &str)]) {
        let lines: String =
            hosts.iter().map(|(name, address)| format!("{address} {name}.example\n")).collect();
        fs::write(self.hosts.path(), lines).unwrap();
    }

    fn serve(&self) -> Dns {
        self.serve_with(&self.options)
    }

    fn serve_with<T: AsRef<OsStr>>(&self, options: &[T]) -> Dns {
        let (address, port) = self.address.split_once(':').unwrap();
        let mut dnsmasq = self.place.command("dnsmasq");
        dnsmasq.args(["--bind-interfaces", "--listen-address", address]).args(options);
        Dns::run(dnsmasq, port.parse().unwrap())
    }

    /// With a service for the SRV name, and one for the address of `db.example` at the first server's port.
    fn prepare(&self, db: &Server, more: &str) -> Mesh {
        self.prepare_at(&self.address, db, more)
    }

    fn prepare_at(&self, address: &str, db: &Server, more: &str) -> Mesh {
        let mesh = Mesh::prepare("service = []");
        mesh.configure(&format!(
            r#"
[[registry]]
type = "dns"
servers = ["{address}"]
[[registry.name]]
srv = "_http._tcp.backend.example"
port = 80
name = "backend"
namespace = "service.local"
vip = "{VIP}"
policy = "random"
[[registry.name]]
a = "db.example"
port = {}
name = "db"
namespace = "service.local"
vip = "127.128.41.2"
{more}"#,
            db.port()
        ));
        mesh
    }

    fn mesh(&self, db: &Server, more: &str) -> Mesh {
        let mut mesh = self.prepare(db, more);
        mesh.launch();
        mesh.ready();
        mesh
    }
}

fn names(mesh: &Mesh, what: &str) -> bool {
    mesh.registry()["problems"]
        .as_array()
        .unwrap()
        .iter()
        .any(|problem| problem.as_str().unwrap().contains(what))
}

#[test]
fn srv_records_and_addresses_are_backends_and_are_followed() {
    let (one, two) = (Server::start("one"), Server::start_at("two", "127.0.0.2:0"));
    let zone = Zone::new(&one, &two);
    let dns = zone.serve();
    let broken = "[[registry.name]]\na = \"x.broken.example\"\nport = 80\nname = \"x\"\nnamespace = \"y\"\n";
    let mesh = zone.mesh(&one, broken);
    let (backend, db) = (format!("{VIP}:80"), format!("127.128.41.2:{}", one.port()));
    mesh.wait_for_backends(&backend, 2);
    assert_eq!(mesh.dial(&db), "one");
    // A name that nobody answers for is named, and the others are served.
    assert!(names(&mesh, "x.broken.example: "), "{}", mesh.registry());
    assert_eq!(mesh.registry()["state"], "synced");
    let check = std::process::Command::new(mesh_tests::binary())
        .args(["check", "--pre", "--config"])
        .arg(&mesh.config)
        .output();
    assert!(text(&check.unwrap()).contains("x.broken.example: "));

    // There is no `b.example` any more: it does not exist, which is an answer.
    zone.write(&[("a", "127.0.0.1"), ("db", "127.0.0.1")]);
    dns.reload();
    mesh.wait_for_backends(&backend, 1);
    assert_eq!(mesh.dial(&backend), "one");
    zone.write(&[("a", "127.0.0.1")]);
    dns.reload();
    wait_until("db is gone", || mesh.dial(&db).contains("refused"));

    // What breaks the rules is named. Alone, it is nonsense, and what was there before stays.
    zone.write(&[("a", "127.0.0.1"), ("b", "127.0.0.2"), ("b", "169.254.169.254")]);
    dns.reload();
    mesh.wait_for_backends(&backend, 2);
    wait_until("it is named", || {
        names(&mesh, "_http._tcp.backend.example: address 169.254.169.254 is link-local")
    });
    zone.write(&[("a", "169.254.169.254"), ("b", "0.0.0.0")]);
    dns.reload();
    wait_until("it is named", || names(&mesh, "what it had before stays in use"));
    wait_until("all is kept", || mesh.kernel_backends(&backend).len() == 2);
    zone.write(&[("b", "127.0.0.2")]);
    dns.reload();
    mesh.wait_for_backends(&backend, 1);
    assert_eq!(mesh.dial(&backend), "two");
}

#[test]
fn a_name_server_that_fails_in_any_way_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start_at("two", "127.0.0.2:0"));
    let zone = Zone::new(&one, &two);
    let dns = zone.serve();
    let mut mesh = zone.mesh(&one, "");
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    let traffic = Traffic::start(&mesh, VIP);

    dns.fall_silent();
    mesh.wait_for_registry("stale");
    assert!(mesh.registry()["error"].to_string().contains("no answer in time"), "{}", mesh.registry());
    dns.wake();
    mesh.wait_for_registry("synced");

    // Gone, and then one that knows nothing and refuses to answer.
    drop(dns);
    mesh.wait_for_registry("stale");
    let other = zone.serve_with::<&str>(&[]);
    wait_until("it refuses", || mesh.registry()["error"].to_string().contains("Refused"));
    drop(other);

    // One that says that there are no such names.
    let empty = zone.serve_with(&["--local=/example/"]);
    wait_until("the fuse", || {
        mesh.registry()["error"].to_string().contains("only 0 instances of 0 services are left")
    });
    drop(empty);
    wait_until("it is gone", || !mesh.registry()["error"].to_string().contains("only 0 instances"));

    // The daemon starts while nobody answers.
    mesh.kill();
    mesh.launch();
    mesh.ready();
    assert_eq!(mesh.registry()["state"], "stale");
    figure(&format!(
        "name server silent, gone, refusing, empty: {} connects, none failed",
        traffic.end(&["one", "two"])
    ));
    mesh.kill();
    assert!(mesh.cleanup().status.success());
    mesh.launch();
    mesh.ready();
    assert!(["one", "two"].contains(&&*mesh.dial(&format!("{VIP}:80"))), "from the state folder");

    zone.write(&[("b", "127.0.0.2"), ("db", "127.0.0.1")]);
    let _dns = zone.serve();
    mesh.wait_for_registry("synced");
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!(mesh.dial(&format!("{VIP}:80")), "two");
}

#[test]
fn a_name_server_behind_a_black_hole_is_noticed_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start_at("two", "127.0.0.2:0"));
    let network = Network::new();
    let [node, far]: [Host; 2] = std::array::from_fn(|_| network.host());
    let zone = Zone::at(far.place(), &one, &two);
    zone.write(&[("a", "127.0.0.1"), ("db", "127.0.0.1")]);
    let dns = zone.serve();
    let mut mesh = zone.prepare(&one, "");
    outage::launch_on(&node, &mut mesh);
    outage::in_a_black_hole("name server", &mesh, VIP, &far, || {
        zone.write(&[("b", "127.0.0.2"), ("db", "127.0.0.1")]);
        dns.reload();
    });
}

/// At a byte a second over TCP: its answers are too long for datagrams then.
#[test]
fn a_name_server_that_says_a_byte_a_second_or_nonsense_is_noticed_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start_at("two", "127.0.0.2:0"));
    let zone = Zone::new(&one, &two);
    zone.write(&[("a", "127.0.0.1"), ("db", "127.0.0.1")]);
    let dns = zone.serve();
    let between = Between::start(&zone.address);
    between.pass_datagrams(&zone.address);
    let mut mesh = zone.prepare_at(&between.address, &one, "");
    mesh.launch();
    mesh.ready();
    let change = |server: usize| {
        let host = [("a", "127.0.0.1"), ("b", "127.0.0.2")][server];
        zone.write(&[host, ("db", "127.0.0.1")]);
        dns.reload();
    };
    between.endure("name server", &mesh, VIP, ["no answer in time", "no answer in time"], change);
}
