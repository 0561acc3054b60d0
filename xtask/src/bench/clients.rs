//! What an arm is asked with in slices of a second: wrk, oha, sockperf, iperf3, and connects of our own.

use std::{process::Command, time::Duration};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::{load::Running, world::Service};
use crate::tools::{output, tools};

/// Connections of the clients that have several.
const CONNECTIONS: &str = "16";

/// Of the latencies that oha says.
pub(super) const PERCENTILES: [&str; 4] = ["p50", "p90", "p99", "p99.9"];

/// What a slice gave.
pub(super) struct Taken {
    pub(super) values: Vec<f64>,
    /// Requests or connections, for the CPU time of one.
    pub(super) count: f64,
}

fn seconds(length: Duration) -> String {
    length.as_secs().max(1).to_string()
}

pub(super) fn wrk(running: &Running, length: Duration, more: &[&str]) -> anyhow::Result<Taken> {
    let mut wrk = running.site.client.command("wrk");
    wrk.args(["-t1", "-c", CONNECTIONS, "-d", &seconds(length)]).args(more).arg(running.url());
    let said = output(&mut wrk)?;
    let errors = said.lines().find(|line| line.contains("Non-2xx") || line.contains("Socket errors"));
    ensure!(errors.is_none(), "wrk: {}", errors.unwrap_or_default().trim());
    let count = said.lines().find_map(|line| line.trim().split_once(" requests in "));
    let rate = said.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    let (Some((count, _)), Some(rate)) = (count, rate) else { bail!("wrk says no rate: {said}") };
    Ok(Taken { values: vec![rate.trim().parse()?], count: count.parse()? })
}

pub(super) fn connects(running: &Running, length: Duration) -> anyhow::Result<Taken> {
    let mut client = running.site.client.part("connects")?;
    let targets = running.arm.targets(Service::Greet);
    client.arg(length.as_secs_f64().to_string()).args(targets.iter().map(ToString::to_string));
    let said = output(&mut client)?;
    let (count, seconds) = said.trim().split_once(' ').context("two numbers")?;
    let (count, seconds) = (count.parse::<f64>()?, seconds.parse::<f64>()?);
    Ok(Taken { values: vec![count / seconds], count })
}

pub(super) fn sockperf(running: &Running, length: Duration) -> anyhow::Result<Taken> {
    let target = running.arm.targets(Service::Echo)[0];
    let mut sockperf = running.site.client.command("sockperf");
    sockperf.args(["ping-pong", "--tcp", "-i", &target.ip().to_string(), "-p", &target.port().to_string()]);
    let said = output(sockperf.args(["-t", &seconds(length), "--full-rtt"]))?;
    let percentile = |of: &str| {
        let line = said.lines().find(|line| line.contains(&format!("percentile {of} =")));
        let value =
            line.and_then(|line| line.rsplit('=').next()).with_context(|| format!("sockperf: {said}"))?;
        Ok(value.trim().parse()?)
    };
    let values = ["50.000", "99.000"].iter().map(|of| percentile(of)).collect::<anyhow::Result<_>>()?;
    Ok(Taken { values, count: 0.0 })
}

pub(super) fn iperf(running: &Running, length: Duration) -> anyhow::Result<Taken> {
    let target = running.arm.targets(Service::Bulk)[0];
    let mut iperf = running.site.client.command("iperf3");
    iperf.args(["--client", &target.ip().to_string(), "--port", &target.port().to_string(), "--json"]);
    let said = iperf.args(["--time", &seconds(length)]).output()?;
    let said: Value = serde_json::from_slice(&said.stdout).context("iperf3 says no JSON")?;
    ensure!(said["error"].is_null(), "iperf3: {}", said["error"]);
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 says no rate")?;
    Ok(Taken { values: vec![bits / 1e6], count: 0.0 })
}

pub(super) struct Latencies {
    pub(super) rate: f64,
    /// In microseconds.
    pub(super) percentiles: Vec<f64>,
}

/// As fast as it can, or at a rate.
pub(super) fn oha(running: &Running, length: Duration, rate: Option<f64>) -> anyhow::Result<Latencies> {
    let mut oha: Command = running.site.client.command(tools().join("bin/oha"));
    oha.args([
        "--no-tui",
        "--output-format",
        "json",
        "-c",
        CONNECTIONS,
        "-z",
        &format!("{}ms", length.as_millis()),
    ]);
    if let Some(rate) = rate {
        oha.args(["-q", &format!("{rate:.0}"), "--latency-correction"]);
    }
    let said: Value = serde_json::from_str(&output(oha.arg(running.url()))?)?;
    let number = |value: &Value| value.as_f64().with_context(|| format!("oha: {said}"));
    let codes = said["statusCodeDistribution"].as_object().context("oha says no codes")?;
    ensure!(codes.keys().all(|code| code == "200"), "oha got errors: {}", said["statusCodeDistribution"]);
    let errors = said["errorDistribution"].as_object().context("oha says no errors")?;
    // What is under way when the time is over is no error.
    let errors: Vec<_> = errors.iter().filter(|(error, _)| !error.contains("deadline")).collect();
    ensure!(errors.is_empty(), "oha got errors: {errors:?}");
    let done: f64 = codes.values().filter_map(Value::as_f64).sum();
    let percentiles = &said["latencyPercentiles"];
    Ok(Latencies {
        rate: done / number(&said["summary"]["total"])?,
        percentiles: PERCENTILES
            .iter()
            .map(|of| Ok(number(&percentiles[of])? * 1e6))
            .collect::<anyhow::Result<_>>()?,
    })
}
