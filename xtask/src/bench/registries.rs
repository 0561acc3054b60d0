//! How soon the kernel follows a registry on the network, and what following costs.

use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use super::scale::cell;
use crate::tools::{self, cargo, output, run};

pub(super) const PREFIX: &str = "registries: ";

/// Services, and instances of each.
const SIZES: [(u32, u32); 2] = [(10, 10), (10_000, 10)];

/// Rows of each size, after so many changes.
pub(super) fn measure(changes: u32) -> anyhow::Result<Vec<Value>> {
    run(cargo().args(["build", "--release", "--locked", "--package", "mesh-tests", "--bin", "registries"]))?;
    let mut rows = Vec::new();
    for (services, instances) in SIZES {
        let size = topology((services, instances));
        eprintln!("bench: etcd with {size}");
        let args = [services, instances, changes, SECONDS].map(|number| number.to_string());
        let said = output(Command::new(tools::root().join("target/release/registries")).args(args))?;
        for line in said.lines() {
            let said: Value = serde_json::from_str(line)?;
            let what = said["what"].as_str().context("a name")?;
            rows.push(json!({
                "measure": format!("{PREFIX}{what}"), "topology": size, "arm": "mesh",
                "value": said["value"], "unit": said["unit"], "vs_direct": null, "goal": goal(what),
            }));
        }
    }
    Ok(rows)
}

/// How long as much is written as one writer can.
const SECONDS: u32 = 10;

fn topology((services, instances): (u32, u32)) -> String {
    format!("etcd, {services} x {instances}")
}

/// The most that it should be.
fn goal(what: &str) -> Option<f64> {
    match what {
        "from etcd's answer to a connect that follows, p50" => Some(1.0),
        "from etcd's answer to a connect that follows, p99" => Some(10.0),
        "CPU while etcd is away" => Some(10.0),
        "synced again after" => Some(1000.0),
        _ => None,
    }
}

/// One line a measure, one column a size.
pub(super) fn markdown(rows: &[Value]) -> String {
    let sizes = SIZES.map(topology);
    let at = |measure: &Value, size: &String| {
        rows.iter().find(|row| row["measure"] == *measure && row["topology"] == **size)
    };
    let ours = rows.iter().filter(|row| row["topology"] == sizes[0]).map(|row| &row["measure"]);
    let lines = ours.map(|measure| {
        let cells = sizes.each_ref().map(|size| at(measure, size).map_or_else(String::new, cell));
        format!(
            "| {} | {} |\n",
            measure.as_str().unwrap_or_default().trim_start_matches(PREFIX),
            cells.join(" | ")
        )
    });
    let lines: String = lines.collect();
    if lines.is_empty() {
        return "No figures yet.\n".into();
    }
    format!(
        "| services x instances | {} |\n|---|---|---|\n{lines}\nBold: more than the goal.\n",
        sizes.join(" | ")
    )
}
