//! What a client gets through each arm: requests, latencies, connects, throughput, and what CPU time that
//! takes.
//!
//! All arms are up at once and take turns; the order is reversed in every other round (ABBA), and each
//! slice is compared with the direct slice of its own round. All is set up anew several times, for set-ups
//! differ from one another. A slice in which others used the machine is dropped.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Lines, Write},
    ops::Range,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::{Value, json};

use super::{
    Effort,
    clients::{PERCENTILES, Taken, connects, iperf, oha, sockperf, wrk},
    connect::Runs,
    rivals::{Arm, KINDS, Kind},
    slices::{Measured, REACHED, Slices},
    stats::{Random, median},
    usage::Usage,
    world::{Service, Site, Topology, World, check_interrupted, last_words},
};

/// What its rows begin with.
pub(super) const PREFIX: &str = "load: ";

/// What the row of an arm that did not start is called.
pub(super) const ALL: &str = "all";

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

    pub(super) fn url(&self) -> String {
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

/// Rows of every topology.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    let mut rows = Vec::new();
    for (topology, set_ups, rounds) in effort.topologies() {
        let mut table = Table::new(topology, effort);
        for set_up in 0..set_ups {
            eprintln!("bench: load, {}, set-up {} of {set_ups}", topology.name(), set_up + 1);
            table
                .measure(&Setup::start(topology, BACKENDS, false)?, set_up * rounds..(set_up + 1) * rounds)?;
        }
        rows.extend(table.rows(set_ups));
    }
    Ok(rows)
}

/// Everything that is measured in a topology.
struct Table<'a> {
    topology: Topology,
    effort: &'a Effort,
    measured: Vec<Measured>,
    /// What direct does at most: requests a second.
    most: Option<f64>,
    /// How often mesh's programs ran while they should not have.
    runs: Vec<(String, u64)>,
    /// Arms that did not start: how often, and why.
    missing: BTreeMap<&'static str, (usize, String)>,
}

impl<'a> Table<'a> {
    fn new(topology: Topology, effort: &'a Effort) -> Self {
        let (measured, runs, missing) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { topology, effort, measured, most: None, runs, missing }
    }

    fn measure(&mut self, setup: &Setup, rounds: Range<usize>) -> anyhow::Result<()> {
        SHORTS.iter().try_for_each(|short| self.short(setup, short, rounds.clone()))?;
        for measure in MEASURES.iter().filter(|measure| measure.quick || !self.effort.quick()) {
            let values = measure.values.iter().map(|(value, unit)| ((*value).to_owned(), *unit)).collect();
            let measured = Measured::new(measure.name, values, None);
            let slice = self.effort.slice;
            self.run(setup, measured, measure.service, measure.per, rounds.clone(), |running| {
                (measure.take)(running, slice)
            })?;
        }
        self.latencies(setup, rounds)?;
        for (arm, why) in &setup.missing {
            self.missing.entry(arm).or_insert_with(|| (0, why.clone())).0 += 1;
        }
        Ok(())
    }

    /// What was measured before in other set-ups has the same name.
    fn keep(&mut self, mut measured: Measured) {
        match self.measured.iter_mut().find(|known| known.name == measured.name) {
            Some(known) => known.set_ups.append(&mut measured.set_ups),
            None => self.measured.push(measured),
        }
    }

    fn run(
        &mut self,
        setup: &Setup,
        mut measured: Measured,
        service: Service,
        per: Option<&str>,
        rounds: Range<usize>,
        mut take: impl FnMut(&Running) -> anyhow::Result<Taken>,
    ) -> anyhow::Result<()> {
        eprintln!("bench: load, {}: {}", self.topology.name(), measured.name);
        let arms: Vec<_> = setup.running.iter().filter(|running| running.has(service)).collect();
        let mut slices: Vec<Slices> = arms.iter().map(|_| Slices::default()).collect();
        for round in rounds {
            for arm in order(arms.len(), round) {
                check_interrupted()?;
                let running = arms[arm];
                let cgroups = [&running.site.client.cgroup, &running.site.egress.cgroup];
                let cgroups =
                    || cgroups.into_iter().map(PathBuf::as_path).chain([setup.world.server_cgroup()]);
                let before = Usage::now(cgroups())?;
                let taken = take(running);
                let used = Usage::now(cgroups())?.since(&before);
                check_interrupted()?;
                let values = taken.map(|mut taken| {
                    if per.is_some() {
                        // Microseconds for one are seconds for a million.
                        taken.values.push(used.arm.as_secs_f64() * 1e6 / taken.count);
                    }
                    taken.values
                });
                slices[arm].take(values, used.disturbed && !self.effort.noisy);
            }
        }
        measured.values.extend(per.map(|per| (format!("CPU seconds for a million {per}"), "s")));
        measured.set_ups = vec![arms.iter().map(|arm| arm.kind.name).zip(slices).collect()];
        self.keep(measured);
        Ok(())
    }

    /// At fixed rates, whether or not earlier requests are answered.
    fn latencies(&mut self, setup: &Setup, rounds: Range<usize>) -> anyhow::Result<()> {
        let slice = self.effort.slice;
        if self.most.is_none()
            && let Some(direct) = setup.running.iter().find(|running| running.kind.name == "direct")
        {
            // By the same client, so that it can reach the rates.
            let most = (0..3).map(|_| Ok(oha(direct, slice, None)?.rate)).collect::<anyhow::Result<_>>();
            check_interrupted()?;
            match most {
                Ok(most) => self.most = Some(median(most)),
                Err(error) => eprintln!("bench: no latencies: {error:#}"),
            }
        }
        let Some(most) = self.most else { return Ok(()) };
        for (load, name) in LOADS.into_iter().filter(|(load, _)| self.effort.loads.contains(load)) {
            let rate = most * f64::from(load) / 100.0;
            let mut values = PERCENTILES.map(|percentile| (percentile.to_owned(), "us")).to_vec();
            values.push((REACHED.into(), "%"));
            let measured = Measured::new(name, values, Some(rate));
            self.run(setup, measured, Service::Http, None, rounds.clone(), |running| {
                let said = oha(running, slice, Some(rate))?;
                let values = said.percentiles.into_iter().chain([100.0 * said.rate / rate]).collect();
                Ok(Taken { values, count: 0.0 })
            })?;
        }
        Ok(())
    }

    /// One thing after the other, in many short slices, so that small differences show. And whether
    /// anything of mesh runs meanwhile.
    fn short(&mut self, setup: &Setup, short: &Short, rounds: Range<usize>) -> anyhow::Result<()> {
        let name = short.name;
        eprintln!("bench: load, {}: {name}", self.topology.name());
        let (mut clients, mut slices) = (Vec::new(), BTreeMap::<_, Slices>::new());
        for running in setup.running.iter().filter(|running| running.has(short.service)) {
            let arm = running.kind.name;
            match Client::start(running, short) {
                Ok(client) => clients.push((arm, client)),
                Err(error) => {
                    check_interrupted()?;
                    slices.entry(arm).or_default().take(Err(error), false);
                }
            }
        }
        let mesh = setup.running.iter().find_map(|running| running.arm.node()).filter(|_| short.still);
        let counted = mesh.map(Runs::count).transpose()?;
        let start = Instant::now();
        for round in 0..rounds.len() * SHORT_ROUNDS {
            check_interrupted()?;
            // Slices have a number of requests, not a length: a slow machine has fewer rounds.
            if round % 2 == 0 && start.elapsed() > SHORT_LIMIT * u32::try_from(rounds.len())? {
                break;
            }
            let before = Usage::now([])?;
            let mut taken = Vec::new();
            for arm in order(clients.len(), round) {
                let (name, client) = &mut clients[arm];
                taken.push((*name, client.slice()));
            }
            // Slices are too short for the clocks of CPU time: a round is dropped as a whole.
            let disturbed = Usage::now([])?.since(&before).disturbed && !self.effort.noisy;
            for (arm, taken) in taken {
                slices.entry(arm).or_default().take(taken, disturbed);
            }
        }
        if let Some(counted) = counted {
            self.runs.push((name.to_owned(), counted.runs()?));
        }
        let values = [("mean", "ns"), ("p50", "ns"), ("p99", "ns"), ("rate", "/s")];
        let mut measured =
            Measured::new(name, values.map(|(value, unit)| (value.to_owned(), unit)).to_vec(), None);
        measured.set_ups = vec![slices];
        self.keep(measured);
        Ok(())
    }

    fn rows(&self, set_ups: usize) -> Vec<Value> {
        let topology = self.topology.name();
        let row = |measure: &str, arm: &str| {
            json!({
                "measure": format!("{PREFIX}{measure}"), "topology": topology, "arm": arm, "value": null, "unit": "",
                "vs_direct": null,
            })
        };
        let mut rows = Vec::new();
        for short in SHORTS.iter().filter(|short| self.runs.iter().any(|(name, _)| name == short.name)) {
            let runs = self.runs.iter().filter(|(name, _)| name == short.name).map(|(_, runs)| runs);
            let mut row = row(&format!("{}: runs of mesh's programs meanwhile", short.name), "mesh");
            row["value"] = runs.sum::<u64>().into();
            rows.push(row);
        }
        for measured in &self.measured {
            for (number, (value, unit)) in measured.values.iter().enumerate() {
                for kind in KINDS.iter().filter(|kind| measured.has(kind.name)) {
                    let mut row = row(&format!("{}: {value}", measured.name), kind.name);
                    row["unit"] = (*unit).into();
                    measured.fill(&mut row, number, kind.name, *unit == "s");
                    rows.push(row);
                }
            }
        }
        for (arm, (times, why)) in &self.missing {
            let mut row = row(ALL, arm);
            row["missing"] =
                if *times == set_ups { why.clone() } else { format!("{times} of {set_ups} times: {why}") }
                    .into();
            rows.push(row);
        }
        rows
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
