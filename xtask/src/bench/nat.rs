//! Rewriting by the kernel's NAT, as kube-proxy has it and with nftables alone.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};

use super::{
    rivals::{Arm, State},
    world::{Service, Site},
};

/// Rules in the client's namespace.
pub(super) struct Dnat {
    nft: bool,
    namespace: String,
    vip: Ipv4Addr,
    backends: Vec<IpAddr>,
}

impl Dnat {
    pub(super) fn start(site: &mut Site, nft: bool) -> anyhow::Result<Box<dyn Arm>> {
        let last = if nft { 11 } else { 10 };
        let vip = if site.routed { Ipv4Addr::new(10, 96, 0, last) } else { Ipv4Addr::new(127, 96, 0, last) };
        let mut arm =
            Self { nft, namespace: site.client.namespace.clone(), vip, backends: site.backends.clone() };
        arm.tell(&vec![State::Active; site.backends.len()])?;
        Ok(Box::new(arm))
    }

    fn rules(&self, states: &[State]) -> String {
        let of = |service: Service| {
            let active = self.backends.iter().zip(states).filter(|(_, state)| **state == State::Active);
            active.map(move |(ip, _)| SocketAddr::new(*ip, service.backend_port())).collect::<Vec<_>>()
        };
        if self.nft { nft_rules(self.vip, of) } else { iptables_rules(self.vip, of) }
    }
}

/// As kube-proxy writes them.
fn iptables_rules(vip: Ipv4Addr, of: impl Fn(Service) -> Vec<SocketAddr>) -> String {
    let (mut chains, mut rules) = (String::new(), String::new());
    for service in Service::ALL {
        let (name, backends) = (service.name().to_uppercase(), of(service));
        chains += &format!(":KUBE-SVC-{name} - [0:0]\n");
        rules +=
            &format!("-A KUBE-SERVICES -d {vip}/32 -p tcp --dport {} -j KUBE-SVC-{name}\n", service.port());
        for (number, backend) in backends.iter().enumerate() {
            chains += &format!(":KUBE-SEP-{name}{number} - [0:0]\n");
            let left = backends.len() - number;
            let chance = if left > 1 {
                format!("-m statistic --mode random --probability {:.11} ", 1.0 / left as f64)
            } else {
                String::new()
            };
            rules += &format!("-A KUBE-SVC-{name} {chance}-j KUBE-SEP-{name}{number}\n");
            rules += &format!("-A KUBE-SEP-{name}{number} -p tcp -j DNAT --to-destination {backend}\n");
        }
    }
    format!(
        "*nat\n:KUBE-SERVICES - [0:0]\n{chains}-A OUTPUT -j KUBE-SERVICES\n-A PREROUTING -j KUBE-SERVICES\n{rules}COMMIT\n"
    )
}

fn nft_rules(vip: Ipv4Addr, of: impl Fn(Service) -> Vec<SocketAddr>) -> String {
    let mut rules = String::new();
    for service in Service::ALL {
        let backends = of(service);
        let map =
            backends.iter().enumerate().map(|(number, at)| format!("{number} : {} . {}", at.ip(), at.port()));
        let map = map.collect::<Vec<_>>().join(", ");
        if !backends.is_empty() {
            rules += &format!(
                "  ip daddr {vip} tcp dport {} dnat ip to numgen random mod {} map {{ {map} }}\n",
                service.port(),
                backends.len()
            );
        }
    }
    format!(
        "table ip bench\ndelete table ip bench\ntable ip bench {{\n chain output {{\n  type nat hook output priority -100;\n{rules} }}\n}}\n"
    )
}

impl Arm for Dnat {
    fn targets(&self, service: Service) -> Vec<SocketAddr> {
        vec![SocketAddr::new(self.vip.into(), service.port())]
    }

    fn tell(&mut self, states: &[State]) -> anyhow::Result<()> {
        let program: &[&str] = if self.nft { &["nft", "-f", "-"] } else { &["iptables-restore"] };
        let mut load = Command::new("nsenter");
        load.arg(format!("--net=/run/netns/{}", self.namespace)).args(program);
        let mut child =
            load.stdin(Stdio::piped()).spawn().with_context(|| format!("cannot run {}", program[0]))?;
        child.stdin.take().context("a pipe")?.write_all(self.rules(states).as_bytes())?;
        let status = child.wait()?;
        if !status.success() {
            bail!("{} failed ({status}): does the kernel have what it needs?", program[0]);
        }
        Ok(())
    }
}
