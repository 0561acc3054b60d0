//! A node that starts without its registry: what the registry said last is in the state folder.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use mesh_tests::{Mesh, figure, is_long, server::Server, service, text, wait_until};
use serde_json::Value;

const VIP: &str = "127.128.9.1";

fn echo(server: &Server) -> String {
    service("echo", 80, VIP, &[("127.0.0.1", server.port())])
}

fn dial(mesh: &Mesh) -> String {
    dial_at(mesh, VIP)
}

fn dial_at(mesh: &Mesh, vip: &str) -> String {
    mesh.dial(&format!("{vip}:80"))
}

/// The one file that holds what the registry said, once there is one.
fn kept(mesh: &Mesh) -> PathBuf {
    let mut found = Vec::new();
    wait_until("one file in the state folder", || {
        let files = fs::read_dir(mesh.dir.path().join("state/registries")).into_iter().flatten();
        found = files.map(|file| file.unwrap().path()).collect();
        found.len() == 1 && found[0].extension().is_some_and(|end| end == "json")
    });
    found.remove(0)
}

/// What a reboot leaves: the state folder.
fn reboot(mesh: &mut Mesh) {
    mesh.kill();
    wipe(mesh);
    mesh.launch();
}

fn wipe(mesh: &Mesh) {
    let cleanup = mesh.cleanup();
    assert!(cleanup.status.success() && !mesh.pin_dir.exists(), "{}", text(&cleanup));
}

fn registry(mesh: &Mesh) -> Value {
    mesh.json(&["registry", "list"])[0].clone()
}

fn away(mesh: &Mesh) -> PathBuf {
    let away = mesh.dir.path().join("away");
    fs::rename(&mesh.services, &away).unwrap();
    away
}

#[test]
fn a_node_that_reboots_without_its_registry_serves_what_it_said_last() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let derived = service("derived", 80, "", &[("127.0.0.1", one.port())]);
    let mut mesh = Mesh::start(&(echo(&one) + &derived));
    let vip = |mesh: &Mesh| {
        let service = mesh.json(&["service", "get", "derived"]);
        service["vips"][0].as_str().unwrap().to_owned()
    };
    let before = vip(&mesh);

    // Away, unreadable, emptied, no file at all: the registry says nothing.
    for (how, what) in
        [(None, "No such file"), (Some("[[service]]\nname = "), "services.toml:2: "), (Some(""), "empty")]
    {
        mesh.kill();
        wipe(&mesh);
        assert_ne!(dial(&mesh), "one", "nothing is left in the kernel");
        match how {
            None => drop(away(&mesh)),
            Some(text) => mesh.write(text),
        }
        mesh.launch();
        mesh.ready();
        assert_eq!((dial(&mesh), dial_at(&mesh, &before)), ("one".into(), "one".into()), "{what}");
        assert_eq!(vip(&mesh), before);
        let registry = registry(&mesh);
        assert_eq!(
            (&registry["state"], &registry["services"], &registry["instances"]),
            (&"stale".into(), &2.into(), &2.into())
        );
        assert!(registry["error"].as_str().unwrap().contains(what), "{registry}");
        assert!(registry["last_sync"].as_str().unwrap().ends_with('Z'), "{registry}");
        assert!(registry["age_seconds"].as_u64().unwrap() < 60, "{registry}");
        let status = text(&mesh.mesh(&["status"]).output().unwrap());
        assert!(status.contains("stale, last read "), "{status}");
        let metrics =
            Command::new("curl").args(["-s", &format!("http://{}/metrics", mesh.web)]).output().unwrap();
        assert!(
            text(&metrics).contains("mesh_registry_up{type=\"file\"")
                && text(&metrics).contains("mesh_registry_last_sync_timestamp_seconds{")
        );
    }

    // The file is back, and says something else.
    mesh.write(&echo(&two));
    wait_until("the change", || dial(&mesh) == "two");
    wait_until("the service that is gone", || dial_at(&mesh, &before) != "one");
    assert_eq!(registry(&mesh)["state"], "synced");
}

/// A daemon that was killed before it had kept what its maps hold.
fn behind((old, new): &(Server, Server)) -> Mesh {
    let mut mesh = Mesh::start(&echo(old));
    let path = kept(&mesh);
    let before = fs::read(&path).unwrap();
    mesh.write(&echo(new));
    wait_until("the change", || dial(&mesh) == "new");
    mesh.kill();
    fs::write(&path, before).unwrap();
    mesh
}

#[test]
fn maps_that_outlived_the_daemon_know_better_than_the_state_folder() {
    let servers = (Server::start("old"), Server::start("new"));
    let mut mesh = behind(&servers);
    away(&mesh);
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "new");
    reboot(&mut mesh);
    mesh.ready();
    assert_eq!(dial(&mesh), "old", "there is nothing better");
}

#[test]
fn programs_that_run_on_other_maps_know_better_than_the_state_folder() {
    let servers = (Server::start("old"), Server::start("new"));
    let mut mesh = behind(&servers);
    // As if that daemon had another layout of the maps.
    let maps = mesh.map_pin("SLOTS").parent().unwrap().to_owned();
    fs::rename(maps, mesh.pin_dir.join("abi-0")).unwrap();
    let hidden = away(&mesh);
    mesh.launch();
    wait_until("the API answers", || mesh.mesh(&["status"]).output().unwrap().status.success());
    wait_until("the registry was asked", || registry(&mesh)["error"] != Value::Null);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(dial(&mesh), "new");
    fs::rename(hidden, &mesh.services).unwrap();
    mesh.ready();
    assert_eq!(dial(&mesh), "new");
}

#[test]
fn spoilt_and_hostile_state_is_named_and_left_alone() {
    let server = Server::start("echo");
    let other = service("other", 80, "127.128.9.2", &[("127.0.0.1", server.port())]);
    let mut mesh = Mesh::start(&(echo(&server) + &other));
    let path = kept(&mesh);
    let good = fs::read_to_string(&path).unwrap();
    mesh.stop();
    let hidden = away(&mesh);
    let vips = mesh.dir.path().join("state/vips.json");
    for (text, answers) in [
        (String::new(), false),
        ("{".into(), false),
        ("\0".repeat(100), false),
        (good.replace("\"version\":1", "\"version\":99"), false),
        (good.replace("services.toml", "others.toml"), false),
        // Records that the file registry would refuse are left out, each alone.
        (good.replacen("127.0.0.1", "169.254.169.254", 1), true),
        (good.replacen(VIP, "10.9.9.9", 1), true),
    ] {
        assert_ne!(text, good);
        fs::write(&path, &text).unwrap();
        fs::write(&vips, "spoilt").unwrap();
        wipe(&mesh);
        mesh.launch();
        wait_until("the API answers", || mesh.mesh(&["status"]).output().unwrap().status.success());
        wait_until("the registry was asked", || registry(&mesh)["error"] != Value::Null);
        assert_eq!(registry(&mesh)["state"], if answers { "stale" } else { "failed" }, "{text:?}");
        if answers {
            mesh.ready();
            assert_eq!(dial_at(&mesh, "127.128.9.2"), "echo");
        }
        assert_ne!(dial(&mesh), "echo");
        assert!(mesh.kernel_backends("10.9.9.9:80").is_empty());
        assert!(
            mesh.log().contains(path.to_str().unwrap()) && mesh.log().contains("vips.json"),
            "{}",
            mesh.log()
        );
        fs::remove_file(mesh.dir.path().join("daemon.log")).unwrap();
        mesh.kill();
    }
    // What was spoilt is written anew once the registry answers.
    fs::rename(hidden, &mesh.services).unwrap();
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "echo");
    mesh.stop();
    assert_eq!(fs::read_to_string(&path).unwrap(), good);
}

#[test]
fn a_registry_that_was_taken_out_does_not_come_back() {
    let server = Server::start("echo");
    let mut mesh = Mesh::prepare(&service("one", 80, "127.128.9.3", &[("127.0.0.1", server.port())]));
    let second = mesh.dir.path().join("second.toml");
    fs::write(&second, echo(&server)).unwrap();
    let both = format!("[[registry]]\ntype = \"file\"\npath = {second:?}\n");
    mesh.configure(&both);
    mesh.launch();
    mesh.ready();
    assert_eq!(dial(&mesh), "echo");
    mesh.stop();
    assert_eq!(fs::read_dir(mesh.dir.path().join("state/registries")).unwrap().count(), 2);
    wipe(&mesh);
    mesh.configure("");
    away(&mesh);
    mesh.launch();
    mesh.ready();
    assert_ne!(dial(&mesh), "echo");
    assert_eq!(dial_at(&mesh, "127.128.9.3"), "echo");
    kept(&mesh);

    // Nor does what it said once when it is configured again, and says nothing.
    fs::remove_file(&second).unwrap();
    mesh.configure(&both);
    wait_until("both are there", || mesh.json(&["registry", "list"]).as_array().unwrap().len() == 2);
    std::thread::sleep(Duration::from_millis(300));
    assert_ne!(dial(&mesh), "echo");
    assert_eq!(mesh.json(&["registry", "list"])[1]["state"], "failed");
}

/// Reading the file takes a while, and what is known from before is served meanwhile.
#[test]
fn a_node_is_ready_once_its_registry_was_asked() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut mesh = Mesh::start(&echo(&one));
    kept(&mesh);
    mesh.kill();
    let many: Vec<_> = (0..50_000).map(|n| format!("10.{}.{}.1", n >> 8, n & 255)).collect();
    let many: Vec<_> = many.iter().map(|address| (address.as_str(), 80)).collect();
    mesh.write(&(echo(&two) + &service("filler", 80, "127.128.9.4", &many)));
    mesh.launch();
    let page = format!("http://{}/readyz", mesh.web);
    wait_until("it is ready", || {
        Command::new("curl").args(["-sf", &page]).stdout(Stdio::null()).status().unwrap().success()
    });
    assert_eq!(dial(&mesh), "two");
}

/// The state is large, so that a kill comes in the middle of its writing now and then.
#[test]
fn a_kill_while_the_state_is_written_leaves_the_old_or_the_new() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let many: Vec<_> = (0..20_000).map(|n| (format!("10.{}.{}.1", n >> 8, n & 255), 80)).collect();
    let many: Vec<_> = many.iter().map(|(address, port)| (address.as_str(), *port)).collect();
    let filler = service("filler", 80, "127.128.9.4", &many);
    let mut mesh = Mesh::start(&(echo(&one) + &filler));
    let path = kept(&mesh);
    let rounds = if is_long() { 100 } else { 12 };
    let mut cut = 0;
    let (mut old, mut new) = ("one", "two");
    for round in 0..rounds {
        mesh.write(&(echo(if new == "one" { &one } else { &two }) + &filler));
        let unfinished = path.with_extension("json.new");
        let start = Instant::now();
        while !unfinished.exists() && start.elapsed() < Duration::from_secs(5) {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_micros(300 * (round % 12)));
        mesh.kill();
        cut += usize::from(unfinished.exists());
        wipe(&mesh);
        let hidden = away(&mesh);
        mesh.launch();
        mesh.ready();
        let answer = dial(&mesh);
        assert!([old, new].contains(&answer.as_str()), "round {round}: {answer}");
        assert_eq!(mesh.kernel_backends("127.128.9.4:80").len(), 20_000);
        fs::rename(hidden, &mesh.services).unwrap();
        wait_until("what the file says", || dial(&mesh) == new);
        (old, new) = (new, old);
    }
    assert!(cut > 0, "no kill came in time");
    figure(&format!(
        "{cut} of {rounds} kills cut a write of the state short; the old or the new was served each time"
    ));
}

/// Not a benchmark: a loop that never waits takes a whole CPU.
#[test]
fn a_registry_that_is_away_costs_next_to_nothing() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&echo(&server));
    let ticks = |mesh: &Mesh| -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", mesh.pid())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let busy = |mesh: &Mesh| {
        let before = ticks(mesh);
        std::thread::sleep(Duration::from_secs(3));
        ticks(mesh) - before
    };
    away(&mesh);
    wait_until("the loss is noticed", || registry(&mesh)["state"] == "stale");
    let gone = busy(&mesh);
    assert!(Command::new("mkfifo").arg(&mesh.services).stdin(Stdio::null()).status().unwrap().success());
    wait_until("the pipe is noticed", || registry(&mesh)["error"].to_string().contains("not a file"));
    let pipe = busy(&mesh);
    // A tick is 10 ms: a whole CPU would be 300.
    assert!(gone < 100 && pipe < 100, "{gone} and {pipe} ticks in 3 s");
    assert_eq!(dial(&mesh), "echo");
    assert_eq!(mesh.stop(), Some(0));
}
