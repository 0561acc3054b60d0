//! Who used the CPUs.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use super::world::OURS;
use crate::node::cgroup2;

/// Of a slice, the part of the machine that others may use, beyond what clocks that tick differ by.
const FOREIGN: f64 = 0.1;

/// What was used up to a moment.
pub(super) struct Usage {
    at: Instant,
    /// By an arm's task, its proxies or daemon, and the server.
    arm: Duration,
    /// By all of the benchmark.
    ours: Duration,
    machine: Duration,
}

/// What was used between two moments.
pub(super) struct Used {
    pub(super) arm: Duration,
    /// Whether others used so much that the slice says nothing.
    pub(super) disturbed: bool,
}

impl Usage {
    pub(super) fn now<'a>(cgroups: impl IntoIterator<Item = &'a Path>) -> anyhow::Result<Self> {
        let softirqs = softirqs();
        let arm = cgroups.into_iter().map(of_cgroup).sum::<anyhow::Result<Duration>>()?;
        let mut ours = softirqs + own()?;
        for entry in fs::read_dir(cgroup2()?)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(OURS) {
                ours += of_cgroup(&entry.path())?;
            }
        }
        Ok(Self { at: Instant::now(), arm: arm + softirqs, ours, machine: machine()? })
    }

    pub(super) fn since(&self, before: &Self) -> Used {
        let foreign = (self.machine - before.machine).saturating_sub(self.ours - before.ours);
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let all = (self.at - before.at).as_secs_f64() * cpus as f64;
        let limit = FOREIGN * all + ticks("2").as_secs_f64();
        Used { arm: self.arm - before.arm, disturbed: foreign.as_secs_f64() > limit }
    }
}

pub(super) fn of_cgroup(path: &Path) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(path.join("cpu.stat"))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Ok(Duration::from_micros(usage.unwrap_or_default().trim().parse()?))
}

/// A hundredth of a second, the unit of the files below.
fn ticks(text: &str) -> Duration {
    Duration::from_millis(text.parse::<u64>().unwrap_or_default() * 10)
}

/// Everything but idle, with what the hypervisor gave to others.
fn machine() -> anyhow::Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let mut fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    // user nice system idle iowait irq softirq steal; guests' time is in user.
    let fields: Vec<_> = fields.by_ref().take(8).collect();
    Ok([0, 1, 2, 5, 6, 7].iter().filter_map(|field| fields.get(*field)).map(|field| ticks(field)).sum())
}

/// What the kernel's threads for packets used: nobody's, but the benchmark's doing.
fn softirqs() -> Duration {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let packets =
        |path: &Path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"));
    processes.filter(|path| packets(path)).map(|path| of_process(&path)).sum()
}

/// By this program itself.
fn own() -> anyhow::Result<Duration> {
    Ok(of_process(Path::new("/proc/self")))
}

fn of_process(path: &Path) -> Duration {
    let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    // utime and stime, counted from behind the name.
    fields.skip(11).take(2).map(ticks).sum()
}
