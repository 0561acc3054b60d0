//! Instances that are deregistered unless they are registered again in time.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    time::Instant,
};

use super::{state::State, translate};

/// Service id and instance id.
type Key = (String, String);

/// Times are of the monotonic clock, so after a start every lease begins anew: nobody could renew
/// one meanwhile.
#[derive(Debug, Default)]
pub struct Leases {
    ends: HashMap<Key, Instant>,
    /// May hold ends that were put off since.
    queue: BinaryHeap<Reverse<(Instant, Key)>>,
}

impl Leases {
    pub fn of(state: &State, now: Instant) -> Self {
        let mut leases = Self::default();
        for (service, instance) in state.all_instances() {
            leases.renew(service, &instance.id, &instance.attributes, now);
        }
        leases
    }

    /// An instance was registered, perhaps again.
    pub fn renew(&mut self, service: &str, id: &str, attributes: &super::records::Attributes, now: Instant) {
        let key = (service.to_owned(), id.to_owned());
        match translate::lease(attributes) {
            Ok(Some(lease)) => {
                self.queue.push(Reverse((now + lease, key.clone())));
                self.ends.insert(key, now + lease);
            }
            _ => drop(self.ends.remove(&key)),
        }
    }

    /// When one may end next.
    pub fn next(&self) -> Option<Instant> {
        self.queue.peek().map(|Reverse((at, _))| *at)
    }

    /// One that has ended.
    pub fn ended(&mut self, now: Instant) -> Option<Key> {
        while self.next().is_some_and(|at| at <= now) {
            let Reverse((at, key)) = self.queue.pop()?;
            if self.ends.get(&key) == Some(&at) {
                self.ends.remove(&key);
                return Some(key);
            }
        }
        None
    }
}
