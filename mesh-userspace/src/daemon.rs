//! The node daemon: the only place where its parts are wired together.
//!
//! ```text
//! config ─▶ registries ─▶ catalog ─▶ reconcile ─▶ kernel      api, web: read all of them
//! ```

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, RwLock, atomic::AtomicBool, atomic::Ordering},
};

use anyhow::Context;
use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};

use crate::{
    api,
    catalog::{Catalog, vip::Vips},
    config::{self, Config, Registry},
    datapath::{self, Datapath, Pins},
    plan::Applied,
    reconcile::{Reconciler, Report},
    registry::{self, Publisher, State},
    web,
};

/// What the API and the web page read.
pub struct View {
    pub config: watch::Receiver<Arc<Config>>,
    pub registries: watch::Receiver<Vec<State>>,
    pub catalog: watch::Receiver<Option<Arc<Catalog>>>,
    pub applied: Arc<RwLock<Applied>>,
    pub report: watch::Receiver<Report>,
    pub stats: datapath::Stats,
    pub pins: Pins,
    pub cgroup: PathBuf,
    pub reload_worked: AtomicBool,
}

/// Runs until SIGTERM or SIGINT; what is in the kernel stays.
pub async fn run(path: Option<&Path>) -> anyhow::Result<()> {
    let config = config::load(path)?;
    for table in &config.later {
        tracing::warn!("this version does not act on [{table}] yet");
    }
    let cgroup = config.node.cgroup()?;
    let settings = datapath::Settings {
        cgroup: cgroup.clone(),
        pin_dir: config.node.pin_dir.clone(),
        vip_ranges: config.kernel_ranges(),
        sizes: config.datapath.sizes(),
    };
    let (datapath, adopted) = Datapath::open(&settings)?;
    if datapath.maps.sizes() != settings.sizes {
        tracing::warn!("the pinned maps keep their sizes; [datapath] takes effect after `mesh cleanup`");
    }
    let vips = Vips::open(&config.node.state_dir, config.rules.vip_ranges.clone())
        .with_context(|| format!("cannot read the state in {}", config.node.state_dir.display()))?;
    let socket = api::bind(&config.api.socket)?;
    let web = web::bind(config.web.listen).await?;

    let pins = datapath.pins().clone();
    let reconciler = Reconciler::new(datapath, adopted)?;
    let (config, _) = watch::channel(Arc::new(config));
    let registries = watch::Sender::new(Vec::new());
    let (catalog_sender, catalog) = watch::channel(None);
    let view = Arc::new(View {
        config: config.subscribe(),
        registries: registries.subscribe(),
        catalog: catalog.clone(),
        applied: reconciler.applied(),
        report: reconciler.report(),
        stats: datapath::Stats::open(&pins)?,
        pins,
        cgroup,
        reload_worked: AtomicBool::new(true),
    });

    let reload = watch::Sender::new(0);
    let sources = Sources::start(&config.borrow(), registries.clone(), reload.subscribe());
    let runtime = Handle::current();
    let writer = std::thread::spawn(move || reconciler.run(&runtime, catalog));
    let merge = tokio::spawn(merge(registries.subscribe(), vips, catalog_sender));
    tokio::spawn(api::serve(socket, view.clone()));
    tokio::spawn(web::serve(web, view.clone()));
    tracing::info!(cgroup = %view.cgroup.display(), "mesh {} runs", env!("CARGO_PKG_VERSION"));

    supervise(&config, sources, &reload, &view).await?;

    // The last catalog is written before the writer's channel closes.
    merge.abort();
    let _ = merge.await;
    let _ = tokio::task::spawn_blocking(move || writer.join()).await;
    let _ = std::fs::remove_file(&config.borrow().api.socket);
    tracing::info!("mesh stops; the datapath stays in place (`mesh cleanup` removes it)");
    Ok(())
}

/// Answers signals; returns when the daemon should end.
async fn supervise(
    config: &watch::Sender<Arc<Config>>,
    mut sources: Sources,
    reload: &watch::Sender<u64>,
    view: &View,
) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let path = config.borrow().path.clone();
    let mut changed = config::changes(path);
    loop {
        tokio::select! {
            _ = hangup.recv() => {}
            Some(()) = changed.recv() => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
        let current = config.borrow().clone();
        let worked = match config::load(current.path.as_deref()) {
            Ok(new) => {
                sources.replace(&current, &new);
                for table in current.needs_restart(&new) {
                    tracing::warn!("[{table}] changed; that takes effect at the next start");
                }
                config.send_replace(Arc::new(new));
                true
            }
            Err(error) => {
                tracing::error!("{error}; the configuration stays as it was");
                false
            }
        };
        view.reload_worked.store(worked, Ordering::Relaxed);
        reload.send_modify(|count| *count += 1);
    }
}

/// The running registries.
struct Sources {
    tasks: Vec<JoinHandle<()>>,
    states: watch::Sender<Vec<State>>,
    reload: watch::Receiver<u64>,
}

impl Sources {
    fn start(config: &Config, states: watch::Sender<Vec<State>>, reload: watch::Receiver<u64>) -> Self {
        let mut sources = Self { tasks: Vec::new(), states, reload };
        sources.spawn(config);
        sources
    }

    /// Follows a new configuration. A registry that is still configured keeps what it delivered.
    fn replace(&mut self, old: &Config, new: &Config) {
        if (&old.registries, &old.rules) != (&new.registries, &new.rules) {
            self.tasks.drain(..).for_each(|task| task.abort());
            self.spawn(new);
        }
    }

    fn spawn(&mut self, config: &Config) {
        let known = self.states.borrow().clone();
        let states = config.registries.iter().map(|registry| {
            let (kind, source) = registry.label();
            let same = known.iter().find(|state| (state.kind, &state.source) == (kind, &source));
            same.cloned().unwrap_or_else(|| State::new(kind, source))
        });
        self.states.send_replace(states.collect());
        for (place, registry) in config.registries.iter().enumerate() {
            let publisher = Publisher::new(self.states.clone(), place);
            let Registry::File { path } = registry.clone();
            let task = registry::file::run(path, config.rules.clone(), publisher, self.reload.clone());
            self.tasks.push(tokio::spawn(task));
        }
    }
}

/// Turns the registries' states into the catalog.
async fn merge(
    mut registries: watch::Receiver<Vec<State>>,
    mut vips: Vips,
    catalog: watch::Sender<Option<Arc<Catalog>>>,
) {
    loop {
        let states = registries.borrow_and_update().clone();
        let snapshots: Vec<_> = states.iter().map(|state| state.snapshot.clone()).collect();
        // Before anything is known there is nothing to say.
        if snapshots.is_empty() || snapshots.iter().any(Option::is_some) {
            let new = Catalog::build(&snapshots, &mut vips);
            if let Err(error) = vips.save() {
                tracing::error!("cannot keep the VIPs that were handed out: {error}");
            }
            let old = catalog.borrow().clone();
            let known = |conflict: &String| old.as_ref().is_some_and(|old| old.conflicts.contains(conflict));
            for conflict in new.conflicts.iter().filter(|conflict| !known(conflict)) {
                tracing::error!("{conflict}");
            }
            if old.is_none_or(|old| *old != new) {
                catalog.send_replace(Some(Arc::new(new)));
            }
        }
        if registries.changed().await.is_err() {
            return;
        }
    }
}
