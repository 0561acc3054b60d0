//! What the size of the tables costs, and what it is to cost at most.

use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use super::{Effort, services};
use crate::tools::{self, cargo, output, run};

/// Services, backends of each, changes; where there is little time only those with fewer backends than [`LARGE`].
const TABLES: [(u32, u32, u32); 7] = [
    (1, 1, 2000),
    (1, 10, 2000),
    (1, 1000, 1000),
    (1, 100_000, 1000),
    (1, 1_000_000, 20),
    (1000, 10, 1000),
    (100_000, 10, 1000),
];

const LARGE: u32 = 100_000;

/// Rows of all tables, then of the programs. Each change ends with a grace, which is what takes the time:
/// so many percent of them are made.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    run(cargo().args(["build", "--release", "--locked", "--package", "mesh-tests", "--bin", "scale"]))?;
    let mut rows = Vec::new();
    for (services, backends, changes) in TABLES {
        if effort.quick() && services * backends >= LARGE {
            continue;
        }
        let table = format!("{services} x {backends}");
        eprintln!("bench: {table}");
        let changes = (changes * effort.changes / 100).max(10);
        let args = [services, backends, changes].map(|number| number.to_string());
        rows.extend(read(&args, |what| (what.to_owned(), table.clone()))?);
    }
    let program = |what: &str| {
        let (program, what) = what.split_once(": ").unwrap_or(("", what));
        (what.to_owned(), program.to_owned())
    };
    rows.extend(read(&["programs".into()], program)?);
    if !effort.quick() {
        rows.extend(services::measure(effort)?);
    }
    Ok(rows)
}

fn read(args: &[String], label: impl Fn(&str) -> (String, String)) -> anyhow::Result<Vec<Value>> {
    let said = output(Command::new(tools::root().join("target/release/scale")).args(args))?;
    let row = |line: &str| -> anyhow::Result<Value> {
        let said: Value = serde_json::from_str(line)?;
        let what = said["what"].as_str().context("a name")?;
        let (measure, topology) = label(what);
        Ok(json!({
            "measure": format!("scale: {measure}"), "topology": topology, "arm": "mesh",
            "value": said["value"], "unit": said["unit"], "vs_direct": null, "goal": goal(what, args),
        }))
    };
    said.lines().map(row).collect()
}

/// The most that it should be.
fn goal(what: &str, args: &[String]) -> Option<f64> {
    let [_, backends, _] = args else { return None };
    let backends = backends.parse::<u32>().unwrap_or(0);
    match what {
        "look-up by random, hot service" if backends < 100_000 => Some(30.0),
        "look-up by random, hot service" if backends == 100_000 => Some(35.0),
        "look-up by random, hot service" | "look-up by random, any service" => Some(60.0),
        "cold load" => Some(1000.0),
        "one change visible, p99" => Some(1000.0),
        "memory of the mirror" => Some(128.0),
        "kernel memory" => Some(64.0),
        _ => None,
    }
}

/// One line a measure, one column a table.
pub(super) fn markdown(rows: &[Value]) -> String {
    let tables = TABLES.map(|(services, backends, _)| format!("{services} x {backends}"));
    let scale: Vec<_> = rows.iter().filter(|row| is_ours(row)).collect();
    let mut measures: Vec<&str> = Vec::new();
    for row in scale.iter().filter(|row| tables.iter().any(|table| row["topology"] == **table)) {
        let measure = row["measure"].as_str().unwrap_or_default();
        if !measures.contains(&measure) {
            measures.push(measure);
        }
    }
    let mut text = format!(
        "\n| services x backends of each | {} |\n|---|{}\n",
        tables.join(" | "),
        "---|".repeat(tables.len())
    );
    for measure in measures {
        let cell = |table: &String| {
            let row = scale.iter().find(|row| row["measure"] == measure && row["topology"] == **table);
            row.map_or_else(String::new, |row| cell(row))
        };
        let cells: Vec<_> = tables.iter().map(cell).collect();
        text += &format!("| {} | {} |\n", measure.trim_start_matches("scale: "), cells.join(" | "));
    }
    text += "\nBold: more than the goal.\n\n| program | verified instructions | instructions | stack |\n|---|---|---|---|\n";
    let programs = scale.iter().filter(|row| row["measure"] == "scale: stack");
    for program in programs.filter_map(|row| row["topology"].as_str()) {
        let value = |what: &str| {
            let row = scale.iter().find(|row| row["topology"] == program && row["measure"] == what);
            row.map_or_else(String::new, |row| cell(row))
        };
        let [verified, all, stack] =
            ["verified instructions", "instructions", "stack"].map(|what| value(&format!("scale: {what}")));
        text += &format!("| {program} | {verified} | {all} | {stack} |\n");
    }
    text + &services::markdown(rows)
}

pub(super) fn is_ours(row: &Value) -> bool {
    row["measure"].as_str().is_some_and(|measure| measure.starts_with("scale: "))
}

pub(super) fn cell(row: &Value) -> String {
    let (value, unit) = (row["value"].as_f64().unwrap_or_default(), row["unit"].as_str().unwrap_or_default());
    let text = if value < 100.0 && value.fract() != 0.0 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    };
    let text = text.trim();
    if row["goal"].as_f64().is_some_and(|goal| value > goal) {
        format!("**{text}**")
    } else {
        text.to_owned()
    }
}
