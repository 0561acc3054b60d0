//! What clients notice when one backend of three goes, in every arm.
//!
//! All arms are up, each with a client that makes a connection for each request and one that keeps its
//! connections, at a fixed rate that loads nothing. Then something happens to one backend, for all arms
//! at the same moment.

use std::{
    io::{BufRead, BufReader, Lines},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::{Value, json};

use super::{
    Effort,
    load::{Running, Setup},
    rivals::{KINDS, State},
    stats::median,
    usage::Usage,
    world::{Service, Topology, check_interrupted},
};
use crate::tools::run;

/// What its rows begin with.
pub(super) const PREFIX: &str = "failover: ";

const BACKENDS: u8 = 3;
/// Requests a second of each client.
const RATE: u32 = 50;
const SECONDS: u32 = 12;
/// When it happens.
const BEFORE: Duration = Duration::from_secs(2);
/// From a notice to the end of the server.
const NOTICE: Duration = Duration::from_secs(1);
/// How often it is tried at most where others use the machine.
const TRIES: usize = 3;
/// Of the timeline, in milliseconds.
const BIN: u64 = 100;
/// A request that took longer is counted as slow.
const SLOW: u64 = 250_000;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    Removed,
    Drained,
    Killed,
    BlackHoled,
}

impl Event {
    pub(super) const ALL: [Self; 4] = [Self::Removed, Self::Drained, Self::Killed, Self::BlackHoled];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Removed => "removed, ends a second later",
            Self::Drained => "draining, ends a second later",
            Self::Killed => "killed",
            Self::BlackHoled => "black-holed",
        }
    }
}

pub(super) const CLIENTS: [(&str, bool); 2] =
    [("a connection for each request", false), ("keep-alive", true)];

/// What is told of each.
pub(super) const VALUES: [&str; 3] = ["failed requests", "last failure", "slow requests"];

pub(super) const ABOUT: &str = "One backend of three goes at second 0, for all arms at the same moment. Each arm has a client that makes \
    a connection for each request and one that keeps 16 connections, each with 50 requests a second for 10 more seconds; a \
    request fails after 2 s, and is slow from 250 ms on. *Last* is when the last request that failed was due. Of a removed or \
    draining backend every arm but direct is told at once: mesh by its services file, Envoy by its endpoints, HAProxy through its \
    socket, NAT by new rules, as a control plane that loses no time would. Of a killed or black-holed one nobody is told. \
    mesh ejects a backend after five failed handshakes in a row, Envoy after five failures in a row; and a client that gives up before the kernel does, as these do, says \
    nothing of its backend to mesh: a black hole is not ejected here. Envoy (HTTP) also tries a \
    request again elsewhere, and HAProxy a connect; HAProxy asks its servers every 2 s. NAT alone knows no health.";

/// What one client saw.
struct Seen {
    arm: &'static str,
    client: &'static str,
    failed: u32,
    slow: u32,
    /// Seconds after the event; zero where nothing failed.
    last: f64,
    /// Failed requests by the time they were due: milliseconds after the event.
    timeline: Vec<(i64, u32)>,
}

pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    let mut rows = Vec::new();
    for event in Event::ALL.into_iter().filter(|event| !effort.quick() || *event == Event::Killed) {
        let mut all = Vec::new();
        let mut disturbed = 0;
        for _ in 0..effort.failovers {
            let seen = loop {
                check_interrupted()?;
                eprintln!("bench: failover, {}", event.name());
                let (seen, others) = once(event)?;
                if !others || effort.noisy {
                    break seen;
                }
                disturbed += 1;
                if disturbed >= TRIES {
                    eprintln!("bench: failover, {}: others use the machine", event.name());
                    break Vec::new();
                }
            };
            all.extend(seen);
        }
        for kind in &KINDS {
            for (client, _) in CLIENTS {
                let seen: Vec<&Seen> =
                    all.iter().filter(|seen| seen.arm == kind.name && seen.client == client).collect();
                let Some(last) = seen.last() else { continue };
                let value = |of: fn(&Seen) -> f64| median(seen.iter().map(|seen| of(seen)).collect());
                let values = [
                    (value(|seen| f64::from(seen.failed)), ""),
                    (value(|seen| seen.last), "s"),
                    (value(|seen| f64::from(seen.slow)), ""),
                ];
                for (what, (value, unit)) in VALUES.into_iter().zip(values) {
                    rows.push(json!({
                        "measure": measure_of(event, client, what), "topology": Topology::Namespaces.name(),
                        "arm": kind.name, "value": value, "unit": unit, "vs_direct": null,
                        "times": seen.len(), "disturbed": disturbed,
                        "timeline": (what == VALUES[0]).then_some(&last.timeline),
                    }));
                }
            }
        }
    }
    Ok(rows)
}

pub(super) fn measure_of(event: Event, client: &str, value: &str) -> String {
    format!("{PREFIX}{}, {client}: {value}", event.name())
}

/// What the clients saw of it, and whether others used the machine meanwhile.
fn once(event: Event) -> anyhow::Result<(Vec<Seen>, bool)> {
    let mut setup = Setup::start(Topology::Namespaces, BACKENDS, true)?;
    let mut clients = Vec::new();
    for running in &setup.running {
        for (name, keep_alive) in CLIENTS {
            match Client::start(running, keep_alive) {
                Ok(client) => clients.push((running.kind.name, name, client)),
                Err(error) => eprintln!("bench: {}: {error:#}", running.kind.name),
            }
        }
    }
    let before = Usage::now([])?;
    thread::sleep(BEFORE);
    let at = Instant::now();
    happen(event, &mut setup)?;
    let mut seen = Vec::new();
    for (arm, name, client) in clients {
        match client.seen(arm, name, at) {
            Ok(what) => seen.push(what),
            Err(error) => {
                check_interrupted()?;
                eprintln!("bench: {arm}: {error:#}");
            }
        }
    }
    Ok((seen, Usage::now([])?.since(&before).disturbed))
}

fn happen(event: Event, setup: &mut Setup) -> anyhow::Result<()> {
    let mut states = [State::Active; BACKENDS as usize];
    match event {
        Event::Removed => states[0] = State::Removed,
        Event::Drained => states[0] = State::Draining,
        Event::Killed => {}
        Event::BlackHoled => {
            let address = setup.world.addresses()[0];
            let place = &setup.world.servers().place;
            let rules = format!(
                "add table ip hole; add chain ip hole input {{ type filter hook input priority 0; }}; \
                 add rule ip hole input iifname eth0 ip daddr {address} drop"
            );
            return run(place.command("nft").arg(rules));
        }
    }
    if states[0] != State::Active {
        for running in &mut setup.running {
            running.arm.tell(&states)?;
        }
        thread::sleep(NOTICE);
    }
    setup.world.servers().end_http(0);
    for running in &mut setup.running {
        running.arm.end_backend(0);
    }
    Ok(())
}

struct Client {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    start: Instant,
}

impl Client {
    fn start(running: &Running, keep_alive: bool) -> anyhow::Result<Self> {
        let mut client: Command = running.site.client.part("requests")?;
        client.args(running.arm.targets(Service::Http).iter().map(ToString::to_string));
        client.args(["--rate", &RATE.to_string(), "--seconds", &SECONDS.to_string()]);
        if keep_alive {
            client.arg("--keep-alive");
        }
        let mut child = client.stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
        lines.next().context("the client has ended")??;
        Ok(Self { child, lines, start: Instant::now() })
    }

    /// Waits for its end.
    fn seen(mut self, arm: &'static str, client: &'static str, event: Instant) -> anyhow::Result<Seen> {
        let event = i64::try_from(event.duration_since(self.start).as_micros())?;
        let mut seen = Seen { arm, client, failed: 0, slow: 0, last: 0.0, timeline: Vec::new() };
        for line in self.lines.by_ref() {
            let line = line?;
            let mut words = line.splitn(3, ' ');
            let mut number = || words.next().and_then(|word| word.parse::<i64>().ok()).context("a number");
            let (due, took) = (number()?, number()?);
            let after = due - event;
            if words.next().is_some_and(|wrong| !wrong.is_empty()) {
                seen.failed += 1;
                seen.last = seen.last.max(after as f64 / 1e6);
                let bin = (after / 1000).div_euclid(i64::try_from(BIN)?) * i64::try_from(BIN)?;
                match seen.timeline.iter_mut().find(|(at, _)| *at == bin) {
                    Some((_, count)) => *count += 1,
                    None => seen.timeline.push((bin, 1)),
                }
            } else if took > i64::try_from(SLOW)? {
                seen.slow += 1;
            }
        }
        seen.timeline.sort_unstable();
        Ok(seen)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
