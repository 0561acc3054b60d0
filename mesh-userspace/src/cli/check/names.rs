//! What keeps programs on this node from asking the daemon, or from hearing what it says now.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use super::Finding;
use crate::config::Dns;

const CHECK: &str = "names";

/// What decides on this node how a name is looked up.
struct Node {
    nsswitch: String,
    resolv: String,
    hosts: String,
    has_nscd: bool,
}

impl Node {
    /// A file that is not there says nothing.
    fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self {
            nsswitch: read("/etc/nsswitch.conf"),
            resolv: read("/etc/resolv.conf"),
            hosts: read("/etc/hosts"),
            has_nscd: Path::new("/run/nscd/socket").exists(),
        }
    }

    /// What glibc asks for host names, before DNS.
    fn before_dns(&self) -> Vec<&str> {
        let hosts = self.nsswitch.lines().find_map(|line| line.trim_start().strip_prefix("hosts:"));
        let words = hosts.unwrap_or_default().split_whitespace();
        words.take_while(|word| *word != "dns" && !word.starts_with('#')).collect()
    }

    fn has_stub(&self) -> bool {
        /// Of systemd-resolved.
        const STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));
        let servers = self.resolv.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
        servers.filter_map(|server| server.trim().parse::<IpAddr>().ok()).any(|server| server == STUB)
    }

    /// Names of ours that the hosts file has.
    fn own_hosts(&self, suffixes: &[String]) -> Vec<&str> {
        let lines = self.hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
        let names = lines.flat_map(|line| line.split_whitespace().skip(1));
        let is_own = |name: &&str| suffixes.iter().any(|suffix| is_below(name, suffix));
        names.filter(is_own).collect()
    }
}

fn is_below(name: &str, suffix: &str) -> bool {
    let name = name.to_lowercase();
    name.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.'))
}

pub(super) fn check(dns: &Dns) -> Vec<Finding> {
    look(&Node::this(), dns)
}

fn look(node: &Node, dns: &Dns) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |detail: String, hint: &str| {
        findings.push(Finding { hint: Some(hint.to_owned()), ..super::note(CHECK, detail) });
    };
    let before = node.before_dns();
    let is_local = |suffix: &&String| *suffix == "local" || is_below(suffix, "local");
    if let Some(suffix) = dns.suffixes.iter().find(is_local)
        && before.iter().any(|source| source.starts_with("mdns"))
    {
        note(
            format!(
                "nsswitch.conf has mDNS before dns, which may say of names below {suffix} that there are none"
            ),
            "put dns before it, or set another suffix",
        );
    }
    let excludes_resolved = dns.exclude.iter().any(|path| path.ends_with("systemd-resolved.service"));
    if (before.contains(&"resolve") || node.has_stub()) && !excludes_resolved {
        note(
            "systemd-resolved is asked on this node, and its own questions are intercepted: it keeps answers, and \
             as an upstream it asks the daemon in turn"
                .into(),
            "add \"/system.slice/systemd-resolved.service\" to dns.exclude",
        );
    }
    if before.contains(&"resolve") {
        note(
            "nsswitch.conf has resolve before dns: glibc asks systemd-resolved without a query that could be \
             intercepted"
                .into(),
            "put dns before it",
        );
    }
    if node.has_nscd {
        note(
            "nscd keeps answers, also that there is no such name".into(),
            "set negative-time-to-live hosts 0 in nscd.conf",
        );
    }
    let own = node.own_hosts(&dns.suffixes);
    if !own.is_empty() {
        note(
            format!("/etc/hosts goes before DNS, and has {}", own.join(", ")),
            "take it out, unless it is meant",
        );
    }
    if dns.intercept {
        note(
            "programs that ask over HTTPS or TLS, such as browsers, are not intercepted".into(),
            "turn it off there, or let them use the system's resolver",
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Upstream;

    fn details(nsswitch: &str, resolv: &str, hosts: &str, exclude: &[&str]) -> Vec<String> {
        let node =
            Node { nsswitch: nsswitch.into(), resolv: resolv.into(), hosts: hosts.into(), has_nscd: false };
        let dns = Dns {
            listen: Vec::new(),
            outside: Vec::new(),
            suffixes: vec!["service.local".into()],
            intercept: false,
            exclude: exclude.iter().map(Into::into).collect(),
            upstream: Upstream::Auto,
        };
        look(&node, &dns).into_iter().map(|finding| finding.detail).collect()
    }

    #[test]
    fn a_plain_node_has_no_pitfalls() {
        let hosts = "127.0.0.1 localhost service.local # db.service.local\n10.0.0.1 myservice.local\n";
        let found = details("hosts: files dns mdns4 # resolve\n", "nameserver 10.0.0.2\n", hosts, &[]);
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn each_pitfall_is_named() {
        let found = details("passwd: files\nhosts: files mdns4_minimal [NOTFOUND=return] dns\n", "", "", &[]);
        assert!(found.len() == 1 && found[0].contains("mDNS before dns"), "{found:?}");
        let resolve = "hosts: resolve [!UNAVAIL=return] dns";
        let found = details(resolve, "", "", &["system.slice/systemd-resolved.service"]);
        assert!(found.len() == 1 && found[0].contains("resolve before dns"), "{found:?}");
        let found = details("", "nameserver 127.0.0.53\n", "", &[]);
        assert!(found.len() == 1 && found[0].contains("asks the daemon in turn"), "{found:?}");
        let found = details("", "", "10.0.0.1 x DB.service.local y\n", &[]);
        assert_eq!(found, ["/etc/hosts goes before DNS, and has DB.service.local"]);
    }
}
