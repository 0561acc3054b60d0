//! The report for people: goals first, then what each part measured.

use serde_json::Value;

use super::{
    failover, line, load, memory, names, registries, rivals::KINDS, scale, services, world::Topology,
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

/// What a goal is about.
enum Of {
    /// Relative to direct.
    VsDirect,
    /// Mesh relative to the arm.
    MeshVs,
    /// More than direct.
    OverDirect,
    /// Relative to one service.
    VsOne,
    Value,
}

struct Goal {
    what: &'static str,
    measure: String,
    topology: &'static str,
    arm: &'static str,
    of: Of,
    at_most: bool,
    goal: f64,
}

fn all_goals() -> Vec<Goal> {
    let namespaces = Topology::Namespaces.name();
    let goal = |what, measure: &str, arm, of, at_most, goal| Goal {
        what,
        measure: format!("{}{measure}", load::PREFIX),
        topology: namespaces,
        arm,
        of,
        at_most,
        goal,
    };
    let of_memory = |what, measure: &str, at_most, of: f64| Goal {
        what,
        measure: format!("{}1000 services x 10: {measure}", memory::PREFIX),
        topology: "100 tasks",
        arm: "mesh",
        of: Of::Value,
        at_most,
        goal: of,
    };
    let one = "HTTP keep-alive, one connection";
    let all = "HTTP keep-alive";
    let each = "HTTP, a connection for each request";
    vec![
        goal(STEADY, &format!("{one}: p50"), "mesh", Of::VsDirect, true, 1.002),
        goal("keep-alive, p99, relative to direct", &format!("{one}: p99"), "mesh", Of::VsDirect, true, 1.01),
        goal(
            "keep-alive, requests/s, relative to direct",
            &format!("{all}: requests"),
            "mesh",
            Of::VsDirect,
            false,
            0.998,
        ),
        goal(
            "runs of mesh's programs meanwhile",
            &format!("{one}: runs of mesh's programs meanwhile"),
            "mesh",
            Of::Value,
            true,
            0.0,
        ),
        goal(
            "TCP round trips, p50, relative to direct",
            "TCP round trips: p50",
            "mesh",
            Of::VsDirect,
            true,
            1.002,
        ),
        goal(
            "throughput, relative to direct",
            "TCP throughput: throughput",
            "mesh",
            Of::VsDirect,
            false,
            0.998,
        ),
        goal(
            "keep-alive, requests/s, relative to the Envoy pair",
            &format!("{all}: requests"),
            "envoy-pair-http",
            Of::MeshVs,
            false,
            10.0,
        ),
        goal(EACH, &format!("{each}: requests"), "envoy-pair-http", Of::MeshVs, false, 3.0),
        goal(
            "connects/s, relative to direct",
            "TCP connects, one after the other: rate",
            "mesh",
            Of::VsDirect,
            false,
            0.97,
        ),
        goal(
            "connects/s, relative to iptables",
            "TCP connects, one after the other: rate",
            "iptables",
            Of::MeshVs,
            false,
            1.0,
        ),
        goal(
            "connects/s, relative to nft",
            "TCP connects, one after the other: rate",
            "nft",
            Of::MeshVs,
            false,
            1.0,
        ),
        goal(
            "CPU seconds for a million requests, above direct",
            &format!("{all}: CPU seconds for a million requests"),
            "mesh",
            Of::OverDirect,
            true,
            0.05,
        ),
        goal(
            "CPU seconds for a million connections, above direct",
            "TCP connects: CPU seconds for a million connections",
            "mesh",
            Of::OverDirect,
            true,
            0.4,
        ),
        Goal {
            what: "connects/s with 100,000 services, relative to 1",
            measure: services::MEASURE.into(),
            topology: "loopback",
            arm: services::MANY,
            of: Of::VsOne,
            at_most: false,
            goal: 0.99,
        },
        Goal {
            what: ADDED,
            measure: CONNECT.into(),
            topology: "loopback",
            arm: "mesh",
            of: Of::OverDirect,
            at_most: true,
            goal: 250.0,
        },
        of_memory(PSS, "PSS", true, 15.0),
        of_memory(MAPS, "maps", true, 8.0),
        of_memory(IDLE, "idle CPU", true, 0.1),
    ]
}

const EACH: &str = "a connection for each request, relative to the Envoy pair";
const PSS: &str = "PSS of the daemon, 100 tasks, 1,000 services, 10,000 backends, MiB";
const MAPS: &str = "its maps, MiB";
const IDLE: &str = "idle CPU, ms/s";
const STEADY: &str = "keep-alive, p50, relative to direct";
const FURTHER: &str = "memory of a further task, without files, KiB";
const ADDED: &str = "ns added to `connect()`";
const CONNECT: &str = "connect tcp";

/// Why a goal is missed, where that is known.
fn cause(what: &str, rows: &[Value]) -> Option<String> {
    let number =
        |measure: &str, topology: &str, arm: &str| find(rows, measure, topology, arm)?["value"].as_f64();
    let of_memory = |measure: &str| {
        number(&format!("{}1000 services x 10: {measure}", memory::PREFIX), "100 tasks", "mesh")
    };
    let added = |arm: &str| value(find(rows, CONNECT, "loopback", arm)?, &Of::OverDirect).map(|(ns, ..)| ns);
    Some(match what {
        EACH => {
            let each = format!("{}HTTP, a connection for each request: requests", load::PREFIX);
            let rate = |arm: &str| number(&each, Topology::Namespaces.name(), arm);
            format!(
                "direct itself gets {} times what the Envoy pair does, and mesh cannot get more. Envoy keeps its \
                 connections to the servers open, so that these accept hardly any; who connects by himself has the \
                 server accept each.",
                rounded(rate("direct")? / rate("envoy-pair-http")?)
            )
        }
        ADDED => {
            let (empty, plain, mesh) = (added("empty-hooks")?, added("without-bookkeeping")?, added("mesh")?);
            format!(
                "hooks that do nothing take {:.0} ns, for the kernel calls each sock_ops program several times in a \
                 handshake; choosing a backend takes {:.0} ns more, and {:.0} what is kept of the socket (its peer, \
                 its backend's count) and the three callbacks that passive health needs.",
                empty,
                plain - empty,
                mesh - plain
            )
        }
        PSS => format!(
            "{} MiB are data; the rest is pages of the program's own file and of libraries, of which the kernel maps \
             16 for each that is used.",
            rounded(of_memory("PSS without files")?)
        ),
        MAPS => format!(
            "they are allocated up front, so that nothing that is added can fail for want of memory: 65,536 backends \
             and 32,768 open sockets. With room for twice what is there they take {} MiB.",
            rounded(of_memory(memory::ROOM)?)
        ),
        IDLE => "pins, programs, services files and tasks are looked at once a second (tasks every five where there are many), \
             as nobody tells when they change."
            .into(),
        STEADY => "no program of mesh runs meanwhile. The interval is that of one set-up: that namespaces differ from one \
                   another it does not cover."
            .into(),
        FURTHER => "the daemon listens for names in its namespace, over UDP and TCP.".into(),
        _ => return None,
    })
}

/// A goal, and what has come of it.
struct Line {
    what: &'static str,
    goal: String,
    here: String,
    /// What direct again has.
    again: Option<String>,
    verdict: Verdict,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Met,
    Missed,
    Undecided,
}

fn goals(rows: &[Value]) -> String {
    let lines = goal_lines(rows);
    if lines.is_empty() {
        return String::new();
    }
    let line = |line: &Line| {
        let verdict = match line.verdict {
            Verdict::Met => "met",
            Verdict::Missed => "**missed**",
            Verdict::Undecided => "not decided",
        };
        let again = line.again.as_deref().unwrap_or("-");
        format!("| {} | {} | {} | {again} | {verdict} |\n", line.what, line.goal, line.here)
    };
    let table: String = lines.iter().map(line).collect();
    format!(
        "## Goals\n\nIn brackets: 95 % intervals. *Not decided*: the interval has the goal in it. Direct again is \
         what noise does to the same figure.\n\n| what | goal | here | direct again | |\n|---|---|---|---|---|\n\
         {table}\n{}",
        missed(rows)
    )
}

/// What misses its goal, and why, where that is known.
pub(super) fn missed(rows: &[Value]) -> String {
    let missed = goal_lines(rows).into_iter().filter(|line| line.verdict == Verdict::Missed);
    let line = |Line { what, goal, here, .. }: Line| {
        let cause = cause(what, rows).map_or_else(String::new, |cause| format!(": {cause}"));
        format!("- *{what}*: {here} (goal {goal}){cause}\n")
    };
    let missed: String = missed.map(line).collect();
    if missed.is_empty() { missed } else { format!("What misses its goal, and why:\n\n{missed}\n") }
}

fn goal_lines(rows: &[Value]) -> Vec<Line> {
    let mut lines = Vec::new();
    for goal in all_goals() {
        let row = find(rows, &goal.measure, goal.topology, goal.arm);
        let Some((value, low, high)) = row.and_then(|row| value(row, &goal.of)) else { continue };
        let good = |value: f64| if goal.at_most { value <= goal.goal } else { value >= goal.goal };
        let verdict = match (good(low), good(high)) {
            (true, true) => Verdict::Met,
            (false, false) => Verdict::Missed,
            _ => Verdict::Undecided,
        };
        let again = find(rows, &goal.measure, goal.topology, "direct-again");
        let again = again.filter(|_| !matches!(goal.of, Of::Value | Of::MeshVs | Of::VsOne));
        let again = again.and_then(|row| self::value(row, &goal.of)).map(interval);
        let here = if low.total_cmp(&high).is_eq() { rounded(value) } else { interval((value, low, high)) };
        let sign = if goal.at_most { "≤" } else { "≥" };
        lines.push(Line { what: goal.what, goal: format!("{sign} {}", goal.goal), here, again, verdict });
    }
    lines.extend(derived_goals(rows));
    lines
}

/// Goals about several rows.
fn derived_goals(rows: &[Value]) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut add = |what: &'static str, goal: &str, value: Option<f64>, met: fn(f64) -> bool| {
        if let Some(value) = value {
            let verdict = if met(value) { Verdict::Met } else { Verdict::Missed };
            lines.push(Line { what, goal: goal.into(), here: rounded(value), again: None, verdict });
        }
    };
    let number =
        |measure: &str, topology: &str, arm: &str| find(rows, measure, topology, arm)?["value"].as_f64();
    let pss = |tasks: usize, arm: &str, what: &str| {
        number(&format!("{}1000 services x 10: {what}", memory::PREFIX), &format!("{tasks} tasks"), arm)
    };
    let data = "PSS without files";
    let further = pss(1, "mesh", data).zip(pss(100, "mesh", data));
    let further = further.map(|(one, all)| (all - one).max(0.0) / 99.0 * 1024.0);
    add(FURTHER, "≤ 1", further, |kib| kib <= 1.0);
    let both = memory::BOTH;
    let most =
        memory::TASKS.iter().rev().find_map(|tasks| Some((*tasks, pss(*tasks, "envoy-pair-http", both)?)));
    if let Some(((tasks, envoys), mesh)) = most.zip(pss(100, "mesh", both)) {
        let what = match tasks {
            100 => "memory of 100 Envoys, relative to mesh",
            50 => "memory of 100 Envoys, by 50 that were started, relative to mesh",
            10 => "memory of 100 Envoys, by 10 that were started, relative to mesh",
            _ => "memory of 100 Envoys, by one that was started, relative to mesh",
        };
        add(what, "≥ 50", Some(envoys / tasks as f64 * 100.0 / mesh), |times| times >= 50.0);
    }
    lines
}

/// With its interval, which may be that value alone.
fn value(row: &Value, of: &Of) -> Option<(f64, f64, f64)> {
    let compared = match of {
        Of::Value => return row["value"].as_f64().map(|value| (value, value, value)),
        Of::VsDirect => &row["vs_direct"],
        Of::MeshVs => &row["mesh_vs"],
        Of::OverDirect => &row["over_direct"],
        Of::VsOne => &row["vs_one"],
    };
    Some((compared["ratio"].as_f64()?, compared["low"].as_f64()?, compared["high"].as_f64()?))
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
    fn a_goal_is_judged_by_its_interval() {
        let measure = "load: TCP round trips: p50";
        let judged = |ratio: f64, low: f64, high: f64| {
            goals(&[row(measure, "mesh", 20.0, &json!({"ratio": ratio, "low": low, "high": high}))])
        };
        assert!(judged(1.0, 0.99, 1.001).ends_with("| met |\n\n"));
        assert!(judged(1.001, 0.99, 1.01).ends_with("| not decided |\n\n"));
        assert!(judged(1.01, 1.0, 1.02).ends_with("| not decided |\n\n"));
        let missed = "| **missed** |\n\nWhat misses its goal, and why:\n\n\
                      - *TCP round trips, p50, relative to direct*: 1.100 (1.050 to 1.200) (goal ≤ 1.002)\n\n";
        assert!(judged(1.1, 1.05, 1.2).ends_with(missed));
        assert_eq!(goals(&[]), "");
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
