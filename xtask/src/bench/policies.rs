//! What the choice of a backend does to latency where one backend is slow.
//!
//! Requests arrive at a fixed rate, whether or not earlier ones are answered (an open loop), each
//! on a connection of its own; its latency counts from the moment it was due, so that waiting for
//! a free client thread is not left out. Policies alternate (ABBA).

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::{Value, json};

use crate::{
    node::Node,
    tools::{enter, output},
};

/// What its rows begin with.
pub(super) const MEASURE: &str = "one slow backend of four";

const VIP: &str = "127.128.0.21";
/// How long each backend takes for a request. Each serves so many at a time.
const TIMES_MS: [u64; 4] = [2, 2, 2, 20];
const WORKERS: usize = 4;
/// Requests a second: under random the slow backend is used to nine tenths.
const RATE: u32 = 720;
const THREADS: usize = 128;
pub(super) const POLICIES: [&str; 3] = ["random", "round-robin", "least-connections"];

#[derive(clap::Args)]
pub(crate) struct ClientArgs {
    cgroup: PathBuf,
    address: SocketAddr,
    requests: u32,
}

/// Latencies of each policy, in microseconds.
pub(super) fn measure(batches: usize) -> anyhow::Result<Vec<Value>> {
    let ports = TIMES_MS.map(|time| backend(Duration::from_millis(time)));
    let mut node = Node::new("mesh-bench-policies")?;
    let mut text = String::new();
    for (n, policy) in POLICIES.iter().enumerate() {
        text += &format!(
            "[[service]]\nname = \"{policy}\"\nnamespace = \"service.local\"\nport = {}\nvip = \"{VIP}\"\npolicy = \"{policy}\"\n",
            8000 + n
        );
        for port in &ports {
            let port = port.as_ref().map_err(|error| anyhow::anyhow!("a backend does not start: {error}"))?;
            text +=
                &format!("[[service.instance]]\nid = \"{port}\"\naddress = \"127.0.0.1\"\nport = {port}\n");
        }
    }
    node.write_services(&text)?;
    node.start()?;

    let mut latencies: Vec<Vec<f64>> = vec![Vec::new(); POLICIES.len()];
    for round in 0..2 {
        let mut order: Vec<usize> = (0..POLICIES.len()).collect();
        if round == 1 {
            order.reverse();
        }
        for policy in order {
            let requests = RATE * u32::try_from(batches)? / 2;
            let mut client = Command::new(std::env::current_exe()?);
            client.arg("bench-load-client").arg(&node.cgroup);
            client.args([format!("{VIP}:{}", 8000 + policy), requests.to_string()]);
            for line in output(&mut client)?.lines() {
                latencies[policy].push(line.parse().context("the client prints numbers")?);
            }
        }
    }
    let mut rows = Vec::new();
    for (policy, mut values) in POLICIES.iter().zip(latencies) {
        values.sort_by(f64::total_cmp);
        for (name, part) in [("p50", 0.5), ("p99", 0.99)] {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
            let value = values[(values.len() as f64 * part) as usize];
            rows.push(json!({
                "measure": format!("{MEASURE}: latency {name}, {policy}"), "topology": "loopback",
                "arm": "mesh", "value": value, "unit": "us", "vs_direct": null,
            }));
        }
    }
    Ok(rows)
}

/// A server that takes its time; its port.
fn backend(time: Duration) -> std::io::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    rustix::net::listen(&listener, 4096)?;
    let port = listener.local_addr()?.port();
    for _ in 0..WORKERS {
        let listener = listener.try_clone()?;
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::sleep(time);
                // A client that goes away is its own affair.
                let _ = stream.and_then(|mut stream| stream.write_all(b"x"));
            }
        });
    }
    Ok(port)
}

/// Prints a line per request: its latency in microseconds.
pub(crate) fn client(args: &ClientArgs) -> anyhow::Result<()> {
    enter(&args.cgroup)?;
    let (next, start) = (AtomicU32::new(0), Instant::now());
    let work = || -> anyhow::Result<Vec<u128>> {
        let mut latencies = Vec::new();
        loop {
            let request = next.fetch_add(1, Ordering::Relaxed);
            if request >= args.requests {
                return Ok(latencies);
            }
            let due = start + Duration::from_secs(1) * request / RATE;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            TcpStream::connect(args.address)?.read_exact(&mut [0])?;
            latencies.push(due.elapsed().as_micros());
        }
    };
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<anyhow::Result<Vec<_>>>()
    })?;
    all.iter().flatten().for_each(|latency| println!("{latency}"));
    Ok(())
}
