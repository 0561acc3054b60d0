//! How soon the kernel follows an etcd: `registries SERVICES INSTANCES CHANGES SECONDS`.
//!
//! So many services with so many instances each; changes of one of them, one after the other; 10,000 changes a second
//! of the others for so many seconds, with changes of that one between them; then a while of nothing, and a while without
//! etcd. Prints one JSON object a line: `{"what", "value", "unit"}`.

use std::{
    collections::BTreeMap,
    io::Read,
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_tests::{Dialogue, Mesh, etcd::Etcd, now, server::Server, wait_until};
use serde_json::{Value, json};

const VIP: &str = "127.128.60.1";
/// Keys that are written at once: as many as etcd takes.
const AT_ONCE: usize = 100;
const RATE: f64 = 10_000.0;

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match &args[..] {
        [what, address] if what == "dial" => dial(address.parse().expect("an address and port")),
        [_, _, _, _] => {
            let numbers: Vec<usize> = args.iter().map(|arg| arg.parse().expect("a number")).collect();
            let [services, instances, changes, seconds] = numbers[..] else { unreachable!("four of them") };
            measure(services, instances, changes, seconds);
        }
        _ => panic!("registries SERVICES INSTANCES CHANGES SECONDS"),
    }
}

fn say(what: &str, value: f64, unit: &str) {
    println!("{}", json!({ "what": what, "value": value, "unit": unit }));
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

/// Puts keys, as fast as one writer can.
struct Writer {
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
    url: String,
}

impl Writer {
    fn new(etcd: &Etcd) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().expect("a client");
        Self { runtime, http, url: format!("{}/v3/kv/txn", etcd.url()) }
    }

    fn put(&self, keys: &[(String, String)]) {
        let put = |(key, value): &(String, String)| json!({ "requestPut": { "key": BASE64_STANDARD.encode(key), "value": BASE64_STANDARD.encode(value) } });
        let body = json!({ "success": keys.iter().map(put).collect::<Vec<_>>() }).to_string();
        let answer =
            self.runtime.block_on(self.http.post(&self.url).body(body).send()).expect("etcd answers");
        assert!(answer.status().is_success(), "{answer:?}");
    }
}

fn service(number: usize) -> (String, String) {
    let vip = if number == 0 { format!(r#", "vip": "{VIP}""#) } else { String::new() };
    (format!("/mesh/services/service.local/s{number}"), format!(r#"{{"port": 80{vip}}}"#))
}

fn instance(service: usize, number: usize, port: usize) -> (String, String) {
    let address = format!("10.{}.{}.{}", service >> 8, service & 255, number + 1);
    let key = format!("/mesh/instances/service.local/s{service}/i{number}");
    (key, format!(r#"{{"address": "{address}", "port": {port}}}"#))
}

fn measure(services: usize, instances: usize, changes: usize, seconds: usize) {
    let mut etcd = Etcd::start();
    let servers = [Server::start("one"), Server::start("two")];
    let at = |server: &Server| {
        let key = "/mesh/instances/service.local/s0/i0".to_owned();
        vec![(key, format!(r#"{{"address": "127.0.0.1", "port": {}}}"#, server.port()))]
    };
    let writer = Writer::new(&etcd);
    let all = (0..services).map(service);
    let all = all.chain((1..services).flat_map(|n| (0..instances).map(move |of| instance(n, of, 8080))));
    let all: Vec<_> = all.chain(at(&servers[0])).collect();
    all.chunks(AT_ONCE).for_each(|keys| writer.put(keys));
    let backends = 1 + (services - 1) * instances;

    let mut mesh = Mesh::prepare("service = []");
    mesh.configure(&format!(
        "[datapath]\nmax_services = {}\nmax_backends = {}\n[[registry]]\ntype = \"etcd\"\nendpoints = [{:?}]\n",
        2 * services,
        2 * backends + 1000,
        etcd.url()
    ));
    let start = Instant::now();
    mesh.launch();
    mesh.ready();
    say("from the start until all is served", start.elapsed().as_secs_f64() * 1e3, "ms");
    assert_eq!(mesh.used("BACKENDS"), backends as u64, "all is in the maps");

    let own = std::env::current_exe().expect("this program");
    let mut dialler = mesh.inside(own);
    dialler.args(["dial", &format!("{VIP}:80")]);
    let mut dialler = Dialogue::start(dialler);
    let mut turn = 0;
    let mut follow = |changes: &mut dyn Iterator<Item = ()>| {
        let mut times = Vec::new();
        for () in changes {
            turn += 1;
            writer.put(&at(&servers[turn % 2]));
            let acknowledged = now();
            dialler.say(["one", "two"][turn % 2]);
            let reached: u64 = dialler.hear().parse().expect("a time");
            times.push(reached.saturating_sub(acknowledged));
        }
        times.sort_unstable();
        times
    };
    let tell = |what: &str, times: &[u64]| {
        for (name, share) in [("p50", 50), ("p99", 99)] {
            say(&format!("{what}, {name}"), times[times.len() * share / 100] as f64 / 1e6, "ms");
        }
    };
    // The first ones find nothing in the caches.
    follow(&mut (0..20).map(drop));
    tell("from etcd's answer to a connect that follows", &follow(&mut (0..changes).map(drop)));

    if services > 1 {
        let stop = AtomicBool::new(false);
        let (written, times) = thread::scope(|scope| {
            let many = scope.spawn(|| flood(&etcd, (services, instances), seconds, &stop));
            let times = follow(&mut std::iter::repeat_n((), usize::MAX).take_while(|()| !stop.load(Relaxed)));
            (many.join().expect("no panic"), times)
        });
        say("changes", written.puts as f64 / written.took.as_secs_f64(), "/s");
        tell("the same beside them", &times);
        let start = Instant::now();
        wait_until("the last of them is followed", || written.is_followed(&mesh));
        say("the last of them is followed after", start.elapsed().as_secs_f64() * 1e3, "ms");
        // The sockets of what was replaced may stay for 20 s, and are looked after until then.
        thread::sleep(Duration::from_secs(35));
    }
    say("memory of the daemon", memory(&mesh), "MB");
    say("CPU while nothing happens", cpu(&mesh), "ms/s");
    etcd.kill();
    say("CPU while etcd is away", cpu(&mesh), "ms/s");
    etcd.restart();
    let back = Instant::now();
    mesh.wait_for_registry("synced");
    say("synced again after", back.elapsed().as_secs_f64() * 1e3, "ms");
    assert!(dialler.end().success());
}

/// What was written last of each instance that was written.
struct Written {
    ports: BTreeMap<(usize, usize), usize>,
    puts: usize,
    took: Duration,
}

impl Written {
    fn is_followed(&self, mesh: &Mesh) -> bool {
        let list = mesh.json(&["backend", "list"]);
        let ports: BTreeMap<_, _> = list.as_array().expect("a list").iter().map(place_and_port).collect();
        self.ports.iter().all(|((service, number), port)| {
            ports.get(&(format!("s{service}"), format!("i{number}"))) == Some(&(*port as u64))
        })
    }
}

fn place_and_port(backend: &Value) -> ((String, String), u64) {
    let text = |key: &str| backend[key].as_str().unwrap_or_default().to_owned();
    ((text("service"), text("instance")), backend["port"].as_u64().expect("a port"))
}

/// Other services' instances, in turn, each at another port than before.
fn flood(etcd: &Etcd, (services, instances): (usize, usize), seconds: usize, stop: &AtomicBool) -> Written {
    let writer = Writer::new(etcd);
    let mut written = Written { ports: BTreeMap::new(), puts: 0, took: Duration::ZERO };
    let mut places = (1..services).flat_map(|n| (0..instances).map(move |of| (n, of))).cycle();
    // A transaction may hold a key only once.
    let at_once = AT_ONCE.min((services - 1) * instances);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds as u64) {
        let places: Vec<_> = places.by_ref().take(at_once).collect();
        let keys = places.iter().map(|place| {
            let port = written.ports.get(place).map_or(9000, |port| 9000 + (port - 9000 + 1) % 1000);
            written.ports.insert(*place, port);
            instance(place.0, place.1, port)
        });
        let keys: Vec<_> = keys.collect();
        writer.put(&keys);
        written.puts += keys.len();
        let due = start + Duration::from_secs_f64(written.puts as f64 / RATE);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    written.took = start.elapsed();
    stop.store(true, Relaxed);
    written
}

/// Resident memory of the daemon.
fn memory(mesh: &Mesh) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", mesh.pid())).expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// CPU time of the daemon's over five seconds, by the scheduler's own count.
fn cpu(mesh: &Mesh) -> f64 {
    let spent = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", mesh.pid())).expect("procfs").flatten();
        let spent = tasks.filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        spent.sum()
    };
    let (start, before) = (Instant::now(), spent());
    thread::sleep(Duration::from_secs(5));
    (spent() - before) as f64 / 1e6 / start.elapsed().as_secs_f64()
}
