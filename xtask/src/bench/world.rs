//! Where the arms live: network namespaces and cgroups of their own, and processes in them. What is
//! made goes when it is dropped, and what an earlier run left goes first; the host's own namespace is
//! left as it is.

use std::{
    fs::{self, File},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{
    node::cgroup2,
    tools::{output, root, run},
};

/// Namespaces and cgroups of ours begin with it.
pub(super) const OURS: &str = "mesh-bench";

/// How the tasks are connected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Topology {
    /// Each task has a namespace, all are plugged into one switch: as with ECS's awsvpc.
    Namespaces,
    /// The same; the client's task is on one CPU, the server's on another.
    Pinned,
    /// Client and server in one namespace.
    Loopback,
}

impl Topology {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Pinned => "namespaces, pinned",
            Self::Loopback => "loopback",
        }
    }

    fn cpus(self) -> [Option<&'static str>; 2] {
        if self == Self::Pinned { [Some("0"), Some("1")] } else { [None; 2] }
    }
}

/// What a server's task offers. Clients dial other ports, so that what is not translated fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    Http,
    /// Says one byte to whoever connects, and closes.
    Greet,
    /// sockperf's.
    Echo,
    /// iperf3's.
    Bulk,
}

impl Service {
    pub(super) const ALL: [Self; 4] = [Self::Http, Self::Greet, Self::Echo, Self::Bulk];

    pub(super) fn name(self) -> &'static str {
        ["http", "greet", "echo", "bulk"][self as usize]
    }

    pub(super) fn port(self) -> u16 {
        [8080, 8081, 8082, 8083][self as usize]
    }

    pub(super) fn backend_port(self) -> u16 {
        10_000 + self.port()
    }
}

/// A process's namespace and cgroup, and its CPU where it is to have one.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) namespace: String,
    pub(super) cgroup: PathBuf,
    cpu: Option<&'static str>,
}

impl Place {
    pub(super) fn new(namespace: &str, cgroup: PathBuf) -> Self {
        Self { namespace: namespace.into(), cgroup, cpu: None }
    }

    /// A command there, which ends with this thread.
    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace));
        command.args(["setpriv", "--pdeathsig", "KILL"]);
        if let Some(cpu) = self.cpu {
            command.args(["taskset", "-c", cpu]);
        }
        command.args(["sh", "-c", r#"echo $$ > "$0" && exec "$@""#]);
        command.arg(self.cgroup.join("cgroup.procs")).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// A part of this program.
    pub(super) fn part(&self, part: &str) -> anyhow::Result<Command> {
        let mut command = self.command(std::env::current_exe()?);
        command.args(["bench-part", part]);
        Ok(command)
    }

    /// How long it takes until a service answers here.
    pub(super) fn first_answer(&self, service: Service, at: SocketAddr) -> anyhow::Result<Duration> {
        let mut call = self.part("call")?;
        call.arg(at.to_string());
        match service {
            Service::Http => drop(call.arg("--http")),
            Service::Greet => drop(call.arg("--greeting")),
            // That it accepts has to do.
            Service::Echo | Service::Bulk => {}
        }
        let took = output(&mut call).map_err(|_| anyhow!("{at} does not answer"))?;
        Ok(Duration::from_micros(took.trim().parse()?))
    }
}

/// A process that ends when this is dropped.
pub(super) struct Process(Child);

impl Process {
    /// What it prints goes to a file.
    pub(super) fn start(command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let file = File::create(log)?;
        let child = command.stdout(file.try_clone()?).stderr(file).spawn();
        Ok(Self(child.with_context(|| format!("cannot run what writes {}", log.display()))?))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last lines of each log in a folder, for messages.
pub(super) fn last_words(dir: &Path) -> String {
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let last = |path: PathBuf| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().rev().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    logs.flat_map(last).collect::<Vec<_>>().join("; ")
}

/// A cgroup; its processes end with it.
pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    pub(super) fn new(path: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> PathBuf {
        self.0.clone()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove_cgroup(&self.0);
    }
}

fn remove_cgroup(path: &Path) {
    let _ = fs::write(path.join("cgroup.kill"), "1");
    let start = Instant::now();
    while let Err(error) = fs::remove_dir(path)
        && error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
        && start.elapsed() < Duration::from_secs(5)
    {
        thread::sleep(Duration::from_millis(10));
    }
}

/// A network namespace.
pub(super) struct Namespace(pub(super) String);

impl Namespace {
    pub(super) fn new(name: String) -> anyhow::Result<Self> {
        ip(&["netns", "add", &name])?;
        let namespace = Self(name);
        ip(&["-n", &namespace.0, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.0]);
    }
}

pub(super) fn ip(args: &[&str]) -> anyhow::Result<()> {
    run(Command::new("ip").args(args))
}

/// The switch, the server's task, and what else is shared by the arms of a topology.
pub(super) struct World {
    pub(super) topology: Topology,
    pub(super) dir: PathBuf,
    servers: Vec<Servers>,
    plugged: u8,
    cgroups: Vec<Cgroup>,
    server_cgroup: PathBuf,
    /// For processes that belong to no arm.
    pub(super) switch: String,
    backends: u8,
    /// Whether each backend has an HTTP server for itself.
    alone: bool,
    namespaces: Vec<Namespace>,
    _lock: Lock,
}

/// What an arm is given.
pub(super) struct Site {
    /// For files.
    pub(super) dir: PathBuf,
    pub(super) client: Place,
    /// Beside the client: its proxy.
    pub(super) egress: Place,
    /// Beside the server: its proxy.
    pub(super) ingress: Place,
    pub(super) switch: String,
    pub(super) backends: Vec<IpAddr>,
    /// Whether the namespace reaches others through a gateway.
    pub(super) routed: bool,
}

impl World {
    pub(super) fn new(topology: Topology, backends: u8, alone: bool) -> anyhow::Result<Self> {
        let lock = Lock::take()?;
        remove_leftovers()?;
        let dir = root().join("target").join(OURS).join("arms");
        fs::create_dir_all(&dir)?;
        let server_cgroup = Cgroup::new(cgroup2()?.join(format!("{OURS}-server")))?;
        let mut world = Self {
            topology,
            dir,
            servers: Vec::new(),
            plugged: 0,
            server_cgroup: server_cgroup.path(),
            cgroups: vec![server_cgroup],
            switch: format!("{OURS}-switch"),
            backends,
            alone,
            namespaces: Vec::new(),
            _lock: lock,
        };
        world.namespaces.push(Namespace::new(world.switch.clone())?);
        ip(&["-n", &world.switch, "link", "add", "sw0", "type", "bridge"])?;
        ip(&["-n", &world.switch, "address", "add", "10.77.0.1/24", "dev", "sw0"])?;
        ip(&["-n", &world.switch, "link", "set", "sw0", "up"])?;
        if topology != Topology::Loopback {
            let server = world.plug("server")?;
            for backend in world.addresses() {
                ip(&["-n", &server, "address", "add", &format!("{backend}/24"), "dev", "eth0"])?;
            }
            world.serve(&server)?;
        }
        Ok(world)
    }

    /// Another namespace on the switch.
    pub(super) fn plug(&mut self, role: &str) -> anyhow::Result<String> {
        self.plugged += 1;
        let (name, port) = (format!("{OURS}-{role}"), format!("p{}", self.plugged));
        self.namespaces.push(Namespace::new(name.clone())?);
        ip(&[
            "link",
            "add",
            "eth0",
            "netns",
            &name,
            "type",
            "veth",
            "peer",
            "name",
            &port,
            "netns",
            &self.switch,
        ])?;
        ip(&["-n", &self.switch, "link", "set", &port, "master", "sw0", "up"])?;
        ip(&["-n", &name, "address", "add", &format!("10.77.0.{}/24", 100 + self.plugged), "dev", "eth0"])?;
        ip(&["-n", &name, "link", "set", "eth0", "up"])?;
        ip(&["-n", &name, "route", "add", "default", "via", "10.77.0.1"])?;
        Ok(name)
    }

    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let net = if self.topology == Topology::Loopback { [127, 77, 0] } else { [10, 77, 0] };
        (0..self.backends).map(|n| IpAddr::from([net[0], net[1], net[2], 11 + n])).collect()
    }

    fn place(&self, namespace: &str, cgroup: PathBuf, role: usize) -> Place {
        Place { namespace: namespace.into(), cgroup, cpu: self.topology.cpus()[role] }
    }

    fn serve(&mut self, namespace: &str) -> anyhow::Result<()> {
        let place = self.place(namespace, self.server_cgroup.clone(), 1);
        let servers = Servers::start(place, &self.dir, &self.addresses(), self.alone)?;
        self.servers.push(servers);
        Ok(())
    }

    /// A task for the client of an arm. On loopback, arms that change how a namespace routes have one for
    /// themselves, with servers of their own.
    pub(super) fn site(&mut self, arm: &'static str, alone: bool) -> anyhow::Result<Site> {
        let (client, server) = if self.topology == Topology::Loopback {
            let name = format!("{OURS}-{}", if alone { arm } else { "loopback" });
            if !self.namespaces.iter().any(|namespace| namespace.0 == name) {
                self.namespaces.push(Namespace::new(name.clone())?);
                self.serve(&name)?;
            }
            (name.clone(), name)
        } else {
            (self.plug(arm)?, format!("{OURS}-server"))
        };
        let parent = cgroup2()?;
        let cgroups =
            ["client", "proxy"].map(|role| Cgroup::new(parent.join(format!("{OURS}-{arm}-{role}"))));
        let [of_client, of_proxy] = cgroups;
        let (of_client, of_proxy) = (of_client?, of_proxy?);
        let dir = self.dir.join(arm);
        fs::create_dir_all(&dir)?;
        let site = Site {
            dir,
            client: self.place(&client, of_client.path(), 0),
            egress: self.place(&client, of_proxy.path(), 0),
            ingress: self.place(&server, of_proxy.path(), 1),
            switch: self.switch.clone(),
            backends: self.addresses(),
            routed: self.topology != Topology::Loopback,
        };
        self.cgroups.extend([of_client, of_proxy]);
        Ok(site)
    }

    pub(super) fn server_cgroup(&self) -> &Path {
        &self.server_cgroup
    }

    /// The servers, where there is one namespace that has some.
    pub(super) fn servers(&mut self) -> &mut Servers {
        &mut self.servers[0]
    }
}

/// The server's task: all services, at every address.
pub(super) struct Servers {
    pub(super) place: Place,
    dir: PathBuf,
    http: Vec<Process>,
    _others: Vec<Process>,
}

impl Servers {
    fn start(place: Place, dir: &Path, addresses: &[IpAddr], alone: bool) -> anyhow::Result<Self> {
        let dir = dir.join(&place.namespace);
        fs::create_dir_all(&dir)?;
        let mut others = Vec::new();
        let at =
            |service: Service| addresses.iter().map(move |ip| SocketAddr::new(*ip, service.backend_port()));
        let greet = at(Service::Greet).map(|address| address.to_string());
        others.push(Process::start(place.part("greet")?.args(greet), &dir.join("greet.log"))?);
        let mut sockperf = place.command("sockperf");
        sockperf.args(["server", "--tcp", "-p", &Service::Echo.backend_port().to_string()]);
        others.push(Process::start(&mut sockperf, &dir.join("sockperf.log"))?);
        let mut iperf = place.command("iperf3");
        iperf.args(["--server", "--port", &Service::Bulk.backend_port().to_string()]);
        others.push(Process::start(&mut iperf, &dir.join("iperf3.log"))?);
        let mut servers = Self { place, dir, http: Vec::new(), _others: others };
        if alone {
            addresses.iter().try_for_each(|address| servers.start_http(&[*address]))?;
        } else {
            servers.start_http(addresses)?;
        }
        for service in [Service::Http, Service::Greet, Service::Echo] {
            for address in at(service) {
                let answer = servers.place.first_answer(service, address);
                answer.with_context(|| format!("the server of {} does not start", service.name()))?;
            }
        }
        Ok(servers)
    }

    /// Starts an HTTP server for these backends.
    fn start_http(&mut self, addresses: &[IpAddr]) -> anyhow::Result<()> {
        let name = format!("nginx-{}", self.http.len());
        let listen = addresses.iter().map(|address| {
            format!("listen {} backlog=4096;", SocketAddr::new(*address, Service::Http.backend_port()))
        });
        let text = include_str!("../../../bench/arms/nginx.conf")
            .replace("$LISTEN", &listen.collect::<Vec<_>>().join(" "))
            .replace("$DIR", &self.dir.display().to_string())
            .replace("$NAME", &name);
        let config = self.dir.join(format!("{name}.conf"));
        fs::write(&config, text)?;
        let mut nginx = self.place.command("nginx");
        nginx.arg("-c").arg(&config).arg("-p").arg(&self.dir).args(["-e", "stderr"]);
        self.http.push(Process::start(&mut nginx, &self.dir.join(format!("{name}.log")))?);
        Ok(())
    }

    /// The HTTP server of a backend ends at once, as by `kill -9`.
    pub(super) fn end_http(&mut self, backend: usize) {
        self.http.remove(backend);
    }
}

/// One run at a time on a machine.
struct Lock(#[expect(dead_code, reason = "held until it is dropped")] File);

impl Lock {
    fn take() -> anyhow::Result<Self> {
        let path = format!("/run/{OURS}.lock");
        let file = File::create(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(Errno::WOULDBLOCK) => bail!("another benchmark is running: {path} is locked"),
            Err(error) => Err(error).context(path),
        }
    }
}

/// Namespaces, cgroups and their processes that an earlier run could not remove.
fn remove_leftovers() -> anyhow::Result<()> {
    let parent = cgroup2()?;
    let ours = |name: &str| name.strip_prefix(OURS).is_some_and(|rest| rest.starts_with('-'));
    for entry in fs::read_dir(&parent)? {
        let entry = entry?;
        if ours(&entry.file_name().to_string_lossy()) && entry.file_type()?.is_dir() {
            for inner in fs::read_dir(entry.path())?.flatten().filter(|inner| inner.path().is_dir()) {
                remove_cgroup(&inner.path());
            }
            remove_cgroup(&entry.path());
        }
    }
    for name in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = name.file_name().to_string_lossy().into_owned();
        if ours(&name) {
            ip(&["netns", "delete", &name])?;
        }
    }
    Ok(())
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C ends the run where [`check_interrupted`] is asked, and everything is removed.
pub(super) fn catch_interrupts() -> anyhow::Result<()> {
    Ok(ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))?)
}

pub(super) fn check_interrupted() -> anyhow::Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}
