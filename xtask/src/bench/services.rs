//! What a connect costs where there are many services, against where there is one.

use std::{fmt::Write, net::Ipv4Addr};

use serde_json::{Value, json};

use super::{
    arms::{PORT, Sinks},
    connect::{Client, Kind, rounds},
    report::{interval, rounded},
    stats::{comparison, median},
};
use crate::node::Node;

pub(super) const MEASURE: &str = "scale: connects, one after the other";
pub(super) const MANY: &str = "100,000 services, 1 is dialled";
const SERVICES: u32 = 100_000;
/// Of those that are dialled in turn, every so many is one.
const STEP: usize = 100;

/// Connects a second of each arm, and its ratio to the first of the same round.
pub(super) fn measure(batches: usize) -> anyhow::Result<Vec<Value>> {
    let sinks = Sinks::open()?;
    let (few, many) = (node("mesh-bench-few", 1, &sinks)?, node("mesh-bench-many", SERVICES, &sinks)?);
    let one = vec![address(0)];
    let some: Vec<_> = (0..SERVICES).step_by(STEP).map(address).collect();
    let arms = [
        ("1 service", &few, &one),
        (MANY, &many, &one),
        ("100,000 services, 1,000 are dialled in turn", &many, &some),
        ("1 service again", &few, &one),
    ];
    let mut slices = arms.map(|_| Vec::new());
    for _ in 0..batches {
        let clients =
            arms.iter().map(|(_, node, dialled)| Client::start(Kind::Tcp, dialled, Some(&node.cgroup)));
        for round in rounds(clients.collect::<anyhow::Result<_>>()?, &sinks)? {
            slices.iter_mut().zip(round).for_each(|(arm, [call, close])| arm.push(1e9 / (call + close)));
        }
    }
    let rows = arms.iter().zip(&slices).map(|((arm, ..), rates)| {
        let ratios: Vec<f64> = rates.iter().zip(&slices[0]).map(|(rate, first)| rate / first).collect();
        json!({
            "measure": MEASURE, "topology": "loopback", "arm": arm, "value": median(rates.clone()), "unit": "/s",
            "vs_one": comparison(ratios),
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
        let number = |key: &str| row["vs_one"][key].as_f64().unwrap_or_default();
        let versus = interval((number("ratio"), number("low"), number("high")));
        let rate = rounded(row["value"].as_f64().unwrap_or_default());
        text += &format!("| {} | {rate} | {versus} |\n", row["arm"].as_str().unwrap_or_default());
    }
    if text.is_empty() {
        return text;
    }
    format!(
        "\n| TCP connects, one after the other | connects/s | relative to 1 service |\n|---|---|---|\n{text}"
    )
}
