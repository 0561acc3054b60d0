//! How soon the kernel follows a registry, and what following costs:
//! `registries KIND SERVICES INSTANCES CHANGES SECONDS`.
//!
//! So many services with so many instances each are in the registry when the daemon starts. Then a while of nothing, and
//! changes of one of them, each some time after the one before. An etcd is also taken away for a while, and gets
//! 10,000 changes a second of the others for so many seconds, with changes of that one between them. Prints one JSON
//! object a line: `{"what", "value", "unit"}`.

use std::{
    collections::HashMap,
    ffi::OsString,
    io::Read,
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use mesh_tests::{Dialogue, Mesh, binary, now, server::Server, wait_until};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use table::{Table, VIP};

mod consul;
mod dns;
mod embedded;
mod etcd;
mod http;
mod kubernetes;
mod table;

/// The longest time until all is served.
const START: Duration = Duration::from_secs(300);
/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(20);
/// From then on, until what the start left behind is done.
const SETTLE: Duration = Duration::from_secs(3);
/// Between two changes: longer than any registry is let rest after one.
const PAUSE: Duration = Duration::from_millis(25);

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match &args[..] {
        [what, address] if what == "dial" => dial(address.parse().expect("an address and port")),
        [kind, numbers @ ..] if numbers.len() == 4 => {
            let numbers: Vec<usize> = numbers.iter().map(|arg| arg.parse().expect("a number")).collect();
            let [services, instances, changes, seconds] = numbers[..] else { unreachable!("four of them") };
            raise_limit();
            measure(start(kind), Table { services, instances }, changes, seconds);
        }
        _ => panic!("registries KIND SERVICES INSTANCES CHANGES SECONDS"),
    }
}

/// A Consul is asked about each service on a connection of its own.
fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .expect("up to the maximum one may");
}

/// What can be measured.
trait Registry {
    /// What the daemon's configuration says of it.
    fn settings(&self, table: Table) -> String;

    /// Writes all of a table, whose first service is at this port. The daemon is configured, and does not run.
    fn fill(&mut self, table: Table, port: u16, mesh: &mut Mesh);

    /// Puts the only instance of the first service at another port, and returns when that is acknowledged.
    fn put(&self, port: u16);

    /// How long it takes until all that is asked now and then was asked once.
    fn turn(&self) -> Duration {
        Duration::from_secs(5)
    }

    /// If it is one.
    fn etcd(&mut self) -> Option<&mut mesh_tests::etcd::Etcd> {
        None
    }
}

fn start(kind: &str) -> Box<dyn Registry> {
    match kind {
        "etcd" => Box::new(etcd::Registry::start()),
        "embedded" => Box::new(embedded::Registry::new()),
        "cloudmap" => Box::new(embedded::CloudMap::new()),
        "consul" => Box::new(consul::Registry::start()),
        "kubernetes" => Box::new(kubernetes::Registry::start()),
        "dns" => Box::new(dns::Registry::new()),
        _ => panic!("{kind:?} is no registry that can be measured"),
    }
}

fn say(what: &str, value: f64, unit: &str) {
    println!("{}", json!({ "what": what, "value": value, "unit": unit }));
}

/// Half of them are below the one, 99 % below the other.
fn tell(what: &str, mut times: Vec<u64>) {
    times.sort_unstable();
    for (name, share) in [("p50", 50), ("p99", 99)] {
        say(&format!("{what}, {name}"), times[times.len() * share / 100] as f64 / 1e6, "ms");
    }
}

/// For each name on a line: dials until it answers, and says when that was.
fn dial(address: SocketAddr) {
    for wanted in std::io::stdin().lines() {
        let wanted = wanted.expect("a line");
        let mut answer = String::new();
        while answer != wanted {
            answer.clear();
            // In the moment of a change nobody may be there.
            let _ = TcpStream::connect(address).and_then(|mut stream| stream.read_to_string(&mut answer));
        }
        println!("{}", now());
    }
}

fn measure(mut registry: Box<dyn Registry>, table: Table, changes: usize, seconds: usize) {
    let servers = [("one", Server::start("one")), ("two", Server::start("two"))];
    let mut mesh = Mesh::prepare("service = []");
    mesh.configure(&(table.datapath() + &registry.settings(table)));
    registry.fill(table, servers[0].1.port(), &mut mesh);

    serve(&mut mesh, table);
    thread::sleep(SETTLE);
    say("memory of the daemon", memory(&mesh), "MB");
    say("CPU while nothing happens", cpu(&mesh, registry.turn()), "ms/s");
    if let Some(etcd) = registry.etcd() {
        is_away(etcd, &mesh);
    }
    if changes == 0 {
        return;
    }

    let own = std::env::current_exe().expect("this program");
    let mut dialler = mesh.inside(own);
    dialler.args(["dial", &format!("{VIP}:80")]);
    let mut dialler = Dialogue::start(dialler);
    let mut turn = 0;
    let mut follow = |registry: &dyn Registry| {
        turn += 1;
        let (name, server) = &servers[turn % 2];
        registry.put(server.port());
        let acknowledged = now();
        dialler.say(name);
        let reached: u64 = dialler.hear().parse().expect("a time");
        reached.saturating_sub(acknowledged)
    };
    let mut apart = |_| {
        thread::sleep(PAUSE);
        follow(&*registry)
    };
    // The first ones find nothing in the caches.
    (0..20).map(&mut apart).for_each(drop);
    tell("from the write to a connect that follows", (0..changes).map(apart).collect());

    if let Some(url) = registry.etcd().map(|etcd| etcd.url())
        && seconds > 0
    {
        let stop = AtomicBool::new(false);
        let (written, times) = thread::scope(|scope| {
            let many = scope.spawn(|| etcd::flood(&url, table, Duration::from_secs(seconds as u64), &stop));
            let mut times = Vec::new();
            while !stop.load(Relaxed) {
                times.push(follow(&*registry));
            }
            (many.join().expect("no panic"), times)
        });
        say("changes", written.rate(), "/s");
        tell("the same beside them", times);
        let start = Instant::now();
        wait_until("the last of them is followed", || written.is_followed(&mesh));
        say("the last of them is followed after", start.elapsed().as_secs_f64() * 1e3, "ms");
        say("memory of the daemon after them", memory(&mesh), "MB");
    }
    assert!(dialler.end().success());
}

/// Starts the daemon, and waits until all is in the kernel's tables.
fn serve(mesh: &mut Mesh, table: Table) {
    let start = Instant::now();
    launch(mesh);
    let mut served = start.elapsed();
    while mesh.used("BACKENDS") < table.backends() as u64 {
        assert!(served < START, "not served: {}", mesh.log());
        thread::sleep(LOOK);
        served = start.elapsed();
    }
    say("from the start until all is served", served.as_secs_f64() * 1e3, "ms");
}

/// Returns when the daemon is ready.
fn launch(mesh: &mut Mesh) {
    let mut daemon = Command::new(binary());
    // Keys as ECS gives them; nobody is to be asked for other ones.
    daemon.envs([("AWS_ACCESS_KEY_ID", "any"), ("AWS_SECRET_ACCESS_KEY", "any")]);
    daemon.env("AWS_EC2_METADATA_DISABLED", "true");
    mesh.launch_as(daemon);
    let start = Instant::now();
    let is_ready = || mesh.mesh(&["status", "--brief", "--wait=0s"]).output().expect("it can be asked");
    while !is_ready().status.success() {
        assert!(start.elapsed() < START, "not ready: {}", mesh.log());
        thread::sleep(LOOK);
    }
}

/// What the daemon does without its etcd, and when that is back.
fn is_away(etcd: &mut mesh_tests::etcd::Etcd, mesh: &Mesh) {
    etcd.kill();
    say("CPU while it is away", cpu(mesh, Duration::from_secs(5)), "ms/s");
    etcd.restart();
    let back = Instant::now();
    mesh.wait_for_registry("synced");
    say("synced again after", back.elapsed().as_secs_f64() * 1e3, "ms");
}

/// Resident memory of the daemon.
fn memory(mesh: &Mesh) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", mesh.pid())).expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// CPU time of the daemon's over some time, by the scheduler's own count. What a thread does that ends meanwhile
/// is not in it.
fn cpu(mesh: &Mesh, time: Duration) -> f64 {
    let spent = || -> HashMap<OsString, u64> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", mesh.pid())).expect("procfs").flatten();
        let spent = tasks.filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            Some((task.file_name(), text.split(' ').next()?.parse().ok()?))
        });
        spent.collect()
    };
    let (start, before) = (Instant::now(), spent());
    thread::sleep(time);
    let took = start.elapsed();
    let since = spent().into_iter().map(|(task, spent)| spent - before.get(&task).copied().unwrap_or(0));
    since.sum::<u64>() as f64 / 1e6 / took.as_secs_f64()
}
