//! How soon the kernel follows a registry, and what following costs, for each kind of registry.

use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use super::{Effort, Mode, names::version, report::find, scale::cell};
use crate::tools::{self, cargo, output, run};

pub(super) const PREFIX: &str = "registries: ";

/// Instances of each service.
const INSTANCES: u32 = 10;
const FEW: u32 = 10;
const MANY: u32 = 10_000;

/// A kind of registry.
struct Kind {
    /// As the configuration has it.
    name: &'static str,
    /// Whether it tells of changes by itself.
    tells: bool,
    /// What stands for it.
    about: &'static str,
}

const KINDS: [Kind; 6] = [
    Kind {
        name: "embedded",
        tells: true,
        about: "the daemon's own, over HTTP; it starts with a file that an earlier run has filled",
    },
    Kind { name: "etcd", tells: true, about: "a real one, of Debian" },
    Kind {
        name: "consul",
        tells: true,
        about: "an imitation of blocking queries: one connection for each service",
    },
    Kind {
        name: "kubernetes",
        tells: true,
        about: "an imitation of lists in pages and of watches, without TLS; one slice for each service",
    },
    Kind {
        name: "cloudmap",
        tells: false,
        about: "the embedded registry of another daemon; asked in turn, 20 calls a second",
    },
    Kind {
        name: "dns",
        tells: false,
        about: "a real unbound; each service is an SRV name of 10 hosts, all with a TTL of 30 s: 21 questions for each",
    },
];

const SERVED: &str = "from the start until all is served";
const FOLLOWED: [&str; 2] =
    ["from the write to a connect that follows, p50", "from the write to a connect that follows, p99"];
const MEMORY: &str = "memory of the daemon";
const IDLE: &str = "CPU while nothing happens";
/// What is measured with an etcd alone.
const OF_ETCD: [&str; 7] = [
    "changes",
    "the same beside them, p50",
    "the same beside them, p99",
    "the last of them is followed after",
    "memory of the daemon after them",
    "CPU while it is away",
    "synced again after",
];
/// The measure of what could not be measured.
const MISSING: &str = "all";

/// Rows of each kind and size.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    run(cargo().args(["build", "--release", "--locked", "--package", "mesh-tests", "--bin", "registries"]))?;
    let mut rows = Vec::new();
    for (kind, services) in turns(effort.mode) {
        let size = topology(kind.name, services);
        eprintln!("bench: {size}");
        let row = |what: &str, value: &Value, unit: &Value| {
            json!({
                "measure": format!("{PREFIX}{what}"), "topology": size, "arm": "mesh",
                "value": value, "unit": unit, "vs_direct": null, "goal": goal(what),
            })
        };
        match said(kind, services, effort) {
            Ok(all) => rows.extend(all.iter().map(|one| row(&one.what, &one.value, &one.unit))),
            Err(why) => {
                eprintln!("bench: {size} is missing: {why:#}");
                let mut missing = row(MISSING, &Value::Null, &Value::Null);
                missing["missing"] = format!("{why:#}").into();
                rows.push(missing);
            }
        }
        super::world::check_interrupted()?;
    }
    Ok(rows)
}

/// Registries, and services in each.
fn turns(mode: Mode) -> Vec<(&'static Kind, u32)> {
    let few = KINDS.iter().filter(|kind| kind.tells).map(|kind| (kind, FEW));
    match mode {
        Mode::Quick => few.filter(|(kind, _)| kind.name == "etcd").collect(),
        Mode::Usual => few.collect(),
        Mode::Full => few.chain(KINDS.iter().map(|kind| (kind, MANY))).collect(),
    }
}

struct Said {
    what: String,
    value: Value,
    unit: Value,
}

fn said(kind: &Kind, services: u32, effort: &Effort) -> anyhow::Result<Vec<Said>> {
    // Changes, and seconds in which as much is written as one writer can.
    let (changes, seconds) = match effort.mode {
        Mode::Quick => (50, 2),
        Mode::Usual => (250, 10),
        Mode::Full => (1000, 60),
    };
    let changes = if kind.tells { changes } else { 0 };
    let numbers = [services, INSTANCES, changes, seconds].map(|number| number.to_string());
    let mut program = Command::new(tools::root().join("target/release/registries"));
    let said = output(program.arg(kind.name).args(numbers))?;
    let line = |line: &str| {
        let said: Value = serde_json::from_str(line)?;
        let what = said["what"].as_str().context("a name")?.to_owned();
        Ok(Said { what, value: said["value"].clone(), unit: said["unit"].clone() })
    };
    said.lines().map(line).collect()
}

fn topology(kind: &str, services: u32) -> String {
    format!("{kind}, {services} x {INSTANCES}")
}

/// The most that it should be.
fn goal(what: &str) -> Option<f64> {
    match what {
        _ if what == FOLLOWED[0] => Some(1.0),
        _ if what == FOLLOWED[1] => Some(10.0),
        "CPU while it is away" => Some(10.0),
        "synced again after" => Some(1000.0),
        _ => None,
    }
}

/// What is real of them: versions, null where it is not there.
pub(super) fn versions() -> Value {
    json!({"etcd": version("etcd", "--version", "etcd Version: ")})
}

/// One line a registry; then what an etcd alone is measured with.
pub(super) fn markdown(rows: &[Value]) -> String {
    let text = registries(rows);
    if text.is_empty() {
        return "No figures yet.\n".into();
    }
    format!(
        "{text}\nBold: more than the goal. *Followed*: from the write's acknowledgement to the first connect to the new backend, \
         each change 25 ms after the one before. -: not pushed, or not measured.\n\n{}\n{}",
        KINDS.iter().map(|kind| format!("- *{}*: {}.\n", kind.name, kind.about)).collect::<String>(),
        etcd(rows)
    )
}

fn of(rows: &[Value], what: &str, kind: &str, services: u32) -> Option<String> {
    let size = topology(kind, services);
    let found = |what: &str| find(rows, &format!("{PREFIX}{what}"), &size, "mesh");
    found(what).map(cell).or_else(|| found(MISSING).map(|_| "missing".into()))
}

fn registries(rows: &[Value]) -> String {
    let columns = [(FOLLOWED[0], FEW), (FOLLOWED[1], FEW), (FOLLOWED[0], MANY), (FOLLOWED[1], MANY)];
    let columns = [&columns[..], &[(SERVED, MANY), (MEMORY, MANY), (IDLE, MANY)]].concat();
    let line = |kind: &Kind| {
        let cells: Vec<_> =
            columns.iter().map(|(what, services)| of(rows, what, kind.name, *services)).collect();
        cells.iter().any(Option::is_some).then(|| {
            let cells: Vec<_> = cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".into())).collect();
            format!("| {} | {} |\n", kind.name, cells.join(" | "))
        })
    };
    let lines: String = KINDS.iter().filter_map(line).collect();
    if lines.is_empty() {
        return lines;
    }
    format!(
        "| services of 10 instances | 10: followed, p50 | p99 | 10,000: followed, p50 | p99 | all is served after | memory | CPU while nothing happens |\n\
         |---|---|---|---|---|---|---|---|\n{lines}"
    )
}

/// One line a measure, one column a size.
fn etcd(rows: &[Value]) -> String {
    let sizes = [FEW, MANY];
    let line = |what: &&str| {
        let cells = sizes.map(|services| of(rows, what, "etcd", services));
        cells
            .iter()
            .any(Option::is_some)
            .then(|| format!("| {what} | {} |\n", cells.map(Option::unwrap_or_default).join(" | ")))
    };
    let lines: String = OF_ETCD.iter().filter_map(line).collect();
    format!(
        "| services x instances | {} |\n|---|---|---|\n{lines}",
        sizes.map(|services| topology("etcd", services)).join(" | ")
    )
}
