//! Network namespaces joined by a cable.

use std::process::Command;

use crate::{text, unique};

/// Two hosts, `10.213.0.1` and `10.213.0.2`, each in a namespace of its own.
pub struct Pair {
    pub client: Host,
    pub server: Host,
}

/// A network namespace.
pub struct Host(String);

impl Pair {
    pub fn new() -> Self {
        let pair = Self { client: Host::new("c"), server: Host::new("s") };
        ip(&[
            "link",
            "add",
            "v0",
            "netns",
            &pair.client.0,
            "type",
            "veth",
            "peer",
            "name",
            "v0",
            "netns",
            &pair.server.0,
        ]);
        for (host, address) in [(&pair.client, "10.213.0.1/24"), (&pair.server, "10.213.0.2/24")] {
            ip(&["-n", &host.0, "address", "add", address, "dev", "v0"]);
            ip(&["-n", &host.0, "link", "set", "v0", "up"]);
            ip(&["-n", &host.0, "link", "set", "lo", "up"]);
        }
        pair
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    fn new(role: &str) -> Self {
        let name = unique(&format!("mesh-{role}"));
        ip(&["netns", "add", &name]);
        Self(name)
    }

    /// The words that run a command on this host. `nsenter` keeps the cgroup and BPF file
    /// systems visible; `ip netns exec` hides them.
    pub fn enter(&self) -> [String; 2] {
        ["nsenter".into(), format!("--net=/run/netns/{}", self.0)]
    }

    /// A command on this host.
    pub fn command(&self, program: &str) -> Command {
        let [nsenter, net] = self.enter();
        let mut command = Command::new(nsenter);
        command.arg(net).arg(program);
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this host was: {}", self.enter().join(" "));
        }
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {}: {}", args.join(" "), text(&output));
}
