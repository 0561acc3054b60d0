//! Network namespaces joined by a switch.

use std::{cell::Cell, process::Command};

use crate::{text, unique};

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

    /// Pulls the cable out: what is sent to this host is lost from now on.
    pub fn unplug(&self) {
        ip(&["-n", &self.namespace.0, "link", "set", "v0", "down"]);
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
