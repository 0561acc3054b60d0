//! What a registry's records come to, where it says of each change what has changed.

use std::{collections::BTreeMap, sync::Arc};

use super::Said;
use crate::{
    model::Service,
    registry::{Claims, Services},
};

/// Services by the keys of whoever reads the records. Who came first keeps what two of them want. A change costs
/// what has changed, unless it is about what services want.
pub struct Ledger<K, T> {
    known: BTreeMap<K, (T, Vec<Arc<Service>>)>,
    /// What is wrong with records, by their keys.
    problems: BTreeMap<K, Vec<String>>,
    /// What services want that an older one has.
    clashes: Vec<String>,
    /// Whether somebody wants something else than when that was found out.
    claimed: bool,
    services: Services,
}

impl<K, T> Default for Ledger<K, T> {
    fn default() -> Self {
        Self {
            known: BTreeMap::new(),
            problems: BTreeMap::new(),
            clashes: Vec::new(),
            claimed: false,
            services: Services::new(),
        }
    }
}

impl<K: Ord + Clone, T: Ord + Clone> Ledger<K, T> {
    pub fn services(&self, key: &K) -> &[Arc<Service>] {
        self.known.get(key).map_or(&[], |(_, services)| services)
    }

    /// What the records of a key come to now, since when they are there, and what is wrong with them. Whether that
    /// is something else than before.
    pub fn put(&mut self, key: K, since: T, services: Vec<Service>, problems: Vec<String>) -> bool {
        let before = self.services(&key);
        // One that says what it said stays the same.
        let same =
            |new: Service| before.iter().find(|old| ***old == new).cloned().unwrap_or_else(|| new.into());
        let services: Vec<_> = services.into_iter().map(same).collect();
        let told = self.complain(&key, problems);
        if let Some((known, before)) = self.known.get_mut(&key)
            && *known == since
            && Claims::are_same(before, &services)
        {
            let mut changed = false;
            for (old, new) in before.iter_mut().zip(services).filter(|(old, new)| !Arc::ptr_eq(old, new)) {
                changed = true;
                // Another one may have what this one wants.
                if let Some(known) = self.services.get_mut(&new.id).filter(|known| Arc::ptr_eq(known, old)) {
                    known.clone_from(&new);
                }
                *old = new;
            }
            return told || changed;
        }
        self.claimed = true;
        self.known.insert(key, (since, services));
        true
    }

    /// What is wrong with the records of a key, which come to what they came to. Whether something else was.
    pub fn complain(&mut self, key: &K, problems: Vec<String>) -> bool {
        let before = match problems.is_empty() {
            true => self.problems.remove(key),
            false => self.problems.insert(key.clone(), problems),
        };
        before.as_ref() != self.problems.get(key)
    }

    /// There are no records of a key any more.
    pub fn remove(&mut self, key: &K) {
        self.problems.remove(key);
        self.claimed |= self.known.remove(key).is_some();
    }

    /// What is known now, and what is wrong with it.
    pub fn read(&mut self) -> Said {
        if std::mem::take(&mut self.claimed) {
            let all = self.known.values();
            let all = all.flat_map(|(since, services)| services.iter().map(move |one| (since, one.clone())));
            Said { services: self.services, problems: self.clashes, .. } =
                Said::by_age(all.collect(), Vec::new());
        }
        let problems = self.problems.values().flatten().chain(&self.clashes).cloned().collect();
        Said { services: self.services.clone(), unheard: Vec::new(), problems }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{catalog::tests::service, model::Health};

    /// One that wants one of few VIPs, and has so many instances.
    fn wants(name: u8, vip: u8, instances: usize) -> Service {
        let addresses: Vec<_> = (0..instances).map(|number| format!("10.0.0.{number}")).collect();
        let instances: Vec<_> = addresses.iter().map(|address| (&**address, Health::Healthy)).collect();
        service(&format!("s{name}"), 80, Some(&format!("127.128.0.{vip}")), &instances)
    }

    proptest! {
        /// Step by step it comes to what it comes to when everything is looked at again.
        #[test]
        fn what_is_followed_is_what_there_is(
            steps in prop::collection::vec((0..5_u8, 0..4_u8, 1..3_u8, 0..3_usize, any::<bool>()), 1..40),
        ) {
            let (mut ledger, mut all) = (Ledger::default(), BTreeMap::new());
            for (name, since, vip, instances, stays) in steps {
                if stays {
                    let service = wants(name, vip, instances);
                    let is_news = all.get(&name) != Some(&(since, service.clone()));
                    prop_assert_eq!(ledger.put(name, since, vec![service.clone()], Vec::new()), is_news);
                    all.insert(name, (since, service));
                } else {
                    ledger.remove(&name);
                    all.remove(&name);
                }
                let anew = all.values().map(|(since, service)| (*since, Arc::new(service.clone())));
                let anew = Said::by_age(anew.collect(), Vec::new());
                let said = ledger.read();
                prop_assert_eq!((said.services, said.problems), (anew.services, anew.problems));
            }
        }
    }
}
