//! Brings the maps to what the catalog wants, and keeps the mirror of what they hold.

use std::{
    sync::{Arc, RwLock},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch};

use crate::{
    catalog::Catalog,
    datapath::{Datapath, Error},
    plan::{self, Applied},
};

/// How long after a failed write the next try comes.
const RETRY: Duration = Duration::from_secs(1);

/// What the last round did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Whether the programs are in place.
    pub attached: bool,
    /// How many rounds were completed.
    pub rounds: u64,
    /// Whether the last round followed a catalog to which every registry had contributed.
    pub settled: bool,
    /// Services that did not fit, and why.
    pub refused: Vec<String>,
    /// Why the last round was not completed.
    pub error: Option<String>,
    pub seconds: f64,
}

/// The one writer of the maps.
pub struct Reconciler {
    datapath: Datapath,
    applied: Arc<RwLock<Applied>>,
    report: watch::Sender<Report>,
}

impl Reconciler {
    /// Reads the maps. Where they were adopted with content, puts the programs in place at once;
    /// otherwise only after the first round, so that running programs are not swapped for ones
    /// that know nothing.
    pub fn new(mut datapath: Datapath, adopted: bool) -> Result<Self, Error> {
        let applied = datapath.maps.restore()?;
        let mut report = Report::default();
        if adopted {
            datapath.attach()?;
            report.attached = true;
        }
        Ok(Self { datapath, applied: Arc::new(RwLock::new(applied)), report: watch::Sender::new(report) })
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
            let done = current.is_none_or(|current| self.round(&current));
            let more = runtime.block_on(async {
                if done {
                    return catalog.changed().await.is_ok();
                }
                tokio::select! {
                    changed = catalog.changed() => changed.is_ok(),
                    () = tokio::time::sleep(RETRY) => true,
                }
            });
            if !more {
                return;
            }
        }
    }

    fn round(&mut self, catalog: &Catalog) -> bool {
        let start = Instant::now();
        let result = self.write(catalog);
        let mut report = self.report.borrow().clone();
        report.seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(refused) => {
                for new in refused.iter().filter(|refused| !report.refused.contains(refused)) {
                    tracing::error!("{new}");
                }
                report.attached = true;
                report.rounds += 1;
                report.settled = catalog.delivered;
                report.refused = refused;
                report.error = None;
            }
            Err(error) => {
                tracing::error!("{error}");
                report.error = Some(error.to_string());
                // What was written before the error is in the maps, so they know best.
                match self.datapath.maps.restore() {
                    Ok(applied) => *self.applied.write().expect("no writer panics") = applied,
                    Err(error) => tracing::error!("cannot read the maps back: {error}"),
                }
            }
        }
        let done = report.error.is_none();
        self.report.send_replace(report);
        done
    }

    fn write(&mut self, catalog: &Catalog) -> Result<Vec<String>, Error> {
        let desired = catalog.desired();
        let plan = {
            let applied = self.applied.read().expect("no writer panics");
            plan::plan(&desired, &applied, catalog.prune())
        };
        for op in &plan.ops {
            self.datapath.maps.write(op)?;
            self.applied.write().expect("no writer panics").apply(op);
        }
        if !self.report.borrow().attached {
            self.datapath.attach()?;
        }
        Ok(plan.refused.iter().map(ToString::to_string).collect())
    }
}
