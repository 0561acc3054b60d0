//! The arms that are compared: cgroups with other hooks on them, and where their sockets dial.

use std::{
    fs,
    io::{BufRead, BufReader, Lines, Write},
    net::{TcpListener, UdpSocket},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::Context;

use super::world::Cgroup;
use crate::{
    node::Node,
    tools::{self, cargo, run},
};

pub(super) const VIP: &str = "127.128.0.20";
pub(super) const VIP6: &str = "fd00:6d65:7368::20";
pub(super) const PORT: u16 = 8080;

/// Which hooks the cgroup of an arm's sockets has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Hooks {
    None,
    /// As many as mesh has, but they do nothing.
    Empty,
    /// They translate, but keep nothing of the socket.
    Plain,
    Mesh,
}

pub(super) struct Arm {
    pub(super) name: &'static str,
    pub(super) hooks: Hooks,
    pub(super) dials_vip: bool,
}

const fn arm(name: &'static str, hooks: Hooks, dials_vip: bool) -> Arm {
    Arm { name, hooks, dials_vip }
}

pub(super) const ARMS: [Arm; 6] = [
    arm("direct", Hooks::None, false),
    arm("mesh", Hooks::Mesh, true),
    arm("empty-hooks", Hooks::Empty, false),
    arm("without-bookkeeping", Hooks::Plain, true),
    arm("hooked-untouched", Hooks::Mesh, false),
    arm("direct-again", Hooks::None, false),
];

/// Everything the arms need, for as long as it lives.
pub(super) struct Bench {
    pub(super) node: Node,
    pub(super) sinks: Sinks,
    /// Of sockets that nothing is hooked to.
    outside: Cgroup,
    empty: Holder,
    plain: Holder,
}

impl Bench {
    pub(super) fn start() -> anyhow::Result<Self> {
        run(cargo().args(["build", "--release", "--locked", "--package", "mesh-tests", "--bin", "hooks"]))?;
        let sinks = Sinks::open()?;
        let mut node = Node::new("mesh-bench")?;
        let service = |protocol, vip, backend| {
            let mut text = format!(
                "[[service]]\nname = \"bench\"\nnamespace = \"service.local\"\nprotocol = \"{protocol}\"\n\
                 port = {PORT}\nvip = \"{vip}\"\n"
            );
            for port in sinks.ports {
                text += &format!(
                    "[[service.instance]]\nid = \"{port}\"\naddress = \"{backend}\"\nport = {port}\n"
                );
            }
            text.replace("\"bench\"", &format!("\"bench-{}\"", if backend == "::1" { 6 } else { 4 }))
        };
        let services = ["tcp", "udp"]
            .map(|protocol| service(protocol, VIP, "127.0.0.1") + &service(protocol, VIP6, "::1"));
        node.write_services(&services.concat())?;
        node.start()?;
        let (empty, plain) = (
            Holder::start(&node, "empty", "empty")?,
            Holder::start(&node, "plain", "plain,empty_release,empty_sockops")?,
        );
        let outside = Cgroup::new(node.cgroup.with_file_name("mesh-bench-direct"))?;
        Ok(Self { node, sinks, outside, empty, plain })
    }

    pub(super) fn cgroup(&self, arm: &Arm) -> PathBuf {
        match arm.hooks {
            Hooks::None => self.outside.path(),
            Hooks::Empty => self.empty.cgroup.clone(),
            Hooks::Plain => self.plain.cgroup.clone(),
            Hooks::Mesh => self.node.cgroup.clone(),
        }
    }

    /// How many nanoseconds the hooks of each kind have run, by the kernel's statistics.
    pub(super) fn run_ns(&mut self) -> anyhow::Result<RunNs> {
        let mut list = Command::new(tools::mesh());
        list.args(["bpf", "programs", "-o", "json", "--config"]).arg(&self.node.config);
        let programs: serde_json::Value = serde_json::from_str(&tools::output(&mut list)?)?;
        let programs = programs.as_array().context("a list of programs")?;
        let mesh = programs.iter().filter_map(|program| program["run_ns"].as_f64()).sum();
        Ok(RunNs { empty: self.empty.run_ns()?, plain: self.plain.run_ns()?, mesh })
    }
}

/// How long all hooks of a kind have run.
pub(super) struct RunNs {
    pub(super) empty: f64,
    pub(super) plain: f64,
    pub(super) mesh: f64,
}

/// Hooks of the benchmark's own on a cgroup of their own; they go when this is dropped.
struct Holder {
    cgroup: PathBuf,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Holder {
    fn start(node: &Node, name: &str, prefixes: &str) -> anyhow::Result<Self> {
        let cgroup = node.cgroup.with_file_name(format!("mesh-bench-{name}"));
        fs::create_dir_all(&cgroup)?;
        let target = tools::root().join("target");
        let mut hooks = Command::new(target.join("release/hooks"));
        hooks.arg(target.join("bpf/bpfel-unknown-none/release/mesh-ebpf-bench")).arg(&node.pin_dir);
        hooks.args([prefixes.as_ref(), cgroup.as_os_str()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = hooks.spawn()?;
        let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
        let mut holder = Self { cgroup, stdin: child.stdin.take(), child, lines };
        // Its first answer says that the hooks are attached.
        holder.run_ns()?;
        Ok(holder)
    }

    fn run_ns(&mut self) -> anyhow::Result<f64> {
        self.stdin.as_mut().context("a pipe")?.write_all(b"\n")?;
        let line = self.lines.next().context("the holder of hooks has ended")??;
        Ok(line.parse()?)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.child.wait();
        let _ = fs::remove_dir(&self.cgroup);
    }
}

/// What the arms dial: two ports of 127.0.0.1 and of ::1, for TCP and UDP.
pub(super) struct Sinks {
    pub(super) ports: [u16; 2],
    listeners: Vec<TcpListener>,
    _datagrams: Vec<UdpSocket>,
}

impl Sinks {
    pub(super) fn open() -> anyhow::Result<Self> {
        let (mut all, mut datagrams) = (Vec::new(), Vec::new());
        let mut port = || -> anyhow::Result<u16> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let port = listener.local_addr()?.port();
            let listeners = [listener, TcpListener::bind(("::1", port))?];
            listeners.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
            all.extend(listeners);
            datagrams.extend([UdpSocket::bind(("127.0.0.1", port))?, UdpSocket::bind(("::1", port))?]);
            Ok(port)
        };
        Ok(Self { ports: [port()?, port()?], listeners: all, _datagrams: datagrams })
    }

    /// Takes the connections that clients have reset out of the listeners' queues.
    pub(super) fn accept(&self) {
        for listener in &self.listeners {
            while listener.accept().is_ok() {}
        }
    }
}
