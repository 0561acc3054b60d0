//! What the live tests stand on: a daemon of their own with a private cgroup, pin folder and
//! state, network namespaces, and servers that say who they are.
//!
//! Everything is removed when it is dropped, also when a test fails.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, ErrorKind, Lines, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

pub mod certificates;
pub mod etcd;
pub mod maps;
pub mod netns;
pub mod server;

use netns::Host;

/// Longest wait for something that should happen at once.
fn patience() -> Duration {
    let emulated = std::env::var_os("MESH_TEST_EMULATED").is_some();
    Duration::from_secs(if emulated { 120 } else { 20 })
}

/// The daemon under test: what `cargo xtask build` leaves.
pub fn binary() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/mesh");
    assert!(path.exists(), "no {}: run `cargo xtask test`, which builds it", path.display());
    path
}

/// Another version of it, with another layout of the maps.
pub fn other_binary() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/other/mesh");
    assert!(path.exists(), "no {}: run `cargo xtask test`, which builds it", path.display());
    path
}

/// Whether the full counts were asked for (`cargo xtask test --long`).
pub fn is_long() -> bool {
    std::env::var_os("MESH_TEST_LONG").is_some()
}

/// A measured figure, for a person to read: `cargo xtask test --long` keeps them.
pub fn figure(text: &str) {
    println!("figure: {text}");
}

/// The page in `docs` holds this table; it is put there when that is asked for.
pub fn documents(page: &str, table: &str) {
    /// What stands around the table in a page.
    const MARKS: [&str; 2] = ["<!-- table -->\n", "<!-- end of table -->\n"];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    let text = fs::read_to_string(&path).unwrap();
    let [begin, end] = MARKS;
    let (before, rest) = text.split_once(begin).expect("the page has a table");
    let (held, after) = rest.split_once(end).expect("the table ends");
    if std::env::var_os("MESH_UPDATE_DOCS").is_some() {
        fs::write(path, [before, begin, table, end, after].concat()).unwrap();
    } else {
        assert_eq!(held, table, "docs/{page} is not what was seen; MESH_UPDATE_DOCS=1 writes it");
    }
}

/// Runs a command that must work.
pub fn done(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output));
}

/// Nanoseconds on the clock that all processes share.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Waits until `condition` holds; panics with `what` if it never does.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < patience(), "waited {:?} in vain: {what}", patience());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Removes a folder and all that is in it, also while the daemon puts its pins back.
pub fn wipe(folder: &Path) {
    wait_until("the folder is gone", || match fs::remove_dir_all(folder) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => false,
        Err(error) => panic!("{}: {error}", folder.display()),
    });
}

/// A name that no other test, in this or another process, has.
pub fn unique(prefix: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A daemon with everything private to it.
pub struct Mesh {
    pub dir: TempDir,
    pub cgroup: PathBuf,
    pub pin_dir: PathBuf,
    pub socket: PathBuf,
    pub config: PathBuf,
    pub services: PathBuf,
    pub web: String,
    /// What the configuration's `[dns]` table holds, from the next [`configure`](Self::configure) on.
    pub dns: String,
    daemon: Option<Child>,
}

impl Mesh {
    /// Everything but the running daemon. Loopback backends are allowed.
    pub fn prepare(services: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "the live tests need root: run `cargo xtask test`");
        let name = unique("mesh-test");
        let dir = TempDir::with_prefix(&name).unwrap();
        let cgroup = cgroup2().join(&name);
        fs::create_dir(&cgroup).unwrap();
        let mesh = Self {
            cgroup,
            pin_dir: Path::new("/sys/fs/bpf").join(&name),
            socket: dir.path().join("api.sock"),
            config: dir.path().join("mesh.toml"),
            services: dir.path().join("services.toml"),
            web: own_address(),
            // The usual address is one for all tests, and the node's name servers are not theirs to ask.
            dns: "listen = []\nupstream = []".into(),
            daemon: None,
            dir,
        };
        mesh.write(services);
        mesh.configure("");
        mesh
    }

    /// A daemon that is ready.
    pub fn start(services: &str) -> Self {
        let mut mesh = Self::prepare(services);
        mesh.launch();
        mesh.ready();
        mesh
    }

    /// Writes the configuration file, with `more` at its end.
    pub fn configure(&self, more: &str) {
        let state = self.dir.path().join("state");
        let text = format!(
            "[node]\ncgroup = {:?}\npin_dir = {:?}\nstate_dir = {state:?}\n[api]\nsocket = {:?}\n[web]\nlisten = {:?}\n\
             [dns]\n{}\n[backends]\nallow_loopback = true\n[[registry]]\ntype = \"file\"\npath = {:?}\n{more}",
            self.cgroup, self.pin_dir, self.socket, self.web, self.dns, self.services
        );
        replace(&self.config, &text);
    }

    /// Replaces the services file in one step.
    pub fn write(&self, services: &str) {
        replace(&self.services, services);
    }

    pub fn launch(&mut self) {
        self.launch_as(Command::new(binary()));
    }

    /// Launches another version, or one that is watched by another program.
    pub fn launch_as(&mut self, mut command: Command) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        command.arg("run").arg("--config").arg(&self.config).stdin(Stdio::null());
        self.daemon = Some(command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
    }

    pub fn ready(&self) {
        let ready =
            self.mesh(&["status", "--brief", &format!("--wait={}s", patience().as_secs())]).output().unwrap();
        assert!(ready.status.success(), "not ready: {}\n{}", text(&ready), self.log());
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Whether the daemon has ended by itself, or was killed by somebody else.
    pub fn has_ended(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(|daemon| daemon.try_wait().unwrap().is_some())
    }

    /// SIGTERM, and its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&daemon),
            rustix::process::Signal::TERM,
        )
        .unwrap();
        daemon.wait().unwrap().code()
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    pub fn hang_up(&self) {
        let daemon = self.daemon.as_ref().expect("the daemon runs");
        rustix::process::kill_process(rustix::process::Pid::from_child(daemon), rustix::process::Signal::HUP)
            .unwrap();
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("daemon.log")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// `mesh ARGS` against this daemon.
    pub fn mesh(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(args).arg("--socket").arg(&self.socket);
        command
    }

    /// What `mesh ARGS -o json` prints.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.mesh(args).args(["-o", "json"]).output().unwrap();
        assert!(output.status.success(), "mesh {args:?}: {}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Where a map is pinned.
    pub fn map_pin(&self, map: &str) -> PathBuf {
        self.pin_dir.join(format!("abi-{}", mesh_common::abi::VERSION)).join(map)
    }

    /// What `mesh bpf WHAT` reads from the pins.
    pub fn bpf(&self, what: &str) -> Value {
        let output = Command::new(binary())
            .args(["bpf", what, "-o", "json", "--config"])
            .arg(&self.config)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The kernel's table.
    pub fn lb(&self) -> Value {
        self.bpf("lb")
    }

    /// How much of a map the kernel uses.
    pub fn used(&self, map: &str) -> u64 {
        let maps = self.bpf("maps");
        let row = maps.as_array().unwrap().iter().find(|row| row["name"] == map).unwrap();
        row["used"].as_u64().unwrap()
    }

    /// What is said of the registry that is configured besides the services file.
    pub fn registry(&self) -> Value {
        self.json(&["registry", "list"])[1].clone()
    }

    pub fn wait_for_registry(&self, state: &str) {
        wait_until(&format!("the registry is {state}"), || self.registry()["state"] == state);
    }

    /// Addresses that the kernel sends a frontend's connects to.
    pub fn kernel_backends(&self, frontend: &str) -> Vec<String> {
        let lb = self.lb();
        let row = lb.as_array().unwrap().iter().find(|row| row["frontend"] == frontend);
        let shares = row.and_then(|row| row["backends"].as_array()).cloned().unwrap_or_default();
        shares
            .iter()
            .map(|share| format!("{}:{}", share["address"].as_str().unwrap(), share["port"]))
            .collect()
    }

    /// Waits until the daemon has written so many selectable backends of a frontend.
    pub fn wait_for_backends(&self, frontend: &str, count: usize) {
        wait_until(&format!("{count} backends at {frontend}"), || {
            self.json(&["explain", frontend])[0]["backends"].as_array().map(Vec::len) == Some(count)
        });
    }

    /// A command whose sockets are translated.
    pub fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        enter(&self.cgroup, program)
    }

    /// A cgroup below the managed one: that of a task, or a pod.
    pub fn workload(&self, name: &str) -> Workload {
        let cgroup = self.cgroup.join(name);
        fs::create_dir_all(&cgroup).unwrap();
        Workload(cgroup)
    }

    /// As [`inside`](Self::inside), on a host.
    pub fn on(&self, host: &Host, program: &str) -> Command {
        let [nsenter, net] = host.enter();
        let mut command = self.inside(nsenter);
        command.arg(net).arg(program);
        command
    }

    /// Runs a Python program inside; its output, or a panic with its traceback.
    pub fn python(&self, program: &str) -> String {
        let output = self.inside("python3").args(["-c", program]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// What the server says that is behind `ADDRESS:PORT`, or why nobody does.
    pub fn dial(&self, to: &str) -> String {
        let (address, port) = to.rsplit_once(':').unwrap();
        self.python(&format!(
            r#"
import socket
try:
    print(socket.create_connection(("{address}", {port}), 5).recv(9).decode())
except OSError as error:
    print(error)
"#
        ))
    }

    /// A Python program inside that is led by the test, line by line.
    pub fn dialogue(&self, program: &str) -> Dialogue {
        let mut python = self.inside("python3");
        python.args(["-c", program]);
        Dialogue::start(python)
    }

    pub fn cleanup(&self) -> Output {
        Command::new(binary()).args(["cleanup", "--config"]).arg(&self.config).output().unwrap()
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- daemon's log\n{}---", self.log());
        }
        self.cleanup();
        // What still runs in the private cgroup was started by this test.
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let gone = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(2));
            remove_cgroup(&self.cgroup).is_ok()
        });
        if !gone {
            eprintln!("left behind: {}", self.cgroup.display());
        }
    }
}

/// A cgroup that goes with the [`Mesh`] it belongs to.
pub struct Workload(PathBuf);

impl Workload {
    /// A command whose sockets are translated, and are this workload's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        enter(&self.0, program)
    }
}

/// A program that tells how far it is and waits to be told to go on.
pub struct Dialogue {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Dialogue {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, stdin, lines: BufReader::new(stdout).lines() }
    }

    /// The next line that it prints.
    pub fn hear(&mut self) -> String {
        self.lines.next().expect("the program ended").unwrap()
    }

    /// Lets it go on.
    pub fn go_on(&mut self) {
        self.say("");
    }

    /// A line for its input.
    pub fn say(&mut self, line: &str) {
        self.stdin.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Closes its input, and waits for its end.
    pub fn end(self) -> ExitStatus {
        let Self { mut child, stdin, .. } = self;
        drop(stdin);
        child.wait().unwrap()
    }
}

/// stdout and stderr of a finished command.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// One `[[service]]` with instances `name-0`, `name-1`, … at these addresses and ports.
pub fn service(name: &str, port: u16, vip: &str, instances: &[(&str, u16)]) -> String {
    let weighted: Vec<_> = instances.iter().map(|(address, port)| (*address, *port, 100)).collect();
    weighted_service(name, port, vip, &weighted)
}

/// As [`service`], with weights.
pub fn weighted_service(name: &str, port: u16, vip: &str, instances: &[(&str, u16, u16)]) -> String {
    let mut text = format!(
        "[[service]]\nname = {name:?}\nnamespace = \"service.local\"\nport = {port}\npolicy = \"random\"\n"
    );
    if !vip.is_empty() {
        text += &format!("vip = {vip:?}\n");
    }
    for (n, (address, port, weight)) in instances.iter().enumerate() {
        text += &format!(
            "[[service.instance]]\nid = \"{name}-{n}\"\naddress = {address:?}\nport = {port}\nweight = {weight}\n"
        );
    }
    text
}

/// As [`service`], over UDP.
pub fn datagram_service(name: &str, port: u16, vip: &str, instances: &[(&str, u16)]) -> String {
    service(name, port, vip, instances).replacen("port = ", "protocol = \"udp\"\nport = ", 1)
}

/// A loopback address that nobody listens on at the moment.
pub fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// A loopback address of one's own: a port of the kernel's choice may be another socket's a moment later.
fn own_address() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let [_, _, _, count] = COUNT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    format!("127.{}.{low}.{count}:9464", 100 + high % 20)
}

fn enter(cgroup: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("sh");
    let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.display());
    command.args(["-c", &script, "sh"]).arg(program).stdin(Stdio::null());
    command
}

fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

/// With the workloads below it; their processes must have ended.
fn remove_cgroup(cgroup: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(cgroup)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount =
        mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    mount.split(' ').nth(1).unwrap().into()
}
