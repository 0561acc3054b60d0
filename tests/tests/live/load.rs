//! Many connects while the registry file changes and the daemon dies.

use std::{
    collections::BTreeMap,
    io::Read,
    process::Stdio,
    time::{Duration, Instant},
};

use mesh_tests::{Mesh, now, server::Server, wait_until, weighted_service};

const VIP: &str = "127.128.6.1";
const CONNECTS: usize = 10_000;
const THREADS: usize = 4;

/// When "changing" was surely not listed: from the moment the maps no longer had it until
/// the moment before the file named it again.
struct Absence {
    from: u64,
    to: u64,
}

/// What a client saw: when each connect began, and who answered.
struct Seen(Vec<(u64, String)>);

impl Seen {
    fn shares(&self) -> BTreeMap<&str, usize> {
        let mut shares = BTreeMap::new();
        for (_, answer) in &self.0 {
            *shares.entry(answer.as_str()).or_default() += 1;
        }
        shares
    }
}

/// Runs the client while `change` is called over and over, about 20 times a second.
fn run(mesh: &Mesh, connects: usize, mut change: impl FnMut(u64)) -> Seen {
    let mut client = mesh.inside(env!("CARGO_BIN_EXE_client"));
    client.args([format!("{VIP}:80"), THREADS.to_string(), connects.to_string()]);
    let mut client = client.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = client.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    let mut round = 0;
    while client.try_wait().unwrap().is_none() {
        let start = Instant::now();
        change(round);
        round += 1;
        std::thread::sleep(Duration::from_millis(50).saturating_sub(start.elapsed()));
    }
    let text = reader.join().unwrap();
    let seen: Vec<_> = text
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(start, answer)| (start.parse().unwrap(), answer.to_owned()))
        .collect();
    assert_eq!(seen.len(), connects);
    Seen(seen)
}

#[test]
fn connects_never_fail_nor_reach_what_is_not_listed_while_the_file_changes() {
    let servers = ["one", "two", "changing"].map(Server::start);
    let ports = servers.each_ref().map(Server::port);
    let both = [("127.0.0.1", ports[0], 100), ("127.0.0.1", ports[1], 200)];
    let all = [both[0], both[1], ("127.0.0.1", ports[2], 100)];
    let text = |instances: &[(&str, u16, u16)]| weighted_service("echo", 80, VIP, instances);
    let mesh = Mesh::start(&text(&both));
    let frontend = format!("{VIP}:80");

    let mut absences = Vec::new();
    let mut absent_since = now();
    let mut changes = 0;
    // The client is run until the file has changed 100 times under it.
    let mut seen = Seen(Vec::new());
    while changes < 100 {
        let more = run(&mesh, CONNECTS, |round| {
            changes += 1;
            if round % 2 == 0 {
                absences.push(Absence { from: absent_since, to: now() });
                mesh.write(&text(&all));
                mesh.wait_for_backends(&frontend, 3);
            } else {
                mesh.write(&text(&both));
                mesh.wait_for_backends(&frontend, 2);
                absent_since = now();
            }
        });
        seen.0.extend(more.0);
        mesh.write(&text(&both));
        mesh.wait_for_backends(&frontend, 2);
        absent_since = now();
    }

    let shares = seen.shares();
    let (one, two, changing) = (shares["one"], shares["two"], shares["changing"]);
    assert_eq!(one + two + changing, seen.0.len(), "only answers, no errors: {shares:?}");
    let strays = seen.0.iter().filter(|(start, answer)| {
        answer == "changing" && absences.iter().any(|absence| (absence.from..absence.to).contains(start))
    });
    assert_eq!(strays.count(), 0, "connects that began while the backend was not listed");
    eprintln!("{} connects, {changes} changes, {shares:?}", seen.0.len());

    // Among the two that were always listed the shares follow the weights. 3 sigma is passed by
    // chance once in 370 runs, so a second look is taken before that counts.
    let even = |one: usize, two: usize| {
        let n = (one + two) as f64;
        (one as f64 - n / 3.0).abs() <= 3.0 * (n * 2.0 / 9.0).sqrt()
    };
    if !even(one, two) {
        let again = run(&mesh, CONNECTS, |_| ());
        let shares = again.shares();
        assert!(even(shares["one"], shares["two"]), "{one}:{two}, then {shares:?}, for weights 1:2");
    }
}

#[test]
fn killing_the_daemon_in_the_middle_of_changes_fails_no_connect() {
    let servers = ["one", "two", "three"].map(Server::start);
    let ports = servers.each_ref().map(Server::port);
    let instances = ports.map(|port| ("127.0.0.1", port, 100));
    let text = |count: usize| weighted_service("echo", 80, VIP, &instances[..count]);
    let mut mesh = Mesh::start(&text(3));
    let mut kills = 0;
    let mut connects = 0;
    while kills < 20 {
        let cgroup_client = {
            let mut client = mesh.inside(env!("CARGO_BIN_EXE_client"));
            client
                .args([format!("{VIP}:80"), THREADS.to_string(), CONNECTS.to_string()])
                .stdout(Stdio::piped());
            client.spawn().unwrap()
        };
        let reader = std::thread::spawn(move || cgroup_client.wait_with_output().unwrap());
        while !reader.is_finished() {
            // The kill comes while the change is being read or written.
            mesh.write(&text(2 + kills % 2));
            std::thread::sleep(Duration::from_micros(700 * (kills as u64 % 17)));
            mesh.kill();
            kills += 1;
            mesh.launch();
            mesh.ready();
        }
        let output = String::from_utf8(reader.join().unwrap().stdout).unwrap();
        let failed: Vec<_> = output
            .lines()
            .filter(|line| !["one", "two", "three"].contains(&line.split(' ').nth(1).unwrap()))
            .collect();
        assert_eq!(failed, Vec::<&str>::new(), "after {kills} kills");
        connects += output.lines().count();
    }
    eprintln!("{connects} connects, {kills} kills, 0 failed");

    // Whatever was left half done is made good, and nothing is leaked.
    mesh.write(&text(2));
    wait_until("two backends", || mesh.kernel_backends(&format!("{VIP}:80")).len() == 2);
    let maps = mesh.json(&["status"])["maps"].clone();
    let used: Vec<_> = maps.as_array().unwrap().iter().map(|map| map["used"].as_u64().unwrap()).collect();
    assert_eq!(used, [1, 1, 2, 2], "{maps}");
    let raw = std::process::Command::new(mesh_tests::binary())
        .args(["bpf", "maps", "-o", "json", "--config"])
        .arg(&mesh.config)
        .output()
        .unwrap();
    let raw: serde_json::Value = serde_json::from_slice(&raw.stdout).unwrap();
    let backends = raw.as_array().unwrap().iter().find(|map| map["name"] == "BACKENDS").unwrap();
    assert_eq!(backends["used"], 2, "what the kernel holds");
}
