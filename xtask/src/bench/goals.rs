//! What is to be reached, whether it is, and if not why.

use serde_json::Value;

use super::{
    load, memory,
    report::{find, interval, rounded},
    services,
    world::Topology,
};

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
    /// Why it is missed, where that is known.
    cause: Cause,
}

type Cause = fn(&[Value]) -> Option<String>;

impl Goal {
    fn because(self, cause: Cause) -> Self {
        Self { cause, ..self }
    }
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
        cause: |_| None,
    };
    let of_memory = |what, measure: &str, at_most, of: f64| Goal {
        what,
        measure: format!("{}1000 services x 10: {measure}", memory::PREFIX),
        topology: "100 tasks",
        arm: "mesh",
        of: Of::Value,
        at_most,
        goal: of,
        cause: |_| None,
    };
    let one = "HTTP keep-alive, one connection";
    let all = "HTTP keep-alive";
    let each = "HTTP, a connection for each request";
    vec![
        goal(
            "keep-alive, p50, relative to direct",
            &format!("{one}: p50"),
            "mesh",
            Of::VsDirect,
            true,
            1.002,
        )
        .because(one_set_up),
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
        goal(
            "a connection for each request, relative to the Envoy pair",
            &format!("{each}: requests"),
            "envoy-pair-http",
            Of::MeshVs,
            false,
            3.0,
        )
        .because(direct_is_no_better),
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
            cause: |_| None,
        },
        Goal {
            what: "ns added to `connect()`",
            measure: CONNECT.into(),
            topology: "loopback",
            arm: "mesh",
            of: Of::OverDirect,
            at_most: true,
            goal: 250.0,
            cause: parts_of_a_connect,
        },
        of_memory("PSS of the daemon, 100 tasks, 1,000 services, 10,000 backends, MiB", "PSS", true, 15.0)
            .because(data_and_pages),
        of_memory("its maps, MiB", "maps", true, 8.0).because(room),
        of_memory("idle CPU, ms/s", "idle CPU", true, 0.1).because(looks),
    ]
}

const CONNECT: &str = "connect tcp";

fn number(rows: &[Value], measure: &str, topology: &str, arm: &str) -> Option<f64> {
    find(rows, measure, topology, arm)?["value"].as_f64()
}

/// Of 1,000 services.
fn of_tasks(rows: &[Value], tasks: usize, arm: &str, what: &str) -> Option<f64> {
    number(rows, &format!("{}1000 services x 10: {what}", memory::PREFIX), &format!("{tasks} tasks"), arm)
}

/// Of memory: what is no file's.
const DATA: &str = "PSS without files";

fn one_set_up(_: &[Value]) -> Option<String> {
    let cause = "no program of mesh runs meanwhile. The interval is that of one set-up: that namespaces differ from \
                 one another it does not cover.";
    Some(cause.into())
}

fn direct_is_no_better(rows: &[Value]) -> Option<String> {
    let each = format!("{}HTTP, a connection for each request: requests", load::PREFIX);
    let rate = |arm: &str| number(rows, &each, Topology::Namespaces.name(), arm);
    Some(format!(
        "direct itself gets {} times what the Envoy pair does, and mesh cannot get more. Envoy keeps its connections \
         to the servers open, so that these accept hardly any; who connects by himself has the server accept each.",
        rounded(rate("direct")? / rate("envoy-pair-http")?)
    ))
}

fn parts_of_a_connect(rows: &[Value]) -> Option<String> {
    let added = |arm: &str| value(find(rows, CONNECT, "loopback", arm)?, &Of::OverDirect).map(|(ns, ..)| ns);
    let (empty, plain, mesh) = (added("empty-hooks")?, added("without-bookkeeping")?, added("mesh")?);
    Some(format!(
        "hooks that do nothing take {empty:.0} ns, for the kernel calls each sock_ops program several times in a \
         handshake; choosing a backend takes {:.0} ns more, and {:.0} what is kept of the socket (its peer, its \
         backend's count) and the three callbacks that passive health needs.",
        plain - empty,
        mesh - plain
    ))
}

fn data_and_pages(rows: &[Value]) -> Option<String> {
    Some(format!(
        "{} MiB are data; the rest is pages of the program's own file and of libraries, of which the kernel maps 16 \
         for each that is used.",
        rounded(of_tasks(rows, 100, "mesh", DATA)?)
    ))
}

fn room(rows: &[Value]) -> Option<String> {
    Some(format!(
        "they are allocated up front, so that nothing that is added can fail for want of memory: 65,536 backends and \
         32,768 open sockets. With room for twice what is there they take {} MiB.",
        rounded(of_tasks(rows, 100, "mesh", memory::ROOM)?)
    ))
}

fn looks(_: &[Value]) -> Option<String> {
    let cause = "pins, programs, services files and tasks are looked at once a second (tasks every five where there \
                 are many), as nobody tells when they change.";
    Some(cause.into())
}

/// Of 99 further tasks, KiB each.
fn further(rows: &[Value], what: &str) -> Option<f64> {
    let [one, all] = [1, 100].map(|tasks| of_tasks(rows, tasks, "mesh", what));
    Some((all? - one?).max(0.0) / 99.0 * 1024.0)
}

fn pages_again(rows: &[Value]) -> Option<String> {
    Some(format!(
        "{} KiB are data, for the daemon listens for names in the task's namespace, over UDP and TCP; the rest is pages \
         of its own file that were given back after the start and that the first tasks have it use again.",
        rounded(further(rows, DATA)?)
    ))
}

/// A goal, and what has come of it.
struct Line {
    what: String,
    goal: String,
    here: String,
    /// What direct again has.
    again: Option<String>,
    verdict: Verdict,
    cause: Cause,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Met,
    Missed,
    Undecided,
}

pub(super) fn goals(rows: &[Value]) -> String {
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
    let line = |Line { what, goal, here, cause, .. }: Line| {
        let cause = cause(rows).map_or_else(String::new, |cause| format!(": {cause}"));
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
        let (what, limit) = (goal.what.into(), format!("{sign} {}", goal.goal));
        lines.push(Line { what, goal: limit, here, again, verdict, cause: goal.cause });
    }
    lines.extend(derived_goals(rows));
    lines
}

/// Goals about several rows.
fn derived_goals(rows: &[Value]) -> Vec<Line> {
    let line = |what: String, limit: &str, value: f64, met: bool, cause: Cause| {
        let verdict = if met { Verdict::Met } else { Verdict::Missed };
        Line { what, goal: limit.into(), here: rounded(value), again: None, verdict, cause }
    };
    let further = further(rows, "PSS")
        .map(|kib| line("memory of a further task, KiB".into(), "≤ 1", kib, kib <= 1.0, pages_again));
    let mut tasks = memory::TASKS.iter().rev();
    let most =
        tasks.find_map(|tasks| Some((*tasks, of_tasks(rows, *tasks, "envoy-pair-http", memory::BOTH)?)));
    let envoys = most.zip(of_tasks(rows, 100, "mesh", memory::BOTH)).map(|((tasks, envoys), mesh)| {
        let by = if tasks == 100 { String::new() } else { format!(" by {tasks} that were started,") };
        let times = envoys / tasks as f64 * 100.0 / mesh;
        line(format!("memory of 100 Envoys,{by} relative to mesh"), "≥ 50", times, times >= 50.0, |_| None)
    });
    further.into_iter().chain(envoys).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_goal_is_judged_by_its_interval() {
        let measure = "load: TCP round trips: p50";
        let judged = |ratio: f64, low: f64, high: f64| {
            let versus = json!({"ratio": ratio, "low": low, "high": high});
            goals(&[
                json!({"measure": measure, "topology": "namespaces", "arm": "mesh", "value": 20.0, "vs_direct": versus}),
            ])
        };
        assert!(judged(1.0, 0.99, 1.001).ends_with("| met |\n\n"));
        assert!(judged(1.001, 0.99, 1.01).ends_with("| not decided |\n\n"));
        assert!(judged(1.01, 1.0, 1.02).ends_with("| not decided |\n\n"));
        let missed = "| **missed** |\n\nWhat misses its goal, and why:\n\n\
                      - *TCP round trips, p50, relative to direct*: 1.100 (1.050 to 1.200) (goal ≤ 1.002)\n\n";
        assert!(judged(1.1, 1.05, 1.2).ends_with(missed));
        assert_eq!(goals(&[]), "");
    }
}
