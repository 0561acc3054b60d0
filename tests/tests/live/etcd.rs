//! The etcd registry, against a real etcd.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::Ordering::Relaxed,
    thread,
    time::{Duration, Instant},
};

use mesh_tests::{
    Mesh,
    certificates::Certificates,
    etcd::Etcd,
    figure, free_address,
    netns::{Host, Network},
    server::Server,
    text, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    between::Between,
    outage::{self, Outage},
    traffic::Traffic,
};

const VIP: &str = "127.128.40.1";
const SERVICE: &str = "/mesh/services/service.local/echo";

fn key(id: &str) -> String {
    format!("/mesh/instances/service.local/echo/{id}")
}

fn at(server: &Server) -> String {
    format!(r#"{{"address": "127.0.0.1", "port": {}}}"#, server.port())
}

/// An etcd that knows a service with these instances, each by its name.
fn etcd(instances: &[(&str, &Server)]) -> Etcd {
    let etcd = Etcd::start();
    fill(&etcd, instances);
    etcd
}

fn fill(etcd: &Etcd, instances: &[(&str, &Server)]) {
    etcd.put(SERVICE, &format!(r#"{{"port": 80, "vip": "{VIP}", "policy": "random"}}"#));
    for (name, server) in instances {
        etcd.put(&key(name), &at(server));
    }
}

/// A daemon beside it that has not been started.
fn prepare(endpoints: &[&str]) -> Mesh {
    let mesh = Mesh::prepare("service = []");
    mesh.configure(&format!("[[registry]]\ntype = \"etcd\"\nendpoints = {endpoints:?}\n"));
    mesh
}

fn start(etcd: &Etcd) -> Mesh {
    let mut mesh = prepare(&[&etcd.url()]);
    mesh.launch();
    mesh.ready();
    mesh
}

fn dial(mesh: &Mesh) -> String {
    mesh.dial(&format!("{VIP}:80"))
}

/// Both sides show certificates, and users are asked for passwords; etcd forgets who has shown one when it is
/// restarted.
#[test]
fn etcd_is_asked_over_tls_and_with_a_password() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let (certificates, others) = (Certificates::make(), Certificates::make());
    let [ca, cert, private] = [&certificates.ca, &certificates.cert, &certificates.key].map(Clone::clone);
    let mut etcd = Etcd::start_with(certificates);
    etcd.require_password(("mesh", "secret"), "/mesh/");
    etcd.put(SERVICE, &format!(r#"{{"port": 80, "vip": "{VIP}", "policy": "random"}}"#));
    etcd.put(&key("one"), &at(&one));
    let mut mesh = Mesh::prepare("service = []");
    let password = mesh.services.with_file_name("password");
    let configure = |mesh: &mut Mesh, ca: &Path| {
        mesh.configure(&format!(
            "[[registry]]\ntype = \"etcd\"\nendpoints = [{:?}]\nusername = \"mesh\"\npassword_file = {password:?}\n\
             tls = {{ ca_file = {ca:?}, cert_file = {cert:?}, key_file = {private:?} }}\n",
            etcd.url(),
        ));
    };
    let fails = |mesh: &Mesh, why: &str| {
        wait_until(why, || text(&mesh.mesh(&["registry", "list"]).output().unwrap()).contains(why));
    };
    fs::write(&password, "wrong\n").unwrap();
    configure(&mut mesh, &others.ca);
    mesh.launch();
    fails(&mesh, "invalid peer certificate: ");
    mesh.kill();
    configure(&mut mesh, &ca);
    mesh.launch();
    fails(&mesh, "invalid user ID or password");
    // Read again at the next attempt.
    fs::write(&password, "secret\n").unwrap();
    mesh.ready();
    wait_until("the instance", || dial(&mesh) == "one");

    etcd.kill();
    etcd.restart();
    etcd.delete(&key("one"));
    etcd.put(&key("two"), &at(&two));
    wait_until("the other instance", || dial(&mesh) == "two");
    assert!(!mesh.registry().to_string().contains("secret") && !mesh.log().contains("secret"));
}

#[test]
fn what_is_put_and_deleted_is_followed_and_leases_end() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let etcd = etcd(&[("one", &one)]);
    // The first endpoint is nobody's.
    let mut mesh = prepare(&[&format!("http://{}", free_address()), &etcd.url()]);
    mesh.launch();
    mesh.ready();
    wait_until("the instance", || dial(&mesh) == "one");
    mesh.wait_for_registry("synced");
    assert_eq!((&mesh.registry()["services"], &mesh.registry()["instances"]), (&1.into(), &1.into()));

    etcd.put(&key("two"), &at(&two));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    etcd.delete(&key("one"));
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!(dial(&mesh), "two");

    let lease = etcd.ctl(&["lease", "grant", "1"]);
    let lease = lease.split(' ').nth(1).unwrap();
    etcd.ctl(&["put", "--lease", lease, &key("one"), &at(&one)]);
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!(dial(&mesh), "two");
    assert_eq!(mesh.registry()["error"], Value::Null);

    // What many keys say is read in several pages.
    let transaction: String = (0..120).map(|n| format!("put {} {}\n", key(&format!("x{n}")), n)).collect();
    for half in 0..20 {
        let more = transaction.replace("/x", &format!("/{half}-"));
        let mut etcdctl = Command::new("etcdctl");
        etcdctl.env("ETCDCTL_API", "3").args(["--endpoints", &etcd.address, "txn"]).stdin(Stdio::piped());
        let mut etcdctl = etcdctl.stdout(Stdio::null()).spawn().unwrap();
        etcdctl.stdin.take().unwrap().write_all(format!("\n{more}\n\n").as_bytes()).unwrap();
        assert!(etcdctl.wait().unwrap().success());
    }
    wait_until("all of them are named", || left_out(&mesh).contains("2380 more"));
    mesh.hang_up();
    wait_until("they are read again", || left_out(&mesh).contains("2380 more"));
    assert_eq!(dial(&mesh), "two");
}

/// The last problem of the registry.
fn left_out(mesh: &Mesh) -> String {
    mesh.registry()["problems"].as_array().unwrap().last().map(ToString::to_string).unwrap_or_default()
}

#[test]
fn a_kill_and_a_restart_of_etcd_fail_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut etcd = etcd(&[("one", &one)]);
    let mesh = start(&etcd);
    assert_eq!(dial(&mesh), "one");
    let traffic = Traffic::start(&mesh, VIP);
    for round in 0..3 {
        etcd.kill();
        mesh.wait_for_registry("stale");
        let error = mesh.registry()["error"].to_string();
        assert!(error.contains(&etcd.address), "{error}");
        // Long enough for the longest pause between attempts.
        thread::sleep(Duration::from_secs(2));
        etcd.restart();
        let back = Instant::now();
        mesh.wait_for_registry("synced");
        figure(&format!("etcd back: synced again after {} ms", back.elapsed().as_millis()));
        let (gone, new) = if round % 2 == 0 { ("one", "two") } else { ("two", "one") };
        etcd.put(&key(new), &at(if new == "one" { &one } else { &two }));
        mesh.wait_for_backends(&format!("{VIP}:80"), 2);
        etcd.delete(&key(gone));
        wait_until("the change", || dial(&mesh) == new);
    }
    figure(&format!("etcd killed 3 times: {} connects, none failed", traffic.end(&["one", "two"])));
}

#[test]
fn an_etcd_that_comes_back_empty_removes_nothing() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut etcd = etcd(&[("one", &one)]);
    let mut mesh = start(&etcd);
    let traffic = Traffic::start(&mesh, VIP);
    etcd.kill();
    etcd.restart_empty();
    let is_held = |mesh: &Mesh| {
        mesh.registry()["error"].to_string().contains("only 0 instances of 0 services are left")
    };
    wait_until("the fuse", || is_held(&mesh));
    assert_eq!(mesh.registry()["state"], "stale");
    let status = text(&mesh.mesh(&["status"]).output().unwrap());
    assert!(status.contains("of 1 instances of 1 services only 0 instances"), "{status}");
    assert_eq!(dial(&mesh), "one");

    // Nor does a restart, nor a reboot.
    mesh.kill();
    mesh.launch();
    mesh.ready();
    wait_until("the fuse", || is_held(&mesh));
    assert_eq!(dial(&mesh), "one");
    assert!(traffic.end(&["one", "two"]) > 0);
    mesh.kill();
    assert!(mesh.cleanup().status.success());
    mesh.launch();
    mesh.ready();
    wait_until("the fuse", || is_held(&mesh));
    assert_eq!(dial(&mesh), "one");

    // It is said again, and other than before.
    etcd.put(SERVICE, &format!(r#"{{"port": 80, "vip": "{VIP}"}}"#));
    etcd.put(&key("two"), &at(&two));
    mesh.wait_for_registry("synced");
    wait_until("what it says now", || mesh.kernel_backends(&format!("{VIP}:80")).len() == 1);
    assert_eq!(dial(&mesh), "two");
}

/// While the daemon sees nothing it comes to a revision that the daemon knows, on another way.
#[test]
fn an_etcd_that_is_restored_from_a_backup_is_read_again() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut etcd = etcd(&[("one", &one)]);
    let mesh = start(&etcd);
    etcd.kill();
    let backup = etcd.backup();
    etcd.restart();
    etcd.put(&key("two"), &at(&two));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    let traffic = Traffic::start(&mesh, VIP);

    let daemon = Pid::from_raw(mesh.pid().cast_signed()).unwrap();
    kill_process(daemon, Signal::STOP).unwrap();
    etcd.kill();
    etcd.restart_from(&backup);
    for weight in 1..4 {
        etcd.put(&key("one"), &at(&one).replace('}', &format!(r#", "weight": {weight}}}"#)));
    }
    kill_process(daemon, Signal::CONT).unwrap();
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!(dial(&mesh), "one");
    assert!(traffic.end(&["one", "two"]) > 0);
}

#[test]
fn a_spoilt_record_is_left_out_alone_and_named() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let etcd = etcd(&[("one", &one), ("two", &two)]);
    let mesh = start(&etcd);
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    etcd.put(&key("metadata"), r#"{"address": "169.254.169.254", "port": 80}"#);
    let problem = "/mesh/instances/service.local/echo/metadata: address 169.254.169.254 is link-local";
    let names = |what: &str| {
        let status = mesh.json(&["status"]);
        status["problems"].as_array().unwrap().iter().any(|problem| problem.as_str().unwrap().contains(what))
    };
    wait_until("it is named", || names(problem));
    assert_eq!((&mesh.registry()["state"], &mesh.registry()["instances"]), (&"synced".into(), &2.into()));
    let list = text(&mesh.mesh(&["registry", "list"]).output().unwrap());
    assert!(list.contains(problem), "{list}");
    let check =
        Command::new(mesh_tests::binary()).args(["check", "--pre", "--config"]).arg(&mesh.config).output();
    assert!(text(&check.unwrap()).contains(problem));

    // What worked stays until there is something better.
    etcd.put(&key("one"), "garbage");
    wait_until("it is named", || names("echo/one: the value is no JSON object"));
    assert_eq!(mesh.registry()["instances"], 2);
    etcd.put(&key("thief"), r#"{"address": "127.128.40.1", "port": 80}"#);
    etcd.put("/mesh/services/service.local/a-thief", &format!(r#"{{"port": 80, "vip": "{VIP}"}}"#));
    wait_until("they are named", || {
        names("echo/thief: address 127.128.40.1 lies in a VIP range")
            && names("service a-thief.service.local:80/tcp: vip 127.128.40.1 port 80/tcp is already taken")
    });

    for id in ["metadata", "thief", "one"] {
        etcd.delete(&key(id));
    }
    assert_eq!(mesh.registry()["services"], 1);
    etcd.delete("/mesh/services/service.local/a-thief");
    wait_until("nothing is wrong", || mesh.json(&["status"])["problems"] == Value::Array(Vec::new()));
    mesh.wait_for_backends(&format!("{VIP}:80"), 1);
    assert_eq!(dial(&mesh), "two");
}

#[test]
fn an_etcd_that_falls_silent_is_noticed_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let etcd = etcd(&[("one", &one)]);
    let mesh = start(&etcd);
    let traffic = Traffic::start(&mesh, VIP);
    etcd.freeze();
    let silent = Instant::now();
    mesh.wait_for_registry("stale");
    figure(&format!("etcd silent: noticed after {} ms", silent.elapsed().as_millis()));
    let error = mesh.registry()["error"].to_string();
    assert!(error.contains("no answer in time"), "{error}");
    etcd.thaw();
    mesh.wait_for_registry("synced");
    etcd.put(&key("two"), &at(&two));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    assert!(traffic.end(&["one", "two"]) > 0);
}

#[test]
fn an_etcd_behind_a_black_hole_is_noticed_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let network = Network::new();
    let [node, far]: [Host; 2] = std::array::from_fn(|_| network.host());
    let etcd = Etcd::start_at(far.place());
    fill(&etcd, &[("x", &one)]);
    let mut mesh = prepare(&[&etcd.url()]);
    outage::launch_on(&node, &mut mesh);
    assert!(far.connections() > 0, "it is connected");
    outage::in_a_black_hole("etcd", &mesh, VIP, &far, || etcd.put(&key("x"), &at(&two)));
}

#[test]
fn a_daemon_that_starts_while_etcd_is_away_serves_what_it_said_last() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut etcd = etcd(&[("one", &one)]);
    let mut mesh = start(&etcd);
    assert_eq!(dial(&mesh), "one");
    let kept = mesh.dir.path().join("state/registries");
    wait_until("it is on disk", || {
        let mut files = fs::read_dir(&kept).into_iter().flatten().flatten();
        files.any(|file| file.file_name().to_string_lossy().starts_with("etcd-"))
    });
    etcd.kill();
    for wipe in [false, true] {
        mesh.kill();
        if wipe {
            assert!(mesh.cleanup().status.success());
        }
        mesh.launch();
        mesh.ready();
        assert_eq!(dial(&mesh), "one");
        assert_eq!(mesh.registry()["state"], "stale");
    }
    etcd.restart();
    etcd.put(&key("one"), &at(&two));
    wait_until("what it says now", || dial(&mesh) == "two");
    assert_eq!(mesh.registry()["state"], "synced");
}

#[test]
fn an_etcd_that_says_a_byte_a_second_or_nonsense_is_noticed_and_fails_no_connect() {
    let servers = [Server::start("one"), Server::start("two")];
    let etcd = etcd(&[("x", &servers[0])]);
    let between = Between::start(&etcd.address);
    let mut mesh = prepare(&[&format!("http://{}", between.address)]);
    mesh.launch();
    mesh.ready();
    let change = |server: usize| etcd.put(&key("x"), &at(&servers[server]));
    between.endure("etcd", &mesh, VIP, ["in time", "HTTP"], change);
}

/// A user is deleted, with its tokens, and is there again with another password.
#[test]
fn a_password_that_is_changed_is_noticed_and_read_again_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut etcd = etcd(&[("x", &one)]);
    etcd.require_password(("mesh", "secret"), "/mesh/");
    let mut mesh = Mesh::prepare("service = []");
    let password = prepare_with_password(&mesh, &etcd);
    fs::write(&password, "secret").unwrap();
    mesh.launch();
    mesh.ready();
    let outage = Outage {
        what: "etcd with another password",
        mesh: &mesh,
        vip: VIP,
        error: "invalid user ID or password",
        servers: ["one", "two"],
    };
    let change_password = || {
        etcd.ctl(&["user", "delete", "mesh"]);
        etcd.ctl(&["user", "add", "mesh:another"]);
        etcd.ctl(&["user", "grant-role", "mesh", "reader"]);
    };
    let change = || etcd.put(&key("x"), &at(&two));
    outage.endure(change_password, change, |()| fs::write(&password, "another").unwrap());
}

/// A token ends when it was not used for a second, which is shorter than the time between two questions.
#[test]
fn tokens_that_end_are_replaced_and_fail_no_connect() {
    let servers = [Server::start("one"), Server::start("two")];
    let mut etcd = Etcd::start_as(&["--auth-token-ttl", "1"]);
    fill(&etcd, &[("x", &servers[0])]);
    etcd.require_password(("mesh", "secret"), "/mesh/");
    let mut mesh = Mesh::prepare("service = []");
    fs::write(prepare_with_password(&mesh, &etcd), "secret").unwrap();
    mesh.launch();
    mesh.ready();
    let traffic = Traffic::start(&mesh, VIP);
    let ended = || mesh.log().matches("invalid auth token").count();
    for (server, name) in [(&servers[1], "two"), (&servers[0], "one")] {
        let before = ended();
        wait_until("a token has ended", || ended() > before);
        etcd.put(&key("x"), &at(server));
        wait_until("the change", || dial(&mesh) == name);
    }
    mesh.wait_for_registry("synced");
    figure(&format!(
        "etcd's tokens ended {} times: {} connects, none failed",
        ended(),
        traffic.end(&["one", "two"])
    ));
}

/// The daemon's user is `mesh`; the file for its password.
fn prepare_with_password(mesh: &Mesh, etcd: &Etcd) -> PathBuf {
    let password = mesh.services.with_file_name("password");
    mesh.configure(&format!(
        "[[registry]]\ntype = \"etcd\"\nendpoints = [{:?}]\nusername = \"mesh\"\npassword_file = {password:?}\n",
        etcd.url(),
    ));
    password
}

#[test]
fn history_that_is_compacted_before_it_is_watched_is_read_again_and_fails_no_connect() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let etcd = etcd(&[("one", &one)]);
    let between = Between::start(&etcd.address);
    let mut mesh = prepare(&[&format!("http://{}", between.address)]);
    mesh.launch();
    mesh.ready();
    let traffic = Traffic::start(&mesh, VIP);
    between.hold.store(true, Relaxed);
    // It lists anew.
    mesh.hang_up();
    wait_until("everything is listed", || between.held.load(Relaxed));
    etcd.put(&key("one"), &at(&two));
    let revision = etcd.ctl(&["get", &key("one"), "-w", "json"]);
    let revision: Value = serde_json::from_str(&revision).unwrap();
    etcd.put("/elsewhere", "x");
    etcd.ctl(&["compaction", &(revision["header"]["revision"].as_u64().unwrap() + 1).to_string()]);
    between.hold.store(false, Relaxed);
    wait_until("it says so", || mesh.log().contains("history is compacted up to revision"));
    wait_until("what was written meanwhile", || dial(&mesh) == "two");
    mesh.wait_for_registry("synced");
    figure(&format!("etcd's history compacted: {} connects, none failed", traffic.end(&["one", "two"])));
}
