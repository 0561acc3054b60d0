//! The arms: ways from a client's task to a server's.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::{
    names::version,
    nat::Dnat,
    world::{Cgroup, OURS, Process, Service, Site},
};
use crate::{
    node::Node,
    tools::{root, tools},
};

/// What is said of a backend.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Active,
    Draining,
    Removed,
}

/// A way to the backends. Dropping it ends it.
pub(super) trait Arm {
    /// Where a client dials; several where it chooses by itself.
    fn targets(&self, service: Service) -> Vec<SocketAddr>;

    /// Says what has become of the backends.
    fn tell(&mut self, states: &[State]) -> anyhow::Result<()>;

    /// A server's task ends, and with it what this has there.
    fn end_backend(&mut self, _: usize) {}

    /// The daemon, where this has one.
    fn node(&self) -> Option<&Node> {
        None
    }
}

/// An arm of the table.
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// Whether it changes how its whole namespace routes.
    pub(super) alone: bool,
    pub(super) services: &'static [Service],
    pub(super) start: fn(&mut Site) -> anyhow::Result<Box<dyn Arm>>,
    /// What it does that mesh does not.
    pub(super) about: &'static str,
}

const HTTP: &[Service] = &[Service::Http];

/// Also the order of the report's columns.
pub(super) const KINDS: [Kind; 9] = [
    Kind {
        name: "direct",
        alone: false,
        services: &Service::ALL,
        start: |site| Ok(Box::new(Direct(site.backends.clone()))),
        about: "the client dials a server; for connects and failover, all of them in turn, as DNS round robin would have it",
    },
    Kind { name: "mesh", alone: false, services: &Service::ALL, start: Mesh::start, about: "" },
    Kind {
        name: "envoy-pair-http",
        alone: false,
        services: HTTP,
        start: |site| Envoy::start(site, 1, "http", true),
        about: "as ECS Service Connect: retries of requests, ejection by status codes, metrics of requests, TLS if it is wanted; one connection of a client reaches every server",
    },
    Kind {
        name: "envoy-pair-tcp",
        alone: false,
        services: &Service::ALL,
        start: |site| Envoy::start(site, 2, "tcp", true),
        about: "as ECS Service Connect for a TCP port: retries of connects, TLS if it is wanted",
    },
    Kind {
        name: "envoy-one-hop",
        alone: false,
        services: HTTP,
        start: |site| Envoy::start(site, 3, "http", false),
        about: "as envoy-pair-http, with a proxy only beside the client",
    },
    Kind {
        name: "haproxy",
        alone: false,
        services: &Service::ALL,
        start: Haproxy::start,
        about: "HTTP mode for HTTP: retries, health checks every 2 s, metrics of requests; one connection of a client reaches every server",
    },
    Kind {
        name: "iptables",
        alone: true,
        services: &Service::ALL,
        start: |site| Dnat::start(site, false),
        about: "kube-proxy's chains with one service; also for packets that are forwarded",
    },
    Kind {
        name: "nft",
        alone: true,
        services: &Service::ALL,
        start: |site| Dnat::start(site, true),
        about: "one rule with a map for each service; also for packets that are forwarded",
    },
    Kind {
        name: "direct-again",
        alone: false,
        services: &Service::ALL,
        start: |site| Ok(Box::new(Direct(site.backends.clone()))),
        about: "the same as direct: what differs is noise",
    },
];

/// What is compared, and by what: versions, null where it is not there.
pub(super) fn versions() -> Value {
    json!({
        // COMMIT/VERSION/…
        "Envoy": envoy().ok().and_then(|envoy| version(envoy, "--version", "version: ")).and_then(|version| {
            version.split('/').nth(1).map(str::to_owned)
        }),
        "HAProxy": version("haproxy", "-v", "version "),
        "iptables": version("iptables", "--version", "iptables v"),
        "nft": version("nft", "--version", "nftables v"),
        "nginx": version("nginx", "-v", "nginx/"),
        "oha": version(tools().join("bin/oha"), "--version", "oha "),
        "wrk": version("wrk", "-v", "wrk ").map(|version| version.replace("debian/", "")),
        "sockperf": version("sockperf", "--version", "version ").map(|version| version.replace("-no.git", "")),
        "iperf3": version("iperf3", "--version", "iperf "),
    })
}

struct Direct(Vec<IpAddr>);

impl Arm for Direct {
    fn targets(&self, service: Service) -> Vec<SocketAddr> {
        self.0.iter().map(|ip| SocketAddr::new(*ip, service.backend_port())).collect()
    }

    /// Nobody tells a client.
    fn tell(&mut self, _: &[State]) -> anyhow::Result<()> {
        Ok(())
    }
}

struct Mesh {
    backends: Vec<IpAddr>,
    _client: Cgroup,
    node: Node,
}

const VIP: &str = "127.128.0.30";

impl Mesh {
    fn start(site: &mut Site) -> anyhow::Result<Box<dyn Arm>> {
        let mut node = Node::new(&format!("{OURS}-load"))?;
        let client = Cgroup::new(node.cgroup.join("client"))?;
        site.client.cgroup = client.path();
        node.namespace = Some(site.switch.clone());
        let mut mesh = Self { backends: site.backends.clone(), _client: client, node };
        mesh.write(&vec![State::Active; site.backends.len()])?;
        mesh.node.start()?;
        let pid = mesh.node.pid().context("the daemon runs")?;
        fs::write(site.egress.cgroup.join("cgroup.procs"), pid.to_string())?;
        Ok(Box::new(mesh))
    }

    fn write(&self, states: &[State]) -> anyhow::Result<()> {
        let mut text = String::new();
        for service in Service::ALL {
            text += &format!(
                "[[service]]\nname = \"{}\"\nnamespace = \"service.local\"\nport = {}\nvip = \"{VIP}\"\n",
                service.name(),
                service.port()
            );
            for (backend, state) in self.backends.iter().zip(states) {
                let health = match state {
                    State::Active => "healthy",
                    State::Draining => "draining",
                    State::Removed => continue,
                };
                text += &format!(
                    "[[service.instance]]\nid = \"{backend}\"\naddress = \"{backend}\"\nport = {}\nhealth = \"{health}\"\n",
                    service.backend_port()
                );
            }
        }
        self.node.write_services(&text)
    }
}

impl Arm for Mesh {
    fn targets(&self, service: Service) -> Vec<SocketAddr> {
        vec![SocketAddr::new(VIP.parse().expect("an address"), service.port())]
    }

    fn tell(&mut self, states: &[State]) -> anyhow::Result<()> {
        self.write(states)
    }

    fn node(&self) -> Option<&Node> {
        Some(&self.node)
    }
}

/// A configuration with its repeated parts filled in, once for each list of names and their values.
pub(super) fn fill(template: &str, services: &[Vec<(&str, String)>], all: &[(&str, String)]) -> String {
    let replace = |text: &str, values: &[(&str, String)]| {
        values.iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
    };
    let (mut filled, mut repeated) = (String::new(), None);
    for line in
        template.lines().filter(|line| !line.starts_with("# ") || ["# each", "# end"].contains(&line.trim()))
    {
        match (line.trim(), &mut repeated) {
            ("# each", _) => repeated = Some(String::new()),
            ("# end", Some(part)) => {
                filled.extend(services.iter().map(|values| replace(part, values)));
                repeated = None;
            }
            (_, Some(part)) => *part += &format!("{line}\n"),
            (_, None) => filled += &format!("{line}\n"),
        }
    }
    replace(&filled, all)
}

/// Where the wheel puts the program.
pub(super) fn envoy() -> anyhow::Result<PathBuf> {
    let lib = root().join("target/python/lib");
    let versions = fs::read_dir(&lib).with_context(|| format!("{} is missing", lib.display()))?;
    let programs = versions.flatten().map(|version| version.path().join("site-packages/envoy/_bin/envoy"));
    programs.into_iter().find(|program| program.is_file()).context("envoy is missing: cargo xtask setup")
}

pub(super) fn envoy_template(name: &str) -> &'static str {
    match name {
        "egress-http" => include_str!("../../../bench/arms/envoy-egress-http.yaml"),
        "egress-tcp" => include_str!("../../../bench/arms/envoy-egress-tcp.yaml"),
        "ingress-http" => include_str!("../../../bench/arms/envoy-ingress-http.yaml"),
        _ => include_str!("../../../bench/arms/envoy-ingress-tcp.yaml"),
    }
}

/// The endpoints of a cluster.
pub(super) fn load_assignment(cluster: &str, endpoints: &[(SocketAddr, State)]) -> Value {
    let endpoint = |(at, state): &(SocketAddr, State)| {
        let address = json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}});
        let health = if *state == State::Draining { "DRAINING" } else { "HEALTHY" };
        (*state != State::Removed).then(|| json!({"endpoint": {"address": address}, "health_status": health}))
    };
    let endpoints: Vec<Value> = endpoints.iter().filter_map(endpoint).collect();
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": endpoints}]})
}

/// Tells an Envoy the endpoints of a cluster; it watches for the file to be moved there.
pub(super) fn write_endpoints(
    dir: &Path,
    cluster: &str,
    endpoints: &[(SocketAddr, State)],
) -> anyhow::Result<()> {
    let mut assignment = load_assignment(cluster, endpoints);
    assignment["@type"] = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment".into();
    let response = json!({"resources": [assignment]});
    let new = dir.join(format!("{cluster}.new"));
    fs::write(&new, response.to_string())?;
    Ok(fs::rename(new, dir.join(format!("{cluster}.json")))?)
}

struct Envoy {
    address: IpAddr,
    dir: PathBuf,
    services: &'static [Service],
    /// Addresses of the backends, and what their ingress adds to the port.
    endpoints: Vec<(IpAddr, u16)>,
    ingress: Vec<Option<Process>>,
    _egress: Process,
}

impl Envoy {
    fn start(site: &mut Site, number: u8, mode: &str, pair: bool) -> anyhow::Result<Box<dyn Arm>> {
        // Service Connect's own range.
        let address = IpAddr::from([127, 255, 0, number]);
        let services = if mode == "http" { HTTP } else { &Service::ALL };
        let more = if pair { u16::from(number) * 10_000 } else { 0 };
        let listeners = |address: IpAddr, port: &dyn Fn(Service) -> u16| {
            let values = |service: &Service| {
                vec![
                    ("$NAME", service.name().to_owned()),
                    ("$ADDRESS", address.to_string()),
                    ("$PORT", port(*service).to_string()),
                    ("$APPLICATION", service.backend_port().to_string()),
                ]
            };
            services.iter().map(values).collect::<Vec<_>>()
        };
        let mut ingress = Vec::new();
        for ip in site.backends.iter().filter(|_| pair) {
            let dir = site.dir.join(ip.to_string());
            fs::create_dir_all(&dir)?;
            let listeners = listeners(*ip, &|service| service.backend_port() + more);
            let config = fill(envoy_template(&format!("ingress-{mode}")), &listeners, &[]);
            ingress.push(Some(run_envoy(site.ingress.command(envoy()?), &dir, &config)?));
        }
        let endpoints: Vec<_> = site.backends.iter().map(|ip| (*ip, more)).collect();
        tell_envoy(&site.dir, services, &endpoints, &vec![State::Active; endpoints.len()])?;
        let config = fill(
            envoy_template(&format!("egress-{mode}")),
            &listeners(address, &Service::port),
            &[("$DIR", site.dir.display().to_string())],
        );
        let egress = run_envoy(site.egress.command(envoy()?), &site.dir, &config)?;
        Ok(Box::new(Self { address, dir: site.dir.clone(), services, endpoints, ingress, _egress: egress }))
    }
}

fn tell_envoy(
    dir: &Path,
    services: &[Service],
    endpoints: &[(IpAddr, u16)],
    states: &[State],
) -> anyhow::Result<()> {
    for service in services {
        let endpoints = endpoints.iter().zip(states);
        let endpoints: Vec<_> = endpoints
            .map(|((ip, more), state)| (SocketAddr::new(*ip, service.backend_port() + more), *state))
            .collect();
        write_endpoints(dir, service.name(), &endpoints)?;
    }
    Ok(())
}

pub(super) fn run_envoy(mut command: Command, dir: &Path, config: &str) -> anyhow::Result<Process> {
    let path = dir.join("envoy.yaml");
    fs::write(&path, config)?;
    command.arg("-c").arg(&path).args([
        "--disable-hot-restart",
        "--concurrency",
        "2",
        "--log-level",
        "warning",
    ]);
    Process::start(&mut command, &dir.join("envoy.log"))
}

impl Arm for Envoy {
    fn targets(&self, service: Service) -> Vec<SocketAddr> {
        vec![SocketAddr::new(self.address, service.port())]
    }

    fn tell(&mut self, states: &[State]) -> anyhow::Result<()> {
        tell_envoy(&self.dir, self.services, &self.endpoints, states)
    }

    fn end_backend(&mut self, backend: usize) {
        if let Some(ingress) = self.ingress.get_mut(backend) {
            ingress.take();
        }
    }
}

struct Haproxy {
    address: IpAddr,
    socket: PathBuf,
    _process: Process,
}

impl Haproxy {
    fn start(site: &mut Site) -> anyhow::Result<Box<dyn Arm>> {
        let address = IpAddr::from([127, 255, 0, 9]);
        let service = |service: &Service| {
            let servers = site.backends.iter().enumerate().map(|(number, ip)| {
                format!("server s{number} {}", SocketAddr::new(*ip, service.backend_port()))
            });
            // iperf3 takes a connection that says nothing for a client, and ends.
            let check = if *service == Service::Bulk { " no-check" } else { "" };
            vec![
                ("$NAME", service.name().to_owned()),
                ("$MODE", if *service == Service::Http { "http".into() } else { "tcp".into() }),
                ("$ADDRESS", address.to_string()),
                ("$PORT", service.port().to_string()),
                ("$SERVERS", servers.map(|line| line + check).collect::<Vec<_>>().join("\n    ")),
            ]
        };
        let services: Vec<_> = Service::ALL.iter().map(service).collect();
        let socket = site.dir.join("haproxy.sock");
        let _ = fs::remove_file(&socket);
        let config = site.dir.join("haproxy.cfg");
        let text = fill(
            include_str!("../../../bench/arms/haproxy.cfg"),
            &services,
            &[("$DIR", site.dir.display().to_string())],
        );
        fs::write(&config, text)?;
        let mut haproxy = site.egress.command("haproxy");
        haproxy.arg("-db").arg("-f").arg(config);
        let process = Process::start(&mut haproxy, &site.dir.join("haproxy.log"))?;
        Ok(Box::new(Self { address, socket, _process: process }))
    }
}

impl Arm for Haproxy {
    fn targets(&self, service: Service) -> Vec<SocketAddr> {
        vec![SocketAddr::new(self.address, service.port())]
    }

    fn tell(&mut self, states: &[State]) -> anyhow::Result<()> {
        for service in Service::ALL {
            for (number, state) in states.iter().enumerate() {
                let word = match state {
                    State::Active => "ready",
                    State::Draining => "drain",
                    State::Removed => "maint",
                };
                let mut stream = UnixStream::connect(&self.socket)?;
                writeln!(stream, "set server {}/s{number} state {word}", service.name())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                if !answer.trim().is_empty() {
                    bail!("haproxy: {}", answer.trim());
                }
            }
        }
        Ok(())
    }
}
