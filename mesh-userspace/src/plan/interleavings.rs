//! Every way a reader can meet the writer, for all small worlds: no chance involved.
//!
//! The writer's plans are taken apart into the stores of single words that the datapath makes, the
//! reader into its loads. A load sees the word as it was at its time or as any later store leaves it,
//! but a reader that began before a grace has ended when the grace has. Readers store nothing that others
//! load, but for the workload's affinity; so one reader stands for any number that overlap, when it
//! may hold any backend id from any time before as its affinity.

use std::{collections::BTreeSet, net::Ipv4Addr};

use mesh_common::abi::Backend;

use super::{
    applied::{Dump, Sizes},
    *,
};

const SIZES: Sizes = Sizes { frontends: 3, services: 4, backends: 8, slots: 12 };

/// A word that is stored and loaded in one piece.
#[derive(Clone, Copy)]
enum Place {
    Frontend(usize),
    Service(u32),
    Slot(u32),
    Backend(u32, u32),
}

impl Place {
    const ALL: usize = 2 + (SIZES.services + SIZES.slots + SIZES.backends * Backend::WORDS) as usize;

    fn index(self) -> usize {
        let (slots, backends) = (SIZES.services, SIZES.services + SIZES.slots);
        match self {
            Self::Frontend(n) => n,
            Self::Service(id) => 2 + id as usize,
            Self::Slot(index) => 2 + (slots + index) as usize,
            Self::Backend(id, word) => 2 + (backends + id * Backend::WORDS + word) as usize,
        }
    }
}

/// All that was ever stored, and when.
struct Trace {
    stores: Vec<Vec<(usize, u64)>>,
    now: usize,
    /// When a grace ended.
    graces: Vec<usize>,
}

impl Trace {
    fn new() -> Self {
        Self { stores: vec![vec![(0, 0)]; Place::ALL], now: 0, graces: Vec::new() }
    }

    fn store(&mut self, place: Place, value: u64) {
        self.now += 1;
        self.stores[place.index()].push((self.now, value));
    }

    fn at(&self, place: Place, time: usize) -> u64 {
        let before = self.stores[place.index()].iter().rev().find(|(at, _)| *at <= time);
        before.expect("zero at the beginning").1
    }

    /// What a load may see that comes at `time` or later, but until `end`; and when.
    fn loads(&self, place: Place, time: usize, end: usize) -> impl Iterator<Item = (usize, u64)> {
        let later = self.stores[place.index()].iter().filter(move |(at, _)| time < *at && *at <= end);
        std::iter::once((time, self.at(place, time))).chain(later.copied())
    }

    /// The stores of an operation, as `Maps::write` makes them.
    fn write(&mut self, op: &Op) {
        match op {
            Op::PutBackend { id, service, endpoint, weight } => {
                let backend = Backend::new(endpoint.address, endpoint.port, *service, *weight);
                for (word, value) in (0..).zip(backend.words()) {
                    self.store(Place::Backend(*id, word), value);
                }
            }
            Op::DeleteBackend { id, .. } => {
                (0..Backend::WORDS).rev().for_each(|word| self.store(Place::Backend(*id, word), 0));
            }
            Op::PutSlots { base, words, .. } => {
                for (index, word) in (*base..).zip(words) {
                    self.store(Place::Slot(index), word.0);
                }
            }
            Op::PutService { id, word } => self.store(Place::Service(*id), word.0),
            Op::PutFrontend { frontend, service } => {
                self.store(Place::Frontend(number(frontend)), (*service).into());
            }
            Op::DeleteFrontend { frontend } => self.store(Place::Frontend(number(frontend)), 0),
            Op::PutSettings { .. } => {}
            Op::Grace => {
                self.now += 1;
                self.graces.push(self.now);
            }
        }
    }

    fn backend(&self, id: u32, time: usize) -> Backend {
        Backend::from_words([0, 1, 2, 3].map(|word| self.at(Place::Backend(id, word), time)))
    }

    /// What a daemon finds that starts after a crash at some time, and the removal of what is left over.
    fn restart(&self, time: usize) -> (Self, Applied) {
        let mut trace = Self { stores: Vec::new(), now: 0, graces: Vec::new() };
        trace.stores = (0..Place::ALL)
            .map(|index| vec![*self.stores[index].iter().rev().find(|(at, _)| *at <= time).unwrap()])
            .map(|last| vec![(0, last[0].1)])
            .collect();
        let frontends = (0..2).map(|n| (frontend(n), index_of(trace.at(Place::Frontend(n), 0))));
        let services = (0..SIZES.services).map(|id| (id, ServiceWord(trace.at(Place::Service(id), 0))));
        let services: BTreeMap<_, _> = services.filter(|(_, word)| word.exists()).collect();
        let backends = (0..SIZES.backends).map(|id| (id, trace.backend(id, 0)));
        let dump = Dump {
            frontends: frontends.filter(|(_, id)| *id != 0).collect(),
            settings: services.keys().map(|id| (*id, Settings::default())).collect(),
            services,
            backends: backends.filter(|(_, backend)| backend.in_use()).collect(),
            busy: BTreeSet::new(),
        };
        let slot = |index| SlotWord(trace.at(Place::Slot(index), 0));
        let (mut applied, repairs) = Applied::restore(SIZES, &dump, |word| {
            (word.base()..word.base() + word.count()).map(slot).collect()
        });
        for op in repairs {
            trace.write(&op);
            applied.apply(&op);
        }
        applied.reclaim(|_| true);
        (trace, applied)
    }

    /// What becomes of a connect that begins at `start`: everything that can.
    fn connect(&self, n: usize, start: usize, client: Client) -> BTreeSet<Seen> {
        let end = self.graces.iter().copied().find(|grace| *grace > start).unwrap_or(self.now);
        let mut seen = BTreeSet::new();
        for (time, id) in self.loads(Place::Frontend(n), start, end) {
            if id == 0 {
                seen.insert(Seen::NoFrontend);
                continue;
            }
            let service = index_of(id);
            for (time, word) in self.loads(Place::Service(service), time, end) {
                let word = ServiceWord(word);
                if !word.exists() {
                    seen.insert(Seen::NoFrontend);
                } else if word.count() == 0 {
                    seen.insert(Seen::NoBackend);
                }
                for slot in word.base()..word.base() + word.count() {
                    for (time, slot) in self.loads(Place::Slot(slot), time, end) {
                        let slot = SlotWord(slot);
                        for id in BTreeSet::from([slot.backend(), slot.alias()]) {
                            self.entries(id, time, end, |backend| {
                                let here = Seen::Backend(backend.address, backend.port.get());
                                seen.insert(if backend.in_use() { here } else { Seen::BadTable });
                            });
                        }
                    }
                }
                // Whoever had any backend before by its affinity asks whether it may use it still.
                for id in (1..SIZES.backends).filter(|_| client == Client::Kept) {
                    self.entries(id, time, end, |backend| {
                        if backend.in_use() && backend.weight > 0 && backend.service == service {
                            seen.insert(Seen::Backend(backend.address, backend.port.get()));
                        }
                    });
                }
            }
        }
        seen
    }

    /// An entry as a reader may see it: the last word, which says whether it is in use, comes first.
    fn entries(&self, id: u32, time: usize, end: usize, mut see: impl FnMut(Backend)) {
        for (time, last) in self.loads(Place::Backend(id, 3), time, end) {
            for (time, owner) in self.loads(Place::Backend(id, 2), time, end) {
                for (time, high) in self.loads(Place::Backend(id, 0), time, end) {
                    for (_, low) in self.loads(Place::Backend(id, 1), time, end) {
                        see(Backend::from_words([high, low, owner, last]));
                    }
                }
            }
        }
    }
}

/// Whether a workload may have a backend from before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    New,
    Kept,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    NoFrontend,
    NoBackend,
    BadTable,
    Backend(Address, u16),
}

fn index_of(word: u64) -> u32 {
    u32::try_from(word).expect("an id")
}

fn frontend(n: usize) -> Frontend {
    let last = u8::try_from(n).expect("0 or 1");
    Frontend::new(Ipv4Addr::new(127, 128, 0, last).into(), Port::new(80), 6)
}

fn number(frontend: &Frontend) -> usize {
    usize::from(frontend.address.octets()[15])
}

/// Backends of the two services differ in both words of the address, so that a mixture shows.
fn endpoint(n: usize, backend: usize) -> Endpoint {
    let part = u16::try_from(1 + 4 * n + backend).expect("small");
    Endpoint { address: Address::from_words([part.into(); 4]), port: Port::new(part) }
}

/// What a service can be: absent, or with each of `most` backends absent or with one of these weights.
fn services(n: usize, most: usize, weights: &[u16], policies: &[Policy]) -> Vec<Option<Wanted>> {
    let mut sets = vec![BTreeMap::new()];
    for backend in 0..most {
        let with = |set: &BTreeMap<Endpoint, u16>, weight| {
            let mut set = set.clone();
            set.insert(endpoint(n, backend), weight);
            set
        };
        let more: Vec<_> =
            sets.iter().flat_map(|set| weights.iter().map(|weight| with(set, *weight))).collect();
        sets.extend(more);
    }
    let wanted = |policy, backends| Some(Wanted { policy, settings: Settings::default(), backends });
    let all = policies.iter().flat_map(|policy| sets.iter().cloned().map(|set| wanted(*policy, set)));
    std::iter::once(None).chain(all).collect()
}

/// Every combination of what the services can be.
fn worlds(services: &[Vec<Option<Wanted>>]) -> Vec<Desired> {
    let mut worlds = vec![Desired::new()];
    for (n, states) in services.iter().enumerate() {
        let with = |world: &Desired, state: &Option<Wanted>| {
            let mut world = world.clone();
            world.extend(state.clone().map(|wanted| (frontend(n), wanted)));
            world
        };
        worlds = worlds.iter().flat_map(|world| states.iter().map(|state| with(world, state))).collect();
    }
    worlds
}

/// What connects may meet where only this world is in effect.
fn valid(world: &Desired, n: usize) -> BTreeSet<Seen> {
    let Some(wanted) = world.get(&frontend(n)) else { return BTreeSet::from([Seen::NoFrontend]) };
    let backends = wanted.backends.iter().filter(|(_, weight)| **weight > 0);
    let backends: BTreeSet<_> = backends.map(|(at, _)| Seen::Backend(at.address, at.port.get())).collect();
    if backends.is_empty() { BTreeSet::from([Seen::NoBackend]) } else { backends }
}

/// Leads to a world; `order` may change the plan. Returns when the last store was made that changes
/// what connects meet.
fn lead(trace: &mut Trace, applied: &mut Applied, to: &Desired, order: impl Fn(&mut Vec<Op>)) -> usize {
    let plan = plan(to, applied, Prune::Yes);
    assert_eq!(plan.refused, [], "the small world fits");
    let mut ops = plan.ops.clone();
    order(&mut ops);
    let mut visible = trace.now;
    for op in &ops {
        if *op == Op::Grace {
            visible = trace.now;
        }
        trace.write(op);
    }
    plan.ops.iter().for_each(|op| applied.apply(op));
    applied.reclaim(|_| true);
    visible
}

/// Whether every reader of every moment meets what it may, on the way through these worlds.
fn is_safe(path: &[&Desired], order: impl Fn(&mut Vec<Op>)) -> Result<(), String> {
    let (mut trace, mut applied) = (Trace::new(), Applied::empty(SIZES));
    lead(&mut trace, &mut applied, path[0], |_| {});
    // When readers begin, and which worlds they may meet. Whoever begins right after a grace, and may see
    // all of the next plan's stores before its grace, meets all that those do who begin a little later;
    let mut starts = vec![(trace.graces.last().copied().unwrap_or(0), 0, path.len() - 1)];
    for (at, world) in path.iter().enumerate().skip(1) {
        let graces = trace.graces.len();
        let visible = lead(&mut trace, &mut applied, world, &order);
        if plan(world, &applied, Prune::Yes) != Plan::default() {
            return Err(format!("planned again, {world:?} has something to write"));
        }
        if let Some(grace) = trace.graces.get(graces) {
            starts.last_mut().expect("one is there").2 = at;
            // but whoever begins when the change is made must not meet what was before.
            starts.push((visible, at, at));
            starts.push((*grace, at, path.len() - 1));
        }
    }
    for (start, first, last) in starts {
        for n in 0..2 {
            let may: BTreeSet<_> = path[first..=last].iter().flat_map(|world| valid(world, n)).collect();
            let seen = trace.connect(n, start, Client::Kept);
            if !seen.is_subset(&may) {
                return Err(format!("{seen:?}, not {may:?}, from {start} on the way {path:?}"));
            }
        }
    }
    Ok(())
}

const WEIGHTS: [u16; 3] = [0, 1, 3];
const RANDOM: [Policy; 1] = [Policy::Random];

fn as_planned(_: &mut Vec<Op>) {}

/// Two services with up to two backends each, over three changes: ids and slots are used again by the
/// other service.
#[test]
fn all_ways_through_three_worlds_of_two_services_are_safe() {
    let worlds = worlds(&[0, 1].map(|n| services(n, 2, &[1], &RANDOM)));
    for a in &worlds {
        for b in &worlds {
            for c in &worlds {
                is_safe(&[a, b, c], as_planned).unwrap();
            }
        }
    }
}

fn all_changes_are_safe(worlds: &[Desired]) {
    for a in worlds {
        for b in worlds {
            is_safe(&[a, b], as_planned).unwrap();
        }
    }
}

/// One service with up to three backends of every weight; weight zero is a backend that is unhealthy or
/// draining.
#[test]
fn all_changes_of_a_service_with_three_backends_are_safe() {
    let worlds = worlds(&[services(0, 3, &WEIGHTS, &RANDOM)]);
    all_changes_are_safe(&worlds);
}

#[test]
fn all_changes_of_policy_are_safe() {
    let policies = [Policy::Random, Policy::LeastConnections, Policy::RoundRobin];
    let worlds = worlds(&[services(0, 2, &WEIGHTS, &policies)]);
    all_changes_are_safe(&worlds);
}

/// A crash after any store, then a start with any target: what it leads to is what is wanted, with nothing
/// left over, and every reader on the way meets what was before, or what is wanted.
#[test]
fn a_crash_after_any_store_strands_nothing() {
    let worlds = worlds(&[0, 1].map(|n| services(n, 2, &[1], &RANDOM)));
    let targets = [&worlds[0], &worlds[worlds.len() / 2], &worlds[worlds.len() - 1]];
    for a in &worlds {
        for b in &worlds {
            let (mut trace, mut applied) = (Trace::new(), Applied::empty(SIZES));
            lead(&mut trace, &mut applied, a, as_planned);
            let from = trace.now;
            lead(&mut trace, &mut applied, b, as_planned);
            for crash in from..=trace.now {
                let found: Vec<_> =
                    (0..2).map(|n| trace.restart(crash).0.connect(n, 0, Client::New)).collect();
                for target in targets {
                    let (mut trace, mut applied) = trace.restart(crash);
                    lead(&mut trace, &mut applied, target, as_planned);
                    for (n, found) in found.iter().enumerate() {
                        let may: BTreeSet<_> = found.union(&valid(target, n)).copied().collect();
                        let [old, new] = [valid(a, n), valid(b, n)];
                        assert!(*found == old || *found == new, "{found:?}, not {old:?} or {new:?}");
                        let during = trace.connect(n, 0, Client::New);
                        assert!(during.is_subset(&may), "{during:?}, not {may:?}");
                        assert_eq!(trace.connect(n, trace.now, Client::Kept), valid(target, n));
                    }
                    let wanted: usize = target.values().map(|wanted| wanted.backends.len()).sum();
                    let in_use = (0..SIZES.backends).filter(|id| trace.backend(*id, trace.now).in_use());
                    assert_eq!(in_use.count(), wanted, "backends that nobody wants");
                    let Alloc { services, backends, slots } = &applied.alloc;
                    let used = [services.used(), backends.used(), slots.used()];
                    assert_eq!(used.map(|used| used as usize), [target.len(), wanted, wanted], "leaked");
                    assert_eq!(plan(target, &applied, Prune::Yes), Plan::default());
                }
            }
        }
    }
}

/// Each wrong order of writing has to be noticed somewhere in the same worlds.
#[test]
fn every_wrong_order_is_noticed() {
    let worlds = worlds(&[0, 1].map(|n| services(n, 2, &[1], &RANDOM)));
    let is_noticed = |order: &dyn Fn(&mut Vec<Op>)| {
        worlds
            .iter()
            .any(|a| worlds.iter().any(|b| worlds.iter().any(|c| is_safe(&[a, b, c], order).is_err())))
    };
    let pulled_ahead = |is_late: fn(&Op) -> bool, is_early: fn(&Op) -> bool| {
        move |ops: &mut Vec<Op>| {
            let (late, early) = (ops.iter().position(is_late), ops.iter().position(is_early));
            if let (Some(late), Some(early)) = (late, early)
                && early < late
            {
                let op = ops.remove(late);
                ops.insert(early, op);
            }
        }
    };
    let word = |op: &Op| matches!(op, Op::PutService { word, .. } if word.exists());
    let slots = |op: &Op| matches!(op, Op::PutSlots { .. });
    let backend = |op: &Op| matches!(op, Op::PutBackend { .. });
    assert!(is_noticed(&pulled_ahead(word, slots)), "the service word before the slots");
    // A frontend before its service would do no harm: it is refused until the word is there.
    assert!(is_noticed(&pulled_ahead(word, backend)), "the service word before the backends");
    assert!(
        is_noticed(&pulled_ahead(|op| matches!(op, Op::DeleteBackend { .. }), |op| *op == Op::Grace)),
        "backends deleted before the grace"
    );
    assert!(is_noticed(&|ops: &mut Vec<Op>| ops.retain(|op| *op != Op::Grace)), "no grace");
}
