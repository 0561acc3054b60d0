//! The configuration file: read with [`load`], checked whole, then used.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use mesh_common::{
    abi::{MAX_INDEX, MAX_VIP_RANGES, VipRanges},
    address::Prefix,
};
use serde::Deserialize;

use crate::{
    datapath::mounts,
    plan::applied::Sizes,
    registry::{self, Rules},
    watch::{self, Changes},
};

mod dns;

pub use dns::{Dns, Upstream};

/// Where the configuration is looked for when no file is named.
pub const DEFAULT_PATH: &str = "/etc/mesh/mesh.toml";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}{}: {message}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Invalid { path: PathBuf, line: Option<usize>, message: String },
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file it came from; none for the defaults.
    pub path: Option<PathBuf>,
    pub node: Node,
    pub api: Api,
    pub web: Web,
    pub rules: Rules,
    pub dns: Dns,
    pub datapath: Datapath,
    pub registries: Vec<Registry>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Node {
    cgroup: PathBuf,
    pub pin_dir: PathBuf,
    pub state_dir: PathBuf,
    pub zone: Option<String>,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            cgroup: "auto".into(),
            pin_dir: "/sys/fs/bpf/mesh".into(),
            state_dir: "/var/lib/mesh".into(),
            zone: None,
        }
    }
}

impl Node {
    /// The cgroup whose sockets are translated.
    pub fn cgroup(&self) -> io::Result<PathBuf> {
        if self.cgroup.as_os_str() == "auto" {
            return mounts::cgroup2_root();
        }
        if mounts::is_cgroup2(&self.cgroup) {
            return Ok(self.cgroup.clone());
        }
        let message = format!("node.cgroup {} is not a cgroup2 directory", self.cgroup.display());
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    pub socket: PathBuf,
}

impl Default for Api {
    fn default() -> Self {
        Self { socket: "/run/mesh/api.sock".into() }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Web {
    pub listen: SocketAddr,
}

impl Default for Web {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9464)) }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Datapath {
    pub max_services: u32,
    pub max_backends: u32,
}

impl Default for Datapath {
    fn default() -> Self {
        Self { max_services: 16_384, max_backends: 65_536 }
    }
}

/// Room for eight tables of consistent hashing, one of which changes.
const MAGLEV_SLOTS: u32 = 1 << 16;

impl Datapath {
    /// Map sizes. Entry 0 of the id-indexed maps is never used; slots are twice the backends, so
    /// that a change can write its new slots beside the old ones, and some for Maglev tables.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            frontends: self.max_services,
            services: self.max_services + 1,
            backends: self.max_backends + 1,
            slots: (2 * self.max_backends + MAGLEV_SLOTS).min(MAX_INDEX),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Registry {
    File {
        path: PathBuf,
    },
    Embedded {
        #[serde(default = "embedded_listen")]
        listen: SocketAddr,
    },
    Cloudmap(registry::cloudmap::Settings),
    Consul(registry::consul::Settings),
    Dns(registry::dns::Settings),
    Etcd(registry::etcd::Settings),
    Kubernetes(registry::kubernetes::Settings),
}

fn embedded_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9465))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    node: toml::Spanned<Node>,
    api: Api,
    web: Web,
    vip: Vip,
    backends: Backends,
    dns: dns::Raw,
    datapath: toml::Spanned<Datapath>,
    registry: Vec<toml::Spanned<toml::Table>>,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            node: toml::Spanned::new(0..0, Node::default()),
            api: Api::default(),
            web: Web::default(),
            vip: Vip::default(),
            backends: Backends::default(),
            dns: dns::Raw::default(),
            datapath: toml::Spanned::new(0..0, Datapath::default()),
            registry: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vip {
    ranges: toml::Spanned<Vec<toml::Spanned<IpNet>>>,
}

impl Default for Vip {
    fn default() -> Self {
        let ranges = ["127.128.0.0/10", "fd00:6d65:7368::/96"];
        let ranges = ranges.map(|range| toml::Spanned::new(0..0, range.parse().expect("a valid range")));
        Self { ranges: toml::Spanned::new(0..0, ranges.to_vec()) }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Backends {
    allow: Vec<IpNet>,
    allow_loopback: bool,
}

impl Default for Backends {
    fn default() -> Self {
        let all = ["0.0.0.0/0", "::/0"];
        Self { allow: all.map(|net| net.parse().expect("a valid range")).to_vec(), allow_loopback: false }
    }
}

/// The configuration in `path`; without one, the file at its usual place, else the defaults.
pub fn load(path: Option<&Path>) -> Result<Config, Error> {
    let usual = Path::new(DEFAULT_PATH);
    let path = path.or_else(|| usual.exists().then_some(usual));
    let Some(path) = path else { return parse(Path::new(""), "") };
    let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<Config, Error> {
    let invalid = |at: Option<usize>, message: String| {
        let line = at.map(|offset| 1 + text[..offset.min(text.len())].matches('\n').count());
        Error::Invalid { path: path.into(), line, message }
    };
    let error =
        |error: toml::de::Error| invalid(error.span().map(|span| span.start), error.message().to_owned());
    let raw: Raw = toml::from_str(text).map_err(error)?;

    let ranges = vip_ranges(&raw.vip.ranges).map_err(|(at, message)| invalid(Some(at), message))?;
    if !raw.node.get_ref().pin_dir.is_absolute() {
        return Err(invalid(Some(raw.node.span().start), "node.pin_dir must be an absolute path".into()));
    }
    let datapath = raw.datapath.get_ref();
    for (key, value) in [("max_services", datapath.max_services), ("max_backends", datapath.max_backends)] {
        // Slots are twice the backends, and an index has 24 bits.
        if !(1..=MAX_INDEX / 2).contains(&value) {
            let message = format!("datapath.{key} must be from 1 to {}", MAX_INDEX / 2);
            return Err(invalid(Some(raw.datapath.span().start), message));
        }
    }
    let dns = raw.dns.check(&ranges).map_err(|(at, message)| invalid(Some(at), message))?;
    let rules =
        Rules { vip_ranges: ranges, allow: raw.backends.allow, allow_loopback: raw.backends.allow_loopback };
    let mut registries = Vec::new();
    for table in raw.registry {
        let at = table.span().start;
        let registry = registry(table.into_inner(), &rules).map_err(|message| invalid(Some(at), message))?;
        let is_embedded = |registry: &Registry| matches!(registry, Registry::Embedded { .. });
        if is_embedded(&registry) && registries.iter().any(is_embedded) {
            return Err(invalid(Some(at), "registry: there can be one of type embedded".into()));
        }
        registries.push(registry);
    }
    Ok(Config {
        path: (!path.as_os_str().is_empty()).then(|| path.into()),
        node: raw.node.into_inner(),
        api: raw.api,
        web: raw.web,
        rules,
        dns,
        datapath: raw.datapath.into_inner(),
        registries,
    })
}

fn registry(table: toml::Table, rules: &Rules) -> Result<Registry, String> {
    const TYPES: [&str; 7] = ["file", "embedded", "cloudmap", "consul", "dns", "etcd", "kubernetes"];
    let kind =
        table.get("type").and_then(toml::Value::as_str).ok_or("registry: key `type` is missing")?.to_owned();
    if !TYPES.contains(&kind.as_str()) {
        return Err(format!(
            "registry: type {kind:?} is not known to this version; it knows {}",
            TYPES.join(", ")
        ));
    }
    let of_kind = |message: &str| format!("registry of type {kind}: {message}");
    let registry = table.try_into().map_err(|error: toml::de::Error| of_kind(error.message()))?;
    let checked = match &registry {
        Registry::File { .. } | Registry::Embedded { .. } => Ok(()),
        Registry::Cloudmap(settings) => settings.check(rules),
        Registry::Consul(settings) => settings.check(rules),
        Registry::Dns(settings) => settings.check(rules),
        Registry::Etcd(settings) => settings.check(rules),
        Registry::Kubernetes(settings) => settings.check(),
    };
    checked.map_err(|message| of_kind(&message)).map(|()| registry)
}

fn vip_ranges(ranges: &toml::Spanned<Vec<toml::Spanned<IpNet>>>) -> Result<Vec<IpNet>, (usize, String)> {
    let service_connect: IpNet = "127.255.0.0/16".parse().expect("a valid range");
    let list = ranges.get_ref();
    if list.is_empty() || list.len() > MAX_VIP_RANGES {
        return Err((ranges.span().start, format!("vip.ranges must hold 1 to {MAX_VIP_RANGES} ranges")));
    }
    let mapped: IpNet = "::ffff:0:0/96".parse().expect("a valid range");
    for range in list {
        let (net, at) = (range.get_ref(), range.span().start);
        if net.contains(&service_connect) || service_connect.contains(net) {
            return Err((
                at,
                format!("vip.ranges: {net} overlaps {service_connect}, which is ECS Service Connect's own"),
            ));
        }
        if net.contains(&mapped) || mapped.contains(net) {
            return Err((
                at,
                format!("vip.ranges: {net} overlaps {mapped}, the IPv4 addresses; write it as IPv4"),
            ));
        }
        if net.trunc() != *net {
            return Err((
                at,
                format!("vip.ranges: {net} has bits behind its prefix; did you mean {}?", net.trunc()),
            ));
        }
    }
    Ok(list.iter().map(|range| *range.get_ref()).collect())
}

impl Registry {
    /// Its type, and what tells it from others of that type.
    pub fn label(&self) -> (&'static str, String) {
        match self {
            Self::File { path } => ("file", path.display().to_string()),
            Self::Embedded { listen } => ("embedded", listen.to_string()),
            Self::Cloudmap(settings) => ("cloudmap", settings.source()),
            Self::Consul(settings) => ("consul", settings.source()),
            Self::Dns(settings) => ("dns", settings.source()),
            Self::Etcd(settings) => ("etcd", settings.source()),
            Self::Kubernetes(settings) => ("kubernetes", settings.source()),
        }
    }
}

/// Tells when the configuration file was written, moved into place or removed.
#[derive(Debug)]
pub struct Watch {
    changes: Changes,
    _watcher: Option<notify::RecommendedWatcher>,
}

impl Watch {
    pub fn new(path: Option<&Path>) -> Self {
        let changes = Changes::default();
        let watcher = path.and_then(|path| {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let watcher = watch::folder(dir, path.file_name().map(ToOwned::to_owned), changes.clone());
            if watcher.is_none() {
                tracing::warn!("cannot watch {}; SIGHUP still reloads it", path.display());
            }
            watcher
        });
        Self { changes, _watcher: watcher }
    }

    pub async fn changed(&self) {
        self.changes.wait().await;
    }
}

impl Config {
    /// The VIP ranges as the kernel wants them.
    pub fn kernel_ranges(&self) -> VipRanges {
        let mut ranges = [Prefix::NONE; MAX_VIP_RANGES];
        for (slot, range) in ranges.iter_mut().zip(&self.rules.vip_ranges) {
            let mapped = if range.addr().is_ipv4() { 96 } else { 0 };
            *slot = Prefix::new(range.network().into(), mapped + range.prefix_len());
        }
        ranges
    }

    /// The keys that differ from `other` and are only read at start.
    pub fn needs_restart(&self, other: &Self) -> Vec<&'static str> {
        let keys = [
            ("node", self.node != other.node),
            ("api", self.api != other.api),
            ("web", self.web != other.web),
            ("vip", self.rules.vip_ranges != other.rules.vip_ranges),
            ("dns", self.dns.at_start() != other.dns.at_start()),
            ("datapath", self.datapath != other.datapath),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        parse(Path::new("mesh.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn the_contract_s_example_is_taken() {
        let config = parse(
            Path::new("mesh.toml"),
            r#"
[node]
cgroup    = "auto"
pin_dir   = "/sys/fs/bpf/mesh"
state_dir = "/var/lib/mesh"
zone      = "use1-az1"
[api]
socket = "/run/mesh/api.sock"
[web]
listen = "127.0.0.1:9464"
[vip]
ranges = ["127.128.0.0/10", "fd00:6d65:7368::/96"]
[backends]
allow = ["0.0.0.0/0", "::/0"]
allow_loopback = false
[dns]
listen    = ["127.64.0.53:53"]
outside   = []
suffixes  = ["service.local"]
intercept = true
exclude   = []
upstream  = "auto"
[datapath]
max_services = 16384
max_backends = 65536
[[registry]]
type = "file"
path = "/etc/mesh/services.d"
"#,
        )
        .unwrap();
        let defaults = parse(Path::new(""), "").unwrap();
        assert_eq!(
            (config.rules, config.dns, config.datapath),
            (defaults.rules, defaults.dns, defaults.datapath)
        );
        assert_eq!(config.registries, [Registry::File { path: "/etc/mesh/services.d".into() }]);
    }

    #[test]
    fn mistakes_are_named_with_line_and_key() {
        for (text, expected) in [
            ("\n[node]\ncolour = 1", "mesh.toml:3: unknown field `colour`"),
            ("[nod]\n", "mesh.toml:1: unknown field `nod`"),
            ("\n[web]\nlisten = \"nowhere\"", "mesh.toml:3: "),
            ("\n[dns]\nlisten = [\n\"nowhere\"]", "mesh.toml:4: dns.listen: \"nowhere\" is not ADDRESS:PORT"),
            ("[dns]\nlisten = [\"0.0.0.0:53\"]", "mesh.toml:2: dns.listen: 0.0.0.0 stands for every address"),
            (
                "[dns]\nlisten = [\"127.128.0.1:53\"]",
                "mesh.toml:2: dns.listen: 127.128.0.1 lies in a VIP range",
            ),
            (
                "[dns]\noutside = [\"0.0.0.0:53\"]",
                "mesh.toml:2: dns.outside: 0.0.0.0 stands for every address",
            ),
            (
                "[dns]\nlisten = [\"10.0.0.5:53\"]\noutside = [\"10.0.0.6:53\", \"10.0.0.5:53\"]",
                "mesh.toml:3: dns.outside: 10.0.0.5:53 is in dns.listen",
            ),
            (
                "[dns]\noutside = [\"10.0.0.5:53\"]\nupstream = [\"10.0.0.5\"]",
                "mesh.toml:3: dns.upstream: 10.0.0.5:53 is in dns.outside",
            ),
            ("[dns]\nsuffixes = [\"a..b\"]", "mesh.toml:2: dns.suffixes: suffix \"a..b\" is not a DNS name"),
            ("[dns]\nupstream = 1", "mesh.toml:2: dns.upstream must be \"auto\" or a list"),
            ("[dns]\nupstream = \"10.0.0.2\"", "mesh.toml:2: dns.upstream: \"10.0.0.2\" is neither \"auto\""),
            ("[dns]\nupstream = [\"x:53\"]", "mesh.toml:2: dns.upstream: \"x:53\" is neither ADDRESS"),
            (
                "[dns]\nupstream = [\"127.64.0.53\"]",
                "mesh.toml:2: dns.upstream: 127.64.0.53:53 is in dns.listen",
            ),
            (
                "[dns]\nexclude = [\"/a/../b\"]",
                "mesh.toml:2: dns.exclude: \"/a/../b\" is not the path of a cgroup",
            ),
            ("[dns]\nexclude = [\"a\", \"/\"]", "mesh.toml:2: dns.exclude: \"/\" would be all"),
            ("[dns]\ncolour = 1", "mesh.toml:2: unknown field `colour`"),
            (
                "\n[vip]\nranges = [\"127.255.1.0/24\"]",
                "mesh.toml:3: vip.ranges: 127.255.1.0/24 overlaps 127.255.0.0/16",
            ),
            (
                "\n[vip]\nranges = [\"127.128.0.1/10\"]",
                "mesh.toml:3: vip.ranges: 127.128.0.1/10 has bits behind its prefix; did you mean 127.128.0.0/10?",
            ),
            ("[vip]\nranges = [\"::/0\"]", "mesh.toml:2: vip.ranges: ::/0 overlaps ::ffff:0.0.0.0/96"),
            (
                "[vip]\nranges = [\"::ffff:127.128.0.0/106\"]",
                "mesh.toml:2: vip.ranges: ::ffff:127.128.0.0/106 overlaps",
            ),
            ("[vip]\nranges = []", "mesh.toml:2: vip.ranges must hold 1 to 8"),
            ("[datapath]\nmax_backends = 0", "mesh.toml:1: datapath.max_backends must be from 1"),
            ("[node]\npin_dir = \"x\"", "mesh.toml:1: node.pin_dir must be an absolute path"),
            (
                "\n[[registry]]\ntype = \"zookeeper\"",
                "mesh.toml:2: registry: type \"zookeeper\" is not known",
            ),
            (
                "[[registry]]\ntype = \"embedded\"\n[[registry]]\ntype = \"embedded\"\nlisten = \"127.0.0.1:1\"",
                "mesh.toml:3: registry: there can be one of type embedded",
            ),
            (
                "\n[[registry]]\ntype = \"etcd\"",
                "mesh.toml:2: registry of type etcd: missing field `endpoints`",
            ),
            (
                "[[registry]]\ntype = \"etcd\"\nendpoints = []",
                "mesh.toml:1: registry of type etcd: endpoints names no server",
            ),
            (
                "[[registry]]\ntype = \"etcd\"\nendpoints = [\"http://127.128.0.1:2379\"]",
                "mesh.toml:1: registry of type etcd: endpoints: 127.128.0.1 lies in a VIP range",
            ),
            (
                "[[registry]]\ntype = \"etcd\"\nendpoints = [\"http://x\"]\nprefix = \"/m/\"",
                "mesh.toml:1: registry of type etcd: prefix \"/m/\"",
            ),
            (
                "[[registry]]\ntype = \"etcd\"\nendpoints = [\"http://x\"]\ntoken = \"x\"",
                "mesh.toml:1: registry of type etcd: unknown field `token`",
            ),
            ("\n[[registry]]\npath = \"x\"", "mesh.toml:2: registry: key `type` is missing"),
            ("\n[[registry]]\ntype = \"file\"", "mesh.toml:2: registry of type file: missing field `path`"),
            (
                "\n[[registry]]\ntype = \"file\"\npath = \"x\"\nurl = \"y\"",
                "mesh.toml:2: registry of type file: unknown field `url`",
            ),
        ] {
            let refusal = refusal(text);
            assert!(refusal.starts_with(expected), "{refusal}\nshould start with\n{expected}");
        }
    }

    #[test]
    fn the_kernel_gets_ipv4_ranges_as_mapped_ones() {
        let config = parse(Path::new(""), "").unwrap();
        let ranges = config.kernel_ranges();
        let inside = |address: &str| {
            let address = address.parse::<std::net::IpAddr>().unwrap().into();
            ranges.iter().any(|range| range.contains(&address))
        };
        assert!(inside("127.128.0.1") && inside("::ffff:127.191.0.1") && inside("fd00:6d65:7368::5"));
        assert!(!inside("127.0.0.1") && !inside("10.0.0.1") && !inside("fd00::1"));
    }
}
