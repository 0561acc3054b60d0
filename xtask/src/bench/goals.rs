//! What is to be reached, whether it is, and if not why.

use serde_json::{Value, json};

use super::{
    load, memory,
    report::{find, ratio, rounded},
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
    let of_services = |what, arm| Goal {
        what,
        measure: services::MEASURE.into(),
        topology: "loopback",
        arm,
        of: Of::VsOne,
        at_most: false,
        goal: 0.99,
        cause: |_| None,
    };
    let all = "HTTP keep-alive";
    let each = "HTTP, a connection for each request";
    vec![
        goal(
            "keep-alive, p50, relative to direct",
            &format!("{ONE}: p50"),
            "mesh",
            Of::VsDirect,
            true,
            1.002,
        )
        .because(no_runs),
        goal("keep-alive, p99, relative to direct", &format!("{ONE}: p99"), "mesh", Of::VsDirect, true, 1.01),
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
            &format!("{ONE}: runs of mesh's programs meanwhile"),
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
        of_services("connects/s to one of 100,000 services, relative to an only one", services::MANY),
        of_services(
            "connects/s to 1,000 of 100,000 services in turn, relative to an only one",
            services::IN_TURN,
        )
        .because(cold_look_ups),
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
const ONE: &str = "HTTP keep-alive, one connection";

fn number(rows: &[Value], measure: &str, topology: &str, arm: &str) -> Option<f64> {
    find(rows, measure, topology, arm)?["value"].as_f64()
}

/// Of 1,000 services.
fn of_tasks(rows: &[Value], tasks: usize, arm: &str, what: &str) -> Option<f64> {
    number(rows, &format!("{}1000 services x 10: {what}", memory::PREFIX), &format!("{tasks} tasks"), arm)
}

/// Of memory: what is no file's.
const DATA: &str = "PSS without files";

fn no_runs(rows: &[Value]) -> Option<String> {
    let row = |what: &str, arm: &str| {
        find(rows, &format!("{}{ONE}: {what}", load::PREFIX), Topology::Namespaces.name(), arm)
    };
    let runs = row("runs of mesh's programs meanwhile", "mesh")?["value"].as_u64()?;
    let again = ratio(&row("p50", "direct-again")?["vs_direct"])?;
    Some(format!("mesh's programs ran {runs} times meanwhile; direct again is at {again}."))
}

fn cold_look_ups(rows: &[Value]) -> Option<String> {
    let look_up = |of: &str| {
        number(rows, &format!("scale: look-up by least-connections, {of} service"), "100000 x 10", "mesh")
            .map(rounded)
    };
    Some(format!(
        "a look-up of any of 100,000 services takes {} ns, of one that was looked up just before {}: what is known of \
         them all does not fit into the CPU's caches.",
        look_up("any")?,
        look_up("hot")?
    ))
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
    let added = |arm: &str| find(rows, CONNECT, "loopback", arm)?["over_direct"]["ratio"].as_f64();
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
        "they are allocated up front, at the sizes of `[datapath]`, so that nothing that is added can fail for want of \
         memory. With room for twice what is there they take {} MiB.",
        rounded(of_tasks(rows, 100, "mesh", memory::ROOM)?)
    ))
}

fn looks(_: &[Value]) -> Option<String> {
    let cause = "pins, programs, services files and tasks are looked at once a second (tasks every five where there \
                 are many), and all network namespaces every half a minute, as nobody tells when they change.";
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
        "## Goals\n\n*Not decided*: the interval has the goal in it, or there is none, for too few set-ups. Direct again (or one \
         service again) is what noise does to the same figure.\n\n| what | goal | here | again | |\n|---|---|---|---|---|\n\
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
        let Some(compared) = row.map(|row| compared(row, &goal.of)) else { continue };
        let here = match goal.of {
            Of::Value => compared["ratio"].as_f64().map(rounded),
            _ => ratio(&compared),
        };
        let good = |end: &str| {
            compared[end]
                .as_f64()
                .map(|value| if goal.at_most { value <= goal.goal } else { value >= goal.goal })
        };
        let verdict = match (good("low"), good("high")) {
            (Some(true), Some(true)) => Verdict::Met,
            (Some(false), Some(false)) => Verdict::Missed,
            _ => Verdict::Undecided,
        };
        let again = match goal.of {
            Of::VsDirect | Of::OverDirect => Some("direct-again"),
            Of::VsOne => Some(services::AGAIN),
            Of::Value | Of::MeshVs => None,
        };
        let again = again.and_then(|arm| find(rows, &goal.measure, goal.topology, arm));
        let again = again.and_then(|row| ratio(&self::compared(row, &goal.of)));
        let sign = if goal.at_most { "≤" } else { "≥" };
        let (what, limit) = (goal.what.into(), format!("{sign} {}", goal.goal));
        let here = here.unwrap_or_else(|| "missing".into());
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
        line(
            format!("memory of 100 Envoys with 1,000 services,{by} relative to mesh"),
            "≥ 50",
            times,
            times >= 50.0,
            |_| None,
        )
    });
    further.into_iter().chain(envoys).collect()
}

/// What it is about.
fn compared(row: &Value, of: &Of) -> Value {
    match of {
        Of::Value => json!({"ratio": row["value"], "low": row["value"], "high": row["value"]}),
        Of::VsDirect => row["vs_direct"].clone(),
        Of::MeshVs => row["mesh_vs"].clone(),
        Of::OverDirect => row["over_direct"].clone(),
        Of::VsOne => row["vs_one"].clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(judged(1.1, f64::NAN, f64::NAN).ends_with("| 1.100 | - | not decided |\n\n"));
        // Every slice was disturbed.
        assert!(judged(f64::NAN, f64::NAN, f64::NAN).ends_with("| missing | - | not decided |\n\n"));
        let missed = "| **missed** |\n\nWhat misses its goal, and why:\n\n\
                      - *TCP round trips, p50, relative to direct*: 1.100 (1.050 to 1.200) (goal ≤ 1.002)\n\n";
        assert!(judged(1.1, 1.05, 1.2).ends_with(missed));
        assert_eq!(goals(&[]), "");
    }
}
