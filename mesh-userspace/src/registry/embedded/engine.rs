//! One thread answers every call: in batches, each of which is on disk before any of it is
//! answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Instant,
};

use serde_json::Value;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use super::{
    error::{Error, Result},
    leases::Leases,
    state::State,
    store::{self, Store},
    translate,
};
use crate::{
    model,
    registry::{Rules, Services, Snapshot},
};

/// As many calls are written at a time.
const BATCH: usize = 256;

/// A call and where its answer goes.
pub struct Call {
    pub operation: String,
    pub input: Value,
    pub answer: oneshot::Sender<Result<Value>>,
}

pub struct Engine {
    store: Store,
    state: State,
    rules: Rules,
    leases: Leases,
    /// Service id → what it is to mesh, and what is wrong with it.
    translated: BTreeMap<String, (Option<Arc<model::Service>>, Vec<String>)>,
    /// Those that are something to mesh.
    services: Services,
    /// Services whose translation is out of date.
    changed: BTreeSet<String>,
}

impl Engine {
    pub fn open(path: &Path, rules: Rules) -> std::result::Result<Self, Box<store::Error>> {
        let store = Store::open(path)?;
        let state = store.load()?;
        let leases = Leases::of(&state, Instant::now());
        let changed = state.services.keys().cloned().collect();
        Ok(Self {
            store,
            state,
            rules,
            leases,
            translated: BTreeMap::new(),
            services: Services::new(),
            changed,
        })
    }

    /// Whether nothing was ever created, or everything was deleted.
    pub fn is_empty(&self) -> bool {
        self.state.namespaces.is_empty()
    }

    /// Answers until nobody can ask any more. Publishing takes a tenth of the time at most.
    pub fn run(mut self, mut calls: mpsc::Receiver<Call>, mut publish: impl FnMut(&mut Self)) {
        let start = Instant::now();
        publish(&mut self);
        let (mut published, mut took) = (Instant::now(), start.elapsed());
        let mut due = false;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.expect("a clock is all it needs");
        loop {
            let publish_at = published + took * 9;
            let wake = due.then_some(publish_at).into_iter().chain(self.leases.next()).min();
            let first = runtime.block_on(async {
                match wake {
                    None => Ok(calls.recv().await),
                    Some(at) => tokio::time::timeout_at(at.into(), calls.recv()).await,
                }
            });
            let mut batch = Vec::new();
            match first {
                Ok(None) => return,
                Ok(Some(call)) => batch.push(call),
                Err(_) => {}
            }
            while batch.len() < BATCH {
                match calls.try_recv() {
                    Ok(call) => batch.push(call),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            due |= self.answer(batch, Instant::now());
            if due && Instant::now() >= publish_at {
                let start = Instant::now();
                publish(&mut self);
                (published, took, due) = (Instant::now(), start.elapsed(), false);
            }
        }
    }

    /// Whether anything changed.
    fn answer(&mut self, batch: Vec<Call>, now: Instant) -> bool {
        let mut answers = Vec::with_capacity(batch.len());
        for Call { operation, input, answer } in batch {
            let leased = (operation == "RegisterInstance").then(|| registered(&input)).flatten();
            let result = self.state.call(&operation, input, &self.rules);
            if let (Ok(_), Some((service, id))) = (&result, leased)
                && let Ok((service, instance)) = self.state.instance(&service, &id)
            {
                self.leases.renew(&service.id, &id, &instance.attributes, now);
            }
            answers.push((answer, result));
        }
        while let Some((service, id)) = self.leases.ended(now) {
            let input = serde_json::json!({ "ServiceId": service, "InstanceId": id });
            if self.state.call("DeregisterInstance", input, &self.rules).is_ok() {
                tracing::warn!("instance {id} of service {service} was not renewed in time: deregistered");
            }
        }
        let changes = self.state.take_changes();
        let written = if changes.is_empty() { Ok(()) } else { self.store.write(&changes) };
        if let Err(error) = &written {
            tracing::error!("the embedded registry cannot write: {error}");
            // What is in memory is not what is on disk.
            match self.store.load() {
                Ok(state) => self.state = state,
                Err(error) => tracing::error!("the embedded registry cannot read: {error}"),
            }
            self.leases = Leases::of(&self.state, now);
            self.changed = self.state.services.keys().chain(self.translated.keys()).cloned().collect();
        }
        for (answer, mut result) in answers {
            if let Err(error) = &written {
                result = Err(Error::internal(format!("nothing was changed: cannot write: {error}")));
            }
            // Whoever asked may be gone.
            let _ = answer.send(result);
        }
        let services = changes.iter().filter(|(key, _)| key.starts_with("srv-"));
        self.changed.extend(services.map(|(key, _)| key.split('/').next().unwrap_or(key).to_owned()));
        !changes.is_empty()
    }

    /// Everything, as mesh has it; also says what is wrong with services, once.
    pub fn snapshot(&mut self) -> Snapshot {
        for id in std::mem::take(&mut self.changed) {
            let known = self.translated.remove(&id).unwrap_or_default();
            if let Some(service) = &known.0 {
                self.services.remove(&service.id);
            }
            let Some(service) = self.state.services.get(&id) else { continue };
            let Ok(namespace) = self.state.namespace(&service.namespace) else { continue };
            let instances = self.state.instances(&id);
            let new = match translate::service(namespace, service, instances, &self.rules) {
                Ok((service, wrong)) => (service.map(Arc::new), wrong),
                // What works stays until there is something better.
                Err(why) => (known.0, vec![why]),
            };
            if let Some(service) = &new.0 {
                self.services.insert(service.id.clone(), service.clone());
            }
            for why in new.1.iter().filter(|why| !known.1.contains(why)) {
                tracing::warn!("embedded registry: {why}; it is left out");
            }
            self.translated.insert(id, new);
        }
        Snapshot::complete(self.services.clone())
    }
}

fn registered(input: &Value) -> Option<(String, String)> {
    Some((input["ServiceId"].as_str()?.into(), input["InstanceId"].as_str()?.into()))
}
