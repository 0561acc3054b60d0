//! The maps, and the few ways a hook touches them.
//!
//! Sizes here are the smallest ones; the daemon sets the configured sizes when it creates the
//! maps. `SERVICES` and `SLOTS` are mapped into the daemon, which stores whole words; a hook
//! loads each word exactly once.

use core::{intrinsics::AtomicOrdering, intrinsics::atomic_xadd, ptr::read_volatile};

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, PerCpuArray, SkStorage},
    macros::btf_map,
};
use mesh_common::{
    abi::{Backend, Frontend, MAX_VIP_RANGES, Origin, Peers, ServiceWord, SlotWord, VipRanges},
    address::{Address, Prefix},
    outcome::Outcome,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map]
static FRONTENDS: HashMap<Frontend, u32, 1> = HashMap::new();
#[btf_map]
static SERVICES: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static BACKENDS: Array<Backend, 1> = Array::new();
#[btf_map]
static LOAD: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static CURSORS: Array<u64, 1> = Array::new();
#[btf_map]
pub(crate) static ORIGIN: SkStorage<Origin> = SkStorage::new();
#[btf_map]
pub(crate) static PEERS: SkStorage<Peers> = SkStorage::new();
#[btf_map]
static STATS: PerCpuArray<u64, { Outcome::ALL.len() }> = PerCpuArray::new();

#[unsafe(no_mangle)]
static VIP_RANGES: Global<VipRanges> = Global::new([Prefix::NONE; MAX_VIP_RANGES]);

/// Whether an address is ours at all. Ranges are constants to the verifier, which drops the
/// comparisons that cannot hold for the hook's family.
#[inline(always)]
pub(crate) fn in_vip_ranges(address: &Address) -> bool {
    let [a, b, c, d] = address.words();
    let ranges = (&raw const VIP_RANGES).cast::<[u32; 8]>();
    for index in 0..MAX_VIP_RANGES {
        // SAFETY: the index is below the list's length; a prefix is four words of network, then four of mask.
        let word = |at: usize| unsafe { read_volatile(&raw const (*ranges.add(index))[at]) };
        if a & word(4) == word(0)
            && b & word(5) == word(1)
            && c & word(6) == word(2)
            && d & word(7) == word(3)
        {
            return true;
        }
    }
    false
}

#[inline(always)]
pub(crate) fn service_of(frontend: &Frontend) -> Option<u32> {
    // SAFETY: the value is one word, so a concurrent change cannot tear it.
    unsafe { FRONTENDS.get(frontend).map(|id| read_volatile(id)) }
}

#[inline(always)]
pub(crate) fn service(id: u32) -> ServiceWord {
    ServiceWord(load(&SERVICES, id).unwrap_or(0))
}

#[inline(always)]
pub(crate) fn slot(index: u32) -> Option<SlotWord> {
    load(&SLOTS, index).map(SlotWord)
}

#[inline(always)]
fn load(array: &Array<u64, 1, MMAPABLE>, index: u32) -> Option<u64> {
    let word = array.get_ptr(index)?;
    // SAFETY: a non-null look-up points at the whole word; volatile makes it one load.
    Some(unsafe { read_volatile(word) })
}

/// A backend in use. Its entry does not change while a slot refers to it.
#[inline(always)]
pub(crate) fn backend(id: u32) -> Option<&'static Backend> {
    BACKENDS.get(id).filter(|backend| backend.in_use())
}

/// Connections that a backend has.
#[inline(always)]
pub(crate) fn load_of(backend: u32) -> u64 {
    load(&LOAD, backend).unwrap_or(0)
}

/// One connection more, or with -1 one less.
#[inline(always)]
pub(crate) fn add_load(backend: u32, change: i64) {
    if let Some(load) = LOAD.get_ptr_mut(backend) {
        add(load, change.cast_unsigned());
    }
}

/// How many turns a service has had, this one not counted.
#[inline(always)]
pub(crate) fn take_turn(service: u32) -> u64 {
    let Some(turn) = CURSORS.get_ptr_mut(service) else { return 0 };
    // SAFETY: a word of a map, which stays where it is. Not relaxed: for that LLVM emits an
    // instruction that returns nothing, and uses what it returns all the same.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::AcqRel }>(turn, 1) }
}

#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    if let Some(counter) = STATS.get_ptr_mut(outcome as u32) {
        // This CPU's counter, but a hook can be preempted by another one on the same CPU.
        add(counter, 1);
    }
}

/// Adds atomically, wrapping.
#[inline(always)]
fn add(word: *mut u64, change: u64) {
    // SAFETY: every caller passes a word of a map, which stays where it is.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, change) };
}
