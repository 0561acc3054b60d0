//! Names: the node's own are answered from the catalog that the maps hold, others are asked for
//! upstream.
//!
//! ```text
//! report (what is written) ─▶ table ─┐
//! configuration, resolv.conf ─▶ forwarder ─┴─ core ◀── listeners, in any network namespace
//! ```

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, RwLock},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

use crate::{config::Config, plan::Applied, reconcile::Report};

mod answer;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod metrics;
pub mod query;
mod serve;
mod table;
mod upstream;

use metrics::Metrics;
use table::{Table, View};
use upstream::{Forwarder, Limits};
pub(crate) use upstream::{Pool, ask, pool};

pub use serve::Listener;

/// Seconds that an answer may be kept. A VIP stays with its name, so this only bounds how long a
/// name outlives its service in caches.
const TTL: u32 = 5;

/// The same for "there is no such name": not at all, so that a new service has its name at once.
const NEGATIVE_TTL: u32 = 0;

/// How often it is tried again to listen at an address that somebody else has.
const RETRY: Duration = Duration::from_secs(1);

/// What answers, whichever socket a question came from.
pub struct Core {
    table: ArcSwap<Table>,
    forwarder: ArcSwap<Forwarder>,
    limits: Limits,
    pub metrics: Metrics,
    /// Addresses that are not listened at, and why.
    deaf: Mutex<BTreeMap<SocketAddr, String>>,
    /// Told of another table and of other name servers.
    news: Notify,
}

impl Default for Core {
    fn default() -> Self {
        Self {
            table: ArcSwap::from_pointee(Table::default()),
            forwarder: ArcSwap::from_pointee(Forwarder::nobody(false)),
            limits: Limits::default(),
            metrics: Metrics::default(),
            deaf: Mutex::default(),
            news: Notify::new(),
        }
    }
}

impl Core {
    /// The name servers that are asked.
    pub fn upstream(&self) -> Vec<SocketAddr> {
        self.forwarder.load().servers.clone()
    }

    /// What is wrong with those that are not, and with addresses that are not listened at.
    pub fn problems(&self) -> Vec<String> {
        let deaf = self.deaf.lock().expect("nobody panics holding it").values().cloned().collect();
        [self.forwarder.load().problems.clone(), deaf].concat()
    }

    /// Waits until every registry was heard and it is known who is asked for the rest. Questions that come
    /// before may fail, though nothing is wrong.
    pub async fn can_answer(&self) {
        while !(self.table.load().heard && self.forwarder.load().is_known()) {
            self.news.notified().await;
        }
    }

    /// Listens at an address of the host, unless somebody else does.
    fn bind(&self, address: SocketAddr, view: View) -> Option<Listener> {
        let bound = Listener::bind(address, view);
        let mut deaf = self.deaf.lock().expect("nobody panics holding it");
        match bound {
            Ok(listener) => {
                deaf.remove(&address);
                Some(listener)
            }
            Err(error) => {
                let why = format!("{error:#}");
                if deaf.insert(address, why.clone()).is_none() {
                    tracing::error!("{why}");
                }
                None
            }
        }
    }

    /// Answers at an address of the host, as soon as nobody else has it: connects do not depend on it.
    async fn listen(self: Arc<Self>, address: SocketAddr, view: View, mut bound: Option<Listener>) {
        let listener = loop {
            match bound {
                Some(listener) => break listener,
                None => tokio::time::sleep(RETRY).await,
            }
            bound = self.bind(address, view);
        };
        listener.serve(self).await;
    }
}

/// Serves names until the daemon ends: at `listen` for the node's tasks, at `outside` for others.
/// Listens already when it returns, so that whoever is told that the daemon is ready may ask.
pub fn run(
    core: Arc<Core>,
    listen: Vec<SocketAddr>,
    outside: Vec<SocketAddr>,
    config: watch::Receiver<Arc<Config>>,
    report: watch::Receiver<Report>,
    applied: Arc<RwLock<Applied>>,
) -> impl Future<Output = ()> {
    let listen = listen.into_iter().map(|address| (address, View::Node));
    let all = listen.chain(outside.into_iter().map(|address| (address, View::Outside)));
    let bound: Vec<_> = all.map(|(address, view)| (address, view, core.bind(address, view))).collect();
    async move {
        let listen = async {
            let serving =
                bound.into_iter().map(|(address, view, bound)| core.clone().listen(address, view, bound));
            serving.collect::<JoinSet<()>>().join_all().await;
        };
        // In this order, so that what the first question needs is there.
        tokio::join!(
            follow_names(&core, config.clone(), report, &applied),
            upstream::follow(&core, config),
            listen
        );
    }
}

/// Makes the table anew whenever names that are written, or a suffix, change.
async fn follow_names(
    core: &Core,
    mut config: watch::Receiver<Arc<Config>>,
    mut report: watch::Receiver<Report>,
    applied: &RwLock<Applied>,
) {
    let mut known: Option<(Report, Arc<Config>)> = None;
    loop {
        let new = (report.borrow_and_update().clone(), config.borrow_and_update().clone());
        let same = known.as_ref().is_some_and(|(report, config)| {
            is_named_as(&new.0, report) && config.dns.suffixes == new.1.dns.suffixes
        });
        match &known {
            Some((old, _)) if same => core.table.load().follow(&old.written, &new.0.written),
            _ => rename(core, &new.1, &new.0, applied),
        }
        known = Some(new);
        let changed = tokio::select! {
            changed = report.changed() => changed,
            changed = config.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Instances change more often than the names they are reached by.
fn is_named_as(new: &Report, old: &Report) -> bool {
    let same = match (&new.written, &old.written) {
        (Some(new), Some(old)) => new.has_names_of(old),
        (new, old) => new.is_none() && old.is_none(),
    };
    same && (&new.refused, &new.error) == (&old.refused, &old.error)
}

fn rename(core: &Core, config: &Config, report: &Report, applied: &RwLock<Applied>) {
    // Copied, so that nobody waits for what comes next.
    let frontends = applied.read().expect("no writer panics").frontends.clone();
    let (suffixes, ranges) = (&config.dns.suffixes, &config.rules.vip_ranges);
    // With very many services it takes long enough for other tasks to notice.
    let table = tokio::task::block_in_place(|| {
        let is_programmed = |frontend: &_| frontends.contains_key(frontend);
        Table::build(report.written.as_deref(), suffixes, ranges, is_programmed)
    });
    core.table.store(Arc::new(table));
    core.news.notify_one();
}
