//! Network namespaces joined by a switch.

use std::{
    cell::Cell,
    ffi::OsStr,
    process::{Command, Stdio},
};

use crate::{free_address, text, unique};

/// A switch, in a namespace of its own, and the hosts that are plugged into it.
pub struct Network {
    switch: Namespace,
    hosts: Cell<u8>,
}

/// A machine, or a pod: a namespace with one address of each family.
pub struct Host {
    namespace: Namespace,
    pub address: String,
    pub address6: String,
}

/// A network namespace with a name.
struct Namespace(String);

/// For as long as it lives, whatever comes to a host and leaves it is dropped, and nobody is told.
pub struct BlackHole<'a>(&'a Host);

/// Where a server of a test runs: on this machine's loopback, or on a host.
#[derive(Clone)]
pub struct Place {
    enter: Vec<String>,
    pub address: String,
}

impl Network {
    pub fn new() -> Self {
        let switch = Namespace::new("switch");
        ip(&["-n", &switch.0, "link", "add", "sw0", "type", "bridge"]);
        ip(&["-n", &switch.0, "link", "set", "sw0", "up"]);
        Self { switch, hosts: Cell::new(0) }
    }

    /// One more host: `10.213.0.1` and `fd00:213::1`, then `10.213.0.2` and so on. An address is not
    /// used again.
    pub fn host(&self) -> Host {
        let number = self.hosts.get() + 1;
        self.hosts.set(number);
        let (address, address6) = (format!("10.213.0.{number}"), format!("fd00:213::{number}"));
        let host = Host { namespace: Namespace::new("host"), address, address6 };
        let (name, switch, port) = (&host.namespace.0, &self.switch.0, format!("p{number}"));
        let cable = ["link", "add", "v0", "netns", name, "type", "veth", "peer", "name", &port];
        ip(&[&cable[..], &["netns", switch]].concat());
        ip(&["-n", switch, "link", "set", &port, "master", "sw0", "up"]);
        ip(&["-n", name, "address", "add", &format!("{}/24", host.address), "dev", "v0"]);
        ip(&["-n", name, "address", "add", &format!("{}/64", host.address6), "dev", "v0", "nodad"]);
        ip(&["-n", name, "link", "set", "v0", "up"]);
        ip(&["-n", name, "link", "set", "lo", "up"]);
        host
    }

    /// How many cables are plugged in: a host's is gone once nothing holds its namespace.
    pub fn cables(&self) -> usize {
        ip(&["-n", &self.switch.0, "-oneline", "link", "show", "master", "sw0"]).lines().count()
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// The words that run a command on this host. `nsenter` keeps the cgroup and BPF file
    /// systems visible; `ip netns exec` hides them.
    pub fn enter(&self) -> [String; 2] {
        self.namespace.enter()
    }

    /// A command on this host.
    pub fn command(&self, program: &str) -> Command {
        let [nsenter, net] = self.enter();
        let mut command = Command::new(nsenter);
        command.arg(net).arg(program);
        command
    }

    pub fn place(&self) -> Place {
        Place { enter: self.enter().into(), address: self.address.clone() }
    }

    /// Drops packets, by `nft`. What stays on the host passes.
    pub fn black_hole(&self) -> BlackHole<'_> {
        self.nft(
            r#"add table inet hole
add chain inet hole in { type filter hook input priority 0; }
add chain inet hole out { type filter hook output priority 0; }
add rule inet hole in iifname "v0" counter drop
add rule inet hole out oifname "v0" counter drop"#,
        );
        BlackHole(self)
    }

    /// How many connections there are with others.
    pub fn connections(&self) -> usize {
        let output = self.command("ss").args(["-Htn", "state", "established", "src", &self.address]).output();
        let (output, own) = (text(&output.unwrap()), format!("{}:", self.address));
        output.lines().filter(|line| line.matches(&own).count() == 1).count()
    }

    fn nft(&self, rules: &str) -> String {
        let output = self.command("nft").arg(rules).output().unwrap();
        assert!(output.status.success(), "nft {rules}: {}", text(&output));
        text(&output)
    }

    /// Pulls the cable out: what is sent to this host is lost from now on.
    pub fn unplug(&self) {
        ip(&["-n", &self.namespace.0, "link", "set", "v0", "down"]);
    }
}

impl BlackHole<'_> {
    /// How many packets have been.
    pub fn dropped(&self) -> u64 {
        let table = self.0.nft("list table inet hole");
        let counts = table.split("counter packets ").skip(1);
        counts.map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }
}

impl Drop for BlackHole<'_> {
    fn drop(&mut self) {
        let gone = self.0.command("nft").arg("delete table inet hole").status();
        assert!(std::thread::panicking() || gone.unwrap().success(), "the black hole stays");
    }
}

impl Place {
    pub fn here() -> Self {
        Self { enter: Vec::new(), address: "127.0.0.1".into() }
    }

    /// A command there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some((enter, args)) = self.enter.split_first() else { return Command::new(program) };
        let mut command = Command::new(enter);
        command.args(args).arg(program);
        command
    }

    /// An address there and a port that nobody listens on at the moment.
    pub fn free_address(&self) -> String {
        let here = free_address();
        let (_, port) = here.split_once(':').unwrap();
        format!("{}:{port}", self.address)
    }

    /// Whether somebody listens at an address of this place.
    pub fn listens(&self, address: &str) -> bool {
        let dial = format!("exec 3<>/dev/tcp/{}", address.replace(':', "/"));
        self.command("bash").args(["-c", &dial]).stderr(Stdio::null()).status().unwrap().success()
    }
}

impl Namespace {
    fn new(role: &str) -> Self {
        let name = unique(&format!("mesh-{role}"));
        ip(&["netns", "add", &name]);
        Self(name)
    }

    fn enter(&self) -> [String; 2] {
        ["nsenter".into(), format!("--net=/run/netns/{}", self.0)]
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this namespace was: {}", self.enter().join(" "));
        }
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {}: {}", args.join(" "), text(&output));
    text(&output)
}
