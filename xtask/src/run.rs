//! The example: daemon, backends and a client, from nothing to calls that move away from a
//! backend that was removed.

use std::{
    collections::BTreeMap,
    env,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::{
    build,
    node::Node,
    tools::{self, again_as_root, as_root},
};

const SERVICE: &str = "backend.service.local";
const PORT: u16 = 8080;
const CALLS: u32 = 30;
const NAMES: [&str; 3] = ["backend-1", "backend-2", "backend-3"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Exit after the calls: 0 only if they all worked.
    #[arg(long)]
    once: bool,
    /// Set by the example itself when it runs itself again through sudo.
    #[arg(long, hide = true)]
    built: bool,
    /// Arguments for `mesh run`, which then runs instead of the example.
    #[arg(last = true)]
    mesh: Vec<String>,
}

impl Args {
    pub(crate) fn once() -> Self {
        Self { once: true, built: false, mesh: Vec::new() }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !args.built {
        build::mesh()?;
    }
    if !args.mesh.is_empty() {
        return tools::run(as_root(tools::mesh()).arg("run").args(&args.mesh));
    }
    if let Some(result) = again_as_root(&["run", "--built"], args.once.then_some("--once")) {
        return result;
    }
    // Before anything is started, so that Ctrl-C always comes by here and cleans up.
    let (tell, interrupted) = mpsc::channel();
    ctrlc::set_handler(move || {
        let _ = tell.send(());
    })?;

    let example = Example::start()?;
    example.calls("Three backends", &NAMES)?;
    println!("\nNow backend-2 is deregistered");
    tools::run(&mut example.node.mesh(&["instance", "deregister", SERVICE, "backend-2"]))?;
    example.wait_for(2)?;
    example.calls("Without backend-2", &["backend-1", "backend-3"])?;
    if !args.once {
        example.hint();
        let _ = interrupted.recv();
    }
    Ok(())
}

/// A node with three backends; dropping it removes all of it.
struct Example {
    node: Node,
    vip: String,
    children: Vec<Child>,
}

impl Example {
    fn start() -> anyhow::Result<Self> {
        let node = Node::with_embedded("mesh-example")?;
        let mut example = Self { node, vip: String::new(), children: Vec::new() };
        example.node.start()?;
        for name in NAMES {
            let port = example.start_backend(name)?;
            example.register(name, port)?;
        }
        example.wait_for(NAMES.len())?;
        let service = tools::output(&mut example.node.mesh(&["service", "get", SERVICE, "-o", "json"]))?;
        let service: Value = serde_json::from_str(&service)?;
        example.vip = service["vips"][0].as_str().context("the service has a VIP")?.to_owned();
        let status = tools::output(&mut example.node.mesh(&["status", "--brief", "--wait=15s"]))?;
        println!("mesh: {}", status.trim());
        Ok(example)
    }

    fn start_backend(&mut self, name: &'static str) -> anyhow::Result<u16> {
        let mut command = Command::new(env::current_exe()?);
        let mut child = command.args(["example-backend", name]).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        self.children.push(child);
        let mut port = String::new();
        BufReader::new(stdout).read_line(&mut port)?;
        port.trim().parse().with_context(|| format!("{name} did not start"))
    }

    fn register(&self, name: &str, port: u16) -> anyhow::Result<()> {
        let (service, port) = (format!("{SERVICE}:{PORT}"), port.to_string());
        let args =
            ["instance", "register", &service, "--address", "127.0.0.1", "--port", &port, "--id", name];
        tools::run(&mut self.node.mesh(&args))
    }

    /// Waits until so many backends are in the maps.
    fn wait_for(&self, backends: usize) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            // A name that is not there yet is an error.
            let name = format!("{SERVICE}:{PORT}");
            let list = self.node.mesh(&["explain", &name, "-o", "json"]).output()?;
            let list: Value = serde_json::from_slice(&list.stdout).unwrap_or_default();
            if list[0]["backends"].as_array().map(Vec::len) == Some(backends) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the daemon did not follow its registry within 10 s")
    }

    /// The client, inside the managed cgroup.
    fn client(&self) -> anyhow::Result<Command> {
        let mut client = Command::new(env::current_exe()?);
        client.arg("example-client").arg(&self.node.cgroup);
        Ok(client)
    }

    /// Whether this machine's own resolver asks a name server for the service, and so the daemon: one
    /// that keeps `.local` for multicast DNS does not.
    fn has_name(&self) -> bool {
        let probe =
            || Ok::<_, anyhow::Error>(self.client()?.args([&format!("{SERVICE}:{PORT}"), "0"]).output()?);
        // The daemon has been listening for a moment only.
        (0..50).any(|_| {
            let resolves = probe().is_ok_and(|output| output.status.success());
            if !resolves {
                std::thread::sleep(Duration::from_millis(20));
            }
            resolves
        })
    }

    /// Calls the service, by name where that works, and checks who answered.
    fn calls(&self, title: &str, expected: &[&str]) -> anyhow::Result<()> {
        let vip = format!("{}:{PORT}", self.vip);
        let address = if self.has_name() { format!("{SERVICE}:{PORT}") } else { vip.clone() };
        let lines = tools::output(self.client()?.args([&address, &CALLS.to_string()]))?;
        let mut answers = BTreeMap::<_, u32>::new();
        let mut peers = BTreeMap::<_, u32>::new();
        for (name, peer) in lines.lines().filter_map(|line| line.split_once(' ')) {
            *answers.entry(name).or_default() += 1;
            *peers.entry(peer).or_default() += 1;
        }
        println!("\n{title}: {CALLS} calls to http://{address}");
        for (name, count) in &answers {
            println!("  {name} answered {count:2} times");
        }
        for (peer, count) in &peers {
            println!("  getpeername said {peer} {count} times");
        }
        ensure!(answers.values().sum::<u32>() == CALLS, "a call got no answer");
        ensure!(
            answers.keys().all(|name| expected.contains(name)),
            "a backend answered that is not in the registry"
        );
        ensure!(answers.len() == expected.len(), "a backend in the registry got no call");
        ensure!(peers.keys().eq([&vip.as_str()]), "getpeername must show the VIP");
        Ok(())
    }

    fn hint(&self) {
        let (mesh, socket, cgroup) = (tools::mesh(), self.node.socket.display(), self.node.cgroup.display());
        let (mesh, vip) = (mesh.display(), &self.vip);
        println!(
            "\nThe daemon runs until Ctrl-C. As root, in another shell:\n\
             \n  a call from inside the managed cgroup\n    \
             sh -c 'echo $$ > {cgroup}/cgroup.procs && exec curl -s http://{vip}:{PORT}'\n\
             \n  what a connect would do, and why\n    {mesh} explain backend:{PORT} --socket {socket}\n\
             \n  what is in the kernel\n    {mesh} bpf lb --socket {socket}\n\
             \n  change the registry while it runs\n    {mesh} instance deregister {SERVICE} backend-1 --socket {socket}\n\
             \n  metrics\n    curl -s http://{}/metrics",
            self.node.web
        );
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
