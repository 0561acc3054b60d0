//! SRV names that a real unbound keeps.

use std::{
    fmt::Write as _,
    fs,
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::Duration,
};

use mesh_tests::{Mesh, free_address, wait_until};
use tempfile::TempDir;

use crate::table::{Table, VIP};

/// Seconds.
const TTL: u64 = 30;

pub(crate) struct Registry {
    address: String,
    dir: TempDir,
    server: Option<Child>,
}

impl Registry {
    pub(crate) fn new() -> Self {
        Self {
            address: free_address(),
            dir: TempDir::with_prefix("mesh-dns").expect("a folder"),
            server: None,
        }
    }
}

impl crate::Registry for Registry {
    fn settings(&self, table: Table) -> String {
        let mut text = format!("[[registry]]\ntype = \"dns\"\nservers = [{:?}]\n", self.address);
        for service in 0..table.services {
            let vip = if service == 0 { format!("vip = {VIP:?}\n") } else { String::new() };
            write!(
                text,
                "[[registry.name]]\nsrv = \"{}\"\nport = 80\nname = \"s{service}\"\nnamespace = \"service.local\"\n{vip}",
                name(service)
            )
            .expect("a string takes it");
        }
        text
    }

    fn fill(&mut self, table: Table, port: u16, _: &mut Mesh) {
        let (address, server_port) = self.address.split_once(':').expect("an address and port");
        let mut text = format!(
            "server:\n interface: {address}@{server_port}\n directory: {:?}\n chroot: \"\"\n username: \"\"\n pidfile: \"\"\n \
             use-syslog: no\n do-daemonize: no\n do-ip6: no\n verbosity: 0\n module-config: \"iterator\"\n \
             local-zone: \"example.\" static\n",
            self.dir.path()
        );
        for service in 0..table.services {
            for (number, (address, port)) in table.places(service, port).into_iter().enumerate() {
                let host = format!("i{number}.s{service}.example.");
                write!(
                    text,
                    " local-data: \"{}. {TTL} IN SRV 0 1 {port} {host}\"\n local-data: \"{host} {TTL} IN A {address}\"\n",
                    name(service)
                )
                .expect("a string takes it");
            }
        }
        text += "remote-control:\n control-enable: no\n";
        let config = self.dir.path().join("unbound.conf");
        fs::write(&config, text).expect("it can be written");
        let mut unbound = Command::new("unbound");
        unbound.arg("-c").arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.server = Some(unbound.spawn().expect("unbound starts"));
        wait_until("unbound listens", || TcpStream::connect(&self.address).is_ok());
    }

    fn put(&self, _: u16) {
        panic!("names are asked for in turn: how soon a change is seen is their TTL");
    }

    /// All names are asked for again within their TTL.
    fn turn(&self) -> Duration {
        Duration::from_secs(TTL)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn name(service: usize) -> String {
    format!("_http._tcp.s{service}.example")
}
