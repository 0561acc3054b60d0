//! What a socket costs, arm by arm: its `connect()` or datagram, and its end.
//!
//! Each arm has a process of its own in its cgroup. In turns they make 16 sockets and time the
//! calls on them; the order is shuffled, and reversed in every other round (ABBA), and each slice is
//! compared with the direct slice of its own round. A second direct arm shows how much of a difference
//! is noise. Servers accept between the slices, so that they disturb none. A batch in which others used
//! the machine is dropped.

use std::{
    fs,
    io::{self, BufRead, BufReader, Lines, Write},
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rustix::net::{
    AddressFamily, SendFlags, SocketType, connect, sendto, socket, sockopt::set_socket_linger,
};
use serde_json::{Value, json};

use super::{
    Effort,
    arms::{ARMS, Arm, Bench, PORT, Sinks, VIP, VIP6},
    load::order,
    stats::{comparison, median},
    usage::Usage,
};
use crate::{
    node::Node,
    tools::{self, enter},
};

const SLICE: usize = 16;
const ROUNDS: usize = 100;

/// Which socket, and to which family of addresses.
#[derive(Clone, Copy, clap::ValueEnum, PartialEq, Eq)]
pub(super) enum Kind {
    Tcp,
    Tcp6,
    TcpMapped,
    Mptcp,
    Udp,
    Datagram,
}

impl Kind {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Tcp, "connect tcp"),
        (Self::Tcp6, "connect tcp, IPv6"),
        (Self::TcpMapped, "connect tcp, v4-mapped"),
        (Self::Mptcp, "connect mptcp"),
        (Self::Udp, "connect udp"),
        (Self::Datagram, "first datagram, unconnected"),
    ];

    fn word(self) -> String {
        clap::ValueEnum::to_possible_value(&self).expect("every kind has a name").get_name().to_owned()
    }

    fn socket(self) -> anyhow::Result<OwnedFd> {
        let v6 = matches!(self, Self::Tcp6 | Self::TcpMapped);
        let family = if v6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let datagrams = matches!(self, Self::Udp | Self::Datagram);
        let kind = if datagrams { SocketType::DGRAM } else { SocketType::STREAM };
        Ok(socket(family, kind, (self == Self::Mptcp).then_some(rustix::net::ipproto::MPTCP))?)
    }

    fn addresses(self, dials_vip: bool, ports: [u16; 2]) -> [String; 2] {
        let (vip, direct) = match self {
            Self::Tcp6 => (VIP6, "::1"),
            _ => (VIP, "127.0.0.1"),
        };
        let (address, ports) = if dials_vip { (vip, [PORT; 2]) } else { (direct, ports) };
        let mut address: IpAddr = address.parse().expect("an address");
        if let (Self::TcpMapped, IpAddr::V4(v4)) = (self, address) {
            address = v4.to_ipv6_mapped().into();
        }
        ports.map(|port| SocketAddr::from((address, port)).to_string())
    }
}

#[derive(clap::Args)]
pub(crate) struct ClientArgs {
    kind: Kind,
    /// To enter first.
    cgroup: PathBuf,
    /// To dial in turn.
    addresses: Vec<SocketAddr>,
}

/// The daemon and its maps are made anew so often: what a connect costs differs from one start to the next.
pub(super) const STARTS: usize = 6;

/// What is measured of a kind of socket.
#[derive(Clone, Default)]
struct Taken {
    /// Of each start: of each arm, nanoseconds of each slice per call and per close.
    starts: Vec<Vec<[Vec<f64>; 2]>>,
    /// Nanoseconds that all hooks of a socket's life run together, beyond what empty ones take.
    hooks: [Vec<f64>; 2],
    batches: usize,
    disturbed: usize,
}

/// The arms whose hooks are timed: one of each, as sockets that mesh leaves alone run its programs too.
const TIMED: [&str; 2] = ["mesh", "without-bookkeeping"];

/// Nanoseconds per call of every arm, and their ratios to `direct` of the same round; and those of the hooks, by
/// the kernel's own statistics. It looks at its clock in every run, so a callback that only mesh has costs more
/// there than it does otherwise.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    let mut all = Kind::ALL.map(|_| Taken::default());
    let starts = STARTS.min(effort.batches);
    for _ in 0..starts {
        let mut bench = Bench::start()?;
        for ((kind, _), taken) in Kind::ALL.into_iter().zip(&mut all) {
            let mut slices = vec![<[Vec<f64>; 2]>::default(); ARMS.len()];
            for _ in 0..effort.batches / starts {
                let (rounds, disturbed) = run_clients(&bench, kind, &ARMS.each_ref())?;
                taken.batches += 1;
                if disturbed && !effort.noisy {
                    taken.disturbed += 1;
                    continue;
                }
                for round in rounds {
                    for (arm, ns) in slices.iter_mut().zip(round) {
                        arm.iter_mut().zip(ns).for_each(|(values, ns)| values.push(ns));
                    }
                }
                let times = hook_times(&mut bench, kind)?;
                taken.hooks.iter_mut().zip(times).for_each(|(values, ns)| values.push(ns));
            }
            taken.starts.push(slices);
        }
    }
    let mut rows = Vec::new();
    for ((_, measure), taken) in Kind::ALL.into_iter().zip(&all) {
        ensure!(taken.disturbed < taken.batches, "{measure}: others used the machine in every batch");
        for (end, what) in [measure.to_owned(), format!("{measure}: close")].iter().enumerate() {
            for (number, arm) in ARMS.iter().enumerate() {
                let compare = |by: fn((&f64, &f64)) -> f64| {
                    let pairs = |arms: &Vec<[Vec<f64>; 2]>| {
                        arms[number][end].iter().zip(&arms[0][end]).map(by).collect::<Vec<_>>()
                    };
                    comparison(taken.starts.iter().map(pairs).collect())
                };
                let values = taken.starts.iter().flat_map(|arms| arms[number][end].clone());
                rows.push(json!({
                    "measure": what, "topology": "loopback", "arm": arm.name,
                    "value": median(values.collect()), "unit": "ns",
                    "vs_direct": compare(|(value, direct)| value / direct),
                    "over_direct": compare(|(value, direct)| value - direct),
                    "slices": taken.batches * ROUNDS, "disturbed": taken.disturbed * ROUNDS,
                }));
            }
        }
    }
    for ((_, measure), taken) in Kind::ALL.into_iter().zip(all) {
        for (arm, values) in TIMED.into_iter().zip(taken.hooks) {
            rows.push(json!({
                "measure": format!("hooks of {}", measure.trim_start_matches("connect ")), "topology": "loopback",
                "arm": arm, "value": median(values), "unit": "ns", "vs_direct": null,
            }));
        }
    }
    Ok(rows)
}

fn hook_times(bench: &mut Bench, kind: Kind) -> anyhow::Result<[f64; 2]> {
    let _statistics = Statistics::on()?;
    let arms: Vec<_> =
        ARMS.iter().filter(|arm| arm.name == "empty-hooks" || TIMED.contains(&arm.name)).collect();
    let sockets = ((ROUNDS + 1) * SLICE) as f64;
    let before = bench.run_ns()?;
    run_clients(bench, kind, &arms)?;
    let after = bench.run_ns()?;
    let empty = after.empty - before.empty;
    Ok([after.mesh - before.mesh, after.plain - before.plain].map(|ns| (ns - empty) / sockets))
}

/// What [`rounds`] says of the arms.
fn run_clients(bench: &Bench, kind: Kind, arms: &[&Arm]) -> anyhow::Result<(Vec<Round>, bool)> {
    let clients = arms.iter().map(|arm| {
        let addresses = kind.addresses(arm.dials_vip, bench.sinks.ports);
        Client::start(kind, &addresses, &bench.cgroup(arm))
    });
    rounds(clients.collect::<anyhow::Result<_>>()?, &bench.sinks)
}

/// Of each client, nanoseconds per call and per close.
type Round = Vec<[f64; 2]>;

/// Lets clients take turns; and whether others used the machine meanwhile.
pub(super) fn rounds(mut clients: Vec<Client>, sinks: &Sinks) -> anyhow::Result<(Vec<Round>, bool)> {
    // The first slice warms up.
    for client in &mut clients {
        client.slice()?;
        sinks.accept();
    }
    let before = Usage::now([])?;
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let mut ns = vec![[0.0; 2]; clients.len()];
        for client in order(clients.len(), round) {
            ns[client] = clients[client].slice()?;
            sinks.accept();
        }
        rounds.push(ns);
    }
    Ok((rounds, Usage::now([])?.since(&before).disturbed))
}

/// The process of an arm.
pub(super) struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Client {
    /// In this cgroup, it dials the addresses in turn.
    pub(super) fn start(kind: Kind, addresses: &[String], cgroup: &Path) -> anyhow::Result<Self> {
        let mut client = Command::new(std::env::current_exe()?);
        client.args(["bench-client", &kind.word()]).arg(cgroup).args(addresses);
        let mut child = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
        Ok(Self { stdin: child.stdin.take(), child, lines })
    }

    fn slice(&mut self) -> anyhow::Result<[f64; 2]> {
        self.stdin.as_mut().context("a pipe")?.write_all(b"\n")?;
        let line = self.lines.next().context("a client has ended")??;
        let (call, close) = line.split_once(' ').context("a client prints two numbers")?;
        Ok([call.parse()?, close.parse()?])
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.child.wait();
    }
}

/// For each line of its input one slice: nanoseconds per call and per close.
pub(crate) fn client(args: &ClientArgs) -> anyhow::Result<()> {
    enter(&args.cgroup)?;
    let mut addresses = args.addresses.iter().cycle();
    for line in io::stdin().lines() {
        line?;
        let sockets = (0..SLICE).map(|_| args.kind.socket()).collect::<anyhow::Result<Vec<_>>>()?;
        let start = Instant::now();
        for (socket, address) in sockets.iter().zip(addresses.by_ref()) {
            match args.kind {
                Kind::Datagram => ensure!(sendto(socket, b"x", SendFlags::empty(), address)? == 1),
                _ => connect(socket, address)?,
            }
        }
        let called = start.elapsed();
        if !matches!(args.kind, Kind::Udp | Kind::Datagram) {
            // A reset instead of TIME_WAIT: ports are not used up.
            sockets.iter().try_for_each(|socket| set_socket_linger(socket, Some(Duration::ZERO)))?;
        }
        let start = Instant::now();
        drop(sockets);
        let [called, closed] = [called, start.elapsed()].map(|time| time.as_nanos() as f64 / SLICE as f64);
        println!("{called:.1} {closed:.1}");
    }
    Ok(())
}

/// How often the programs of a node run.
pub(super) struct Runs {
    config: PathBuf,
    before: u64,
    _statistics: Statistics,
}

impl Runs {
    /// Counts from now on.
    pub(super) fn count(node: &Node) -> anyhow::Result<Self> {
        let mut runs = Self { config: node.config.clone(), before: 0, _statistics: Statistics::on()? };
        runs.before = runs.now()?;
        Ok(runs)
    }

    /// Since then.
    pub(super) fn runs(&self) -> anyhow::Result<u64> {
        Ok(self.now()? - self.before)
    }

    fn now(&self) -> anyhow::Result<u64> {
        let mut list = Command::new(tools::mesh());
        list.args(["bpf", "programs", "-o", "json", "--config"]).arg(&self.config);
        let programs: Value = serde_json::from_str(&tools::output(&mut list)?)?;
        let programs = programs.as_array().context("a list of programs")?;
        Ok(programs.iter().filter_map(|program| program["runs"].as_u64()).sum())
    }
}

/// The kernel's statistics of program runs, as they were again afterwards.
struct Statistics(String);

const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";

impl Statistics {
    fn on() -> anyhow::Result<Self> {
        let before = fs::read_to_string(STATISTICS)?;
        fs::write(STATISTICS, "1")?;
        Ok(Self(before))
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        let _ = fs::write(STATISTICS, &self.0);
    }
}
