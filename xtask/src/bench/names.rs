//! How many questions the daemon answers and how soon, beside two servers that nobody here wrote.
//!
//! Each serves the same records at a loopback address of its own, in one process. dnsperf asks one
//! after the other, in turns of half a second whose order is reversed in every other round: as fast
//! as they answer, then at a rate that is far from the limit of each, for the latencies.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::stats::comparison;
use crate::{
    node::Node,
    tools::{output, root},
};

const ARMS: [&str; 3] = ["mesh", "dnsmasq", "unbound"];
const RECORDS: u16 = 1000;
/// Of a turn, in seconds.
const LENGTH: &str = "0.5";
/// Questions a second where latencies are measured.
const RATE: &str = "10000";
/// As long as an answer may have.
const TTL: u32 = 5;
/// How long a server may take to serve what it has.
const START: Duration = Duration::from_secs(15);

const MEASURES: [(&str, &str); 3] = [
    ("names: questions answered in a second", "/s"),
    ("names: latency p50 at 10,000 questions a second", "us"),
    ("names: latency p99 at 10,000 questions a second", "us"),
];

/// Rows of every measure and arm: the median over the turns, and its 95 % interval.
pub(super) fn measure(rounds: usize) -> anyhow::Result<Vec<Value>> {
    let dir = root().join("target/mesh-bench-names");
    let mut node = Node::new("mesh-bench-names")?;
    node.names = Some(address(0));
    node.write_services(&services())?;
    node.start()?;
    let _servers = [dnsmasq(&dir)?, unbound(&dir)?];
    for arm in 0..ARMS.len() {
        wait_for(arm)?;
    }
    let questions = dir.join("questions");
    let lines: Vec<_> = (0..RECORDS).map(|n| format!("{} A\n", name(n))).collect();
    fs::write(&questions, lines.concat())?;

    let mut turns = [const { [const { Vec::new() }; ARMS.len()] }; MEASURES.len()];
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..ARMS.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for arm in order {
            let [fast, p50, p99] = &mut turns;
            fast[arm].push(rate(&dnsperf(arm, &questions, &[])?)?);
            let mut latencies = latencies(&dnsperf(arm, &questions, &["-Q", RATE, "-v"])?)?;
            latencies.sort_by(f64::total_cmp);
            p50[arm].push(latencies[latencies.len() / 2]);
            p99[arm].push(latencies[latencies.len() * 99 / 100]);
        }
    }
    let mut rows = Vec::new();
    for ((measure, unit), arms) in MEASURES.iter().zip(turns) {
        for (arm, values) in ARMS.iter().zip(arms) {
            let turns = comparison(values.into_iter().map(|value| vec![value]).collect()).unwrap_or_default();
            rows.push(json!({
                "measure": measure, "topology": format!("{RECORDS} records, loopback"), "arm": arm,
                "value": turns["ratio"], "low": turns["low"], "high": turns["high"], "unit": unit, "vs_direct": null,
            }));
        }
    }
    Ok(rows)
}

fn address(arm: usize) -> SocketAddr {
    let last = u8::try_from(arm).expect("there are three") + 1;
    (Ipv4Addr::new(127, 64, 53, last), 5300).into()
}

fn name(record: u16) -> String {
    format!("s{record}.service.local")
}

fn vip(record: u16) -> Ipv4Addr {
    let [high, low] = record.to_be_bytes();
    Ipv4Addr::new(127, 130, high, low)
}

fn services() -> String {
    let service = |n| {
        format!(
            "[[service]]\nname = \"s{n}\"\nnamespace = \"service.local\"\nport = 80\nvip = \"{}\"\n\
             [[service.instance]]\nid = \"one\"\naddress = \"127.0.0.1\"\nport = 80\n",
            vip(n)
        )
    };
    (0..RECORDS).map(service).collect()
}

/// A server that ends when this is dropped.
struct Server(Child);

impl Server {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let program = command.get_program().to_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("cannot run {}", program.display()))?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn dnsmasq(dir: &Path) -> anyhow::Result<Server> {
    let hosts = dir.join("hosts");
    let lines: Vec<_> = (0..RECORDS).map(|n| format!("{} {}\n", vip(n), name(n))).collect();
    fs::write(&hosts, lines.concat())?;
    let at = address(1);
    let mut dnsmasq = Command::new("dnsmasq");
    dnsmasq.args(["--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file"]);
    dnsmasq.args(["--no-resolv", "--no-hosts", "--local=/service.local/", "--bind-interfaces"]);
    dnsmasq.arg(format!("--addn-hosts={}", hosts.display()));
    dnsmasq.args([format!("--listen-address={}", at.ip()), format!("--port={}", at.port())]);
    dnsmasq.arg(format!("--local-ttl={TTL}"));
    Server::start(&mut dnsmasq)
}

fn unbound(dir: &Path) -> anyhow::Result<Server> {
    let at = address(2);
    let mut text = format!(
        "server:\n interface: {}@{}\n directory: {dir:?}\n chroot: \"\"\n username: \"\"\n pidfile: \"\"\n \
         use-syslog: no\n do-daemonize: no\n do-ip6: no\n verbosity: 0\n module-config: \"iterator\"\n \
         local-zone: \"service.local.\" static\n",
        at.ip(),
        at.port(),
    );
    for n in 0..RECORDS {
        writeln!(text, " local-data: \"{}. {TTL} IN A {}\"", name(n), vip(n))?;
    }
    text += "remote-control:\n control-enable: no\n";
    let config = dir.join("unbound.conf");
    fs::write(&config, text)?;
    Server::start(Command::new("unbound").arg("-c").arg(config))
}

/// Waits until a server gives the right answer for every record.
fn wait_for(arm: usize) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        match (0..RECORDS).try_for_each(|n| ask(address(arm), n)) {
            Ok(()) => return Ok(()),
            Err(error) if start.elapsed() > START => {
                return Err(error.context(format!("{} does not serve the records", ARMS[arm])));
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn ask(server: SocketAddr, record: u16) -> anyhow::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.connect(server)?;
    let mut question = record.to_be_bytes().to_vec();
    question.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name(record).split('.') {
        question.push(u8::try_from(label.len())?);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    socket.send(&question)?;
    let mut reply = [0; 512];
    let length = socket.recv(&mut reply)?;
    // One record, and nothing behind it: a pointer to the name, A, IN, the time, 4 bytes.
    let mut record_bytes = vec![0xc0, 12, 0, 1, 0, 1];
    record_bytes.extend(TTL.to_be_bytes());
    record_bytes.extend([0, 4]);
    record_bytes.extend(vip(record).octets());
    let right =
        reply[..length].strip_prefix(&question[..2]).is_some_and(|rest| rest.ends_with(&record_bytes));
    ensure!(right, "another answer for {}: {:?}", name(record), &reply[..length]);
    Ok(())
}

/// What dnsperf prints of a turn in which every question was answered.
fn dnsperf(arm: usize, questions: &Path, more: &[&str]) -> anyhow::Result<String> {
    let server = address(arm);
    let mut dnsperf = Command::new("dnsperf");
    dnsperf.args(["-s", &server.ip().to_string(), "-p", &server.port().to_string(), "-l", LENGTH]);
    let text = output(dnsperf.args(more).arg("-d").arg(questions))?;
    let codes = statistic(&text, "Response codes:")?;
    let all = statistic(&text, "Queries lost:")?.starts_with("0 ");
    if !all || !codes.starts_with("NOERROR ") || codes.contains(", ") {
        bail!("{} did not answer every question:\n{}", ARMS[arm], statistics(&text));
    }
    Ok(text)
}

fn statistics(text: &str) -> &str {
    text.find("Statistics:").map_or(text, |at| &text[at..])
}

fn statistic<'a>(text: &'a str, what: &str) -> anyhow::Result<&'a str> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(what));
    line.map(str::trim).with_context(|| format!("dnsperf does not say {what:?}"))
}

fn rate(text: &str) -> anyhow::Result<f64> {
    Ok(statistic(text, "Queries per second:")?.parse()?)
}

/// In microseconds, of lines such as `> NOERROR s1.service.local A 0.000214`.
fn latencies(text: &str) -> anyhow::Result<Vec<f64>> {
    let answers = text.lines().filter(|line| line.starts_with("> NOERROR "));
    let seconds = answers.map(|line| line.rsplit(' ').next().unwrap_or_default().parse::<f64>());
    let all = seconds.map(|seconds| seconds.map(|seconds| seconds * 1e6)).collect::<Result<Vec<_>, _>>()?;
    ensure!(!all.is_empty(), "dnsperf printed no latencies");
    Ok(all)
}

/// What is compared, and by what: versions, null where it is not there.
pub(super) fn versions() -> Value {
    json!({
        "dnsmasq": version("dnsmasq", "--version", "version "),
        "unbound": version("unbound", "-V", "Version "),
        "dnsperf": version("dnsperf", "-h", "Version "),
    })
}

/// The word behind a text that a program prints.
pub(super) fn version(program: impl AsRef<std::ffi::OsStr>, flag: &str, before: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    Some(text.split_once(before)?.1.split_whitespace().next()?.to_owned())
}

pub(super) fn is_ours(row: &Value) -> bool {
    row["measure"].as_str().is_some_and(|measure| measure.starts_with("names: "))
}

/// One line a measure, one column a server.
pub(super) fn markdown(rows: &[Value]) -> String {
    let ours: Vec<_> = rows.iter().filter(|row| is_ours(row)).collect();
    if ours.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "\n| {RECORDS} names: median (95 % interval, over turns) | {} |\n|---|{}\n",
        ARMS.join(" | "),
        "---|".repeat(ARMS.len())
    );
    for (measure, unit) in MEASURES {
        let cell = |arm: &&str| {
            let row = ours.iter().find(|row| row["measure"] == measure && row["arm"] == **arm);
            let number = |key: &str| row.and_then(|row| row[key].as_f64()).unwrap_or(f64::NAN);
            let sure = if number("low").is_nan() {
                String::new()
            } else {
                format!(" ({:.0} to {:.0})", number("low"), number("high"))
            };
            format!("{:.0} {unit}{sure}", number("value"))
        };
        let cells: Vec<_> = ARMS.iter().map(cell).collect();
        text += &format!("| {} | {} |\n", measure.trim_start_matches("names: "), cells.join(" | "));
    }
    text
}
