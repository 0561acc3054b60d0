//! The example: daemon, backends and a client, from nothing to calls that move away from a
//! backend that was removed.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::{
    build,
    tools::{self, as_root, find, is_root},
};

const VIP: &str = "127.128.0.10";
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
    if !is_root() {
        ensure!(find("sudo"), "the example loads programs into the kernel: run it as root, or install sudo");
        let mut again = as_root(env::current_exe()?);
        again.args(["run", "--built"]).args(args.once.then_some("--once"));
        return tools::run(&mut again);
    }
    // Before anything is started, so that Ctrl-C always comes by here and cleans up.
    let (tell, interrupted) = mpsc::channel();
    ctrlc::set_handler(move || {
        let _ = tell.send(());
    })?;

    let mut example = Example::start()?;
    example.calls("Three backends", &NAMES)?;
    println!("\nNow backend-2 leaves the registry file ({})", example.services.display());
    example.backends.remove("backend-2");
    example.write_services()?;
    example.wait_for(2)?;
    example.calls("Without backend-2", &["backend-1", "backend-3"])?;
    if !args.once {
        example.hint();
        let _ = interrupted.recv();
    }
    Ok(())
}

/// Everything the example made; dropping it removes all of it.
struct Example {
    dir: PathBuf,
    cgroup: PathBuf,
    services: PathBuf,
    socket: PathBuf,
    config: PathBuf,
    web: String,
    /// Name → port.
    backends: BTreeMap<&'static str, u16>,
    children: Vec<Child>,
}

impl Example {
    fn start() -> anyhow::Result<Self> {
        let dir = tools::root().join("target/example");
        let cgroup = cgroup2()?.join("mesh-example");
        fs::create_dir_all(&dir)?;
        let mut example = Self {
            services: dir.join("services.toml"),
            socket: dir.join("api.sock"),
            config: dir.join("mesh.toml"),
            web: web_address()?,
            dir,
            cgroup,
            backends: BTreeMap::new(),
            children: Vec::new(),
        };
        if example.mesh(&["status", "--brief"]).output().is_ok_and(|output| output.status.success()) {
            // Not ours to clean up.
            std::mem::forget(example);
            bail!("the example is already running");
        }
        fs::create_dir_all(&example.cgroup)?;
        for name in NAMES {
            let port = example.start_backend(name)?;
            example.backends.insert(name, port);
        }
        example.write_services()?;
        example.write_config()?;
        let daemon = Command::new(tools::mesh()).args(["run", "--config"]).arg(&example.config).spawn()?;
        example.children.push(daemon);
        let status = tools::output(&mut example.mesh(&["status", "--brief", "--wait=15s"]))?;
        println!("mesh: {status}");
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

    fn write_services(&self) -> anyhow::Result<()> {
        let mut text = format!(
            "# Change me while the daemon runs.\n[[service]]\nname = \"backend\"\nnamespace = \"service.local\"\n\
             port = {PORT}\nvip = \"{VIP}\"\npolicy = \"random\"\n"
        );
        for (name, port) in &self.backends {
            text += &format!("\n[[service.instance]]\nid = \"{name}\"\naddress = \"127.0.0.1\"\nport = {port}\n");
        }
        text += "\n# Nobody serves this one: a connect is refused at once.\n[[service]]\nname = \"empty\"\n\
                 namespace = \"service.local\"\nport = 8081\n";
        let new = self.services.with_extension("new");
        fs::write(&new, text)?;
        Ok(fs::rename(new, &self.services)?)
    }

    fn write_config(&self) -> anyhow::Result<()> {
        let show = |path: &Path| path.display().to_string();
        let text = format!(
            "[node]\ncgroup = {:?}\npin_dir = \"/sys/fs/bpf/mesh-example\"\nstate_dir = {:?}\n\n\
             [api]\nsocket = {:?}\n\n[web]\nlisten = {:?}\n\n[backends]\nallow_loopback = true\n\n\
             [[registry]]\ntype = \"file\"\npath = {:?}\n",
            show(&self.cgroup),
            show(&self.dir.join("state")),
            show(&self.socket),
            self.web,
            show(&self.services)
        );
        Ok(fs::write(&self.config, text)?)
    }

    fn mesh(&self, args: &[&str]) -> Command {
        let mut command = Command::new(tools::mesh());
        command.args(args).arg("--socket").arg(&self.socket);
        command
    }

    /// Waits until so many backends are in the maps.
    fn wait_for(&self, backends: usize) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            let list = tools::output(&mut self.mesh(&["explain", &format!("{VIP}:{PORT}"), "-o", "json"]))?;
            let list: Value = serde_json::from_str(&list)?;
            if list[0]["backends"].as_array().map(Vec::len) == Some(backends) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the daemon did not follow the file within 10 s")
    }

    /// Calls the service through its VIP and checks who answered.
    fn calls(&self, title: &str, expected: &[&str]) -> anyhow::Result<()> {
        let mut client = Command::new(env::current_exe()?);
        client.arg("example-client").arg(&self.cgroup).args([format!("{VIP}:{PORT}"), CALLS.to_string()]);
        let lines = tools::output(&mut client)?;
        let mut answers = BTreeMap::<_, u32>::new();
        let mut peers = BTreeMap::<_, u32>::new();
        for (name, peer) in lines.lines().filter_map(|line| line.split_once(' ')) {
            *answers.entry(name).or_default() += 1;
            *peers.entry(peer).or_default() += 1;
        }
        println!("\n{title}: {CALLS} calls to http://{VIP}:{PORT}");
        for (name, count) in &answers {
            println!("  {name} answered {count:2} times");
        }
        for (peer, count) in &peers {
            println!("  getpeername said {peer} {count} times");
        }
        ensure!(answers.values().sum::<u32>() == CALLS, "a call got no answer");
        ensure!(answers.keys().all(|name| expected.contains(name)), "a backend answered that is not in the registry");
        ensure!(answers.len() == expected.len(), "a backend in the registry got no call");
        ensure!(peers.keys().eq([&format!("{VIP}:{PORT}").as_str()]), "getpeername must show the VIP");
        Ok(())
    }

    fn hint(&self) {
        let (mesh, socket, cgroup) = (tools::mesh(), self.socket.display(), self.cgroup.display());
        let (mesh, services) = (mesh.display(), self.services.display());
        println!(
            "\nThe daemon runs until Ctrl-C. As root, in another shell:\n\
             \n  a call from inside the managed cgroup\n    \
             sh -c 'echo $$ > {cgroup}/cgroup.procs && exec curl -s http://{VIP}:{PORT}'\n\
             \n  what a connect would do, and why\n    {mesh} explain backend:{PORT} --socket {socket}\n\
             \n  what is in the kernel\n    {mesh} bpf lb --socket {socket}\n\
             \n  change the registry while it runs\n    $EDITOR {services}\n\
             \n  metrics\n    curl -s http://{}/metrics",
            self.web
        );
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        // The daemon last started goes first, by SIGTERM, so that it logs its end.
        if let Some(daemon) = self.children.get_mut(NAMES.len()) {
            let pid = rustix::process::Pid::from_child(daemon);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ = daemon.wait();
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = Command::new(tools::mesh()).args(["cleanup", "--config"]).arg(&self.config).stderr(Stdio::null()).status();
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn cgroup2() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields.get(2) == Some(&"cgroup2"));
    let mount = mount.context("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")?;
    Ok(mount[1].into())
}

/// The usual address where it is free, else any.
fn web_address() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:9464").or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    Ok(listener.local_addr()?.to_string())
}
