//! Everything at once: connects at full speed, changes of the registry at full speed, connections
//! that are held, and a daemon that is killed, replaced by another version, resized and robbed of its pins.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use mesh_tests::{
    Dialogue, Mesh, Workload, binary, datagram_service, figure, is_long, other_binary, server::Server,
    service, wait_until, wipe,
};

const VIP: &str = "127.128.27.1";
const HELD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/held.py");

/// Connections that nothing is said on, that are talked on all the time, and UDP sockets.
const IDLE: u64 = 1000;
const BUSY: u64 = 100;
const DATAGRAMS: u64 = 50;

/// What happens to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    /// Killed at some moment.
    Kill,
    /// Killed at a system call of its start, or of its writing.
    KillAtCall,
    /// Killed, and followed by another version.
    OtherVersion,
    /// Killed, and followed by one with other sizes of the maps.
    OtherSizes,
    /// Everything that is pinned is taken away.
    Wipe,
}

const ROUND: [Blow; 8] = [
    Blow::Kill,
    Blow::KillAtCall,
    Blow::OtherVersion,
    Blow::KillAtCall,
    Blow::OtherSizes,
    Blow::OtherVersion,
    Blow::KillAtCall,
    Blow::Wipe,
];

/// Under strace, which kills it with the `call`-th system call to BPF of one of its threads.
fn killed_at(call: usize) -> Command {
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=bpf", "-e"]);
    command.arg(format!("inject=bpf:signal=SIGKILL:when={call}")).arg(binary());
    command
}

/// Dials until told to stop; how many answers of each kind there were.
fn dial(task: &Workload, stop: &AtomicBool) -> BTreeMap<String, u64> {
    let mut answers = BTreeMap::new();
    while !stop.load(Relaxed) {
        let mut client = task.command(env!("CARGO_BIN_EXE_client"));
        client.args([&format!("{VIP}:80"), "4", "20000"]).stdout(Stdio::piped());
        let output = client.spawn().unwrap().wait_with_output().unwrap();
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            *answers.entry(line.rsplit(' ').next().unwrap().to_owned()).or_default() += 1;
        }
    }
    answers
}

/// Changes the registry a thousand times a second until told to stop.
fn change(file: &Path, texts: &[String], stop: &AtomicBool, changes: &AtomicU64) {
    let start = Instant::now();
    let new = file.with_extension("new");
    let mut texts = texts.iter().cycle();
    while !stop.load(Relaxed) {
        let n = changes.load(Relaxed) + 1;
        fs::write(&new, texts.next().unwrap()).unwrap();
        fs::rename(&new, file).unwrap();
        changes.store(n, Relaxed);
        thread::sleep((start + Duration::from_millis(n)).saturating_duration_since(Instant::now()));
    }
}

#[test]
fn nothing_that_happens_to_the_daemon_fails_a_connect_or_a_connection() {
    let blows = if is_long() { 400 } else { 16 };
    let servers = ["one", "two", "three", "four"].map(Server::start);
    let mut mesh = Mesh::prepare("");
    // In memory: a disk would not take so many changes.
    let folder = TempDir::new_in("/dev/shm").unwrap();
    mesh.services = folder.path().join("services.toml");
    mesh.configure("");
    let mut python = mesh.inside("python3");
    python.args([HELD, VIP, "81"]).args([IDLE, BUSY, DATAGRAMS].map(|count| count.to_string()));
    let mut client = Dialogue::start(python);
    let held: Vec<_> = client.hear().split(' ').map(|port| ("127.0.0.1", port.parse().unwrap())).collect();
    let all: Vec<_> = servers.iter().map(|server| ("127.0.0.1", server.port())).collect();
    let text = |without: usize| {
        let mut instances = all.clone();
        instances.remove(without);
        format!(
            "{}\n{}\n{}",
            service("echo", 80, VIP, &instances),
            service("held", 81, VIP, &held),
            datagram_service("held", 81, VIP, &held)
        )
    };
    let texts: Vec<_> = (0..4).map(text).collect();
    mesh.write(&texts[0]);
    mesh.launch();
    mesh.ready();
    client.go_on();
    assert_eq!(client.hear(), "all well");

    let (stop, changes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (file, task) = (mesh.services.clone(), mesh.workload("dialler"));
    let start = Instant::now();
    let mut at_calls = 0;
    let mut happened = BTreeMap::<Blow, usize>::new();
    let answers = thread::scope(|scope| {
        // Also if this thread panics: the others are waited for.
        let _stops = Stops(&stop);
        let load = scope.spawn(|| dial(&task, &stop));
        scope.spawn(|| change(&file, &texts, &stop, &changes));
        for number in 0..blows {
            let blow = ROUND[number % ROUND.len()];
            *happened.entry(blow).or_default() += 1;
            at_calls += u32::from(strike(&mut mesh, blow, number));
            client.go_on();
            assert_eq!(client.hear(), "all well", "after {number}: {blow:?}");
        }
        stop.store(true, Relaxed);
        load.join().unwrap()
    });
    let seconds = start.elapsed().as_secs_f64();
    let connects: u64 = answers.values().sum();
    figure(&format!(
        "{happened:?} ({at_calls} died at their call) in {seconds:.0} s: {connects} connects ({:.0}/s), {} changes ({:.0}/s), {answers:?}, {IDLE} idle and {BUSY} busy connections kept",
        connects as f64 / seconds,
        changes.load(Relaxed),
        changes.load(Relaxed) as f64 / seconds,
    ));
    assert!(at_calls > 0, "strace killed none");
    // A connection that is made in the moment of a change of version may show its backend.
    let answered: u64 =
        ["one", "two", "three", "four", "wrong-peer"].iter().filter_map(|name| answers.get(*name)).sum();
    assert_eq!(answered, connects, "{answers:?}");

    // Nothing is leaked, and every count is exact.
    mesh.kill();
    mesh.write(&texts[0]);
    mesh.launch();
    mesh.ready();
    mesh.wait_for_backends(&format!("{VIP}:80"), 3);
    wait_until("the counts are exact", || {
        let list = mesh.json(&["backend", "list"]);
        let counts = list.as_array().unwrap().iter().map(|b| b["connections"]["active"].as_u64().unwrap());
        counts.sum::<u64>() == IDLE + BUSY + DATAGRAMS
    });
    wait_until("no place is taken for nothing", || mesh.used("SOCKETS") == IDLE + BUSY + 2 * DATAGRAMS);
    wait_until("no entry is left behind", || {
        ["FRONTENDS", "SERVICES", "BACKENDS"].map(|map| mesh.used(map)) == [3, 3, 7]
    });
    client.go_on();
    assert_eq!(client.hear(), "all well");
    client.end();
}

struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Returns whether the daemon died at the call that it was to die at.
fn strike(mesh: &mut Mesh, blow: Blow, number: usize) -> bool {
    if blow == Blow::Wipe {
        wipe(&mesh.pin_dir);
        wait_until("everything is pinned again", || {
            mesh.mesh(&["status", "--brief"]).output().unwrap().status.success()
                && mesh.pin_dir.join("link/mesh_sockops").exists()
        });
        return false;
    }
    thread::sleep(Duration::from_millis(number as u64 * 7 % 40));
    mesh.kill();
    let mut at_call = false;
    match blow {
        Blow::OtherVersion => mesh.launch_as(Command::new(other_binary())),
        Blow::KillAtCall => {
            // A start takes about 100 calls; the writer of the maps makes its own, a few for each change.
            let call = if number.is_multiple_of(2) { 1 + number * 13 % 100 } else { 100 + number * 7 % 50 };
            mesh.launch_as(killed_at(call));
            let start = Instant::now();
            while !mesh.has_ended() && start.elapsed() < Duration::from_secs(3) {
                thread::sleep(Duration::from_millis(5));
            }
            at_call = mesh.has_ended();
            mesh.kill();
            mesh.launch();
        }
        Blow::OtherSizes => {
            mesh.configure(&format!("[datapath]\nmax_backends = {}\n", 1000 * (1 + number % 3)));
            mesh.launch();
        }
        Blow::Kill | Blow::Wipe => mesh.launch(),
    }
    mesh.ready();
    at_call
}
