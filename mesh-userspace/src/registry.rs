//! Where services come from. Each registry runs as one task that publishes its [`State`]; only
//! the modules below know a wire format.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use imbl::OrdMap;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    config,
    model::{Service, ServiceId},
};

mod claims;
pub mod cloudmap;
pub mod consul;
pub mod dns;
pub mod embedded;
pub mod etcd;
pub mod file;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
pub mod kept;
pub mod kubernetes;
pub mod remote;
pub mod rules;

pub use claims::Claims;
pub use rules::Rules;

/// A service that has not changed is the same one in the next snapshot: whoever follows a registry looks only
/// at the others.
pub type Services = OrdMap<ServiceId, Arc<Service>>;

/// Everything a registry holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub services: Services,
    /// Services that it said before, perhaps to an earlier run, and has said nothing of since.
    pub kept: Services,
    /// Whether what is not in here is really gone. While any registry's snapshot is incomplete,
    /// nothing is removed from the maps.
    pub complete: bool,
}

/// By their ids.
pub fn services(all: impl IntoIterator<Item = Arc<Service>>) -> Services {
    all.into_iter().map(|service| (service.id.clone(), service)).collect()
}

impl Snapshot {
    /// Everything there is.
    pub fn complete(services: Services) -> Self {
        Self { services, kept: Services::new(), complete: true }
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values().chain(self.kept.values())
    }

    /// Its services, and of each whether it is one of those that are only kept.
    pub fn marked(&self) -> impl Iterator<Item = (&Arc<Service>, bool)> {
        let services = self.services.values().map(|service| (service, false));
        services.chain(self.kept.values().map(|service| (service, true)))
    }
}

/// How well a registry's content is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sync {
    /// The last read worked.
    Synced,
    /// The last read failed, or there was none yet; the last good content is in use.
    Stale,
    /// Nothing was ever read.
    Failed,
}

/// What a registry last said, and how it is doing.
#[derive(Clone, Debug)]
pub struct State {
    /// The type in the configuration.
    pub kind: &'static str,
    /// What tells it from others of its type.
    pub source: String,
    pub sync: Sync,
    pub last_sync: Option<SystemTime>,
    pub error: Option<String>,
    /// Records that are not followed, and why.
    pub problems: Vec<String>,
    /// `None` until the first answer.
    pub snapshot: Option<Arc<Snapshot>>,
}

impl State {
    pub fn new(kind: &'static str, source: String) -> Self {
        let (sync, problems) = (Sync::Failed, Vec::new());
        Self { kind, source, sync, last_sync: None, error: None, problems, snapshot: None }
    }

    /// Whether it was asked in this run, and something is known of it.
    pub fn is_heard(&self) -> bool {
        self.snapshot.is_some() && (self.sync == Sync::Synced || self.error.is_some())
    }
}

/// One registry's place among all of them.
#[derive(Clone, Debug)]
pub struct Publisher {
    all: watch::Sender<Vec<State>>,
    place: usize,
}

impl Publisher {
    pub fn new(all: watch::Sender<Vec<State>>, place: usize) -> Self {
        Self { all, place }
    }

    /// What came of a read: news if there are any, and what is wrong. Receivers are told only if
    /// that changes something.
    pub fn publish(&self, snapshot: Option<Arc<Snapshot>>, error: Option<String>) {
        self.all.send_if_modified(|all| all[self.place].update(snapshot, error));
    }

    /// The registry was heard, and says what it said before.
    pub fn heard(&self) {
        self.all.send_if_modified(|all| {
            let error = all[self.place].error.clone();
            all[self.place].update(None, error)
        });
    }

    /// Which records are not followed by now. That concerns nobody but people.
    pub fn problems(&self, problems: Vec<String>) {
        self.all.send_if_modified(|all| {
            let State { kind, problems: known, .. } = &mut all[self.place];
            for problem in problems.iter().filter(|problem| !known.contains(problem)) {
                tracing::warn!("{kind}: {problem}");
            }
            *known = problems;
            false
        });
    }
}

/// What every registry starts with.
#[derive(Clone, Debug)]
pub struct Start {
    pub rules: Rules,
    /// Where the node is.
    pub zone: Option<String>,
    pub state_dir: PathBuf,
    /// What it said last, perhaps to an earlier run.
    pub kept: Option<Arc<Snapshot>>,
    pub publisher: Publisher,
    /// Asks for a fresh read.
    pub reload: watch::Receiver<u64>,
}

/// Starts a registry: a task that publishes until it is aborted.
pub fn start(registry: config::Registry, start: Start) -> JoinHandle<()> {
    match registry {
        config::Registry::File { path } => {
            let source = file::Source::new(path, start.rules, start.kept);
            tokio::spawn(file::run(source, start.publisher, start.reload))
        }
        config::Registry::Embedded { listen } => tokio::spawn(embedded::run(listen, start)),
        config::Registry::Cloudmap(settings) => {
            let client = cloudmap::Client::new(settings, start.rules.clone());
            tokio::spawn(remote::run(client, start))
        }
        config::Registry::Consul(settings) => {
            let client = consul::Client::new(settings, start.rules.clone());
            tokio::spawn(remote::run(client, start))
        }
        config::Registry::Etcd(settings) => {
            let client = etcd::Client::new(settings, start.rules.clone());
            tokio::spawn(remote::run(client, start))
        }
        config::Registry::Kubernetes(settings) => {
            let client = kubernetes::Client::new(settings, start.zone.clone(), start.rules.clone());
            tokio::spawn(remote::run(client, start))
        }
        config::Registry::Dns(settings) => {
            let client = dns::Client::new(&settings, start.rules.clone());
            tokio::spawn(remote::run(client, start))
        }
    }
}

/// Asks a registry that answers without the daemon how many services it has, and what is wrong.
pub async fn check(registry: config::Registry, rules: &Rules) -> Option<Result<usize, String>> {
    Some(match registry {
        config::Registry::File { path } => file::validate(&path, rules).map_err(|error| error.to_string()),
        config::Registry::Embedded { .. } => return None,
        config::Registry::Cloudmap(settings) => {
            remote::check(cloudmap::Client::new(settings, rules.clone())).await
        }
        config::Registry::Consul(settings) => {
            remote::check(consul::Client::new(settings, rules.clone())).await
        }
        config::Registry::Etcd(settings) => remote::check(etcd::Client::new(settings, rules.clone())).await,
        config::Registry::Kubernetes(settings) => {
            remote::check(kubernetes::Client::new(settings, None, rules.clone())).await
        }
        config::Registry::Dns(settings) => remote::check(dns::Client::new(&settings, rules.clone())).await,
    })
}

#[expect(clippy::disallowed_methods, reason = "shown to people, and kept over restarts")]
fn now() -> SystemTime {
    SystemTime::now()
}

impl State {
    fn update(&mut self, snapshot: Option<Arc<Snapshot>>, error: Option<String>) -> bool {
        let before = (self.sync, self.is_heard());
        if error.is_none() {
            self.last_sync = Some(now());
        }
        let new = snapshot.is_some();
        if snapshot.is_some() {
            self.snapshot = snapshot;
        }
        self.sync = match (&error, &self.snapshot) {
            (None, _) => Sync::Synced,
            (Some(_), Some(_)) => Sync::Stale,
            (Some(_), None) => Sync::Failed,
        };
        if self.error != error {
            match &error {
                Some(error) => tracing::error!("{error}"),
                None => tracing::info!("registry {} {} is well again", self.kind, self.source),
            }
        }
        self.error = error;
        new || before != (self.sync, self.is_heard())
    }
}
