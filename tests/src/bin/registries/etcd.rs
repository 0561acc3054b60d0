//! A real etcd.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_tests::{Mesh, etcd::Etcd};
use serde_json::{Value, json};

use crate::{
    http::Caller,
    table::{PORT, Table, VIP, address},
};

/// Keys that are written at once: as many as etcd takes.
const AT_ONCE: usize = 100;
const RATE: f64 = 10_000.0;

pub(crate) struct Registry {
    etcd: Etcd,
    writer: Writer,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let etcd = Etcd::start();
        Self { writer: Writer::new(&etcd.url()), etcd }
    }
}

impl crate::Registry for Registry {
    fn settings(&self, _: Table) -> String {
        format!("[[registry]]\ntype = \"etcd\"\nendpoints = [{:?}]\n", self.etcd.url())
    }

    fn fill(&mut self, table: Table, port: u16, _: &mut Mesh) {
        let services = (0..table.services).map(service);
        let instances = table.others().map(|(service, number)| instance(service, number, PORT));
        let all: Vec<_> = services.chain(instances).chain([first(port)]).collect();
        all.chunks(AT_ONCE).for_each(|keys| self.writer.put(keys));
    }

    fn put(&self, port: u16) {
        self.writer.put(&[first(port)]);
    }

    fn etcd(&mut self) -> Option<&mut Etcd> {
        Some(&mut self.etcd)
    }
}

/// Puts keys, as fast as one writer can.
struct Writer {
    caller: Caller,
    url: String,
}

impl Writer {
    fn new(etcd: &str) -> Self {
        Self { caller: Caller::new(), url: format!("{etcd}/v3/kv/txn") }
    }

    fn put(&self, keys: &[(String, String)]) {
        let put = |(key, value): &(String, String)| json!({ "requestPut": { "key": BASE64_STANDARD.encode(key), "value": BASE64_STANDARD.encode(value) } });
        let body = json!({ "success": keys.iter().map(put).collect::<Vec<_>>() }).to_string();
        let Caller { runtime, http } = &self.caller;
        let answer = runtime.block_on(http.post(&self.url).body(body).send()).expect("etcd answers");
        assert!(answer.status().is_success(), "{answer:?}");
    }
}

fn service(number: usize) -> (String, String) {
    let vip = if number == 0 { format!(r#", "vip": "{VIP}""#) } else { String::new() };
    (format!("/mesh/services/service.local/s{number}"), format!(r#"{{"port": 80{vip}}}"#))
}

fn instance(service: usize, number: usize, port: usize) -> (String, String) {
    let key = format!("/mesh/instances/service.local/s{service}/i{number}");
    (key, format!(r#"{{"address": "{}", "port": {port}}}"#, address(service, number)))
}

/// The instance on this machine.
fn first(port: u16) -> (String, String) {
    let key = "/mesh/instances/service.local/s0/i0".to_owned();
    (key, format!(r#"{{"address": "127.0.0.1", "port": {port}}}"#))
}

/// What was written last of each instance that was written.
pub(crate) struct Written {
    ports: BTreeMap<(usize, usize), usize>,
    puts: usize,
    took: Duration,
}

impl Written {
    /// Changes a second.
    pub(crate) fn rate(&self) -> f64 {
        self.puts as f64 / self.took.as_secs_f64()
    }

    pub(crate) fn is_followed(&self, mesh: &Mesh) -> bool {
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

/// Other services' instances, in turn, each at another port than before; `stop` says when that is over.
pub(crate) fn flood(url: &str, table: Table, time: Duration, stop: &AtomicBool) -> Written {
    let writer = Writer::new(url);
    let mut written = Written { ports: BTreeMap::new(), puts: 0, took: Duration::ZERO };
    let mut places = table.others().cycle();
    // A transaction may hold a key only once.
    let at_once = AT_ONCE.min(table.backends() - 1);
    let start = Instant::now();
    while start.elapsed() < time {
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
