//! What a connect costs where there are many services, against where there is one.

use std::{fmt::Write, fs, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{
    Effort,
    arms::{PORT, Sinks},
    connect::{Client, Kind, STARTS, rounds},
    report::{ratio, rounded},
    stats::{comparison, median},
    world::Cgroup,
};
use crate::node::{Node, cgroup2};

pub(super) const MEASURE: &str = "scale: connects, one after the other";
pub(super) const MANY: &str = "100,000 services, 1 is dialled";
pub(super) const IN_TURN: &str = "100,000 services, 1,000 are dialled in turn";
pub(super) const AGAIN: &str = "1 service again";
const ARMS: [&str; 4] = ["1 service", MANY, IN_TURN, AGAIN];
const SERVICES: u32 = 100_000;
/// After the start of a daemon with very many services.
const SETTLE: Duration = Duration::from_secs(5);
/// Of those that are dialled in turn, every so many is one.
const STEP: usize = 100;

/// Connects a second of each arm, and its ratio to the first of the same round.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    let sinks = Sinks::open()?;
    let one = vec![address(0)];
    let some: Vec<_> = (0..SERVICES).step_by(STEP).map(address).collect();
    let starts = STARTS.min(effort.batches);
    let (mut taken, mut disturbed) = (Vec::new(), 0);
    for _ in 0..starts {
        let daemons = Cgroup::new(cgroup2()?.join("mesh-bench-daemons"))?;
        let (few, many) = (node("mesh-bench-few", 1, &sinks)?, node("mesh-bench-many", SERVICES, &sinks)?);
        // What is served is also kept on disk, by then.
        thread::sleep(SETTLE);
        for node in [&few, &many] {
            let pid = node.pid().context("the daemon runs")?;
            fs::write(daemons.path().join("cgroup.procs"), pid.to_string())?;
        }
        let arms = [(&few, &one), (&many, &one), (&many, &some), (&few, &one)];
        let mut slices = ARMS.map(|_| Vec::new());
        for _ in 0..effort.batches / starts {
            let clients = arms.iter().map(|(node, dialled)| Client::start(Kind::Tcp, dialled, &node.cgroup));
            let (rounds, others) = rounds(clients.collect::<anyhow::Result<_>>()?, &sinks)?;
            if others && !effort.noisy {
                disturbed += 1;
                continue;
            }
            for round in rounds {
                slices.iter_mut().zip(round).for_each(|(arm, [call, close])| arm.push(1e9 / (call + close)));
            }
        }
        taken.push(slices);
    }
    ensure!(
        disturbed < effort.batches / starts * starts,
        "others used the machine in every batch of connects"
    );
    let rows = ARMS.iter().enumerate().map(|(number, arm)| {
        let ratios = |arms: &[Vec<f64>; ARMS.len()]| {
            arms[number].iter().zip(&arms[0]).map(|(rate, first)| rate / first).collect()
        };
        json!({
            "measure": MEASURE, "topology": "loopback", "arm": arm,
            "value": median(taken.iter().flat_map(|arms| arms[number].clone()).collect()), "unit": "/s",
            "vs_one": comparison(taken.iter().map(ratios).collect()), "disturbed": disturbed,
        })
    });
    Ok(rows.collect())
}

/// A daemon with so many services, each with one backend.
fn node(name: &str, services: u32, sinks: &Sinks) -> anyhow::Result<Node> {
    let mut node = Node::new(name)?;
    node.room = Some([2, 2].map(|times| times * services as usize));
    let mut text = String::new();
    for (number, port) in (0..services).zip(sinks.ports.iter().cycle()) {
        writeln!(
            text,
            "[[service]]\nname = \"s{number}\"\nnamespace = \"service.local\"\nport = {PORT}\nvip = \"{}\"\n\
             [[service.instance]]\nid = \"a\"\naddress = \"127.0.0.1\"\nport = {port}",
            vip(number)
        )?;
    }
    node.write_services(&text)?;
    node.start()?;
    Ok(node)
}

fn vip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 160, 0, 0).to_bits() + service)
}

fn address(service: u32) -> String {
    format!("{}:{PORT}", vip(service))
}

pub(super) fn markdown(rows: &[Value]) -> String {
    let mut text = String::new();
    for row in rows.iter().filter(|row| row["measure"] == MEASURE) {
        let rate = rounded(row["value"].as_f64().unwrap_or_default());
        let arm = row["arm"].as_str().unwrap_or_default();
        text += &format!("| {arm} | {rate} | {} |\n", ratio(&row["vs_one"]).unwrap_or_else(|| "-".into()));
    }
    if text.is_empty() {
        return text;
    }
    format!(
        "\n| TCP connects, one after the other | connects/s | relative to 1 service |\n|---|---|---|\n{text}"
    )
}
