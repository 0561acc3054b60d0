//! The report for people: goals first, then what each part measured.

use serde_json::Value;

use super::{
    failover, goals::goals, line, load, memory, names, registries, rivals::KINDS, scale, world::Topology,
};

/// Everything of it, and the pictures that were drawn.
pub(super) fn markdown(report: &Value, pictures: &[(&str, &str)]) -> String {
    let rows = report["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut text = format!("# Benchmark\n\n{}\n\n", meta(&report["meta"]));
    text += &goals(rows);
    for topology in [Topology::Namespaces, Topology::Pinned, Topology::Loopback] {
        text += &arms(rows, topology);
    }
    text += &failovers(rows);
    text += &memory(rows);
    for (file, title) in pictures {
        text += &format!("![{title}]({file})\n\n");
    }
    text += "## Sockets\n\n";
    text += super::HEAD;
    text.extend(rows.iter().filter(|row| is_of_sockets(row)).map(line));
    text + &names::markdown(rows) + "\n" + &registries::markdown(rows) + &scale::markdown(rows)
}

fn is_of_sockets(row: &Value) -> bool {
    let measure = row["measure"].as_str().unwrap_or_default();
    let others = [load::PREFIX, failover::PREFIX, memory::PREFIX, registries::PREFIX];
    !scale::is_ours(row) && !names::is_ours(row) && !others.iter().any(|prefix| measure.starts_with(prefix))
}

fn meta(meta: &Value) -> String {
    let word = |key: &str| meta[key].as_str().unwrap_or("unknown").to_owned();
    let versions = meta["versions"].as_object().into_iter().flatten();
    let versions: Vec<_> =
        versions.map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or("missing"))).collect();
    format!(
        "`cargo xtask bench`, {}: {} CPUs, Linux {}, load {} before and {} after. {}. Measured: {}. The \
         configurations are in [bench/arms](../arms).",
        word("mode"),
        meta["cpus"],
        word("kernel"),
        word("load_before"),
        word("load"),
        versions.join(", "),
        super::commits(meta)
    )
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

pub(super) fn interval((value, low, high): (f64, f64, f64)) -> String {
    let digits = match value.abs() {
        ..2.0 => 3,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} ({low:.digits$} to {high:.digits$})")
}

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
            let Some(value) = row["value"].as_f64() else { return "missing".into() };
            match row["vs_direct"]["ratio"].as_f64() {
                Some(ratio) if *arm != "direct" => format!("{} ({ratio:.3})", rounded(value)),
                _ => rounded(value),
            }
        };
        let cells: Vec<_> = names.iter().map(cell).collect();
        let measure = measure.trim_start_matches(load::PREFIX);
        text += &format!("| {measure}, {unit} | {} |\n", cells.join(" | ")).replace(", |", " |");
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
    let sum = |key: &str| rows.iter().filter_map(|row| row[key].as_u64()).sum::<u64>();
    text + &format!(
        "\n{} of {} slices were dropped because others used the machine.\n\n",
        sum("disturbed"),
        sum("slices")
    )
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
            text += &format!(
                "### {}\n\n| | failed | last, s | slow | keep-alive: failed | last, s | slow |\n|---|---|---|---|---|---|---|\n{lines}\n",
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
        row.and_then(|row| row["value"].as_f64())
            .map_or_else(|| "-".into(), |value| format!("{}{unit}", rounded(value)))
    };
    let killed = |arm: &str| {
        let measure =
            failover::measure_of(failover::Event::Killed, failover::CLIENTS[0].0, failover::VALUES[0]);
        find(rows, &measure, Topology::Namespaces.name(), arm)
    };
    let mut lines = String::new();
    for kind in &KINDS {
        let arm = kind.name;
        let cells = [
            cell(of_load("HTTP keep-alive: requests", arm), " /s"),
            cell(of_load("HTTP keep-alive at 50 % of direct's maximum: p99", arm), " us"),
            cell(of_load("HTTP, a connection for each request: requests", arm), " /s"),
            cell(of_load("TCP connects, one after the other: rate", arm), " /s"),
            cell(of_load("HTTP keep-alive: CPU seconds for a million requests", arm), " s"),
            cell(killed(arm), ""),
        ];
        if cells.iter().any(|cell| cell != "-") {
            lines += &format!("| {arm} | {} |\n", cells.join(" | "));
        }
    }
    if lines.is_empty() {
        return "The report has no figures of the arms yet: `cargo xtask bench --only load`.".into();
    }
    format!(
        "| | HTTP keep-alive | p99 at half of direct's maximum | a connection for each request | TCP connects | CPU for a million requests | failed requests when a backend is killed |\n\
         |---|---|---|---|---|---|---|\n{lines}"
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
