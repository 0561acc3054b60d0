//! The plan against a model of the maps and of a reader that looks at them while they change.

use std::{cell::Cell, collections::BTreeSet, net::Ipv4Addr};

use mesh_common::abi::Backend;
use proptest::prelude::*;

use super::{
    applied::{Dump, Sizes},
    *,
};

const SIZES: Sizes = Sizes { frontends: 8, services: 9, backends: 16, slots: 24 };

fn frontend(n: u8) -> Frontend {
    Frontend::new(Ipv4Addr::new(127, 128, 0, n).into(), Port::new(80), 6)
}

fn endpoint(n: u8) -> Endpoint {
    Endpoint { address: Ipv4Addr::new(10, 0, 0, n).into(), port: Port::new(8080) }
}

fn desired(services: &[(u8, &[(u8, u16)])]) -> Desired {
    let backends = |list: &[(u8, u16)]| list.iter().map(|(n, weight)| (endpoint(*n), *weight)).collect();
    let wanted =
        |list| Wanted { policy: Policy::Random, settings: Settings::default(), backends: backends(list) };
    services.iter().map(|(n, list)| (frontend(*n), wanted(list))).collect()
}

/// The maps as a reader sees them: plain memory, written one operation at a time.
#[derive(Clone)]
struct Memory {
    frontends: BTreeMap<Frontend, u32>,
    services: Vec<ServiceWord>,
    settings: Vec<Settings>,
    slots: Vec<SlotWord>,
    backends: Vec<Backend>,
}

impl Memory {
    fn new() -> Self {
        Self {
            frontends: BTreeMap::new(),
            services: vec![ServiceWord::default(); SIZES.services as usize],
            settings: vec![Settings::default(); SIZES.services as usize],
            slots: vec![SlotWord::default(); SIZES.slots as usize],
            backends: vec![Backend::default(); SIZES.backends as usize],
        }
    }

    fn write(&mut self, op: &Op) {
        match op {
            Op::PutBackend { id, service, endpoint, weight } => {
                let Endpoint { address, port } = *endpoint;
                self.backends[*id as usize] = Backend::new(address, port, *service, *weight);
            }
            Op::PutSlots { base, words, .. } => {
                self.slots[*base as usize..][..words.len()].copy_from_slice(words);
            }
            Op::PutSettings { service, settings } => self.settings[*service as usize] = *settings,
            Op::PutService { id, word } => self.services[*id as usize] = *word,
            Op::PutFrontend { frontend, service } => {
                self.frontends.insert(*frontend, *service);
            }
            Op::DeleteFrontend { frontend } => {
                self.frontends.remove(frontend);
            }
            Op::DeleteBackend { id } => self.backends[*id as usize] = Backend::default(),
            Op::RetireBackend { .. } | Op::Grace => {}
        }
    }

    /// As at a start: reads everything back, and removes what is left over.
    fn restore(&mut self) -> Applied {
        let services = (0..).zip(&self.services).filter(|(_, word)| word.exists());
        let backends = (0..).zip(&self.backends).filter(|(_, backend)| backend.in_use());
        let dump = Dump {
            frontends: self.frontends.clone(),
            settings: services.clone().map(|(id, _)| (id, self.settings[id as usize])).collect(),
            services: services.map(|(id, word)| (id, *word)).collect(),
            backends: backends.map(|(id, backend)| (id, *backend)).collect(),
            busy: BTreeSet::new(),
        };
        let slots = |word: ServiceWord| self.slots[word.base() as usize..][..word.count() as usize].to_vec();
        let (mut applied, repairs) = Applied::restore(SIZES, &dump, slots);
        for op in repairs {
            self.write(&op);
            applied.apply(&op);
        }
        applied.reclaim(|_| true);
        applied
    }

    /// What connects to `frontend` can reach: `None` if refused as unknown.
    fn reachable(&self, frontend: &Frontend) -> Option<BTreeSet<Endpoint>> {
        let id = self.frontends.get(frontend)?;
        let word = self.services[*id as usize];
        assert!(word.exists(), "a frontend without its service");
        let slots = &self.slots[word.base() as usize..][..word.count() as usize];
        let ids = slots.iter().flat_map(|slot| [slot.backend(), slot.alias()]);
        Some(ids.map(|id| self.endpoint_of(id)).collect())
    }

    fn endpoint_of(&self, id: u32) -> Endpoint {
        let backend = self.backends[id as usize];
        assert!(backend.in_use(), "a slot without its backend");
        Endpoint { address: backend.address, port: backend.port }
    }
}

fn selectable(desired: &Desired, frontend: &Frontend) -> Option<BTreeSet<Endpoint>> {
    let backends = &desired.get(frontend)?.backends;
    Some(backends.iter().filter(|(_, weight)| **weight > 0).map(|(endpoint, _)| *endpoint).collect())
}

/// Plans, writes, and waits for the readers; returns the memory after every prefix.
fn run(desired: &Desired, applied: &mut Applied, memory: &mut Memory) -> Vec<(Memory, Option<Op>)> {
    let plan = plan(desired, applied, Prune::Yes);
    assert_eq!(plan.refused, [], "the small world fits");
    let mut states = Vec::new();
    let mut write = |op: Op, applied: &mut Applied| {
        states.push((memory.clone(), Some(op.clone())));
        memory.write(&op);
        applied.apply(&op);
    };
    plan.ops.into_iter().for_each(|op| write(op, applied));
    if applied.begin_grace() {
        write(Op::Grace, applied);
        applied.end_grace().into_iter().for_each(|op| write(op, applied));
    }
    applied.reclaim(|_| true);
    states.push((memory.clone(), None));
    states
}

fn worlds() -> impl Strategy<Value = Desired> {
    let backends = prop::collection::btree_map(0u8..5, 0u16..4, 0..4);
    prop::collection::btree_map(0u8..3, backends, 0..3).prop_map(|services| {
        let backends =
            |list: BTreeMap<u8, u16>| list.into_iter().map(|(n, weight)| (endpoint(n), weight)).collect();
        let policy = |n| if n == 0 { Policy::LeastConnections } else { Policy::RoundRobin };
        let settings = |n| Settings { affinity_ms: n, ..Settings::default() };
        let wanted = |n: u8, list| Wanted {
            policy: policy(n),
            settings: settings(n.into()),
            backends: backends(list),
        };
        services.into_iter().map(|(n, list)| (frontend(n), wanted(n, list))).collect()
    })
}

/// Every way one reader can meet a change: each of its four loads sees the memory as it was
/// after some operation, in order, and no grace ends while the reader is under way.
fn check_reader(states: &[(Memory, Option<Op>)], from: &Desired, to: &Desired) {
    let graces = |at: &usize| matches!(states[*at].1, Some(Op::Grace));
    for n in 0..3 {
        let dialled = frontend(n);
        let valid: BTreeSet<_> =
            [from, to].iter().filter_map(|world| selectable(world, &dialled)).flatten().collect();
        for first in 0..states.len() {
            let last = (first..states.len()).find(graces).unwrap_or(states.len() - 1);
            let Some(id) = states[first].0.frontends.get(&dialled) else { continue };
            for second in first..=last {
                let word = states[second].0.services[*id as usize];
                let slots = word.base()..word.base() + word.count();
                for (third, slot) in
                    (second..=last).flat_map(|third| slots.clone().map(move |slot| (third, slot)))
                {
                    let slot = states[third].0.slots[slot as usize];
                    for (fourth, id) in
                        (third..=last).flat_map(|fourth| [(fourth, slot.backend()), (fourth, slot.alias())])
                    {
                        let reached = states[fourth].0.endpoint_of(id);
                        assert!(valid.contains(&reached), "{reached:?} was never a backend of {dialled:?}");
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_plan_leads_to_what_is_desired_and_every_prefix_is_safe(a in worlds(), b in worlds(), c in worlds(), cut: prop::sample::Index, cut2: prop::sample::Index) {
        let (mut applied, mut memory) = (Applied::empty(SIZES), Memory::new());
        run(&a, &mut applied, &mut memory);
        let states = run(&b, &mut applied, &mut memory);

        for (state, _) in &states {
            for n in 0..3 {
                let seen = state.reachable(&frontend(n));
                let (old, new) = (selectable(&a, &frontend(n)), selectable(&b, &frontend(n)));
                prop_assert!(seen == old || seen == new, "{seen:?} is neither {old:?} nor {new:?}");
            }
        }
        check_reader(&states, &a, &b);
        prop_assert_eq!(plan(&b, &applied, Prune::Yes), Plan::default());

        let weights = |world: &Desired| -> Vec<_> { world.values().flat_map(|wanted| &wanted.backends).map(|(at, weight)| (*at, *weight)).collect() };
        let written = applied.services.values().flat_map(|service| &service.backends);
        let mut written: Vec<_> = written.map(|(at, backend)| (*at, backend.weight)).collect();
        let mut wanted = weights(&b);
        written.sort_unstable();
        wanted.sort_unstable();
        prop_assert_eq!(written, wanted);

        // What is restored from the maps is what the daemon knew.
        let restored = memory.restore();
        prop_assert_eq!(plan(&b, &restored, Prune::Yes), Plan::default());

        // A crash after any operation, a start with another target, a crash again, and again.
        let mut memory = states[cut.index(states.len())].0.clone();
        for (target, cut) in [(&a, cut), (&b, cut2)] {
            let before = memory.clone();
            let mut applied = memory.restore();
            for n in 0..3 {
                prop_assert_eq!(memory.reachable(&frontend(n)), before.reachable(&frontend(n)), "a start changed something");
            }
            let states = run(target, &mut applied, &mut memory);
            memory = states[cut.index(states.len())].0.clone();
        }
        let mut applied = memory.restore();
        let states = run(&c, &mut applied, &mut memory);
        let (last, _) = states.last().unwrap();
        for n in 0..3 {
            prop_assert_eq!(last.reachable(&frontend(n)), selectable(&c, &frontend(n)));
        }
        let known: usize = c.values().map(|wanted| wanted.backends.len()).sum();
        prop_assert_eq!(last.backends.iter().filter(|backend| backend.in_use()).count(), known, "leaked backends");
        prop_assert_eq!(applied.alloc.backends.used() as usize, known);
        prop_assert_eq!(applied.alloc.services.used() as usize, c.len());
        let slots = c.values().flat_map(|wanted| wanted.backends.values()).filter(|weight| **weight > 0).count();
        prop_assert_eq!(applied.alloc.slots.used() as usize, slots);
    }
}

#[test]
fn the_reader_check_notices_a_service_word_that_comes_too_early() {
    let (mut applied, mut memory) = (Applied::empty(SIZES), Memory::new());
    let (a, b) = (desired(&[(0, &[(1, 1)])]), desired(&[(0, &[(2, 1)])]));
    run(&a, &mut applied, &mut memory);
    let mut ops = plan(&b, &applied, Prune::Yes).ops;
    let at = |ops: &[Op], wanted: fn(&Op) -> bool| ops.iter().position(wanted).unwrap();
    let slots = at(&ops, |op| matches!(op, Op::PutSlots { .. }));
    let service = at(&ops, |op| matches!(op, Op::PutService { .. }));
    ops.swap(slots, service);

    let mut states = Vec::new();
    for op in ops {
        states.push((memory.clone(), Some(op.clone())));
        memory.write(&op);
    }
    states.push((memory, None));
    let caught = std::panic::catch_unwind(|| check_reader(&states, &a, &b));
    assert!(caught.is_err(), "the check passed a wrong order of writes");
}

#[test]
fn without_pruning_nothing_disappears() {
    let (mut applied, mut memory) = (Applied::empty(SIZES), Memory::new());
    run(&desired(&[(0, &[(1, 1)]), (1, &[(2, 1)])]), &mut applied, &mut memory);
    let plan = plan(&desired(&[(0, &[(1, 1)])]), &applied, Prune::No);
    assert_eq!(plan, Plan::default());
}

#[test]
fn a_backend_of_weight_zero_keeps_its_id() {
    let (mut applied, mut memory) = (Applied::empty(SIZES), Memory::new());
    run(&desired(&[(0, &[(1, 1), (2, 1)])]), &mut applied, &mut memory);
    let id = applied.backend_id(&frontend(0), &endpoint(2));
    run(&desired(&[(0, &[(1, 1), (2, 0)])]), &mut applied, &mut memory);
    assert_eq!(applied.backend_id(&frontend(0), &endpoint(2)), id);
}

#[test]
fn a_service_that_does_not_change_fits_also_when_slots_are_used_up() {
    let (mut applied, mut memory) = (Applied::empty(SIZES), Memory::new());
    let many: Vec<_> = (1..=14).map(|n| (n, 1)).collect();
    let world = desired(&[(0, &many)]);
    run(&world, &mut applied, &mut memory);
    assert!(applied.alloc.slots.longest() < 14);
    assert_eq!(plan(&world, &applied, Prune::Yes), Plan::default());

    let changed: Vec<_> = (1..=14).map(|n| (n, u16::from(n))).collect();
    let plan = plan(&desired(&[(0, &changed)]), &applied, Prune::Yes);
    assert_eq!((plan.ops, plan.refused[0].map), (vec![], map::SLOTS));
}

#[test]
fn a_service_fits_whole_or_is_refused_whole() {
    let (mut applied, memory) = (Applied::empty(SIZES), Cell::new(0));
    let many: Vec<_> = (1..=12).map(|n| (n, 1)).collect();
    let world = desired(&[(0, &many), (1, &many)]);
    let plan = plan(&world, &applied, Prune::Yes);
    let [refused] = &plan.refused[..] else { panic!("{:?}", plan.refused) };
    assert_eq!(
        (refused.frontend, refused.map, refused.needed, refused.free),
        (frontend(1), map::BACKENDS, 12, 3)
    );
    assert_eq!(
        refused.to_string(),
        "service at 127.128.0.1 port 80 needs 12 more in map BACKENDS, which has 3 of 15 free in one piece"
    );
    for op in &plan.ops {
        memory.set(memory.get() + usize::from(matches!(op, Op::PutBackend { .. })));
        applied.apply(op);
    }
    assert_eq!(memory.get(), 12);
    assert!(!applied.frontends.contains_key(&frontend(1)));
}

#[test]
fn an_id_rests_until_no_socket_is_counted_on_it() {
    let (mut applied, mut memory) = (Applied::empty(SIZES), Memory::new());
    run(&desired(&[(0, &[(1, 1)])]), &mut applied, &mut memory);
    let id = applied.backend_id(&frontend(0), &endpoint(1)).unwrap();
    let mut ops = plan(&desired(&[(0, &[(2, 1)])]), &applied, Prune::Yes).ops;
    ops.iter().for_each(|op| applied.apply(op));
    assert!(applied.begin_grace());
    ops = applied.end_grace();
    assert_eq!(ops, [Op::DeleteBackend { id }]);
    ops.iter().for_each(|op| applied.apply(op));
    applied.reclaim(|_| false);
    let after = plan(&desired(&[(0, &[(2, 1), (3, 1)])]), &applied, Prune::Yes).ops;
    assert!(!after.iter().any(|op| matches!(op, Op::PutBackend { id: new, .. } if *new == id)), "{after:?}");
    applied.reclaim(|_| true);
    let after = plan(&desired(&[(0, &[(2, 1), (3, 1)])]), &applied, Prune::Yes).ops;
    assert!(after.iter().any(|op| matches!(op, Op::PutBackend { id: new, .. } if *new == id)), "{after:?}");
}

#[test]
fn a_change_of_policy_alone_is_one_change_of_the_service() {
    let (mut applied, mut memory) = (Applied::empty(SIZES), Memory::new());
    let mut world = desired(&[(0, &[(1, 1)])]);
    run(&world, &mut applied, &mut memory);
    world.get_mut(&frontend(0)).unwrap().policy = Policy::RoundRobin;
    run(&world, &mut applied, &mut memory);
    assert_eq!(memory.restore().services.values().next().unwrap().policy, Policy::RoundRobin);
}
