//! Brings the maps to what the catalog wants, and keeps the mirror of what they hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, RwLock, mpsc},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch, task::JoinHandle};

use mesh_common::abi::Frontend;

use crate::{
    catalog::{self, Catalog, Entry},
    datapath::{Datapath, Error, Maps, PROGRAMS},
    model::Protocol,
    plan::{self, Applied, Endpoint, Op, Plan, Prune},
    upkeep::{Leaving, News},
};

/// How often the programs' places are looked at, and how long after a failed write the next try
/// comes.
const PERIOD: Duration = Duration::from_secs(1);

/// What the last round did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The catalog that the maps follow.
    pub written: Option<Arc<Catalog>>,
    /// Services that did not fit, and why.
    pub refused: Vec<String>,
    /// Why the last round was not completed, or the programs are not in place.
    pub error: Option<String>,
    pub seconds: f64,
}

/// The one writer of the maps.
pub struct Reconciler {
    datapath: Datapath,
    applied: Arc<RwLock<Applied>>,
    runtime: Handle,
    /// The grace that is under way.
    grace: Option<JoinHandle<Result<(), Error>>>,
    report: watch::Sender<Report>,
    /// Whether our programs, not those of an earlier daemon, were put in place.
    attached: bool,
    /// When everything was last seen in its place.
    mended: Option<Instant>,
    /// Backends that are deleted after a grace.
    leaving: BTreeMap<u32, Leaving>,
    /// Who is told that they are gone.
    left: mpsc::Sender<News>,
    zone: Option<String>,
    /// Whether programs of an earlier daemon run, on whatever maps.
    succeeds: bool,
    /// What the maps held at the start.
    adopted: BTreeSet<Frontend>,
    /// Backends of services with a slow start, and since when they are known.
    warming: BTreeMap<(Frontend, Endpoint), Instant>,
    /// Backends that the kernel avoided when the weights were made; only a zone asks for them.
    ejected: BTreeSet<u32>,
}

async fn end_of(grace: &mut Option<JoinHandle<Result<(), Error>>>) -> Result<(), Error> {
    if let Some(grace) = grace
        && let Ok(result) = grace.await
    {
        return result;
    }
    // There is none, or the daemon is about to end.
    std::future::pending().await
}

/// What the weights in effect depend on, besides the catalog.
struct Sight<'a> {
    zone: Option<&'a str>,
    adopted: &'a BTreeSet<Frontend>,
    applied: &'a Applied,
    maps: &'a Maps,
    warming: &'a BTreeMap<(Frontend, Endpoint), Instant>,
}

impl catalog::Node for Sight<'_> {
    fn zone(&self) -> Option<&str> {
        self.zone
    }

    fn is_adopted(&self, frontend: &Frontend) -> bool {
        self.adopted.contains(frontend)
    }

    fn is_ejected(&self, frontend: &Frontend, endpoint: &Endpoint) -> bool {
        self.applied.backend_id(frontend, endpoint).is_some_and(|id| self.maps.health(id).is_ejected())
    }

    fn age(&self, frontend: &Frontend, endpoint: &Endpoint) -> Option<Duration> {
        self.warming.get(&(*frontend, *endpoint)).map(Instant::elapsed)
    }
}

impl Reconciler {
    /// Reads the maps. Where they hold something to serve, puts the programs in place at once;
    /// otherwise, and where those of another layout run, only after the first round, so that running
    /// programs are not swapped for ones that know nothing, or not the latest.
    pub fn new(
        mut datapath: Datapath,
        zone: Option<String>,
        left: mpsc::Sender<News>,
        runtime: Handle,
    ) -> Result<Self, Error> {
        let applied = datapath.maps.restore()?;
        let succeeds = PROGRAMS.iter().any(|name| datapath.pins().link_info(name).is_some());
        let attached = !applied.frontends.is_empty() && !datapath.is_another_version_in_use()?;
        if attached {
            datapath.attach()?;
        }
        let report = watch::Sender::new(Report::default());
        Ok(Self {
            datapath,
            succeeds,
            adopted: applied.frontends.keys().copied().collect(),
            applied: Arc::new(RwLock::new(applied)),
            runtime,
            grace: None,
            report,
            attached,
            mended: None,
            leaving: BTreeMap::new(),
            left,
            zone,
            warming: BTreeMap::new(),
            ejected: BTreeSet::new(),
        })
    }

    pub fn applied(&self) -> Arc<RwLock<Applied>> {
        self.applied.clone()
    }

    pub fn report(&self) -> watch::Receiver<Report> {
        self.report.subscribe()
    }

    /// Follows the catalog until its sender is gone. Blocks: run it on a thread of its own.
    pub fn run(mut self, mut catalog: watch::Receiver<Option<Arc<Catalog>>>) {
        let runtime = self.runtime.clone();
        loop {
            let current = catalog.borrow_and_update().clone();
            if let Some(current) = current.filter(|current| self.knows_enough(current)) {
                self.round(&current);
            }
            self.begin_grace();
            let look = self.mended.unwrap_or_else(Instant::now) + PERIOD;
            let (mut ended, grace) = (None, &mut self.grace);
            // No change waits for the grace of the one before.
            let goes_on = runtime.block_on(async {
                tokio::select! {
                    changed = catalog.changed() => changed.is_ok(),
                    result = end_of(grace) => {
                        ended = Some(result);
                        true
                    }
                    () = tokio::time::sleep_until(look.into()) => true,
                }
            });
            if let Some(result) = ended {
                self.end_grace(result);
            }
            if !goes_on {
                return;
            }
        }
    }

    /// Starts to wait for the readers of what is out of use, if that is not under way.
    fn begin_grace(&mut self) {
        if self.grace.is_some() || !self.applied.write().expect("no writer panics").begin_grace() {
            return;
        }
        let grace = self.datapath.maps.grace();
        let wait = move || grace().inspect_err(|_| std::thread::sleep(PERIOD));
        self.grace = Some(self.runtime.spawn_blocking(wait));
    }

    /// A grace that failed is tried again by the next [`begin_grace`](Self::begin_grace).
    fn end_grace(&mut self, result: Result<(), Error>) {
        self.grace = None;
        if let Err(error) = result.and_then(|()| self.free()) {
            self.fail(&error);
        }
    }

    /// Frees what waited for the grace that has ended.
    fn free(&mut self) -> Result<(), Error> {
        let ops = self.applied.write().expect("no writer panics").end_grace();
        self.carry_out(&ops)
    }

    /// Waits until all that is out of use is free; says whether there was any.
    fn settle(&mut self) -> Result<bool, Error> {
        let mut freed = false;
        loop {
            let under_way = self.grace.take().and_then(|grace| self.runtime.block_on(grace).ok());
            if !matches!(under_way, Some(Ok(()))) {
                if !self.applied.write().expect("no writer panics").begin_grace() {
                    return Ok(freed);
                }
                self.datapath.maps.grace()()?;
            }
            self.free()?;
            freed = true;
        }
    }

    /// Programs that run on maps of their own are not swapped for what is left of an earlier run: they
    /// may know something newer.
    fn knows_enough(&self, catalog: &Catalog) -> bool {
        self.attached || !self.succeeds || catalog.services.values().all(|entry| !entry.kept)
    }

    /// Writes a catalog that is new or could not be written before, and sees to it that the
    /// programs are in place.
    fn round(&mut self, catalog: &Arc<Catalog>) {
        let start = Instant::now();
        let before = self.report.borrow().clone();
        let known = before.error.is_none()
            && before.refused.is_empty()
            && before.written.as_ref().is_some_and(|written| Arc::ptr_eq(written, catalog))
            && !self.weights_change();
        self.reclaim();
        let mended = self.mend();
        if known && self.attached && mended.is_ok() {
            return;
        }
        let mut report = before.clone();
        // A registry's news are written also where something cannot be put back.
        let written = if known { Ok(before.refused.clone()) } else { self.write(catalog, &before) };
        let in_place = mended.and_then(|()| self.attach());
        match written.and_then(|refused| in_place.map(|()| refused)) {
            Ok(refused) => {
                for new in refused.iter().filter(|refused| !before.refused.contains(refused)) {
                    tracing::error!("{new}");
                }
                report.written = Some(catalog.clone());
                report.refused = refused;
                report.error = None;
            }
            Err(error) => {
                self.fail(&error);
                report.error = Some(error.to_string());
            }
        }
        report.seconds = start.elapsed().as_secs_f64();
        self.report.send_replace(report);
    }

    /// Puts back what was taken away, at most once a period.
    fn mend(&mut self) -> Result<(), Error> {
        if !self.attached || self.mended.is_some_and(|at| at.elapsed() < PERIOD) {
            return Ok(());
        }
        self.mended = None;
        for mended in self.datapath.mend()? {
            tracing::warn!("{mended} had been taken away, and was put back");
        }
        self.mended = Some(Instant::now());
        Ok(())
    }

    /// Says what is wrong, unless it was said before. What was written before the error is in the maps, so they
    /// know best.
    fn fail(&mut self, error: &Error) {
        let error = error.to_string();
        if self.report.borrow().error.as_ref() != Some(&error) {
            tracing::error!("{error}");
        }
        self.report.send_modify(|report| report.error = Some(error));
        match self.datapath.maps.restore() {
            Ok(applied) => *self.applied.write().expect("no writer panics") = applied,
            Err(error) => tracing::error!("cannot read the maps back: {error}"),
        }
        // A grace under way frees nothing any more. Those of its backends that are still there leave once more.
        self.grace = None;
        std::mem::take(&mut self.leaving).into_values().for_each(|leaving| self.tell(News::Left(leaving)));
    }

    /// Writes until nothing is left to write: what did not fit may fit once something else has gone.
    fn write(&mut self, catalog: &Catalog, before: &Report) -> Result<Vec<String>, Error> {
        if let Some(changes) = self.changes(catalog, before) {
            let mut plan = self.plan(changes.iter().copied(), Prune::No);
            if !plan.refused.is_empty() && self.settle()? {
                plan = self.plan(changes, Prune::No);
            }
            if plan.refused.is_empty() {
                return self.carry_out(&plan.ops).map(|()| Vec::new());
            }
        }
        self.warm(catalog);
        loop {
            let plan = self.plan(catalog.services.values(), catalog.prune());
            self.carry_out(&plan.ops)?;
            if plan.refused.is_empty() || !self.settle()? && plan.ops.is_empty() {
                return Ok(plan.refused.iter().map(ToString::to_string).collect());
            }
        }
    }

    /// All that has to be looked at, where that is less than everything: the maps hold what was written
    /// before, and nothing but a service itself decides on its weights.
    fn changes<'a>(&self, catalog: &'a Catalog, before: &Report) -> Option<Vec<&'a Arc<Entry>>> {
        let settled = before.error.is_none() && before.refused.is_empty();
        let plain = self.zone.is_none() && self.warming.is_empty();
        let written = before.written.as_ref().filter(|_| settled && plain)?;
        let changes = catalog.changes(written)?;
        changes.iter().all(|entry| entry.service.slow_start.is_none()).then_some(changes)
    }

    fn plan<'a>(&self, entries: impl IntoIterator<Item = &'a Arc<Entry>>, prune: Prune) -> Plan {
        let applied = self.applied.read().expect("no writer panics");
        let sight = Sight {
            zone: self.zone.as_deref(),
            adopted: &self.adopted,
            applied: &applied,
            maps: &self.datapath.maps,
            warming: &self.warming,
        };
        plan::plan(&catalog::desired(entries, &sight), &applied, prune)
    }

    fn carry_out(&mut self, ops: &[Op]) -> Result<(), Error> {
        for op in ops {
            self.datapath.maps.write(op)?;
            let mut applied = self.applied.write().expect("no writer panics");
            match op {
                Op::RetireBackend { id, drain_ms } => {
                    let was = applied.whereabouts(*id);
                    let was = was.and_then(|(number, at)| Some((Protocol::from_number(number)?, at)));
                    let drain = Duration::from_millis(*drain_ms);
                    self.leaving.extend(was.map(|was| (*id, Leaving::new(*id, was, drain))));
                }
                Op::PutBackend { id, .. } => drop(self.leaving.remove(id)),
                _ => {}
            }
            applied.apply(op);
            drop(applied);
            if let Op::DeleteBackend { id } = op
                && let Some(leaving) = self.leaving.remove(id)
            {
                self.tell(News::Left(leaving));
            }
        }
        self.reclaim();
        Ok(())
    }

    fn tell(&self, news: News) {
        // Without anybody to tell, the daemon is about to end.
        let _ = self.left.send(news);
    }

    /// Keeps since when the backends of services with a slow start are known. Those that a service
    /// begins with are as warm as each other.
    fn warm(&mut self, catalog: &Catalog) {
        let applied = self.applied.read().expect("no writer panics");
        let slow = catalog.backends().filter_map(|(service, frontend, endpoint)| {
            let window = service.slow_start?;
            let since = match self.warming.get(&(frontend, endpoint)) {
                Some(since) => *since,
                None if applied.is_joined_by(&frontend, &endpoint) => Instant::now(),
                None => return None,
            };
            (since.elapsed() < window).then_some(((frontend, endpoint), since))
        });
        self.warming = slow.collect();
    }

    /// Whether the same catalog leads to other weights than a moment ago.
    fn weights_change(&mut self) -> bool {
        if self.zone.is_none() {
            return !self.warming.is_empty();
        }
        let applied = self.applied.read().expect("no writer panics");
        let ids = applied.services.values().flat_map(|service| service.backends.values());
        let ejected = ids.map(|known| known.id).filter(|id| self.datapath.maps.health(*id).is_ejected());
        let ejected: BTreeSet<_> = ejected.collect();
        let changed = ejected != self.ejected;
        self.ejected = ejected;
        changed || !self.warming.is_empty()
    }

    /// Makes ids usable again whose last socket is gone.
    fn reclaim(&self) {
        let maps = &self.datapath.maps;
        self.applied.write().expect("no writer panics").reclaim(|id| maps.load(id) == 0);
    }

    fn attach(&mut self) -> Result<(), Error> {
        if !self.attached {
            if self.datapath.take_over(&self.applied.read().expect("no writer panics"))? {
                self.tell(News::TakenOver);
            }
            self.attached = true;
        }
        Ok(())
    }
}
