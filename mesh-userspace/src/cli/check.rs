//! `mesh check`: will it run here, and if not, what mends it.

use std::{
    io::{self, Write},
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::ExitCode,
};

use rustix::{
    system::uname,
    thread::{CapabilitySet, capabilities},
};
use serde::Serialize;

use super::{
    ask,
    output::{self, table},
};
use crate::{
    api::{client, objects::Status},
    config::{self, Config},
    datapath::{self, Pins, mounts},
    netns::{self, routes},
    registry::{self, Sync},
};

mod names;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Note,
    Fail,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    result: Level,
    detail: String,
    hint: Option<String>,
}

fn ok(check: &'static str, detail: impl Into<String>) -> Finding {
    Finding { check, result: Level::Ok, detail: detail.into(), hint: None }
}

fn note(check: &'static str, detail: impl Into<String>) -> Finding {
    Finding { result: Level::Note, ..ok(check, detail) }
}

fn fail(check: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Finding {
    Finding { result: Level::Fail, hint: Some(hint.into()), ..ok(check, detail) }
}

pub(super) fn run(
    path: Option<&Path>,
    socket: Option<PathBuf>,
    pre: bool,
    format: Format,
) -> anyhow::Result<ExitCode> {
    let mut findings = Vec::new();
    match config::load(path) {
        Err(error) => findings.push(fail(
            "config",
            error.to_string(),
            "mend the file, then `mesh config validate FILE`",
        )),
        Ok(config) => {
            let name = config.path.as_ref().map_or("defaults".into(), |path| path.display().to_string());
            findings.push(ok("config", name));
            node(&config, &mut findings);
            let running = ask_status(&socket.unwrap_or_else(|| config.api.socket.clone()));
            ports(&config, running.is_ok(), &mut findings);
            ranges(&config, &mut findings);
            registries(&config, &mut findings);
            findings.extend(names::check(&config.dns));
            if !pre {
                daemon(running, &mut findings);
            }
        }
    }
    match format {
        Format::Text => {
            let rows = findings.iter().map(|finding| {
                let hint = finding.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
                vec![output::word(&finding.result), finding.check.into(), format!("{}{hint}", finding.detail)]
            });
            io::stdout().write_all(table(&[], rows).as_bytes())?;
        }
        Format::Json => writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&findings)?)?,
    }
    let failed = findings.iter().any(|finding| finding.result == Level::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn node(config: &Config, findings: &mut Vec<Finding>) {
    let kernel = uname().release().to_string_lossy().into_owned();
    let effective = capabilities(None).map(|sets| sets.effective).unwrap_or(CapabilitySet::empty());
    let root = effective.contains(CapabilitySet::SYS_ADMIN);
    findings.push(if root || effective.contains(CapabilitySet::BPF | CapabilitySet::NET_ADMIN) {
        ok("capabilities", if root { "CAP_SYS_ADMIN" } else { "CAP_BPF and CAP_NET_ADMIN" })
    } else {
        fail(
            "capabilities",
            "CAP_BPF and CAP_NET_ADMIN are missing",
            "run as root, or give both to the daemon",
        )
    });
    // Versions lie about features; the kernel's own verifier does not.
    findings.push(match datapath::probe(&config.kernel_ranges()) {
        Ok(()) => ok("kernel", format!("{kernel} takes the programs")),
        Err(error) => {
            fail("kernel", format!("{kernel}: {error}"), "Linux 6.1 or later with CONFIG_CGROUP_BPF, as root")
        }
    });
    findings.push(match config.node.cgroup() {
        Ok(cgroup) => ok("cgroup2", cgroup.display().to_string()),
        Err(error) => {
            fail("cgroup2", error.to_string(), "mount cgroup2, or set node.cgroup to a directory of one")
        }
    });
    findings.extend(pid_namespace());
    findings.extend(config.node.cgroup().ok().and_then(|cgroup| others(config, &cgroup)));
    let pin_dir = &config.node.pin_dir;
    findings.push(if mounts::is_bpffs(pin_dir) {
        ok("bpffs", pin_dir.display().to_string())
    } else if pin_dir.starts_with("/sys/fs/bpf") {
        note("bpffs", "not mounted at /sys/fs/bpf; the daemon mounts it when it starts")
    } else {
        fail(
            "bpffs",
            format!("{} is not on a BPF file system", pin_dir.display()),
            "set node.pin_dir below /sys/fs/bpf",
        )
    });
    findings.push(note(
        "sandboxes",
        "tasks with a kernel of their own (gVisor, Kata, Firecracker) open no sockets in this one: they are not translated",
    ));
}

/// Tasks are found by their processes.
fn pid_namespace() -> Option<Finding> {
    let text = match netns::is_host_pid_namespace() {
        Ok(true) => return None,
        Ok(false) => "not the host's PID namespace".to_owned(),
        Err(error) => format!("cannot see the PID namespace: {error}"),
    };
    let rest = "sockets of tasks that it hides are not closed after their drain time, and their namespaces \
                get no routes: run with the host's (docker --pid=host, Kubernetes hostPID)";
    Some(note("processes", format!("{text}; {rest}")))
}

/// Programs of others at the same hooks: they see what ours have rewritten, or rewrite first.
fn others(config: &Config, cgroup: &Path) -> Option<Finding> {
    let foreign = datapath::foreign_programs(&Pins::new(&config.node.pin_dir), cgroup).ok()?;
    let names: Vec<_> = foreign.iter().map(|(name, id)| format!("{name} (id {id})")).collect();
    let text = format!("programs of others at the same hooks, which are left alone: {}", names.join(", "));
    (!foreign.is_empty()).then(|| note("programs", text))
}

fn ports(config: &Config, running: bool, findings: &mut Vec<Finding>) {
    let web = std::iter::once(("web.listen", config.web.listen));
    let dns = config.dns.listen.iter().map(|address| ("dns.listen", *address));
    let embedded = config.registries.iter().filter_map(|registry| match registry {
        config::Registry::Embedded { listen } => Some(("listen of the embedded registry", *listen)),
        _ => None,
    });
    let outside = config.dns.outside.iter().map(|address| ("dns.outside", *address));
    for (key, address) in web.chain(dns).chain(outside).chain(embedded) {
        if running {
            findings.push(ok("ports", format!("{address} (the daemon runs)")));
            continue;
        }
        let bound = match key {
            "dns.listen" | "dns.outside" => UdpSocket::bind(address).and_then(|_| TcpListener::bind(address)),
            _ => TcpListener::bind(address),
        };
        findings.push(match bound {
            Ok(_) => ok("ports", address.to_string()),
            Err(error) => fail("ports", format!("{key} {address}: {error}"), format!("set another {key}")),
        });
    }
}

/// Whether the routes that refuse the VIP ranges would take a network from the node.
fn ranges(config: &Config, findings: &mut Vec<Finding>) {
    let overlaps = match routes::overlaps(&config.rules.vip_ranges) {
        Ok(overlaps) => overlaps,
        Err(error) => {
            return findings
                .push(note("vip ranges", format!("cannot list the routes of this node: {error}")));
        }
    };
    let (whole, parts): (Vec<_>, Vec<_>) = overlaps.iter().partition(|overlap| overlap.whole);
    for overlap in parts {
        findings.push(note("vip ranges", format!("{overlap}: what has an address there cannot be reached")));
    }
    findings.push(match whole.first() {
        Some(overlap) => fail("vip ranges", overlap.to_string(), "set other [vip] ranges"),
        None => ok("vip ranges", "take no network from this node"),
    });
}

fn registries(config: &Config, findings: &mut Vec<Finding>) {
    if config.registries.is_empty() {
        findings.push(note("registry", "none is configured: there will be no services"));
    }
    for registry in &config.registries {
        let mut services = None;
        let asked = ask(async {
            services = registry::check(registry.clone(), &config.rules).await;
            Ok(ExitCode::SUCCESS)
        });
        let (kind, source) = registry.label();
        findings.extend(asked.err().map(|error| note("registry", format!("cannot ask: {error}"))));
        findings.extend(services.map(|services| match services {
            Ok(services) => ok("registry", format!("{kind} {source}: {services} services")),
            Err(error) => fail("registry", error, "mend that; the daemon keeps the last good content"),
        }));
    }
}

fn ask_status(socket: &Path) -> anyhow::Result<Status> {
    let mut status = None;
    ask(async {
        status = Some(client::get(socket, "/v1/status").await?);
        Ok(ExitCode::SUCCESS)
    })?;
    status.ok_or_else(|| anyhow::anyhow!("no answer"))
}

fn daemon(status: anyhow::Result<Status>, findings: &mut Vec<Finding>) {
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            return findings.push(fail(
                "daemon",
                format!("{error:#}"),
                "start it with `mesh run`, or see --socket",
            ));
        }
    };
    let unattached: Vec<_> =
        status.programs.iter().filter(|program| !program.attached).map(|program| &*program.name).collect();
    findings.push(if unattached.is_empty() {
        ok("programs", "all attached")
    } else {
        fail("programs", format!("not attached: {}", unattached.join(", ")), "restart the daemon")
    });
    for registry in status.registries.iter().filter(|registry| registry.state != Sync::Synced) {
        let error = registry.error.clone().unwrap_or_else(|| "no answer yet".into());
        findings.push(fail(
            "registry",
            format!("{} {}: {error}", registry.r#type, registry.source),
            "the last good content is in use",
        ));
    }
    findings.extend(
        status.problems.iter().map(|problem| fail("services", problem.as_str(), "see `mesh status`")),
    );
    let ready =
        if status.ready { ok("daemon", "ready") } else { fail("daemon", "not ready", "see `mesh status`") };
    findings.push(ready);
}
