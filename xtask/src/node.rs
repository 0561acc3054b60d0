//! A daemon with everything private to it, below target/.

use std::{
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::tools;

/// Dropping it ends the daemon and removes what it left in the kernel.
pub(crate) struct Node {
    dir: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) pin_dir: PathBuf,
    pub(crate) services: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) web: String,
    /// Where an embedded registry listens, if there is one instead of the services file.
    pub(crate) embedded: Option<String>,
    /// Where the daemon answers names, if it does.
    pub(crate) names: Option<SocketAddr>,
    /// The network namespace that the daemon is started in, if it is another one.
    pub(crate) namespace: Option<String>,
    /// Services and backends that there is room for, if not as many as usual.
    pub(crate) room: Option<[usize; 2]>,
    daemon: Option<Child>,
}

impl Node {
    /// Its files and its cgroup; `start` starts the daemon.
    pub(crate) fn new(name: &str) -> anyhow::Result<Self> {
        let dir = tools::root().join("target").join(name);
        fs::create_dir_all(&dir)?;
        let socket = dir.join("api.sock");
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            bail!("{name} is already running");
        }
        let node = Self {
            services: dir.join("services.toml"),
            config: dir.join("mesh.toml"),
            cgroup: cgroup2()?.join(name),
            pin_dir: Path::new("/sys/fs/bpf").join(name),
            web: usual_address(9464)?,
            embedded: None,
            names: None,
            namespace: None,
            room: None,
            socket,
            dir,
            daemon: None,
        };
        fs::create_dir_all(&node.cgroup)?;
        Ok(node)
    }

    /// As [`new`](Self::new), with an embedded registry that holds nothing.
    pub(crate) fn with_embedded(name: &str) -> anyhow::Result<Self> {
        let mut node = Self::new(name)?;
        node.embedded = Some(usual_address(9465)?);
        if let Err(error) = fs::remove_dir_all(node.dir.join("state"))
            && error.kind() != ErrorKind::NotFound
        {
            return Err(error.into());
        }
        Ok(node)
    }

    /// Starts the daemon on the services written so far; its status once it is ready.
    pub(crate) fn start(&mut self) -> anyhow::Result<String> {
        self.write_config()?;
        let mut daemon = match &self.namespace {
            Some(name) => {
                let mut nsenter = Command::new("nsenter");
                nsenter.arg(format!("--net=/run/netns/{name}")).arg(tools::mesh());
                nsenter
            }
            None => Command::new(tools::mesh()),
        };
        self.daemon = Some(daemon.args(["run", "--config"]).arg(&self.config).stdin(Stdio::null()).spawn()?);
        tools::output(&mut self.mesh(&["status", "--brief", "--wait=15s"]))
    }

    /// The daemon's process, once it was started.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// Replaces the services file in one step.
    pub(crate) fn write_services(&self, text: &str) -> anyhow::Result<()> {
        let new = self.services.with_extension("new");
        fs::write(&new, text)?;
        Ok(fs::rename(new, &self.services)?)
    }

    fn write_config(&self) -> anyhow::Result<()> {
        let registry = match &self.embedded {
            Some(listen) => format!("type = \"embedded\"\nlisten = {listen:?}\n"),
            None => format!("type = \"file\"\npath = {:?}\n", self.services),
        };
        let room = self.room.map_or_else(String::new, |[services, backends]| {
            format!("[datapath]\nmax_services = {services}\nmax_backends = {backends}\n\n")
        });
        let text = format!(
            "{room}[node]\ncgroup = {:?}\npin_dir = {:?}\nstate_dir = {:?}\n\n[api]\nsocket = {:?}\n\n\
             [web]\nlisten = {:?}\n\n[dns]\nlisten = {:?}\nupstream = []\n\n[backends]\nallow_loopback = true\n\n\
             [[registry]]\n{registry}",
            self.cgroup,
            self.pin_dir,
            self.dir.join("state"),
            self.socket,
            self.web,
            Vec::from_iter(self.names.map(|address| address.to_string())),
        );
        Ok(fs::write(&self.config, text)?)
    }

    /// `mesh ARGS` against this daemon.
    pub(crate) fn mesh(&self, args: &[&str]) -> Command {
        let mut command = Command::new(tools::mesh());
        command.args(args).arg("--socket").arg(&self.socket);
        command
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = kill_process(Pid::from_child(daemon), Signal::TERM);
            let _ = daemon.wait();
        }
        if self.config.exists() {
            let mut cleanup = Command::new(tools::mesh());
            let _ = cleanup.args(["cleanup", "--config"]).arg(&self.config).stderr(Stdio::null()).status();
        }
        let _ = fs::remove_dir(&self.cgroup);
    }
}

pub(crate) fn cgroup2() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|fields| fields.get(2) == Some(&"cgroup2"));
    let mount =
        mount.context("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")?;
    Ok(mount[1].into())
}

/// The usual address where it is free, else any.
fn usual_address(port: u16) -> anyhow::Result<String> {
    let listener = TcpListener::bind(("127.0.0.1", port)).or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    Ok(listener.local_addr()?.to_string())
}
