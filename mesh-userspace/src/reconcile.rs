//! Brings the maps to what the catalog wants, and keeps the mirror of what they hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, RwLock, mpsc},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch};

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
    report: watch::Sender<Report>,
    /// Whether our programs, not those of an earlier daemon, were put in place.
    attached: bool,
    /// Who is told which backends are gone.
    leaving: mpsc::Sender<News>,
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
        leaving: mpsc::Sender<News>,
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
            report,
            attached,
            leaving,
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
    pub fn run(mut self, runtime: &Handle, mut catalog: watch::Receiver<Option<Arc<Catalog>>>) {
        loop {
            let current = catalog.borrow_and_update().clone();
            if let Some(current) = current.filter(|current| self.knows_enough(current)) {
                self.round(&current);
            }
            let changed = runtime.block_on(async { tokio::time::timeout(PERIOD, catalog.changed()).await });
            if let Ok(Err(_)) = changed {
                return;
            }
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
        let mended = if self.attached { self.datapath.mend() } else { Ok(Vec::new()) };
        for mended in mended.iter().flatten() {
            tracing::warn!("{mended} had been taken away, and was put back");
        }
        if known && self.attached && mended.is_ok() {
            return;
        }
        let mended = mended.map(drop);
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
                let error = error.to_string();
                if before.error.as_ref() != Some(&error) {
                    tracing::error!("{error}");
                }
                report.error = Some(error);
                // What was written before the error is in the maps, so they know best.
                match self.datapath.maps.restore() {
                    Ok(applied) => *self.applied.write().expect("no writer panics") = applied,
                    Err(error) => tracing::error!("cannot read the maps back: {error}"),
                }
            }
        }
        report.seconds = start.elapsed().as_secs_f64();
        self.report.send_replace(report);
    }

    /// Writes until nothing is left to write: what did not fit may fit once something else has gone.
    fn write(&mut self, catalog: &Catalog, before: &Report) -> Result<Vec<String>, Error> {
        if let Some(changes) = self.changes(catalog, before) {
            let plan = self.plan(changes, Prune::No);
            if plan.refused.is_empty() {
                return self.carry_out(&plan.ops).map(|()| Vec::new());
            }
        }
        self.warm(catalog);
        loop {
            let plan = self.plan(catalog.services.values(), catalog.prune());
            self.carry_out(&plan.ops)?;
            if plan.refused.is_empty() || plan.ops.is_empty() {
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
        let mut leaving = self.leaving(ops).into_iter().peekable();
        for op in ops {
            self.datapath.maps.write(op)?;
            self.applied.write().expect("no writer panics").apply(op);
            // One after the other: what comes after may fail.
            let is_its =
                |leaving: &Leaving| matches!(op, Op::DeleteBackend { id, .. } if *id == leaving.backend);
            if let Some(leaving) = leaving.next_if(is_its) {
                // Without anybody to tell, the daemon is about to end.
                let _ = self.leaving.send(News::Left(leaving));
            }
        }
        self.reclaim();
        Ok(())
    }

    /// The backends that a plan removes.
    fn leaving(&self, ops: &[Op]) -> Vec<Leaving> {
        let applied = self.applied.read().expect("no writer panics");
        let leaving = |op: &Op| {
            let Op::DeleteBackend { id, drain_ms } = op else { return None };
            let (protocol, endpoint) = applied.whereabouts(*id)?;
            let was = (Protocol::from_number(protocol)?, endpoint);
            Some(Leaving::new(*id, was, Duration::from_millis(*drain_ms)))
        };
        ops.iter().filter_map(leaving).collect()
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
                let _ = self.leaving.send(News::TakenOver);
            }
            self.attached = true;
        }
        Ok(())
    }
}
