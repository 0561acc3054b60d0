//! The report for people: goals first, then what each part measured.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    failover, goals::goals, line, load, memory, names, registries, rivals::KINDS, scale, world::Topology,
};

/// Everything of it, and the pictures that were drawn.
pub(super) fn markdown(report: &Value, pictures: &[(&str, &str)]) -> String {
    let rows = report["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut text = format!(
        "# Benchmark\n\n`cargo xtask bench`. The configurations are in [bench/arms](../arms); each Envoy has two threads. \
         Intervals are of 95 %, by bootstrap over set-ups or starts, of six or more.\n\n{}\n",
        conditions(&report["parts"])
    );
    text += &goals(rows);
    for topology in [Topology::Namespaces, Topology::Pinned, Topology::Loopback] {
        text += &arms(rows, topology);
    }
    text += &failovers(rows);
    text += &memory(rows);
    for (file, title) in pictures {
        text += &format!("![{title}]({file})\n\n");
    }
    let sockets: Vec<_> = rows.iter().filter(|row| is_of_sockets(row)).collect();
    text += &format!(
        "## Sockets\n\n{}{}\n\n",
        super::HEAD,
        sockets.iter().copied().map(line).collect::<String>()
    );
    text += &dropped(&sockets);
    text + "\n" + &names::markdown(rows) + "\n" + &registries::markdown(rows) + &scale::markdown(rows)
}

fn is_of_sockets(row: &Value) -> bool {
    let measure = row["measure"].as_str().unwrap_or_default();
    let others = [load::PREFIX, failover::PREFIX, memory::PREFIX, registries::PREFIX];
    !scale::is_ours(row) && !names::is_ours(row) && !others.iter().any(|prefix| measure.starts_with(prefix))
}

/// One line a part: it may have been measured again alone.
fn conditions(parts: &Value) -> String {
    let mut text = "| part | run | commit | Linux | CPUs | load before | after | with |\n|---|---|---|---|---|---|---|---|\n".to_owned();
    for (part, of) in parts.as_object().into_iter().flatten() {
        let word = |key: &str| of[key].as_str().unwrap_or("unknown");
        let versions = of["versions"].as_object().into_iter().flatten();
        let version =
            |(name, version): (&String, &Value)| format!("{name} {}", version.as_str().unwrap_or("missing"));
        text += &format!(
            "| {part} | {} | {} | {} | {} | {} | {} | {} |\n",
            word("mode"),
            word("commit"),
            word("kernel"),
            of["cpus"],
            word("load_before"),
            word("load_after"),
            versions.map(version).collect::<Vec<_>>().join(", ")
        );
    }
    text
}

/// The same in a sentence for each that differ.
pub(super) fn measured(parts: &Value) -> String {
    let mut kinds = BTreeMap::<String, Vec<&str>>::new();
    for (part, of) in parts.as_object().into_iter().flatten() {
        let word = |key: &str| of[key].as_str().unwrap_or_default();
        let kind = format!(
            "{}, commit {}, {} CPUs, Linux {}",
            word("mode"),
            word("commit"),
            of["cpus"],
            word("kernel")
        );
        kinds.entry(kind).or_default().push(part);
    }
    let sentences = kinds.iter().map(|(kind, parts)| format!("{} ({kind})", parts.join(", ")));
    format!("Measured: {}.", sentences.collect::<Vec<_>>().join("; "))
}

pub(super) fn find<'a>(rows: &'a [Value], measure: &str, topology: &str, arm: &str) -> Option<&'a Value> {
    rows.iter().find(|row| row["measure"] == measure && row["topology"] == topology && row["arm"] == arm)
}

pub(super) fn rounded(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A comparison, and its interval where it has one.
pub(super) fn ratio(compared: &Value) -> Option<String> {
    let value = compared["ratio"].as_f64()?;
    let digits = match value.abs() {
        ..2.0 => 3,
        ..100.0 => 1,
        _ => 0,
    };
    let interval = compared["low"].as_f64().zip(compared["high"].as_f64());
    let sure =
        interval.map_or_else(String::new, |(low, high)| format!(" ({low:.digits$} to {high:.digits$})"));
    Some(format!("{value:.digits$}{sure}"))
}

/// A value, unless it is one of requests that the arm could not take at the rate: then it says how long slices
/// are.
pub(super) fn taken(row: &Value) -> Option<f64> {
    let reached = row["reached"].as_f64().unwrap_or(100.0);
    row["value"].as_f64().filter(|_| row["unit"] == "%" || reached >= REACHES)
}

/// From so many percent of a rate on an arm is said to take it.
const REACHES: f64 = 95.0;

/// One line a measure, one column an arm.
fn arms(rows: &[Value], topology: Topology) -> String {
    let ours = |row: &&Value| {
        row["topology"] == topology.name()
            && row["measure"].as_str().is_some_and(|m| m.starts_with(load::PREFIX))
    };
    let rows: Vec<_> = rows.iter().filter(ours).collect();
    let mut measures: Vec<(&str, &str)> = Vec::new();
    for row in &rows {
        let of = (row["measure"].as_str().unwrap_or_default(), row["unit"].as_str().unwrap_or_default());
        if !measures.contains(&of) && row["measure"] != format!("{}{}", load::PREFIX, load::ALL) {
            measures.push(of);
        }
    }
    if measures.is_empty() {
        return String::new();
    }
    let names = KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>();
    let mut text = format!(
        "## Arms: {}\n\nMedians, and in brackets the median of the ratios to direct in the same round.\n\n| | {} |\n|---|{}\n",
        topology.name(),
        names.join(" | "),
        "---|".repeat(names.len())
    );
    for (measure, unit) in measures {
        let cell = |arm: &&str| {
            let Some(row) = rows.iter().find(|row| row["measure"] == measure && row["arm"] == **arm) else {
                return String::new();
            };
            let Some(value) = taken(row) else {
                return if row["value"].is_null() { "missing" } else { "overloaded" }.into();
            };
            match row["vs_direct"]["ratio"].as_f64() {
                Some(ratio) if *arm != "direct" => format!("{} ({ratio:.3})", rounded(value)),
                _ => rounded(value),
            }
        };
        let cells: Vec<_> = names.iter().map(cell).collect();
        let of = rows.iter().find(|row| row["measure"] == measure).and_then(|row| row["rate"].as_f64());
        let rate = of.map_or_else(String::new, |rate| format!(" ({rate:.0} /s)"));
        let measure = measure.trim_start_matches(load::PREFIX);
        text += &format!("| {measure}{rate}, {unit} | {} |\n", cells.join(" | ")).replace(", |", " |");
    }
    text += "\n";
    for kind in KINDS.iter().filter(|kind| !kind.about.is_empty()) {
        text += &format!("- *{}*: {}\n", kind.name, kind.about);
    }
    let missing = rows.iter().filter_map(|row| {
        let (arm, why) = (row["arm"].as_str()?, row["missing"].as_str()?);
        Some(format!(
            "- {arm} is missing in {}: {why}\n",
            row["measure"].as_str()?.trim_start_matches(load::PREFIX)
        ))
    });
    text.extend(missing);
    let failed = rows.iter().filter_map(|row| {
        let (failed, slices) =
            (row["failed"].as_u64().filter(|failed| *failed > 0)?, row["slices"].as_u64()?);
        let what = row["measure"].as_str()?.trim_start_matches(load::PREFIX);
        Some(format!(
            "- {failed} of {slices} slices of {} failed, {what}: {}\n",
            row["arm"].as_str()?,
            row["error"].as_str().unwrap_or_default()
        ))
    });
    text.extend(failed);
    let set_ups = rows.iter().filter_map(|row| row["set_ups"].as_u64()).max().unwrap_or_default();
    text + &format!("\nSet up {set_ups} times. {}\n\n", dropped(&rows))
}

fn dropped(rows: &[&Value]) -> String {
    let sum = |key: &str| rows.iter().filter_map(|row| row[key].as_u64()).sum::<u64>();
    format!("{} of {} slices were dropped because others used the machine.", sum("disturbed"), sum("slices"))
}

/// A table for each event, with a line for each arm.
fn failovers(rows: &[Value]) -> String {
    let mut text = String::new();
    for event in failover::Event::ALL {
        let number = |arm: &str, client: &str, value: &str| {
            let measure = failover::measure_of(event, client, value);
            find(rows, &measure, Topology::Namespaces.name(), arm)?["value"].as_f64()
        };
        let mut lines = String::new();
        for kind in &KINDS {
            let cells = failover::CLIENTS.map(|(client, _)| {
                let cells = failover::VALUES
                    .map(|value| number(kind.name, client, value).map_or_else(|| "-".into(), rounded));
                cells.join(" | ")
            });
            if failover::CLIENTS
                .iter()
                .any(|(client, _)| number(kind.name, client, failover::VALUES[0]).is_some())
            {
                lines += &format!("| {} | {} |\n", kind.name, cells.join(" | "));
            }
        }
        if !lines.is_empty() {
            let of = find(
                rows,
                &failover::measure_of(event, failover::CLIENTS[0].0, failover::VALUES[0]),
                Topology::Namespaces.name(),
                "mesh",
            );
            let [times, dropped] =
                ["times", "disturbed"].map(|key| of.and_then(|row| row[key].as_u64()).unwrap_or_default());
            text += &format!(
                "### {}\n\nMedians of {times}; {dropped} more were dropped because others used the machine.\n\n| | failed | last, s | slow | keep-alive: failed | last, s | slow |\n|---|---|---|---|---|---|---|\n{lines}\n",
                event.name()
            );
        }
    }
    if text.is_empty() {
        return text;
    }
    format!("## Failover\n\n{}\n\n{text}", failover::ABOUT)
}

fn memory(rows: &[Value]) -> String {
    let mut text = String::new();
    for services in memory::SERVICES {
        for what in [memory::BOTH, "PSS", "PSS without files", "maps", memory::ROOM, "idle CPU"] {
            for arm in ["mesh", "envoy-pair-http"] {
                let measure = format!("{}{services} services x 10: {what}", memory::PREFIX);
                let row = |tasks: &usize| find(rows, &measure, &format!("{tasks} tasks"), arm);
                let cell = |tasks: &usize| {
                    row(tasks).map_or_else(String::new, |row| {
                        let value = row["value"].as_f64().map(rounded);
                        value.unwrap_or_else(|| row["missing"].as_str().unwrap_or_default().to_owned())
                    })
                };
                if memory::TASKS.iter().any(|tasks| row(tasks).is_some()) {
                    let unit = if what == "idle CPU" { "ms/s" } else { "MiB" };
                    let cells = memory::TASKS.each_ref().map(cell).join(" | ");
                    text += &format!("| {services} services: {what}, {unit} | {arm} | {cells} |\n");
                }
            }
        }
    }
    if !text.is_empty() {
        text = format!(
            "| tasks | | {} |\n|---|---|---|---|---|---|\n{text}\n",
            memory::TASKS.map(|tasks| tasks.to_string()).join(" | ")
        );
    }
    let starts = rows.iter().filter(|row| row["measure"] == memory::STARTUP).map(line).collect::<String>();
    if !starts.is_empty() {
        text += &format!("{}{starts}\n", super::HEAD);
    }
    if text.is_empty() {
        text
    } else {
        format!("## Memory, idle CPU, start of a task\n\n{}\n\n{text}", memory::ABOUT)
    }
}

/// The README's table: one line an arm.
pub(super) fn summary(rows: &[Value]) -> String {
    let of_load = |measure: &str, arm: &str| {
        find(rows, &format!("{}{measure}", load::PREFIX), Topology::Namespaces.name(), arm)
    };
    let cell = |row: Option<&Value>, unit: &str| {
        row.map_or_else(
            || "-".into(),
            |row| taken(row).map_or_else(|| "overloaded".into(), |value| format!("{}{unit}", rounded(value))),
        )
    };
    let failed = |event, arm: &str| {
        let measure = failover::measure_of(event, failover::CLIENTS[0].0, failover::VALUES[0]);
        find(rows, &measure, Topology::Namespaces.name(), arm)
    };
    let half = "HTTP keep-alive at 50 % of direct's maximum: p99";
    let mut lines = String::new();
    for kind in &KINDS {
        let arm = kind.name;
        let cells = [
            cell(of_load("HTTP keep-alive: requests", arm), " /s"),
            cell(of_load(half, arm), " us"),
            cell(of_load("HTTP, a connection for each request: requests", arm), " /s"),
            cell(of_load("TCP connects, one after the other: rate", arm), " /s"),
            cell(of_load("HTTP keep-alive: CPU seconds for a million requests", arm), " s"),
            cell(failed(failover::Event::Killed, arm), ""),
            cell(failed(failover::Event::BlackHoled, arm), ""),
        ];
        if cells.iter().any(|cell| cell != "-") {
            lines += &format!("| {arm} | {} |\n", cells.join(" | "));
        }
    }
    if lines.is_empty() {
        return "The report has no figures of the arms yet: `cargo xtask bench --only load`.".into();
    }
    let rate = of_load(half, "direct").and_then(|row| row["rate"].as_f64()).unwrap_or_default();
    format!(
        "| | HTTP keep-alive | p99 at half of direct's maximum ({rate:.0} /s) | a connection for each request | TCP connects | CPU for a million requests | failed of 500 requests when a backend is killed | is black-holed |\n\
         |---|---|---|---|---|---|---|---|\n{lines}"
    )
}

/// The same of memory.
pub(super) fn memory_summary(rows: &[Value]) -> String {
    let text = memory(rows);
    match text.find("| tasks") {
        Some(at) => text[at..].split("\n\n").next().unwrap_or_default().to_owned(),
        None => "The report has no figures of memory yet: `cargo xtask bench --only memory`.".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(measure: &str, arm: &str, value: f64, versus: &Value) -> Value {
        json!({"measure": measure, "topology": "namespaces", "arm": arm, "value": value, "unit": "us", "vs_direct": versus})
    }

    #[test]
    fn an_arm_that_did_not_start_is_named_with_its_reason() {
        let mut missing = row("load: all", "nft", 0.0, &Value::Null);
        missing["value"] = Value::Null;
        missing["missing"] = json!("no such program");
        let rows = [row("load: TCP round trips: p50", "direct", 20.0, &Value::Null), missing];
        let text = arms(&rows, Topology::Namespaces);
        assert!(text.contains("- nft is missing in all: no such program\n"), "{text}");
        assert!(text.contains("| TCP round trips: p50, us | 20.0 |"), "{text}");
        assert_eq!(arms(&rows, Topology::Loopback), "");
    }
}
