//! What mesh costs, against direct connects.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::ensure;
use serde_json::{Value, json};

use crate::{
    build, setup,
    tools::{again_as_root, commit, root},
};

mod arms;
mod clients;
mod connect;
mod failover;
mod goals;
mod load;
mod memory;
mod names;
mod nat;
mod parts;
mod plots;
mod policies;
mod readme;
mod registries;
mod report;
mod rivals;
mod scale;
mod services;
mod slices;
mod stats;
mod usage;
mod world;

pub(crate) use connect::{ClientArgs, client};
pub(crate) use parts::{Args as PartArgs, run as part};
use world::Topology;

pub(crate) use policies::{ClientArgs as LoadClientArgs, client as load_client};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fewer rounds, and not every measure.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// More rounds, and all measures in every topology.
    #[arg(long)]
    full: bool,
    /// Keep slices in which others used the machine too, to try the benchmark out: the report goes to
    /// target/mesh-bench.
    #[arg(long)]
    noisy: bool,
    /// One part alone; what the report says of the others stays in it.
    #[arg(long)]
    only: Option<Part>,
    #[arg(long, hide = true)]
    built: bool,
}

#[derive(Clone, Copy, clap::ValueEnum, PartialEq, Eq)]
enum Part {
    Connect,
    /// The arms: mesh, sidecars, other proxies, NAT.
    Load,
    /// One backend of three goes, in every arm.
    Failover,
    /// Memory, idle CPU and start of tasks.
    Memory,
    Policies,
    Names,
    /// How soon each registry is followed, and what that costs.
    Registries,
    Scale,
}

impl Part {
    const ALL: [Self; 8] = [
        Self::Connect,
        Self::Load,
        Self::Failover,
        Self::Memory,
        Self::Policies,
        Self::Names,
        Self::Registries,
        Self::Scale,
    ];

    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).expect("every part has a name").get_name().to_owned()
    }

    fn measure(self, effort: &Effort) -> anyhow::Result<Vec<Value>> {
        let batches = effort.batches;
        match self {
            Self::Connect => connect::measure(effort),
            Self::Load => load::measure(effort),
            Self::Failover => failover::measure(effort),
            Self::Memory => memory::measure(effort),
            Self::Policies => policies::measure(batches),
            Self::Names => names::measure(batches),
            Self::Registries => registries::measure(effort),
            Self::Scale => scale::measure(effort),
        }
    }

    /// What it compares, or measures with: versions.
    fn versions(self) -> Value {
        match self {
            Self::Load | Self::Failover | Self::Memory => rivals::versions(),
            Self::Names => names::versions(),
            Self::Registries => registries::versions(),
            Self::Connect | Self::Policies | Self::Scale => json!({}),
        }
    }

    /// Whether a row of the report is one of this part's.
    fn has(self, row: &Value) -> bool {
        let measure = row["measure"].as_str().unwrap_or_default();
        let of = if scale::is_ours(row) {
            Self::Scale
        } else if measure.starts_with(load::PREFIX) {
            Self::Load
        } else if measure.starts_with(failover::PREFIX) {
            Self::Failover
        } else if measure.starts_with(memory::PREFIX) {
            Self::Memory
        } else if measure.starts_with(registries::PREFIX) {
            Self::Registries
        } else if names::is_ours(row) {
            Self::Names
        } else if measure.starts_with(policies::MEASURE) {
            Self::Policies
        } else {
            Self::Connect
        };
        self == of
    }
}

/// How much is measured.
struct Effort {
    mode: Mode,
    /// Of the parts that have batches.
    batches: usize,
    /// Of the arms' slices.
    slice: Duration,
    /// How often each failover is tried.
    failovers: usize,
    /// In percent of direct's maximum.
    loads: &'static [u32],
    /// Of the changes of tables, in percent.
    changes: u32,
    /// How often a task is started.
    starts: usize,
    /// How long nothing is done.
    idle: Duration,
    noisy: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Quick,
    Usual,
    Full,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Usual => "usual",
            Self::Full => "full",
        }
    }
}

impl Effort {
    fn new(args: &Args) -> Self {
        let mode = match args {
            Args { quick: true, .. } => Mode::Quick,
            Args { full: true, .. } => Mode::Full,
            _ => Mode::Usual,
        };
        let (batches, changes, failovers, starts, idle) = match mode {
            Mode::Quick => (1, 5, 1, 2, 1),
            Mode::Usual => (6, 50, 1, 6, 3),
            Mode::Full => (24, 100, 5, 15, 20),
        };
        Self {
            mode,
            batches,
            changes,
            failovers,
            starts,
            idle: Duration::from_secs(idle),
            slice: Duration::from_secs(1),
            loads: if mode == Mode::Full { &[25, 50, 75] } else { &[50] },
            noisy: args.noisy,
        }
    }

    /// Envoys that are started for their memory.
    fn most_envoys(&self, services: usize) -> usize {
        match (self.mode, services > 100) {
            (Mode::Full, _) | (Mode::Usual, false) => usize::MAX,
            (Mode::Usual, true) => 10,
            (Mode::Quick, _) => 1,
        }
    }

    fn quick(&self) -> bool {
        self.mode == Mode::Quick
    }

    /// What the arms are compared in, how often each is set up, and for how many rounds.
    fn topologies(&self) -> Vec<(Topology, usize, usize)> {
        match self.mode {
            Mode::Quick => vec![(Topology::Namespaces, 1, 2)],
            Mode::Usual => vec![(Topology::Namespaces, 6, 1), (Topology::Loopback, 1, 1)],
            Mode::Full => {
                vec![(Topology::Namespaces, 6, 2), (Topology::Pinned, 1, 2), (Topology::Loopback, 1, 2)]
            }
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !args.built {
        build::mesh()?;
        if args.only.is_none_or(|only| only == Part::Names) {
            setup::name_servers()?;
        }
        if args.only.is_none_or(|only| only == Part::Registries) {
            setup::registries()?;
        }
        if args.only.is_none_or(|only| matches!(only, Part::Load | Part::Failover | Part::Memory)) {
            setup::rivals()?;
        }
    }
    let only = args.only.map(|part| format!("--only={}", part.name()));
    let mut again = vec!["bench", "--built"];
    again.extend(only.as_deref());
    let flags = [(args.quick, "--quick"), (args.full, "--full"), (args.noisy, "--noisy")];
    again.extend(flags.into_iter().filter_map(|(given, flag)| given.then_some(flag)));
    if let Some(result) = again_as_root(&again, None) {
        return result;
    }
    world::catch_interrupts()?;
    let effort = Effort::new(args);
    let earlier = args.only.map_or_else(|| Ok(Value::Null), |_| earlier())?;
    let mut rows = earlier["rows"].as_array().cloned().unwrap_or_default();
    let mut parts = earlier["parts"].as_object().cloned().unwrap_or_default();
    let mut failed = Vec::new();
    for part in Part::ALL.into_iter().filter(|part| args.only.is_none_or(|only| only == *part)) {
        let at = rows.iter().position(|row| part.has(row)).unwrap_or(rows.len());
        rows.retain(|row| !part.has(row));
        let (start, load_before) = (Instant::now(), load()?);
        match part.measure(&effort) {
            Ok(measured) => {
                rows.splice(at..at, measured);
                parts.insert(part.name(), conditions(part, &effort, &load_before)?);
            }
            Err(error) => {
                world::check_interrupted()?;
                eprintln!("bench: {} failed: {error:#}", part.name());
                parts.remove(&part.name());
                failed.push(part.name());
            }
        }
        eprintln!("bench: {} took {} s", part.name(), start.elapsed().as_secs());
        world::check_interrupted()?;
    }
    report(&json!({"parts": parts, "rows": rows}), effort.noisy)?;
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

/// What a part was measured under.
fn conditions(part: Part, effort: &Effort, load_before: &str) -> anyhow::Result<Value> {
    Ok(json!({
        "commit": commit(),
        "mode": effort.mode.name(),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "cpus": std::thread::available_parallelism()?.get(),
        "load_before": load_before,
        "load_after": load()?,
        "versions": part.versions(),
    }))
}

/// The last report, if there is one.
fn earlier() -> anyhow::Result<Value> {
    match fs::read(root().join("bench/report/report.json")) {
        Ok(report) => Ok(serde_json::from_slice(&report)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(error.into()),
    }
}

fn load() -> anyhow::Result<String> {
    let load = fs::read_to_string("/proc/loadavg")?;
    Ok(load.split(' ').next().unwrap_or_default().to_owned())
}

fn report(report: &Value, noisy: bool) -> anyhow::Result<()> {
    // What was measured beside others' work is not kept.
    let dir = root().join(if noisy { "target/mesh-bench/report" } else { "bench/report" });
    fs::create_dir_all(&dir)?;
    let pictures = plots::draw(report["rows"].as_array().map(Vec::as_slice).unwrap_or_default(), &dir)?;
    let markdown = report::markdown(report, &pictures);
    fs::write(dir.join("report.json"), serde_json::to_string_pretty(report)? + "\n")?;
    fs::write(dir.join("report.md"), &markdown)?;
    if !noisy {
        readme::update(report)?;
    }
    println!("{markdown}\nwritten to {}", dir.display());
    Ok(())
}

const HEAD: &str = "| measure | arm | median | vs direct (95 % interval) |\n|---|---|---|---|\n";

fn line(row: &Value) -> String {
    let word = |key: &str| row[key].as_str().unwrap_or_default();
    let versus = report::ratio(&row["vs_direct"]).unwrap_or_else(|| "-".into());
    let value = row["value"].as_f64().unwrap_or_default();
    format!("| {} | {} | {value:.0} {} | {versus} |\n", word("measure"), word("arm"), word("unit"))
}
