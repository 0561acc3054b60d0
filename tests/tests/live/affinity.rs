//! Workloads that keep their backend: affinity and consistent hashing; zones, slow start, panic.

use std::{fs, process::Command};

use mesh_tests::{Mesh, server::Server, service, wait_until, weighted_service};

const VIP: &str = "127.128.12.1";

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

fn start(count: usize) -> Vec<Server> {
    NAMES.iter().take(count).map(|name| Server::start(name)).collect()
}

fn services(servers: &[&Server], policy: &str, more: &str) -> String {
    let instances: Vec<_> = servers.iter().map(|server| ("127.0.0.1", server.port())).collect();
    service("echo", 80, VIP, &instances)
        .replace("policy = \"random\"", &format!("policy = {policy:?}\n{more}"))
}

/// What a workload is told, dialling so often: a workload is a cgroup.
fn dial(mesh: &Mesh, workload: &str, times: usize) -> Vec<String> {
    let cgroup = mesh.cgroup.join(workload);
    let _ = fs::create_dir(&cgroup);
    let client = env!("CARGO_BIN_EXE_client");
    let script = format!("echo $$ > {}/cgroup.procs && exec {client} {VIP}:80 1 {times}", cgroup.display());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.rsplit(' ').next().unwrap().to_owned()).collect()
}

/// The one backend that a workload always gets.
fn backend_of(mesh: &Mesh, workload: &str) -> String {
    let answers = dial(mesh, workload, 8);
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{workload}: {answers:?}");
    answers[0].clone()
}

#[test]
fn with_affinity_a_workload_keeps_its_backend_and_workloads_differ() {
    let servers = start(4);
    let all: Vec<_> = servers.iter().collect();
    for policy in ["least-connections", "random", "round-robin"] {
        let mesh = Mesh::start(&services(&all, policy, "affinity = \"1h\""));
        let first: Vec<_> = (0..12).map(|n| backend_of(&mesh, &format!("task-{n}"))).collect();
        assert!(first.iter().any(|backend| *backend != first[0]), "{policy}: all 12 have {first:?}");
        // Others that come and go change nothing; a restart neither.
        for (n, backend) in first.iter().enumerate() {
            assert_eq!(backend_of(&mesh, &format!("task-{n}")), *backend);
        }
    }
}

#[test]
fn affinity_follows_a_change_of_backends_and_outlives_the_daemon() {
    let servers = start(3);
    let all: Vec<_> = servers.iter().collect();
    let mut mesh = Mesh::start(&services(&all, "random", "affinity = \"1h\""));
    let backend = backend_of(&mesh, "task");
    mesh.kill();
    mesh.launch();
    mesh.ready();
    assert_eq!(backend_of(&mesh, "task"), backend);
    let rest: Vec<_> =
        all.iter().zip(NAMES).filter(|(_, name)| *name != backend).map(|(server, _)| *server).collect();
    mesh.write(&services(&rest, "random", "affinity = \"1h\""));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    let second = backend_of(&mesh, "task");
    assert_ne!(second, backend);
    // The old one comes back: the workload stays where it is now.
    mesh.write(&services(&all, "random", "affinity = \"1h\""));
    mesh.wait_for_backends(&format!("{VIP}:80"), 3);
    assert_eq!(backend_of(&mesh, "task"), second);
}

#[test]
fn affinity_ends_after_its_time_and_can_be_switched_live() {
    let servers = start(4);
    let all: Vec<_> = servers.iter().collect();
    let mesh = Mesh::start(&services(&all, "random", "affinity = \"100ms\""));
    let several = |mesh: &Mesh| {
        let answers = dial(mesh, "task", 40);
        answers.iter().any(|answer| *answer != answers[0])
    };
    assert!(!several(&mesh), "within the time");
    let first = dial(&mesh, "task", 1);
    wait_until("a pause ends it", || {
        std::thread::sleep(std::time::Duration::from_millis(150));
        dial(&mesh, "task", 1) != first
    });
    mesh.write(&services(&all, "random", ""));
    wait_until("switched off", || several(&mesh));
    mesh.write(&services(&all, "random", "affinity = \"1h\""));
    wait_until("switched on", || !several(&mesh));
}

#[test]
fn maglev_gives_a_workload_one_backend_that_only_its_end_changes() {
    let servers = start(5);
    let all: Vec<_> = servers.iter().collect();
    let mesh = Mesh::start(&services(&all, "maglev", ""));
    let count = 60;
    let round = || (0..count).map(|n| backend_of(&mesh, &format!("task-{n}"))).collect::<Vec<_>>();
    let before = round();
    for name in &NAMES[..5] {
        assert!(before.iter().any(|backend| backend == name), "{name} serves nobody of {before:?}");
    }
    mesh.write(&services(&all[..4], "maglev", ""));
    mesh.wait_for_backends(&format!("{VIP}:80"), 4);
    let after = round();
    let moved: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).collect();
    assert!(moved.iter().all(|(before, _)| *before == "e"), "{moved:?}");
    assert!(after.iter().all(|backend| backend != "e"));
    mesh.write(&services(&all, "maglev", ""));
    mesh.wait_for_backends(&format!("{VIP}:80"), 5);
    assert_eq!(round(), before, "the same table again");
}

#[test]
fn the_own_zone_is_preferred_and_spills_over() {
    let servers = start(4);
    let text = |health: &[&str]| {
        let mut text =
            services(&[], "round-robin", "eject = { failures = 2, base = \"60s\", max_percent = 50 }");
        for (n, server) in servers.iter().enumerate() {
            let zone = if n < 2 { "here" } else { "there" };
            text += &format!(
                "[[service.instance]]\nid = \"i-{n}\"\naddress = \"127.0.0.1\"\nport = {}\nzone = {zone:?}\nhealth = {:?}\n",
                server.port(),
                health[n]
            );
        }
        text
    };
    let mut mesh = Mesh::prepare(&text(&["healthy"; 4]));
    let config = fs::read_to_string(&mesh.config).unwrap();
    fs::write(&mesh.config, config.replacen("[node]", "[node]\nzone = \"here\"", 1)).unwrap();
    mesh.launch();
    mesh.ready();
    let share = |mesh: &Mesh| {
        let answers = dial(mesh, "task", 100);
        answers.iter().filter(|answer| ["a", "b"].contains(&answer.as_str())).count()
    };
    assert_eq!(share(&mesh), 100);
    // Half of the zone is sick: it takes 70 %.
    mesh.write(&text(&["healthy", "unhealthy", "healthy", "healthy"]));
    mesh.wait_for_backends(&format!("{VIP}:80"), 3);
    let local = share(&mesh);
    assert!((65..=75).contains(&local), "{local}");
    mesh.write(&text(&["unhealthy", "unhealthy", "healthy", "healthy"]));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    assert_eq!(share(&mesh), 0);
}

#[test]
fn a_zone_whose_only_backend_refuses_does_not_hold_its_clients() {
    let remote = Server::start("far");
    let refusing: u16 = mesh_tests::free_address().rsplit(':').next().unwrap().parse().unwrap();
    let mut text = services(&[], "random", "eject = { failures = 2, base = \"60s\", max_percent = 50 }");
    for (zone, port) in [("here", refusing), ("there", remote.port())] {
        text += &format!(
            "[[service.instance]]\nid = {zone:?}\naddress = \"127.0.0.1\"\nport = {port}\nzone = {zone:?}\n"
        );
    }
    let mut mesh = Mesh::prepare(&text);
    let config = fs::read_to_string(&mesh.config).unwrap();
    fs::write(&mesh.config, config.replacen("[node]", "[node]\nzone = \"here\"", 1)).unwrap();
    mesh.launch();
    mesh.ready();
    wait_until("the other zone takes over", || dial(&mesh, "task", 20).iter().all(|answer| answer == "far"));
}

#[test]
fn a_new_backend_starts_slowly_and_gets_its_share() {
    let servers = start(2);
    let text =
        |servers: &[&Server], window| services(servers, "round-robin", &format!("slow_start = {window:?}"));
    // So long that it is as good as at its beginning, however slow this machine is.
    let mesh = Mesh::start(&text(&[&servers[0]], "1h"));
    mesh.write(&text(&[&servers[0], &servers[1]], "1h"));
    mesh.wait_for_backends(&format!("{VIP}:80"), 2);
    let share = |mesh: &Mesh| dial(mesh, "task", 200).iter().filter(|answer| *answer == "b").count();
    let early = share(&mesh);
    assert!(early < 30, "{early} of 200 at once");
    mesh.write(&text(&[&servers[0], &servers[1]], "2s"));
    wait_until("an even share", || (99..=101).contains(&share(&mesh)));
}

#[test]
fn with_too_few_healthy_ones_health_is_ignored() {
    let servers = start(3);
    let text = |panic: u8| {
        let instances: Vec<_> = servers.iter().map(|server| ("127.0.0.1", server.port(), 100)).collect();
        let text = weighted_service("echo", 80, VIP, &instances)
            .replace("policy = \"random\"", &format!("policy = \"round-robin\"\npanic_percent = {panic}"));
        // The first one stays healthy.
        let (first, rest) = text.split_at(text.find("id = \"echo-1\"").unwrap());
        format!("{first}{}", rest.replace("weight", "health = \"unhealthy\"\nweight"))
    };
    let mesh = Mesh::start(&text(33));
    assert!(dial(&mesh, "task", 30).iter().all(|answer| answer == "a"), "a third is enough for 33 %");
    mesh.write(&text(50));
    mesh.wait_for_backends(&format!("{VIP}:80"), 3);
    let answers = dial(&mesh, "task", 30);
    for name in &NAMES[..3] {
        assert_eq!(answers.iter().filter(|answer| answer == name).count(), 10, "{answers:?}");
    }
}
