//! What a `connect()` costs through mesh, against direct connects.
//!
//! All sockets of a run are made beforehand, some inside the managed cgroup and some outside, so
//! that nothing but the connects is between two looks at the clock. Slices of 16 connects of
//! every arm alternate, the order reversed in every other round (ABBA), and each slice is
//! compared with the direct slice of its own round. A second direct arm shows how much of a
//! difference is noise.

use std::{
    fmt::Write as _,
    fs,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context;
use rustix::{
    net::{AddressFamily, SocketType, connect, socket, sockopt::set_socket_linger},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use serde_json::{Value, json};

use crate::{
    build,
    node::Node,
    tools::{self, again_as_root, commit, enter, output, root},
};

const VIP: &str = "127.128.0.20";
const PORT: u16 = 8080;
const SLICE: usize = 16;
/// In the managed cgroup or not, dialling the VIP or not.
const ARMS: [(&str, bool, bool); 4] = [
    ("direct", false, false),
    ("mesh", true, true),
    ("hooked-untouched", true, false),
    ("direct-again", false, false),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A fifth of the rounds.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Five times the rounds.
    #[arg(long)]
    full: bool,
    #[arg(long, hide = true)]
    built: bool,
}

#[derive(clap::Args)]
pub(crate) struct ClientArgs {
    cgroup: PathBuf,
    protocol: String,
    vip: SocketAddr,
    direct: SocketAddr,
    rounds: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !args.built {
        build::mesh()?;
    }
    let mode = if args.quick { Some("--quick") } else { args.full.then_some("--full") };
    if let Some(result) = again_as_root(&["bench", "--built"], mode) {
        return result;
    }
    let batches = if args.quick {
        2
    } else if args.full {
        50
    } else {
        10
    };

    let (_sinks, port) = sinks()?;
    let mut node = Node::new("mesh-bench")?;
    let service = |protocol| {
        format!(
            "[[service]]\nname = \"bench\"\nnamespace = \"service.local\"\nprotocol = \"{protocol}\"\n\
             port = {PORT}\nvip = \"{VIP}\"\npolicy = \"random\"\n\
             [[service.instance]]\nid = \"only\"\naddress = \"127.0.0.1\"\nport = {port}\n"
        )
    };
    node.write_services(&(service("tcp") + &service("udp")))?;
    node.start()?;

    let mut rows = Vec::new();
    for protocol in ["udp", "tcp"] {
        rows.extend(measure(&node, protocol, port, batches)?);
    }
    rows.extend(hook_times(&node, port)?);
    report(&rows, batches)
}

/// A UDP socket and a TCP listener on the same port; connections wait in the listener's queue
/// only until the client resets them.
fn sinks() -> anyhow::Result<((UdpSocket, TcpListener), u16)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    rustix::net::listen(&listener, 4096)?;
    let port = listener.local_addr()?.port();
    let accepting = listener.try_clone()?;
    std::thread::spawn(move || accepting.incoming().for_each(drop));
    Ok(((UdpSocket::bind(("127.0.0.1", port))?, listener), port))
}

fn run_client(node: &Node, protocol: &str, port: u16, rounds: usize) -> anyhow::Result<String> {
    let mut client = Command::new(std::env::current_exe()?);
    client.arg("bench-client").arg(&node.cgroup).args([protocol, &format!("{VIP}:{PORT}")]);
    output(client.args([format!("127.0.0.1:{port}"), rounds.to_string()]))
}

/// Nanoseconds per connect of every arm, and their ratios to `direct` of the same round.
fn measure(node: &Node, protocol: &str, port: u16, batches: usize) -> anyhow::Result<Vec<Value>> {
    let mut slices: Vec<Vec<f64>> = vec![Vec::new(); ARMS.len()];
    for _ in 0..batches {
        for line in run_client(node, protocol, port, 100)?.lines() {
            for (arm, ns) in slices.iter_mut().zip(line.split(' ')) {
                arm.push(ns.parse().context("the client prints numbers")?);
            }
        }
    }
    let rows = ARMS.iter().zip(&slices).map(|((arm, ..), values)| {
        let ratios: Vec<f64> = values.iter().zip(&slices[0]).map(|(value, direct)| value / direct).collect();
        let (low, high) = confidence(&ratios);
        json!({
            "measure": format!("connect {protocol}"), "topology": "loopback", "arm": arm,
            "value": median(values.clone()), "unit": "ns",
            "vs_direct": {"ratio": median(ratios), "low": low, "high": high},
        })
    });
    Ok(rows.collect())
}

/// Nanoseconds per run of each program, by the kernel's own statistics.
fn hook_times(node: &Node, port: u16) -> anyhow::Result<Vec<Value>> {
    let _statistics = Statistics::on()?;
    let read = || -> anyhow::Result<Value> {
        let json = output(
            Command::new(tools::mesh()).args(["bpf", "programs", "-o", "json", "--config"]).arg(&node.config),
        )?;
        Ok(serde_json::from_str(&json)?)
    };
    let before = read()?;
    run_client(node, "tcp", port, 100)?;
    let after = read()?;
    let number = |all: &Value, n: usize, key: &str| all[n][key].as_f64().unwrap_or(0.0);
    let rows = (0..4).filter_map(|n| {
        let runs = number(&after, n, "runs") - number(&before, n, "runs");
        let ns = number(&after, n, "run_ns") - number(&before, n, "run_ns");
        (runs > 0.0).then(|| {
            json!({
                "measure": format!("run of {}", after[n]["name"].as_str().unwrap_or("?")), "topology": "loopback",
                "arm": "mesh", "value": ns / runs, "unit": "ns", "vs_direct": null,
            })
        })
    });
    Ok(rows.collect())
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

fn report(rows: &[Value], batches: usize) -> anyhow::Result<()> {
    let meta = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": commit(),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "cpus": std::thread::available_parallelism()?.get(),
        "load": fs::read_to_string("/proc/loadavg")?.trim(),
        "slices_per_arm": batches * 100,
        "connects_per_slice": SLICE,
        "note": "direct sockets are outside the managed cgroup, but on the same kernel: the static key that any \
                 attached connect program turns on is in every arm",
    });
    let dir = root().join("bench/report");
    fs::create_dir_all(&dir)?;
    let markdown = markdown(rows)?;
    fs::write(
        dir.join("report.json"),
        serde_json::to_string_pretty(&json!({"meta": meta, "rows": rows}))? + "\n",
    )?;
    fs::write(dir.join("report.md"), &markdown)?;
    println!("{markdown}\nwritten to {}", dir.display());
    Ok(())
}

fn markdown(rows: &[Value]) -> anyhow::Result<String> {
    let mut text =
        String::from("| measure | arm | median | vs direct (95 % interval) |\n|---|---|---|---|\n");
    for row in rows {
        let word = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let ratio = &row["vs_direct"];
        let number = |key: &str| ratio[key].as_f64().unwrap_or_default();
        let versus = match ratio {
            Value::Null => "-".into(),
            _ => format!("{:.3} ({:.3} to {:.3})", number("ratio"), number("low"), number("high")),
        };
        let value = row["value"].as_f64().unwrap_or_default();
        writeln!(text, "| {} | {} | {value:.0} {} | {versus} |", word("measure"), word("arm"), word("unit"))?;
    }
    Ok(text)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The 95 % bootstrap interval of the median.
fn confidence(values: &[f64]) -> (f64, f64) {
    // A fixed seed: the same measurements give the same report.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).expect("below a usize")
    };
    let mut resample = || median(values.iter().map(|_| values[random(values.len())]).collect());
    let mut medians: Vec<f64> = (0..400).map(|_| resample()).collect();
    medians.sort_by(f64::total_cmp);
    (medians[10], medians[389])
}

/// Prints a line per round: nanoseconds per connect, arm by arm.
pub(crate) fn client(args: &ClientArgs) -> anyhow::Result<()> {
    let kind = if args.protocol == "udp" { SocketType::DGRAM } else { SocketType::STREAM };
    let need = (ARMS.len() * SLICE * args.rounds + 100) as u64;
    // Only the soft limit: 6,500 files are within every usual hard limit.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(need), maximum })?;
    let make = |inside: bool| -> anyhow::Result<Vec<Vec<OwnedFd>>> {
        let slices = args.rounds * ARMS.iter().filter(|arm| arm.1 == inside).count();
        (0..slices)
            .map(|_| (0..SLICE).map(|_| Ok(socket(AddressFamily::INET, kind, None)?)).collect())
            .collect()
    };
    let mut outside = make(false)?;
    enter(&args.cgroup)?;
    let mut inside = make(true)?;

    for round in 0..args.rounds {
        let mut order: Vec<usize> = (0..ARMS.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        let mut ns = [0.0; ARMS.len()];
        for arm in order {
            let (_, managed, vip) = ARMS[arm];
            let sockets = if managed { inside.pop() } else { outside.pop() }.context("made enough")?;
            let target = if vip { args.vip } else { args.direct };
            let start = Instant::now();
            for socket in &sockets {
                connect(socket, &target)?;
            }
            ns[arm] = start.elapsed().as_nanos() as f64 / SLICE as f64;
            if kind == SocketType::STREAM {
                // A reset instead of TIME_WAIT: ports are not used up.
                sockets.iter().try_for_each(|socket| set_socket_linger(socket, Some(Duration::ZERO)))?;
            }
        }
        println!("{}", ns.map(|ns| format!("{ns:.1}")).join(" "));
    }
    Ok(())
}
