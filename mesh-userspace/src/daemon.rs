//! The node daemon: the only place where its parts are wired together.
//!
//! ```text
//! config ─▶ registries ─▶ catalog ─▶ reconcile ─▶ kernel      dns, api, web: read all of them
//! ```

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, RwLock, atomic::AtomicBool, atomic::Ordering, mpsc},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use ipnet::IpNet;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    api,
    catalog::{Catalog, vip::Vips},
    config::{self, Config},
    datapath::{self, Datapath, NameServers, Pins},
    dns,
    namespaces::{Names, Namespaces},
    netns::{self, routes},
    plan::Applied,
    reconcile::{Reconciler, Report},
    registry::{
        self, Publisher, State,
        kept::{self, Keeper},
    },
    sys, systemd,
    upkeep::Upkeep,
    web,
};

/// What the API and the web page read.
pub struct View {
    pub config: watch::Receiver<Arc<Config>>,
    pub registries: watch::Receiver<Vec<State>>,
    pub catalog: watch::Receiver<Option<Arc<Catalog>>>,
    pub applied: Arc<RwLock<Applied>>,
    pub report: watch::Receiver<Report>,
    pub dns: Arc<dns::Core>,
    /// Where it listens, for the node's tasks and for others.
    pub listen: Vec<SocketAddr>,
    pub outside: Vec<SocketAddr>,
    pub stats: datapath::Stats,
    pub pins: Pins,
    pub cgroup: PathBuf,
    pub reload_worked: AtomicBool,
}

/// Runs until SIGTERM or SIGINT; what is in the kernel stays.
///
/// `socket` goes before the configuration's.
pub async fn run(path: Option<&Path>, socket: Option<PathBuf>) -> anyhow::Result<()> {
    // First of all, so that an early signal does not kill.
    let signals = Signals::new()?;
    raise_file_limit();
    let mut config = config::load(path)?;
    if let Some(socket) = socket {
        config.api.socket = socket;
    }
    let watch = config::Watch::new(config.path.as_deref());
    let cgroup = config.node.cgroup()?;
    check_ranges(&config.rules.vip_ranges)?;
    let options = datapath::Options {
        cgroup: cgroup.clone(),
        pin_dir: config.node.pin_dir.clone(),
        vip_ranges: config.kernel_ranges(),
        sizes: config.datapath.sizes(),
    };
    let datapath = Datapath::open(&options)?;
    if datapath.maps.sizes() != options.sizes {
        tracing::warn!(
            "what is in the maps does not fit into the sizes of [datapath]: they keep their sizes"
        );
    }
    let vips = Vips::open(&config.node.state_dir, config.rules.vip_ranges.clone())
        .with_context(|| format!("cannot read the state in {}", config.node.state_dir.display()))?;
    let socket = api::bind(&config.api.socket)?;
    let web = web::bind(config.web.listen).await?;
    let (listen, outside) = (config.dns.listen.clone(), config.dns.outside.clone());

    let pins = datapath.pins().clone();
    let (leaving, left) = mpsc::channel();
    let reconciler = Reconciler::new(datapath, config.node.zone.clone(), leaving, Handle::current())?;
    let upkeep = Upkeep::new(&pins, cgroup.clone(), reconciler.applied())?;
    let core = Arc::<dns::Core>::default();
    let names = intercept(&config, &pins, &cgroup, &core)?;
    let namespaces = Namespaces::new(&pins, cgroup.clone(), config.rules.vip_ranges.clone(), names);
    let socket_path = config.api.socket.clone();
    let state_dir = config.node.state_dir.clone();
    let (config, _) = watch::channel(Arc::new(config));
    let registries = watch::Sender::new(Vec::new());
    let (catalog_sender, catalog) = watch::channel(None);
    let view = Arc::new(View {
        config: config.subscribe(),
        registries: registries.subscribe(),
        catalog: catalog.clone(),
        applied: reconciler.applied(),
        report: reconciler.report(),
        dns: core,
        listen,
        outside,
        stats: datapath::Stats::open(&pins)?,
        pins,
        cgroup,
        reload_worked: AtomicBool::new(true),
    });

    let reload = watch::Sender::new(0);
    let (sources, keeper) =
        Sources::start(&config.borrow(), state_dir, registries.clone(), reload.subscribe());
    let (keep, kept) = oneshot::channel();
    let keeper = tokio::spawn(keeper.run(registries.subscribe(), kept));
    let (writer_runs, mut writer_ended) = oneshot::channel::<()>();
    let writer = std::thread::spawn(move || {
        let _writer_runs = writer_runs;
        reconciler.run(catalog);
    });
    let upkeep = std::thread::spawn(move || upkeep.run(&left));
    let (word, mut tell) = io::pipe()?;
    let namespaces = std::thread::spawn(move || namespaces.run(word));
    let mut merge = tokio::spawn(merge(registries.subscribe(), vips, catalog_sender));
    let names = dns::run(
        view.dns.clone(),
        view.listen.clone(),
        view.outside.clone(),
        config.subscribe(),
        view.report.clone(),
        view.applied.clone(),
    );
    let mut names = tokio::spawn(names);
    let core = view.dns.clone();
    let listens = tokio::spawn(async move {
        core.can_answer().await;
        let _ = tell.write_all(&[0]);
        // The other end works for as long as this one is open.
        std::future::pending::<()>().await;
    });
    let mut api = tokio::spawn(api::serve(socket, view.clone()));
    let mut web = tokio::spawn(web::serve(web, view.clone()));
    let tells = tokio::spawn(tell_when_ready(view.clone()));
    tracing::info!(cgroup = %view.cgroup.display(), "mesh {} runs", env!("CARGO_PKG_VERSION"));

    let end = tokio::select! {
        () = supervise(signals, watch, &config, sources, &reload, &view) => Ok(()),
        // None of these ends by itself: whoever runs the daemon starts it again.
        _ = &mut writer_ended => Err(anyhow!("the writer of the maps has ended")),
        end = &mut merge => Err(anyhow!("the catalog has ended: {end:?}")),
        end = &mut names => Err(anyhow!("the name server has ended: {end:?}")),
        end = &mut api => Err(anyhow!("the API has ended: {end:?}")),
        end = &mut web => Err(anyhow!("the web page has ended: {end:?}")),
    };

    // Never that it is ready after that it stops.
    tells.abort();
    let _ = tells.await;
    systemd::tell(systemd::STOPPING);
    listens.abort();
    let _ = listens.await;
    // What was delivered last is written before the end, also to disk.
    drop(keep);
    let _ = keeper.await;
    // The last catalog is written before the writer's channel closes.
    merge.abort();
    let _ = merge.await;
    let _ = tokio::task::spawn_blocking(move || (writer.join(), upkeep.join(), namespaces.join())).await;
    let _ = std::fs::remove_file(socket_path);
    tracing::info!("mesh stops; the datapath stays in place (`mesh cleanup` removes it)");
    end
}

/// Whoever started the daemon may have others wait for it.
async fn tell_when_ready(view: Arc<View>) {
    const PERIOD: Duration = Duration::from_millis(50);
    /// By then it is on disk, too, what the registries said.
    const SETTLED: Duration = Duration::from_secs(2);
    while !view.ready() {
        tokio::time::sleep(PERIOD).await;
    }
    systemd::tell(systemd::READY);
    // All was read, perhaps from more than one place; later there are only changes.
    tokio::time::sleep(SETTLED).await;
    sys::trim_heap();
    sys::drop_program_pages();
}

/// The VIP ranges are made unreachable for what is not translated. That must not take a network
/// from the node; a part of a wider one may have been set aside for VIPs.
fn check_ranges(ranges: &[IpNet]) -> anyhow::Result<()> {
    for overlap in routes::overlaps(ranges).context("cannot list the routes of this node")? {
        if overlap.whole {
            bail!("{overlap}; set other ranges");
        }
        tracing::warn!("{overlap}: what has an address there cannot be reached");
    }
    Ok(())
}

/// What answers tasks' queries, whichever name server they ask.
fn intercept(
    config: &Config,
    pins: &Pins,
    cgroup: &Path,
    core: &Arc<dns::Core>,
) -> anyhow::Result<Option<Names>> {
    if !config.dns.intercept {
        // Somebody else may listen by now where an earlier daemon did.
        NameServers::open(pins)?.retain(|_| false)?;
        return Ok(None);
    }
    if !netns::is_host_pid_namespace()? {
        tracing::warn!("dns.intercept needs the host's PID namespace: tasks' queries go where they are sent");
        return Ok(None);
    }
    let exclude = config.dns.exclude.iter().map(|path| cgroup.join(path)).collect();
    Ok(Some(Names::new(pins, exclude, core.clone(), Handle::current())?))
}

/// Clients and name servers may need more files than a process has at first.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }
}

/// Answers signals and changes of the configuration; returns when the daemon should end.
async fn supervise(
    mut signals: Signals,
    watch: config::Watch,
    config: &watch::Sender<Arc<Config>>,
    mut sources: Sources,
    reload: &watch::Sender<u64>,
    view: &View,
) {
    let started = config.borrow().clone();
    loop {
        tokio::select! {
            _ = signals.hangup.recv() => {}
            () = watch.changed() => {}
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
        }
        let worked = match config::load(started.path.as_deref()) {
            Ok(mut new) => {
                for table in started.needs_restart(&new) {
                    tracing::warn!("[{table}] changed; that takes effect at the next start");
                }
                // The programs have the old ranges: what registries say is checked against those.
                new.rules.vip_ranges.clone_from(&started.rules.vip_ranges);
                let old = config.borrow().clone();
                sources.replace(&old, &new).await;
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
    state_dir: PathBuf,
}

impl Sources {
    /// Starts them with what is left of an earlier run; also gives whoever keeps that from now on.
    fn start(
        config: &Config,
        state_dir: PathBuf,
        states: watch::Sender<Vec<State>>,
        reload: watch::Receiver<u64>,
    ) -> (Self, Keeper) {
        let mut sources = Self { tasks: Vec::new(), states, reload, state_dir };
        let restored = sources.spawn(config);
        let keeper = Keeper::new(&sources.state_dir, &restored);
        (sources, keeper)
    }

    /// Follows a new configuration. A registry that is still configured keeps what it delivered.
    async fn replace(&mut self, old: &Config, new: &Config) {
        if (&old.registries, &old.rules) != (&new.registries, &new.rules) {
            for task in self.tasks.drain(..) {
                // Awaited, so that it does not publish into the place of another one.
                task.abort();
                let _ = task.await;
            }
            self.spawn(new);
        }
    }

    /// Returns the states that they start with.
    fn spawn(&mut self, config: &Config) -> Vec<State> {
        let known = self.states.borrow().clone();
        let states = config.registries.iter().map(|registry| {
            let (kind, source) = registry.label();
            let same = known.iter().find(|state| (state.kind, &state.source) == (kind, &source));
            same.cloned().unwrap_or_else(|| kept::restore(&self.state_dir, kind, source, &config.rules))
        });
        let states: Vec<_> = states.collect();
        self.states.send_replace(states.clone());
        for (place, (registry, state)) in config.registries.iter().zip(&states).enumerate() {
            let publisher = Publisher::new(self.states.clone(), place);
            let start = registry::Start {
                rules: config.rules.clone(),
                zone: config.node.zone.clone(),
                state_dir: self.state_dir.clone(),
                kept: state.snapshot.clone(),
                publisher,
                reload: self.reload.clone(),
            };
            self.tasks.push(registry::start(registry.clone(), start));
        }
        states
    }
}

/// Turns the registries' states into the catalog. Each hour, VIPs of names that are gone may become free.
async fn merge(
    mut registries: watch::Receiver<Vec<State>>,
    mut vips: Vips,
    catalog: watch::Sender<Option<Arc<Catalog>>>,
) {
    const HOUR: Duration = Duration::from_secs(3600);
    let mut hour = tokio::time::interval_at(Instant::now() + HOUR, HOUR);
    // Never less than an hour between two.
    hour.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = Vec::new();
    loop {
        let states = registries.borrow_and_update().clone();
        let snapshots: Vec<_> = states.iter().map(|state| state.snapshot.clone()).collect();
        // Before anything is known there is nothing to say.
        if snapshots.is_empty() || snapshots.iter().any(Option::is_some) {
            let old = catalog.borrow().clone();
            let followed = old.as_ref().and_then(|old| old.follow(&before, &snapshots));
            let mut new = followed.unwrap_or_else(|| {
                let built = Catalog::build(&snapshots, &mut vips);
                if let Err(error) = vips.save() {
                    tracing::error!("cannot keep the VIPs that were handed out: {error}");
                }
                let known =
                    |conflict: &String| old.as_ref().is_some_and(|old| old.conflicts.contains(conflict));
                for conflict in built.conflicts.iter().filter(|conflict| !known(conflict)) {
                    tracing::error!("{conflict}");
                }
                built
            });
            new.delivered = states.iter().all(State::is_heard);
            if old.is_none_or(|old| *old != new) {
                catalog.send_replace(Some(Arc::new(new)));
            }
            before = snapshots;
        }
        tokio::select! {
            changed = registries.changed() => if changed.is_err() { return },
            // What is not everything there is says of no name that it is gone.
            _ = hour.tick() => if let Some(known) = &*catalog.borrow() && known.complete {
                vips.hour(&known.names());
                // All is looked at again: VIPs may be free for names that have none.
                before.clear();
            },
        }
    }
}
