//! The commands that ask the daemon.

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    ListArgs,
    output::{Format, list, or_dash, print, table, word},
};
use crate::{
    api::{
        client,
        objects::{Backend, Explanation, Registry, Service, Status, join},
    },
    datapath::mounts,
    dns::query::Answer,
    registry::Sync,
};

/// How often `--watch` and `--wait` look.
const PERIOD: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    Brief,
    Usual,
    Verbose,
}

pub(super) async fn status(
    socket: &Path,
    detail: Detail,
    wait: Option<Duration>,
    format: Format,
) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    let wait_for = wait.unwrap_or_default();
    let status: Status = loop {
        let answer = client::get::<Status>(socket, "/v1/status").await;
        let left = wait_for.saturating_sub(start.elapsed());
        match answer {
            Ok(status) if status.ready || left.is_zero() => break status,
            Err(error) if left.is_zero() => return Err(error),
            _ => tokio::time::sleep(PERIOD.min(left)).await,
        }
    };
    print(format, &status, |status| status_text(status, detail))?;
    // Asked to wait, the question was whether it is ready.
    Ok(if wait.is_some() && !status.ready { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn status_text(status: &Status, detail: Detail) -> String {
    let ready = if status.ready { "ready" } else { "not ready" };
    let attached = status.programs.iter().filter(|program| program.attached).count();
    let programs = format!("{attached} of {} attached", status.programs.len());
    if detail == Detail::Brief {
        return format!("{ready}: {} services, {} backends, {programs}\n", status.services, status.backends);
    }
    let listen = [&*status.dns.listen, &*status.dns.outside].concat();
    let mut rows = vec![
        vec!["mesh".into(), format!("{}, {ready}", status.version)],
        vec!["cgroup".into(), status.cgroup.clone()],
        vec!["pins".into(), status.pin_dir.clone()],
        vec!["programs".into(), programs],
        vec!["names".into(), format!("{}; others from {}", list(&listen), list(&status.dns.upstream))],
        vec!["services".into(), status.services.to_string()],
        vec!["backends".into(), status.backends.to_string()],
    ];
    for registry in &status.registries {
        let stale = registry.age_seconds.filter(|_| registry.state == Sync::Stale);
        let stale = stale.map(|age| format!(", last read {} ago", span(age))).unwrap_or_default();
        let error = registry.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
        rows.push(vec![
            "registry".into(),
            format!("{} {} {}{stale}{error}", registry.r#type, registry.source, word(&registry.state)),
        ]);
    }
    for problem in &status.problems {
        rows.push(vec!["problem".into(), problem.clone()]);
    }
    if detail == Detail::Verbose {
        for program in &status.programs {
            let state = if program.attached { "attached" } else { "not attached" };
            rows.push(vec!["program".into(), format!("{} {state}", program.name)]);
        }
        for map in &status.maps {
            rows.push(vec!["map".into(), format!("{} {} of {}", map.name, map.used, map.max)]);
        }
    }
    table(&[], rows)
}

pub(super) async fn services(socket: &Path, name: Option<&str>, args: &ListArgs) -> anyhow::Result<ExitCode> {
    let text = |services: &[Service], wide: bool| {
        let rows = services.iter().map(|service| {
            let mut row = vec![
                service.name.clone(),
                service.namespace.clone(),
                format!("{}/{}", service.port, service.protocol),
                list(&service.vips),
                format!("{}/{}", service.backends.active, service.backends.total),
            ];
            if wide {
                row.extend([list(&service.aliases), word(&service.policy)]);
                row.extend(
                    [service.backends.draining, service.backends.unhealthy, service.backends.ejected]
                        .map(|n| n.to_string()),
                );
            }
            row
        });
        let mut headers = vec!["NAME", "NAMESPACE", "PORT", "VIP", "ACTIVE"];
        if wide {
            headers.extend(["ALIASES", "POLICY", "DRAINING", "UNHEALTHY", "EJECTED"]);
        }
        table(if args.no_headers { &[] } else { &headers }, rows)
    };
    let Some(name) = name else {
        return follow(socket, "/v1/services", args, Ok, |all: &Vec<Service>, wide| text(all, wide)).await;
    };
    let select = |all: Vec<Service>| one_named(all, name);
    let text = |service: &Service, wide| text(std::slice::from_ref(service), wide);
    follow(socket, "/v1/services", args, select, text).await
}

/// The one service that `name` stands for.
fn one_named(mut all: Vec<Service>, name: &str) -> anyhow::Result<Service> {
    all.retain(|service| names(service).iter().any(|known| known == name));
    if all.len() > 1 {
        let exact: Vec<_> = all.iter().map(|service| names(service).pop().unwrap_or_default()).collect();
        bail!("{name:?} stands for several services: {}", exact.join(", "));
    }
    all.pop().with_context(|| format!("no service is named {name:?}"))
}

/// What a service can be called on the command line, the most exact last.
fn names(service: &Service) -> Vec<String> {
    let Service { name, namespace, port, protocol, .. } = service;
    vec![
        name.clone(),
        format!("{name}.{namespace}"),
        format!("{name}:{port}"),
        format!("{name}.{namespace}:{port}"),
        format!("{name}.{namespace}:{port}/{protocol}"),
    ]
}

pub(super) async fn backends(socket: &Path, args: &ListArgs) -> anyhow::Result<ExitCode> {
    follow(socket, "/v1/backends", args, Ok, |backends: &Vec<Backend>, wide| {
        let rows = backends.iter().map(|backend| {
            let mut row = vec![
                or_dash(backend.id),
                format!("{}.{}", backend.service, backend.namespace),
                backend.instance.clone(),
                join(backend.address, backend.port),
                word(&backend.state),
                or_dash(backend.connections.active),
            ];
            if wide {
                row.extend([backend.weight.to_string(), or_dash(backend.zone.clone())]);
            }
            row
        });
        let mut headers = vec!["ID", "SERVICE", "INSTANCE", "ADDRESS", "STATE", "CONNECTIONS"];
        if wide {
            headers.extend(["WEIGHT", "ZONE"]);
        }
        table(if args.no_headers { &[] } else { &headers }, rows)
    })
    .await
}

pub(super) async fn registries(socket: &Path, args: &ListArgs) -> anyhow::Result<ExitCode> {
    let text = |registries: &Vec<Registry>, _| {
        let rows = registries.iter().map(|registry| {
            vec![
                registry.r#type.clone(),
                registry.source.clone(),
                word(&registry.state),
                registry.services.to_string(),
                registry.instances.to_string(),
                or_dash(registry.last_sync.clone()),
                or_dash(registry.age_seconds.map(span)),
                or_dash(registry.trouble()),
            ]
        });
        let headers = ["TYPE", "SOURCE", "STATE", "SERVICES", "INSTANCES", "LAST SYNC", "AGE", "ERROR"];
        table(if args.no_headers { &[] } else { &headers }, rows)
    };
    follow(socket, "/v1/registries", args, Ok, text).await
}

/// Seconds as `1h 2m 3s`.
fn span(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

/// Prints what is selected of the daemon's answer; with `--watch` again whenever it changed.
async fn follow<T, S>(
    socket: &Path,
    path: &str,
    args: &ListArgs,
    select: impl Fn(T) -> anyhow::Result<S>,
    text: impl Fn(&S, bool) -> String,
) -> anyhow::Result<ExitCode>
where
    T: DeserializeOwned,
    S: Serialize,
{
    let (format, wide) = args.output.split();
    let mut shown = None;
    loop {
        let value = select(client::get(socket, path).await?)?;
        let new = serde_json::to_value(&value)?;
        if shown.as_ref() != Some(&new) {
            print(format, &value, |value| text(value, wide))?;
            shown = Some(new);
        }
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// What a name is answered with, and why.
pub(super) async fn dns_query(
    socket: &Path,
    name: &str,
    kind: Option<&str>,
    format: Format,
) -> anyhow::Result<ExitCode> {
    let mut answers: Vec<Answer> = Vec::new();
    for kind in kind.map_or(vec!["A", "AAAA"], |kind| vec![kind]) {
        let path = format!("/v1/dns?name={}&type={}", escape(name), escape(kind));
        answers.push(client::get(socket, &path).await?);
    }
    print(format, &answers, |answers| answers.iter().map(answer_text).collect())?;
    Ok(ExitCode::SUCCESS)
}

fn answer_text(answer: &Answer) -> String {
    let Answer { name, r#type, rcode, answer, reason, records } = answer;
    let mut text = format!("{name} {type}: {rcode}, {answer}: {reason}\n");
    for record in records {
        text += &format!("  {} {} {} {}\n", record.name, record.ttl, record.r#type, record.data);
    }
    text
}

/// Every byte, so that none means anything to the server.
fn escape(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

/// What the daemon says of a target, and whether the caller's own sockets are translated at all.
#[derive(Serialize)]
struct Explained {
    #[serde(flatten)]
    explanation: Explanation,
    /// Whether this command's cgroup is below the managed one.
    here: bool,
}

pub(super) async fn explain(socket: &Path, target: &str, format: Format) -> anyhow::Result<ExitCode> {
    let status: Status = client::get(socket, "/v1/status").await?;
    let query = format!("/v1/explain?target={}", escape(target));
    let explanations: Vec<Explanation> = client::get(socket, &query).await?;
    let here = is_managed(Path::new(&status.cgroup));
    let explained: Vec<_> =
        explanations.into_iter().map(|explanation| Explained { explanation, here }).collect();
    print(format, &explained, |explained| {
        explained.iter().map(|one| explained_text(one, &status.cgroup)).collect()
    })?;
    Ok(ExitCode::SUCCESS)
}

fn explained_text(explained: &Explained, cgroup: &str) -> String {
    let Explanation { target, protocol, verdict, reason, service, backends } = &explained.explanation;
    let protocol = protocol.map(|protocol| format!("/{protocol}")).unwrap_or_default();
    let mut text = format!("{target}{protocol}: {}: {reason}\n", word(verdict));
    if let Some(service) = service {
        text += &format!("  service {service}\n");
    }
    for backend in backends {
        let share = backend.share * 100.0;
        text += &format!(
            "  {:>6.2} %  {}  (backend {})\n",
            share,
            join(backend.address, backend.port),
            backend.id
        );
    }
    if !explained.here {
        text += &format!(
            "  but not from here: this process is outside {cgroup}, so its sockets are not translated\n"
        );
    }
    text
}

fn is_managed(cgroup: &Path) -> bool {
    let Ok(root) = mounts::cgroup2_root() else { return false };
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    own.is_some_and(|own| root.join(own).starts_with(cgroup))
}
