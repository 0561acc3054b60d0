//! The kernel's own look-ups in the real maps, while the real writer changes them as fast as it can.
//!
//! Every backend says by its address whose it is and since when, so the check, in the kernel, is
//! exact. The other tests change one thing about how the maps are written, and see the check notice.
//!
//! The look-ups are a classifier's, which asks for the task's cgroup: the kernel must allow that (6.18 does).

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use mesh_common::{
    abi::Settings,
    lookup::{self, Verdict},
    select::Policy,
};
use mesh_tests::{
    figure, is_long,
    maps::{Lookups, Written},
};
use mesh_userspace::{
    plan::{Desired, Endpoint, Op, Prune, Wanted, applied::Sizes},
    sys::Words,
};

const SERVICES: u32 = 512;
/// The others come and go.
const STAYING: u32 = 384;
const MOST_BACKENDS: u32 = 6;
/// Just enough, so that ids and slots are used again at once.
const SIZES: Sizes = Sizes {
    frontends: SERVICES + 1,
    services: SERVICES + 2,
    backends: SERVICES * MOST_BACKENDS * 2,
    slots: 3 * SERVICES / 64 * 8191 + 3 * SERVICES * MOST_BACKENDS,
};
/// Look-ups of one call into the kernel.
const BATCH: u32 = 20_000;

/// What is done otherwise than the plan says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    WordBeforeSlots,
    BackendInPlace,
    FrontendAnew,
}

impl Fault {
    /// What is waited for: other faults may be met on the way, such as slots that nothing was written to yet.
    fn shows_as(self) -> &'static [Verdict] {
        match self {
            Self::None => &[Verdict::Wrong, Verdict::Torn, Verdict::Untimely, Verdict::Missed],
            Self::WordBeforeSlots => &[Verdict::Wrong, Verdict::Untimely],
            Self::BackendInPlace => &[Verdict::Torn],
            Self::FrontendAnew => &[Verdict::Missed],
        }
    }
}

/// The world that the writer leads from one state to the next.
struct World {
    desired: Desired,
    generations: [u32; SERVICES as usize],
    random: u64,
}

impl World {
    fn below(&mut self, end: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        u32::try_from(((self.random >> 32) * u64::from(end)) >> 32).unwrap()
    }

    /// Changes every other service or so, and announces it; returns which.
    fn change(&mut self, words: &Words) -> Vec<u32> {
        let changed: Vec<_> = (0..SERVICES).filter(|_| self.below(2) == 0).collect();
        for &n in &changed {
            let frontend = lookup::frontend(n);
            let known = self.desired.contains_key(&frontend);
            if known && n >= STAYING && self.below(2) == 0 {
                self.desired.remove(&frontend);
            } else if known && self.below(4) == 0 {
                // The same backends with other weights: some get no connections, the first one does.
                let weights = [0; MOST_BACKENDS as usize].map(|_: u16| self.weight(0));
                let backends = &mut self.desired.get_mut(&frontend).unwrap().backends;
                backends.values_mut().zip(weights).for_each(|(weight, new)| *weight = new);
                *backends.values_mut().next().unwrap() = 1;
            } else {
                let wanted = self.next_generation(n);
                words.store(lookup::newest(n), u64::from(self.generations[n as usize]));
                self.desired.insert(frontend, wanted);
            }
        }
        changed
    }

    fn next_generation(&mut self, n: u32) -> Wanted {
        let generation = self.generations[n as usize] + 1;
        self.generations[n as usize] = generation;
        let policy = match n % 64 {
            0 => Policy::Maglev,
            1..22 => Policy::Random,
            22..43 => Policy::LeastConnections,
            _ => Policy::RoundRobin,
        };
        let affinity_ms = if n.is_multiple_of(3) { 1000 } else { 0 };
        let endpoint = |backend| {
            let (address, port) = lookup::endpoint(n, generation, backend);
            Endpoint { address, port }
        };
        let count = 1 + self.below(MOST_BACKENDS);
        let backends = (0..count).map(|backend| (endpoint(backend), self.weight(1))).collect();
        Wanted { policy, settings: Settings { affinity_ms, ..Settings::default() }, backends }
    }

    fn weight(&mut self, least: u32) -> u16 {
        u16::try_from(least + self.below(3)).unwrap()
    }

    /// What was before may not be met any more.
    fn settle(&self, changed: &[u32], words: &Words) {
        for &n in changed {
            let gone = !self.desired.contains_key(&lookup::frontend(n));
            let oldest = u64::from(self.generations[n as usize]) + u64::from(gone);
            words.store(lookup::oldest(n), oldest);
        }
    }
}

/// What the kernel counted, and what was written meanwhile.
#[derive(Debug)]
struct Report {
    verdicts: [u64; Verdict::ALL.len()],
    changes: u64,
    rounds: u64,
    ops: u64,
}

impl Report {
    fn of(&self, verdict: Verdict) -> u64 {
        self.verdicts[verdict as usize]
    }

    fn shows(&self, fault: Fault) -> bool {
        fault.shows_as().iter().any(|verdict| self.of(*verdict) > 0)
    }
}

/// One thread looks up until it has done so `count` times, or has seen what a fault is to be seen by; the
/// other writes.
fn hammer(fault: Fault, count: u64) -> Report {
    let mut written = Written::new(SIZES);
    let mut lookups = Lookups::load(written.pin_dir());
    let words = lookups.words();
    let mut world =
        World { desired: Desired::new(), generations: [0; SERVICES as usize], random: 0x9e37_79b9 };
    while (0..STAYING).any(|n| !world.desired.contains_key(&lookup::frontend(n))) {
        let changed = world.change(&words);
        write(&mut written, &world, &changed, &words, Fault::None);
    }
    words.store(lookup::SERVICES, SERVICES.into());
    words.store(lookup::STAYING, STAYING.into());

    let ended = AtomicBool::new(false);
    let mut report = Report { verdicts: [0; Verdict::ALL.len()], changes: 0, rounds: 0, ops: 0 };
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (start, patience) = (Instant::now(), Duration::from_secs(120));
            let counted = || Verdict::ALL.map(|verdict| words.load(verdict as u32));
            loop {
                lookups.run("lookup_check", BATCH);
                // So that a grace need not wait for the kernel to take the CPU away.
                std::thread::yield_now();
                let verdicts = counted();
                let seen = Report { verdicts, changes: 0, rounds: 0, ops: 0 };
                let done = if fault == Fault::None {
                    verdicts.iter().sum::<u64>() >= count
                } else {
                    seen.shows(fault) || start.elapsed() > patience
                };
                if done {
                    ended.store(true, Ordering::Relaxed);
                    return verdicts;
                }
            }
        });
        while !ended.load(Ordering::Relaxed) {
            let changed = world.change(&words);
            report.ops += write(&mut written, &world, &changed, &words, fault);
            report.changes += changed.len() as u64;
            report.rounds += 1;
        }
        report.verdicts = reader.join().unwrap();
    });
    report
}

/// Writes what leads to the world as it is now; how many operations.
fn write(written: &mut Written, world: &World, changed: &[u32], words: &Words, fault: Fault) -> u64 {
    let ops = written.plan(&world.desired, Prune::Yes);
    for (op, next) in ops.iter().zip(ops[1..].iter().map(Some).chain([None])) {
        match (fault, op, next) {
            (Fault::WordBeforeSlots, Op::PutSlots { .. }, Some(word @ Op::PutService { .. })) => {
                written.datapath.maps.write(word).unwrap();
                // The order is what is wrong; how often that is met is a matter of luck.
                std::thread::sleep(Duration::from_micros(50));
            }
            (Fault::FrontendAnew, Op::PutService { id, word }, _) if word.exists() => {
                let known = written.applied.frontends.iter().find(|(_, known)| *known == id);
                if let Some((&frontend, &service)) = known {
                    written.datapath.maps.write(&Op::DeleteFrontend { frontend }).unwrap();
                    written.datapath.maps.write(&Op::PutFrontend { frontend, service }).unwrap();
                }
            }
            _ => {}
        }
        written.write(op);
    }
    world.settle(changed, words);
    if fault == Fault::BackendInPlace {
        overwrite(written, world);
    }
    written.free();
    ops.len() as u64
}

/// Entries in use get the address of another backend of the same service and generation, and their own again.
fn overwrite(written: &mut Written, world: &World) {
    for n in 0..STAYING {
        let frontend = lookup::frontend(n);
        let (endpoint, weight) = world.desired[&frontend].backends.first_key_value().unwrap();
        let id = written.applied.backend_id(&frontend, endpoint).unwrap();
        let service = written.applied.frontends[&frontend];
        let (address, port) = lookup::endpoint(n, world.generations[n as usize], u32::MAX);
        for endpoint in [Endpoint { address, port }, *endpoint].repeat(50) {
            let op = Op::PutBackend { id, service, endpoint, weight: *weight };
            written.datapath.maps.write(&op).unwrap();
        }
    }
}

#[test]
fn no_look_up_is_wrong_torn_untimely_or_missed() {
    let count = if is_long() { 100_000_000 } else { 5_000_000 };
    let report = hammer(Fault::None, count);
    let Report { verdicts, changes, rounds, ops } = &report;
    figure(&format!(
        "{} look-ups in the kernel, while {changes} changes of services were written in {rounds} plans of {ops} \
         operations: {}",
        verdicts.iter().sum::<u64>(),
        Verdict::ALL.map(|verdict| format!("{} {verdict:?}", report.of(verdict)).to_lowercase()).join(", "),
    ));
    assert!(!report.shows(Fault::None), "{report:?}");
    assert!(
        report.of(Verdict::Right) > count / 2 && report.of(Verdict::Absent) > 0 && *rounds > 10,
        "{report:?}"
    );
}

fn is_noticed(fault: Fault) {
    let report = hammer(fault, 0);
    assert!(report.shows(fault), "{report:?}");
}

#[test]
fn a_service_word_before_its_slots_is_noticed() {
    is_noticed(Fault::WordBeforeSlots);
}

#[test]
fn a_backend_changed_in_place_is_noticed() {
    is_noticed(Fault::BackendInPlace);
}

#[test]
fn a_frontend_deleted_and_put_back_is_noticed() {
    is_noticed(Fault::FrontendAnew);
}
