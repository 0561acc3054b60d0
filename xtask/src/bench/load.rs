//! What a client gets through each arm: requests, latencies, connects, throughput, and what CPU time that
//! takes.
//!
//! All arms are up at once and take turns; the order is reversed in every other round (ABBA), and each
//! slice is compared with the direct slice of its own round. A slice in which others used the machine
//! is dropped.

use std::{
    io::{BufRead, BufReader, Lines, Write},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::{
    Effort,
    connect::Runs,
    rivals::{Arm, KINDS, Kind},
    stats::{Random, comparison, median},
    usage::Usage,
    world::{Service, Site, Topology, World, check_interrupted, last_words},
};
use crate::tools::{output, tools};

/// What its rows begin with.
pub(super) const PREFIX: &str = "load: ";

/// What the row of an arm that did not start is called.
pub(super) const ALL: &str = "all";

/// Connections of the clients that have several.
const CONNECTIONS: &str = "16";
/// The backends of the arms' service.
const BACKENDS: u8 = 2;

/// An arm that runs.
pub(super) struct Running {
    pub(super) kind: &'static Kind,
    pub(super) arm: Box<dyn Arm>,
    pub(super) site: Site,
}

impl Running {
    fn has(&self, service: Service) -> bool {
        self.kind.services.contains(&service)
    }

    fn url(&self) -> String {
        format!("http://{}/", self.arm.targets(Service::Http)[0])
    }
}

/// All arms of a topology.
pub(super) struct Setup {
    pub(super) running: Vec<Running>,
    /// Which did not start, and why.
    pub(super) missing: Vec<(&'static str, String)>,
    pub(super) world: World,
}

impl Setup {
    pub(super) fn start(topology: Topology, backends: u8, alone: bool) -> anyhow::Result<Self> {
        let mut setup =
            Self { running: Vec::new(), missing: Vec::new(), world: World::new(topology, backends, alone)? };
        for kind in &KINDS {
            check_interrupted()?;
            match setup.start_arm(kind) {
                Ok(running) => setup.running.push(running),
                Err(error) => {
                    eprintln!("bench: {} is missing: {error:#}", kind.name);
                    setup.missing.push((kind.name, format!("{error:#}")));
                }
            }
        }
        Ok(setup)
    }

    fn start_arm(&mut self, kind: &'static Kind) -> anyhow::Result<Running> {
        let mut site = self.world.site(kind.name, kind.alone)?;
        let arm = (kind.start)(&mut site)?;
        for service in kind.services.iter().filter(|service| **service != Service::Bulk) {
            for target in arm.targets(*service) {
                let answer = site.client.first_answer(*service, target);
                answer.with_context(|| format!("{}: {}", service.name(), last_words(&site.dir)))?;
            }
        }
        Ok(Running { kind, arm, site })
    }
}

/// What a slice gave.
struct Taken {
    values: Vec<f64>,
    /// Requests or connections, for the CPU time of one.
    count: f64,
}

/// One kind of slice.
struct Measure {
    name: &'static str,
    service: Service,
    values: &'static [(&'static str, &'static str)],
    /// What CPU time is counted for.
    per: Option<&'static str>,
    /// Whether it is measured also where there is little time.
    quick: bool,
    take: fn(&Running, Duration) -> anyhow::Result<Taken>,
}

const MEASURES: [Measure; 5] = [
    Measure {
        name: "HTTP keep-alive",
        service: Service::Http,
        values: &[("requests", "/s")],
        per: Some("requests"),
        quick: true,
        take: |running, length| wrk(running, length, &[]),
    },
    Measure {
        name: "HTTP, a connection for each request",
        service: Service::Http,
        values: &[("requests", "/s")],
        per: Some("requests"),
        quick: true,
        take: |running, length| wrk(running, length, &["-H", "Connection: close"]),
    },
    Measure {
        name: "TCP connects",
        service: Service::Greet,
        values: &[("connects", "/s")],
        per: Some("connections"),
        quick: false,
        take: connects,
    },
    Measure {
        name: "TCP round trips",
        service: Service::Echo,
        values: &[("p50", "us"), ("p99", "us")],
        per: None,
        quick: false,
        take: sockperf,
    },
    Measure {
        name: "TCP throughput",
        service: Service::Bulk,
        values: &[("throughput", "Mbit/s")],
        per: None,
        quick: false,
        take: iperf,
    },
];

/// The parts of direct's maximum that latencies are measured at.
pub(super) const LOADS: [(u32, &str); 3] = [
    (25, "HTTP keep-alive at 25 % of direct's maximum"),
    (50, "HTTP keep-alive at 50 % of direct's maximum"),
    (75, "HTTP keep-alive at 75 % of direct's maximum"),
];
const PERCENTILES: [(&str, &str, &str); 4] =
    [("p50", "us", "p50"), ("p90", "us", "p90"), ("p99", "us", "p99"), ("p99.9", "us", "p99.9")];

/// Rows of every topology.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    let mut rows = Vec::new();
    for (topology, rounds) in effort.topologies() {
        eprintln!("bench: load, {}", topology.name());
        let setup = Setup::start(topology, BACKENDS, false)?;
        let mut table = Table { topology, effort, rounds, rows: Vec::new() };
        SHORTS.iter().try_for_each(|short| table.short(&setup, short))?;
        for measure in MEASURES.iter().filter(|measure| measure.quick || !effort.quick()) {
            table.run(&setup, measure.name, measure.service, measure.values, measure.per, |running| {
                (measure.take)(running, effort.slice)
            })?;
        }
        table.latencies(&setup)?;
        for (arm, reason) in &setup.missing {
            table.rows.push(json!({
                "measure": format!("{PREFIX}{ALL}"), "topology": topology.name(), "arm": arm, "value": null,
                "unit": "", "vs_direct": null, "missing": reason,
            }));
        }
        rows.extend(table.rows);
    }
    Ok(rows)
}

struct Table<'a> {
    topology: Topology,
    effort: &'a Effort,
    rounds: usize,
    rows: Vec<Value>,
}

/// The slices of an arm: none where one failed or was disturbed.
#[derive(Default)]
struct Slices {
    taken: Vec<Option<Vec<f64>>>,
    disturbed: usize,
    failed: Option<String>,
}

impl Table<'_> {
    fn run(
        &mut self,
        setup: &Setup,
        name: &str,
        service: Service,
        values: &[(&str, &str)],
        per: Option<&str>,
        mut take: impl FnMut(&Running) -> anyhow::Result<Taken>,
    ) -> anyhow::Result<()> {
        eprintln!("bench: load, {}: {name}", self.topology.name());
        let arms: Vec<_> = setup.running.iter().filter(|running| running.has(service)).collect();
        let mut slices: Vec<Slices> = arms.iter().map(|_| Slices::default()).collect();
        for round in 0..self.rounds {
            for arm in order(arms.len(), round) {
                check_interrupted()?;
                let running = arms[arm];
                let cgroups = [&running.site.client.cgroup, &running.site.egress.cgroup];
                let cgroups =
                    || cgroups.into_iter().map(PathBuf::as_path).chain([setup.world.server_cgroup()]);
                let before = Usage::now(cgroups())?;
                let taken = take(running);
                let used = Usage::now(cgroups())?.since(&before);
                let slices = &mut slices[arm];
                slices.taken.push(match taken {
                    Ok(_) if used.disturbed && !self.effort.noisy => {
                        slices.disturbed += 1;
                        None
                    }
                    Ok(mut taken) => {
                        if per.is_some() {
                            // Microseconds for one are seconds for a million.
                            taken.values.push(used.arm.as_secs_f64() * 1e6 / taken.count);
                        }
                        Some(taken.values)
                    }
                    Err(error) => {
                        check_interrupted()?;
                        slices.failed = Some(format!("{error:#}"));
                        None
                    }
                });
            }
        }
        let cpu = per.map(|per| (format!("CPU seconds for a million {per}"), "s"));
        let values = values.iter().map(|(value, unit)| ((*value).to_owned(), *unit));
        for (number, (value, unit)) in values.chain(cpu).enumerate() {
            let measure = format!("{PREFIX}{name}: {value}");
            self.rows(
                &measure,
                unit,
                number,
                &arms.iter().map(|arm| arm.kind.name).collect::<Vec<_>>(),
                &slices,
            );
        }
        Ok(())
    }

    /// The rows of one value, compared with direct, and mesh with each.
    fn rows(&mut self, measure: &str, unit: &str, number: usize, arms: &[&str], slices: &[Slices]) {
        let of = |arm: &str| arms.iter().position(|name| *name == arm).map(|arm| &slices[arm]);
        let compare = |above: Option<&Slices>, below: Option<&Slices>, by: fn(f64, f64) -> f64| {
            let pairs = above?.taken.iter().zip(&below?.taken);
            let pairs =
                pairs.filter_map(|(above, below)| Some((above.as_ref()?[number], below.as_ref()?[number])));
            comparison(pairs.map(|(above, below)| by(above, below)).collect())
        };
        for (arm, slices) in arms.iter().zip(slices) {
            let values: Vec<f64> = slices.taken.iter().flatten().map(|values| values[number]).collect();
            let value = (!values.is_empty()).then(|| median(values));
            let missing = match (&slices.failed, value) {
                (Some(failed), None) => Some(failed.clone()),
                (None, None) => Some("every slice was disturbed".into()),
                _ => None,
            };
            let mut row = json!({
                "measure": measure, "topology": self.topology.name(), "arm": arm, "value": value, "unit": unit,
                "vs_direct": compare(Some(slices), of("direct"), |above, below| above / below),
                "mesh_vs": compare(of("mesh"), Some(slices), |above, below| above / below),
                "slices": slices.taken.len(), "disturbed": slices.disturbed, "missing": missing,
            });
            if unit == "s" {
                row["over_direct"] = json!(compare(Some(slices), of("direct"), |above, below| above - below));
            }
            self.rows.push(row);
        }
    }

    /// At fixed rates, whether or not earlier requests are answered.
    fn latencies(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let Some(direct) = setup.running.iter().find(|running| running.kind.name == "direct") else {
            return Ok(());
        };
        // By the same client, so that it can reach the rates.
        let most =
            (0..3).map(|_| Ok(oha(direct, self.effort.slice, None)?.rate)).collect::<anyhow::Result<_>>();
        let most = match most {
            Ok(most) => median(most),
            Err(error) => {
                check_interrupted()?;
                eprintln!("bench: no latencies: {error:#}");
                return Ok(());
            }
        };
        for (load, name) in LOADS.into_iter().filter(|(load, _)| self.effort.loads.contains(load)) {
            let rate = most * f64::from(load) / 100.0;
            let values = PERCENTILES.map(|(value, unit, _)| (value, unit));
            let values = [&values[..], &[("reached of the rate", "%")]].concat();
            self.run(setup, name, Service::Http, &values, None, |running| {
                let said = oha(running, self.effort.slice, Some(rate))?;
                let values = said.percentiles.into_iter().chain([100.0 * said.rate / rate]).collect();
                Ok(Taken { values, count: 0.0 })
            })?;
        }
        Ok(())
    }

    /// One thing after the other, in many short slices, so that small differences show. And whether
    /// anything of mesh runs meanwhile.
    fn short(&mut self, setup: &Setup, short: &Short) -> anyhow::Result<()> {
        let name = short.name;
        eprintln!("bench: load, {}: {name}", self.topology.name());
        let mut clients = Vec::new();
        for running in setup.running.iter().filter(|running| running.has(short.service)) {
            match Client::start(running, short) {
                Ok(client) => clients.push((running.kind.name, client)),
                Err(error) => {
                    check_interrupted()?;
                    eprintln!("bench: {}: {error:#}", running.kind.name);
                }
            }
        }
        let arms: Vec<_> = clients.iter().map(|(arm, _)| *arm).collect();
        let mut slices: Vec<Slices> = arms.iter().map(|_| Slices::default()).collect();
        let mesh = setup.running.iter().find_map(|running| running.arm.node()).filter(|_| short.still);
        let counted = mesh.map(Runs::count).transpose()?;
        let start = Instant::now();
        for round in 0..self.rounds * SHORT_ROUNDS {
            check_interrupted()?;
            // Slices have a number of requests, not a length: a slow machine has fewer rounds.
            if round % 2 == 0 && start.elapsed() > SHORT_LIMIT * u32::try_from(self.rounds)? {
                break;
            }
            let before = Usage::now([])?;
            let mut taken: Vec<_> = arms.iter().map(|_| None).collect();
            for arm in order(arms.len(), round) {
                match clients[arm].1.slice() {
                    Ok(values) => taken[arm] = Some(values),
                    Err(error) => slices[arm].failed = Some(format!("{error:#}")),
                }
            }
            // Slices are too short for the clocks of CPU time: a round is dropped as a whole.
            let disturbed = Usage::now([])?.since(&before).disturbed && !self.effort.noisy;
            for (slices, taken) in slices.iter_mut().zip(taken) {
                slices.disturbed += usize::from(disturbed);
                slices.taken.push(taken.filter(|_| !disturbed));
            }
        }
        if let Some(counted) = counted {
            self.rows.push(json!({
                "measure": format!("{PREFIX}{name}: runs of mesh's programs meanwhile"), "topology": self.topology.name(),
                "arm": "mesh", "value": counted.runs()?, "unit": "", "vs_direct": null,
            }));
        }
        for (number, (value, unit)) in
            [("mean", "ns"), ("p50", "ns"), ("p99", "ns"), ("rate", "/s")].into_iter().enumerate()
        {
            self.rows(&format!("{PREFIX}{name}: {value}"), unit, number, &arms, &slices);
        }
        Ok(())
    }
}

/// What is done in short slices.
struct Short {
    name: &'static str,
    service: Service,
    part: &'static str,
    count: u32,
    /// Whether nothing of mesh is to run meanwhile.
    still: bool,
}

/// Rounds of short slices for each of the others, and how long they may take.
const SHORT_ROUNDS: usize = 20;
const SHORT_LIMIT: Duration = Duration::from_secs(8);

const SHORTS: [Short; 2] = [
    Short {
        name: "HTTP keep-alive, one connection",
        service: Service::Http,
        part: "steady",
        count: 200,
        still: true,
    },
    Short {
        name: "TCP connects, one after the other",
        service: Service::Greet,
        part: "dials",
        count: 100,
        still: false,
    },
];

/// The arms of a round: shuffled for every other one, so that none has always the same one before it, and
/// reversed for the next.
pub(super) fn order(arms: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..arms).collect();
    let mut random = Random::new(round as u64 / 2);
    for left in (2..=arms).rev() {
        order.swap(left - 1, random.below(left));
    }
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// A client of short slices.
struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Client {
    fn start(running: &Running, short: &Short) -> anyhow::Result<Self> {
        let mut client = running.site.client.part(short.part)?;
        let targets = running.arm.targets(short.service);
        let targets = &targets[..if short.still { 1 } else { targets.len() }];
        client.arg(short.count.to_string()).args(targets.iter().map(ToString::to_string));
        let mut child = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
        let mut client = Self { stdin: child.stdin.take(), child, lines };
        client.slice()?;
        Ok(client)
    }

    fn slice(&mut self) -> anyhow::Result<Vec<f64>> {
        self.stdin.as_mut().context("a pipe")?.write_all(b"\n")?;
        let line = self.lines.next().context("a client has ended")??;
        let mut values = line.split(' ').map(|n| Ok(n.parse()?)).collect::<anyhow::Result<Vec<f64>>>()?;
        let mean = values.first().context("a client prints three numbers")?;
        values.push(1e9 / mean);
        Ok(values)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.child.wait();
    }
}

fn seconds(length: Duration) -> String {
    length.as_secs().max(1).to_string()
}

fn wrk(running: &Running, length: Duration, more: &[&str]) -> anyhow::Result<Taken> {
    let mut wrk = running.site.client.command("wrk");
    wrk.args(["-t1", "-c", CONNECTIONS, "-d", &seconds(length)]).args(more).arg(running.url());
    let said = output(&mut wrk)?;
    ensure!(!said.contains("Non-2xx"), "wrk got errors: {said}");
    if let Some(errors) = said.lines().find(|line| line.contains("Socket errors")) {
        ensure!(errors.contains("connect 0,") && errors.contains("timeout 0"), "wrk: {}", errors.trim());
    }
    let count = said.lines().find_map(|line| line.trim().split_once(" requests in "));
    let rate = said.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    let (Some((count, _)), Some(rate)) = (count, rate) else { bail!("wrk says no rate: {said}") };
    Ok(Taken { values: vec![rate.trim().parse()?], count: count.parse()? })
}

fn connects(running: &Running, length: Duration) -> anyhow::Result<Taken> {
    let mut client = running.site.client.part("connects")?;
    let targets = running.arm.targets(Service::Greet);
    client.arg(length.as_secs_f64().to_string()).args(targets.iter().map(ToString::to_string));
    let said = output(&mut client)?;
    let (count, seconds) = said.trim().split_once(' ').context("two numbers")?;
    let (count, seconds) = (count.parse::<f64>()?, seconds.parse::<f64>()?);
    Ok(Taken { values: vec![count / seconds], count })
}

fn sockperf(running: &Running, length: Duration) -> anyhow::Result<Taken> {
    let target = running.arm.targets(Service::Echo)[0];
    let mut sockperf = running.site.client.command("sockperf");
    sockperf.args(["ping-pong", "--tcp", "-i", &target.ip().to_string(), "-p", &target.port().to_string()]);
    let said = output(sockperf.args(["-t", &seconds(length), "--full-rtt"]))?;
    let percentile = |of: &str| {
        let line = said.lines().find(|line| line.contains(&format!("percentile {of} =")));
        let value =
            line.and_then(|line| line.rsplit('=').next()).with_context(|| format!("sockperf: {said}"))?;
        Ok(value.trim().parse()?)
    };
    let values = ["50.000", "99.000"].iter().map(|of| percentile(of)).collect::<anyhow::Result<_>>()?;
    Ok(Taken { values, count: 0.0 })
}

fn iperf(running: &Running, length: Duration) -> anyhow::Result<Taken> {
    let target = running.arm.targets(Service::Bulk)[0];
    let mut iperf = running.site.client.command("iperf3");
    iperf.args(["--client", &target.ip().to_string(), "--port", &target.port().to_string(), "--json"]);
    let said = iperf.args(["--time", &seconds(length)]).output()?;
    let said: Value = serde_json::from_slice(&said.stdout).context("iperf3 says no JSON")?;
    ensure!(said["error"].is_null(), "iperf3: {}", said["error"]);
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 says no rate")?;
    Ok(Taken { values: vec![bits / 1e6], count: 0.0 })
}

struct Latencies {
    rate: f64,
    /// In microseconds.
    percentiles: Vec<f64>,
}

/// As fast as it can, or at a rate.
fn oha(running: &Running, length: Duration, rate: Option<f64>) -> anyhow::Result<Latencies> {
    let mut oha: Command = running.site.client.command(tools().join("bin/oha"));
    oha.args([
        "--no-tui",
        "--output-format",
        "json",
        "-c",
        CONNECTIONS,
        "-z",
        &format!("{}ms", length.as_millis()),
    ]);
    if let Some(rate) = rate {
        oha.args(["-q", &format!("{rate:.0}"), "--latency-correction"]);
    }
    let said: Value = serde_json::from_str(&output(oha.arg(running.url()))?)?;
    let number = |value: &Value| value.as_f64().with_context(|| format!("oha: {said}"));
    let codes = said["statusCodeDistribution"].as_object().context("oha says no codes")?;
    ensure!(codes.keys().all(|code| code == "200"), "oha got errors: {}", said["statusCodeDistribution"]);
    let done: f64 = codes.values().filter_map(Value::as_f64).sum();
    let percentiles = &said["latencyPercentiles"];
    Ok(Latencies {
        rate: done / number(&said["summary"]["total"])?,
        percentiles: PERCENTILES
            .iter()
            .map(|(_, _, of)| Ok(number(&percentiles[of])? * 1e6))
            .collect::<anyhow::Result<_>>()?,
    })
}
