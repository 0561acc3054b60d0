//! The fuse on mass deletion: a registry that says that nearly everything is gone has more
//! probably lost it than meant it.

use std::{
    collections::HashSet,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use imbl::ordmap::DiffItem;

use crate::{
    model::{Service, ServiceId},
    registry::{Services, Snapshot},
};

/// What goes within this time goes at once: leases end one by one.
const WINDOW: Duration = Duration::from_secs(30);

/// How long a registry has to say that so much is gone until it is taken at its word.
const HOLD: Duration = Duration::from_secs(5 * 60);

/// With fewer there is no more than half: three instances may well become one.
const LEAST: usize = 10;

/// Passes on what a registry says. Once blown it still passes on what is new or changed; what is missing
/// stays in use until there is more again, or until the registry has said so for [`HOLD`].
#[derive(Debug)]
pub struct Fuse {
    /// What is in use.
    held: Arc<Snapshot>,
    /// What was said last, and how much that is: counted by what has changed.
    said: Services,
    left: Counts,
    /// The most there was of late.
    most: Counts,
    /// When that was counted.
    counted: Instant,
    blown: Option<Blown>,
}

#[derive(Debug)]
struct Blown {
    before: Counts,
    since: Instant,
    why: String,
}

/// Services that have instances, and instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    services: usize,
    instances: usize,
}

impl Counts {
    fn of<'a>(services: impl Iterator<Item = &'a Arc<Service>>) -> Self {
        services.filter(|service| !service.instances.is_empty()).fold(Self::default(), |sum, service| Self {
            services: sum.services + 1,
            instances: sum.instances + service.instances.len(),
        })
    }

    /// How much is said `now`, where `before` this was said.
    fn follow(&mut self, before: &Services, now: &Services) {
        for change in before.diff(now) {
            let (old, new) = match change {
                DiffItem::Add(_, new) => (None, Some(new)),
                DiffItem::Update { old: (_, old), new: (_, new) } => (Some(old), Some(new)),
                DiffItem::Remove(_, old) => (Some(old), None),
            };
            let (old, new) = (Self::of(old.into_iter()), Self::of(new.into_iter()));
            self.services = self.services + new.services - old.services;
            self.instances = self.instances + new.instances - old.instances;
        }
    }

    fn plus(self, other: Self) -> Self {
        Self { services: self.services + other.services, instances: self.instances + other.instances }
    }

    fn max(self, other: Self) -> Self {
        Self { services: self.services.max(other.services), instances: self.instances.max(other.instances) }
    }

    /// Whether it is an accident that this is all that is left.
    fn is_too_little_of(self, before: Self) -> bool {
        let less_than_half = |now: usize, before: usize| before >= LEAST && 2 * now < before;
        (self.instances == 0 && before.instances > 0)
            || less_than_half(self.instances, before.instances)
            || less_than_half(self.services, before.services)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} instances of {} services", self.instances, self.services)
    }
}

impl Fuse {
    /// For a registry that has said this last, perhaps to an earlier run.
    pub fn new(kept: Option<Arc<Snapshot>>) -> Self {
        let kept = kept.map(|kept| crate::registry::services(kept.all().cloned())).unwrap_or_default();
        let held = Snapshot { kept, ..Snapshot::default() };
        Self {
            most: Counts::of(held.all()),
            held: Arc::new(held),
            said: Services::new(),
            left: Counts::default(),
            counted: Instant::now(),
            blown: None,
        }
    }

    /// What is in use.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.held
    }

    /// Takes what the registry says now, and of which services it says nothing; why not all of that is
    /// followed.
    pub fn pass(&mut self, said: Services, unheard: &[ServiceId], now: Instant) -> Option<String> {
        let kept = unheard.iter().filter_map(|id| Some((id.clone(), self.held.kept.get(id)?.clone())));
        let kept: Services = kept.collect();
        self.left.follow(&self.said, &said);
        self.said = said.clone();
        let left = self.left.plus(Counts::of(kept.values()));
        if now.duration_since(self.counted) > WINDOW {
            (self.most, self.counted) = (Counts::of(self.held.all()), now);
        }
        let before = self.blown.as_ref().map_or(self.most, |blown| blown.before);
        let confirmed = self.blown.as_ref().is_some_and(|blown| now.duration_since(blown.since) >= HOLD);
        if confirmed || !left.is_too_little_of(before) {
            // What was lost and found, or lost for good, is no longer counted.
            self.most = if self.blown.is_some() { left } else { self.most.max(left) };
            self.blown = None;
            self.held = Arc::new(Snapshot { services: said, kept, complete: unheard.is_empty() });
            return None;
        }
        let why = || {
            format!(
                "of {before} only {left} are left; what is missing stays in use until it has been missing for {} minutes",
                HOLD.as_secs() / 60
            )
        };
        let blown = self.blown.get_or_insert_with(|| Blown { before, since: now, why: why() });
        let mut held = merge(&said, &self.held);
        held.complete &= unheard.is_empty();
        self.held = Arc::new(held);
        Some(blown.why.clone())
    }

    /// The registry was not heard for a while: what it confirms it has to say without a gap.
    pub fn interrupted(&mut self) {
        if let Some(Blown { before, .. }) = self.blown.take() {
            self.most = self.most.max(before);
            self.counted = Instant::now();
        }
    }

    /// When what is missing may be taken for gone.
    pub fn due(&self) -> Option<Instant> {
        self.blown.as_ref().map(|blown| blown.since + HOLD)
    }
}

/// What is said, and of what was held all that is not said.
fn merge(said: &Services, held: &Snapshot) -> Snapshot {
    let mut merged = Snapshot { services: said.clone(), ..Snapshot::default() };
    for (before, is_kept) in held.marked() {
        let unsaid = if is_kept { &mut merged.kept } else { &mut merged.services };
        let Some(now) = said.get(&before.id) else {
            unsaid.insert(before.id.clone(), before.clone());
            continue;
        };
        let ids: HashSet<_> = now.instances.iter().map(|one| &one.id).collect();
        let places: HashSet<_> = now.instances.iter().map(|one| (one.address, one.port)).collect();
        let missing = before.instances.iter().filter(|one| !ids.contains(&one.id));
        let missing: Vec<_> = missing.filter(|one| !places.contains(&(one.address, one.port))).collect();
        if !missing.is_empty() {
            let mut whole = Service::clone(now);
            whole.instances.extend(missing.into_iter().cloned());
            merged.services.insert(whole.id.clone(), whole.into());
        }
    }
    // What only an earlier run was told is for the maps to know better.
    merged.complete = merged.kept.is_empty();
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{catalog::tests, model::Health, registry::services as by_id};

    fn service(name: &str, addresses: &[String]) -> Service {
        let addresses: Vec<_> = addresses.iter().map(|address| (address.as_str(), Health::Healthy)).collect();
        tests::service(name, 80, None, &addresses)
    }

    fn address(service: usize, instance: usize) -> String {
        format!("10.0.{service}.{instance}")
    }

    /// So many services `s0`, `s1`, … with so many instances each.
    fn services(count: usize, instances: usize) -> Services {
        let addresses = |n| (0..instances).map(|i| address(n, i)).collect::<Vec<_>>();
        by_id((0..count).map(|n| service(&format!("s{n}"), &addresses(n)).into()))
    }

    fn fuse(said: Services, now: Instant) -> Fuse {
        let mut fuse = Fuse::new(None);
        assert_eq!(fuse.pass(said, &[], now), None);
        fuse
    }

    #[test]
    fn nearly_everything_gone_removes_nothing_until_it_is_confirmed() {
        let start = Instant::now();
        for left in [services(0, 0), services(20, 0), services(9, 2)] {
            let mut fuse = fuse(services(20, 2), start);
            let held = fuse.snapshot().clone();
            let why = fuse.pass(left.clone(), &[], start).expect("blown");
            assert!(why.starts_with("of 40 instances of 20 services only "), "{why}");
            assert_eq!(Counts::of(fuse.snapshot().all()), Counts::of(held.all()));
            assert!(fuse.snapshot().complete, "this run was told everything that is in use");
            assert_eq!(fuse.due(), Some(start + HOLD));
            assert!(fuse.pass(left.clone(), &[], start + HOLD - Duration::from_millis(1)).is_some());
            assert_eq!(fuse.pass(left.clone(), &[], start + HOLD), None);
            assert_eq!(fuse.snapshot().services, left);
            assert_eq!(fuse.due(), None);
        }
    }

    #[test]
    fn ordinary_changes_pass() {
        let start = Instant::now();
        for (before, after) in [
            (services(20, 2), services(10, 2)),
            (services(20, 2), services(20, 1)),
            (services(1, 3), services(1, 1)),
            (services(4, 2), services(1, 1)),
            (services(0, 0), services(0, 0)),
            (services(3, 0), services(0, 0)),
        ] {
            let mut fuse = fuse(before, start);
            assert_eq!(fuse.pass(after.clone(), &[], start), None);
            assert_eq!(fuse.snapshot().services, after);
        }
    }

    #[test]
    fn what_goes_bit_by_bit_within_the_window_goes_at_once() {
        let start = Instant::now();
        let mut fuse = fuse(services(20, 1), start);
        for left in (10..20).rev() {
            assert_eq!(fuse.pass(services(left, 1), &[], start), None);
        }
        assert!(fuse.pass(services(9, 1), &[], start).is_some());
        assert_eq!(fuse.snapshot().services.len(), 10);

        // In its own time it may go.
        let mut fuse = self::fuse(services(20, 1), start);
        for (step, left) in (1..20).rev().enumerate() {
            let now = start + (WINDOW + Duration::from_millis(1)) * u32::try_from(step + 1).unwrap();
            assert_eq!(fuse.pass(services(left, 1), &[], now), None, "{left}");
        }
    }

    #[test]
    fn a_blown_fuse_follows_what_is_new_and_changed_and_mends_when_there_is_more_again() {
        let start = Instant::now();
        let mut fuse = fuse(services(20, 2), start);
        // Its second instance is at another place now, its first has another weight.
        let mut said =
            vec![service("new", &[address(50, 0)]), service("s3", &[address(3, 0), address(3, 7)])];
        said[1].instances[0].weight = 7;
        assert!(fuse.pass(by_id(said.into_iter().map(Arc::new)), &[], start).is_some());
        assert_eq!(Counts::of(fuse.snapshot().all()), Counts { services: 21, instances: 41 });
        let s3 = fuse.snapshot().all().find(|service| service.id.name == "s3").unwrap();
        let mut weights: Vec<_> = s3.instances.iter().map(|one| one.weight).collect();
        weights.sort_unstable();
        assert_eq!(weights, [7, 100]);

        assert_eq!(fuse.pass(services(10, 2), &[], start), None);
        assert_eq!(fuse.snapshot().services, services(10, 2));
        // What was lost is no longer counted.
        assert_eq!(fuse.pass(services(6, 2), &[], start), None);
    }

    #[test]
    fn what_an_earlier_run_was_told_is_held_as_well_and_left_to_the_maps() {
        let kept = Snapshot::complete(services(20, 2));
        let mut fuse = Fuse::new(Some(Arc::new(kept)));
        let now = Instant::now();
        assert!(fuse.pass(services(1, 2), &[], now).is_some());
        let snapshot = fuse.snapshot();
        assert_eq!((snapshot.services.len(), snapshot.kept.len(), snapshot.complete), (1, 19, false));
        assert_eq!(fuse.pass(services(20, 1), &[], now), None);
        assert!(fuse.snapshot().complete && fuse.snapshot().kept.is_empty());
    }

    #[test]
    fn what_it_cannot_tell_yet_stays_as_an_earlier_run_had_it() {
        let kept = Snapshot::complete(services(3, 1));
        let mut fuse = Fuse::new(Some(Arc::new(kept)));
        let now = Instant::now();
        let unheard = vec![services(3, 1).get_max().unwrap().0.clone()];
        assert_eq!(fuse.pass(services(1, 1), &unheard, now), None);
        let snapshot = fuse.snapshot();
        assert_eq!((snapshot.services.len(), snapshot.kept.len(), snapshot.complete), (1, 1, false));
        assert_eq!(fuse.pass(services(1, 1), &[], now), None);
        assert_eq!((fuse.snapshot().kept.len(), fuse.snapshot().complete), (0, true));
    }

    #[test]
    fn a_registry_that_goes_away_has_confirmed_nothing() {
        let start = Instant::now();
        let mut fuse = fuse(services(20, 2), start);
        assert!(fuse.pass(Services::new(), &[], start).is_some());
        fuse.interrupted();
        assert_eq!(fuse.due(), None);
        assert!(fuse.pass(Services::new(), &[], start + HOLD).is_some());
        assert_eq!(fuse.due(), Some(start + 2 * HOLD));
    }
}
