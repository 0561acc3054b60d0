//! Every way a reader can meet the writer, for all small worlds: no chance involved.
//!
//! The writer's plans are taken apart into the stores of single words that the datapath makes, the
//! reader into its loads. A load sees the word as it was at its time or as any later store leaves it,
//! but a reader that began before a grace did has ended when the grace has. Readers store nothing that others
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
    /// When each grace began and ended.
    graces: Vec<(usize, usize)>,
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
            Op::DeleteBackend { id } => {
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
            Op::PutSettings { .. } | Op::RetireBackend { .. } => {}
            Op::Grace => {
                let begun = self.tick();
                self.end_grace(begun);
            }
        }
    }

    fn tick(&mut self) -> usize {
        self.now += 1;
        self.now
    }

    fn end_grace(&mut self, begun: usize) {
        let ended = self.tick();
        self.graces.push((begun, ended));
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

    /// When a connect that begins at `start` has ended at the latest.
    fn end(&self, start: usize) -> usize {
        let ends = self.graces.iter().filter(|(begun, _)| *begun > start).map(|(_, ended)| *ended);
        ends.min().unwrap_or(self.now)
    }

    /// What becomes of a connect that begins at `start`: everything that can.
    fn connect(&self, n: usize, start: usize, client: Client) -> BTreeSet<Seen> {
        let end = self.end(start);
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

/// What is done otherwise than it should be.
#[derive(Clone, Copy)]
enum Fault<'a> {
    None,
    Order(&'a dyn Fn(&mut Vec<Op>)),
    /// Nobody waits before what is out of use is free.
    NoGrace,
    /// A grace is taken to be one also for what went out of use after it began.
    BegunEarlier,
    /// A backend that came back while a grace was under way is deleted all the same.
    BackAndDeleted,
}

/// Writes as the reconciler does.
struct Writer<'a> {
    trace: Trace,
    applied: Applied,
    fault: Fault<'a>,
    /// When the grace that is under way began, and what would be deleted had nothing come back since.
    begun: Option<(usize, Vec<Op>)>,
}

impl Writer<'_> {
    fn new(trace: Trace, applied: Applied) -> Self {
        Self { trace, applied, fault: Fault::None, begun: None }
    }

    fn empty() -> Self {
        Self::new(Trace::new(), Applied::empty(SIZES))
    }

    /// Returns when the first and the last store were made that changes what connects meet.
    fn write(&mut self, to: &Desired) -> (usize, usize) {
        let mut planned = plan(to, &self.applied, Prune::Yes);
        if !planned.refused.is_empty() {
            self.settle();
            planned = plan(to, &self.applied, Prune::Yes);
        }
        assert_eq!(planned.refused, [], "the small world fits");
        let first = self.trace.now + 1;
        let mut ops = planned.ops.clone();
        if let Fault::Order(order) = self.fault {
            order(&mut ops);
        }
        ops.iter().for_each(|op| self.trace.write(op));
        planned.ops.iter().for_each(|op| self.applied.apply(op));
        (first.min(self.trace.now), self.trace.now)
    }

    fn begin_grace(&mut self) {
        let waits = matches!(self.fault, Fault::BegunEarlier) || self.applied.begin_grace();
        if waits && self.begun.is_none() {
            self.begun = Some((self.trace.tick(), self.applied.clone().end_grace()));
        }
    }

    fn end_grace(&mut self) {
        let Some((begun, deleted)) = self.begun.take() else { return };
        if !matches!(self.fault, Fault::NoGrace) {
            self.trace.end_grace(begun);
        }
        if matches!(self.fault, Fault::BegunEarlier) {
            self.applied.begin_grace();
        }
        let ops = self.applied.end_grace();
        let ops = if matches!(self.fault, Fault::BackAndDeleted) { deleted } else { ops };
        for op in ops {
            self.trace.write(&op);
            self.applied.apply(&op);
        }
        self.applied.reclaim(|_| true);
    }

    fn settle(&mut self) {
        self.end_grace();
        self.begin_grace();
        self.end_grace();
    }

    /// Goes through these worlds. A grace that begins after one of them ends after so many more. Returns
    /// when the first and last store of each was made.
    fn walk(&mut self, path: &[&Desired], span: usize) -> Vec<(usize, usize)> {
        let mut over = 0;
        let times = path.iter().enumerate().map(|(at, world)| {
            let times = self.write(world);
            if at >= over {
                self.end_grace();
                self.begin_grace();
                over = at + span;
            }
            if span == 0 {
                self.end_grace();
            }
            times
        });
        let times = times.collect();
        self.settle();
        times
    }
}

/// Whether every reader of every moment meets what it may, on the way through these worlds.
fn is_safe(path: &[&Desired], span: usize, fault: Fault) -> Result<(), String> {
    let mut writer = Writer { fault, ..Writer::empty() };
    let times = writer.walk(path, span);
    let last = path[path.len() - 1];
    if plan(last, &writer.applied, Prune::Yes) != Plan::default() {
        return Err(format!("planned again, {last:?} has something to write"));
    }
    let trace = writer.trace;
    let nothing = Desired::new();
    let worlds: Vec<_> = std::iter::once(&nothing).chain(path.iter().copied()).collect();
    // A world may be met from its first store to the last one of the next.
    let first: Vec<_> = std::iter::once(0).chain(times.iter().map(|(first, _)| *first)).collect();
    let over: Vec<_> = times.iter().map(|(_, last)| *last).chain([usize::MAX]).collect();
    // Whoever begins between two of these meets no more than who begins at the earlier one, and may meet as
    // much.
    let begun = trace.graces.iter().map(|(begun, _)| *begun);
    let starts: BTreeSet<_> = begun.chain(times.iter().map(|(_, last)| *last)).chain([0]).collect();
    for start in starts {
        let end = trace.end(start);
        let may = (0..worlds.len()).filter(|at| first[*at] <= end && over[*at] > start);
        let may: Vec<_> = may.map(|at| worlds[at]).collect();
        for n in 0..2 {
            let may: BTreeSet<_> = may.iter().flat_map(|world| valid(world, n)).collect();
            let seen = trace.connect(n, start, Client::Kept);
            if !seen.is_subset(&may) {
                return Err(format!("{seen:?}, not {may:?}, from {start} on the way {path:?}, span {span}"));
            }
        }
    }
    Ok(())
}

const WEIGHTS: [u16; 3] = [0, 1, 3];
const RANDOM: [Policy; 1] = [Policy::Random];

/// Two services with up to two backends each, over three changes: ids and slots are used again by the
/// other service. The last change is made after the grace of the one before, or meanwhile.
#[test]
fn all_ways_through_three_worlds_of_two_services_are_safe() {
    let worlds = worlds(&[0, 1].map(|n| services(n, 2, &[1], &RANDOM)));
    for a in &worlds {
        for b in &worlds {
            for c in &worlds {
                is_safe(&[a, b, c], 0, Fault::None).unwrap();
                is_safe(&[a, b, c], 1, Fault::None).unwrap();
            }
        }
    }
}

/// Two changes during a grace: backends leave, come back and leave again.
#[test]
fn all_ways_through_four_worlds_of_one_service_are_safe() {
    let worlds = worlds(&[services(0, 2, &[1], &RANDOM)]);
    for a in &worlds {
        for b in &worlds {
            for c in &worlds {
                for d in &worlds {
                    (0..4).for_each(|span| is_safe(&[a, b, c, d], span, Fault::None).unwrap());
                }
            }
        }
    }
}

fn all_changes_are_safe(worlds: &[Desired]) {
    for a in worlds {
        for b in worlds {
            is_safe(&[a, b], 0, Fault::None).unwrap();
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

/// A crash after any store of the way, then a start with any target: what it leads to is what is wanted, with
/// nothing left over, and every reader meets what was before, or what is wanted.
fn no_crash_strands_anything(path: &[&Desired], span: usize, targets: &[&Desired]) {
    let mut writer = Writer::empty();
    writer.write(path[0]);
    let from = writer.trace.now;
    writer.walk(&path[1..], span);
    for crash in from..=writer.trace.now {
        let found: Vec<_> =
            (0..2).map(|n| writer.trace.restart(crash).0.connect(n, 0, Client::New)).collect();
        for target in targets {
            let (trace, applied) = writer.trace.restart(crash);
            let mut after = Writer::new(trace, applied);
            after.walk(&[target], 0);
            let Writer { trace, applied, .. } = after;
            for (n, found) in found.iter().enumerate() {
                assert!(path.iter().any(|world| *found == valid(world, n)), "{found:?} on the way {path:?}");
                let may: BTreeSet<_> = found.union(&valid(target, n)).copied().collect();
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

#[test]
fn a_crash_after_any_store_strands_nothing() {
    let worlds = worlds(&[0, 1].map(|n| services(n, 2, &[1], &RANDOM)));
    let targets = [&worlds[0], &worlds[worlds.len() / 2], &worlds[worlds.len() - 1]];
    for a in &worlds {
        for b in &worlds {
            no_crash_strands_anything(&[a, b], 0, &targets);
        }
    }
}

#[test]
fn a_crash_during_a_grace_strands_nothing() {
    let worlds = worlds(&[services(0, 2, &[1], &RANDOM)]);
    let targets: Vec<_> = worlds.iter().collect();
    for a in &worlds {
        for b in &worlds {
            for c in &worlds {
                no_crash_strands_anything(&[a, b, c], 1, &targets);
            }
        }
    }
}

/// Each fault has to be noticed somewhere in the same worlds.
#[test]
fn every_fault_of_the_writer_is_noticed() {
    let worlds = worlds(&[0, 1].map(|n| services(n, 2, &[1], &RANDOM)));
    let is_noticed = |fault: Fault| {
        let fails = |path: &[&Desired]| (0..2).any(|span| is_safe(path, span, fault).is_err());
        worlds.iter().any(|a| worlds.iter().any(|b| worlds.iter().any(|c| fails(&[a, b, c]))))
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
    assert!(is_noticed(Fault::Order(&pulled_ahead(word, slots))), "the service word before the slots");
    // A frontend before its service would do no harm: it is refused until the word is there.
    assert!(is_noticed(Fault::Order(&pulled_ahead(word, backend))), "the service word before the backends");
    assert!(is_noticed(Fault::NoGrace), "no grace");
    assert!(is_noticed(Fault::BegunEarlier), "freed by a grace that began earlier");
    assert!(is_noticed(Fault::BackAndDeleted), "deleted although it came back");
}
