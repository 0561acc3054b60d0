//! The maps, and the few ways a hook touches them.
//!
//! Sizes here are the smallest ones; the daemon sets the configured sizes when it creates the
//! maps. Arrays that the daemon writes are mapped into it, and it stores whole words; a hook
//! loads those of `SERVICES` and `SLOTS` exactly once.

use core::{
    intrinsics::AtomicOrdering, intrinsics::atomic_cxchg, intrinsics::atomic_xadd, intrinsics::atomic_xchg,
    ptr::read_volatile, ptr::write_volatile,
};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use mesh_common::{
    abi::{
        AffinityWord, Backend, Client, Connection, Cookies, Frontend, MAX_EXCLUDED, MAX_NAMESERVERS,
        MAX_VIP_RANGES, NameServer, Namespace, Peers, SETS, ServiceWord, Settings, Sight, SlotWord,
        VipRanges, WAYS,
    },
    address::{Address, Prefix},
    health::HealthWord,
    outcome::Outcome,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map]
static FRONTENDS: HashMap<Frontend, u32, 1> = HashMap::new();
#[btf_map]
static SERVICES: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static SETTINGS: Array<Settings, 1, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static BACKENDS: Array<Backend, 1, MMAPABLE> = Array::new();
#[btf_map]
static LOAD: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static HEALTH: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static EJECTED: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static CURSORS: Array<u64, 1> = Array::new();
#[btf_map]
static AFFINITY: LruHashMap<Client, u64, 1> = LruHashMap::new();
#[btf_map]
static SOCKETS: Array<Cookies, { SETS as usize }, MMAPABLE> = Array::new();
#[btf_map]
static CONNECTIONS: Array<Connection, { SETS as usize * WAYS }, MMAPABLE> = Array::new();
#[btf_map]
pub(crate) static ORIGIN: SkStorage<Connection> = SkStorage::new();
#[btf_map]
pub(crate) static PEERS: SkStorage<Peers> = SkStorage::new();
#[btf_map]
static STATS: PerCpuArray<u64, { Outcome::ALL.len() }> = PerCpuArray::new();

#[btf_map]
static NAMESERVERS: HashMap<Namespace, NameServer, MAX_NAMESERVERS, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
#[btf_map]
static SIGHTS: RingBuf<Sight, 4096> = RingBuf::new();
#[btf_map]
static EXCLUDED: HashMap<u64, u64, MAX_EXCLUDED, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

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

/// What a service's connects follow.
#[inline(always)]
pub(crate) fn settings(service: u32) -> Option<&'static Settings> {
    SETTINGS.get(service)
}

/// Connections that a backend has.
#[inline(always)]
pub(crate) fn load_of(backend: u32) -> u64 {
    load(&LOAD, backend).unwrap_or(0)
}

/// Counts one more socket on a backend.
#[inline(always)]
pub(crate) fn add_load(backend: u32) {
    if let Some(load) = LOAD.get_ptr_mut(backend) {
        add(load, 1);
    }
}

/// Takes a socket off the count that it is on, if it is on any.
#[inline(always)]
pub(crate) fn let_go(connection: &mut Connection) {
    // SAFETY: a word of a map or of a socket's storage. Not relaxed: see `fetch_add`.
    let before = unsafe { atomic_xchg::<u64, { AtomicOrdering::AcqRel }>(&raw mut connection.held, 0) };
    #[expect(clippy::cast_possible_truncation, reason = "backend ids have 24 bits")]
    if before != 0
        && let Some(load) = LOAD.get_ptr_mut(before as u32)
    {
        add(load, u64::MAX);
    }
}

/// What connects say of a backend.
#[inline(always)]
pub(crate) fn health(backend: u32) -> HealthWord {
    HealthWord(load(&HEALTH, backend).unwrap_or(0))
}

/// Changes it, unless it has changed meanwhile.
#[inline(always)]
pub(crate) fn swap_health(backend: u32, old: HealthWord, new: HealthWord) -> bool {
    HEALTH.get_ptr_mut(backend).is_some_and(|word| swap(word, old.0, new.0))
}

/// Counts one more ejected backend of a service, unless there are `most` already.
#[inline(always)]
pub(crate) fn take_ejection(service: u32, most: u32) -> bool {
    let Some(ejected) = EJECTED.get_ptr_mut(service) else { return false };
    // Signed: for a moment, or after a crash, there may be one too few.
    if fetch_add(ejected, 1).cast_signed() < i64::from(most) {
        return true;
    }
    add(ejected, u64::MAX);
    false
}

#[inline(always)]
pub(crate) fn give_ejection_back(service: u32) {
    if let Some(ejected) = EJECTED.get_ptr_mut(service) {
        add(ejected, u64::MAX);
    }
}

/// The backend that a workload has of a service, if it has used it within the time.
#[inline(always)]
pub(crate) fn affinity(client: &Client, now_ms: u64, timeout_ms: u64) -> Option<u32> {
    let word = AFFINITY.get_ptr_mut(client)?;
    // SAFETY: the value is one word, read once and written once; of two tasks of a workload that
    // write at the same time either may be the last.
    unsafe {
        let affinity = AffinityWord(read_volatile(word));
        if !affinity.holds(now_ms, timeout_ms) {
            return None;
        }
        write_volatile(word, AffinityWord::new(affinity.backend(), now_ms).0);
        Some(affinity.backend())
    }
}

/// Without room for it, the workload has none.
#[inline(always)]
pub(crate) fn set_affinity(client: &Client, now_ms: u64, backend: u32) {
    let _ = AFFINITY.insert(client, AffinityWord::new(backend, now_ms).0, 0);
}

/// The set of places that a socket may have one of.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the low bits choose the set")]
const fn set_of(cookie: u64) -> u32 {
    cookie as u32 & (SETS - 1)
}

#[inline(always)]
pub(crate) fn cookies(cookie: u64) -> Option<&'static mut Cookies> {
    let cookies = SOCKETS.get_ptr_mut(set_of(cookie))?;
    // SAFETY: a non-null look-up points at the whole value. Other sockets' places are left alone.
    Some(unsafe { &mut *cookies })
}

/// The connection that belongs to a place.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "4")]
pub(crate) fn connection(cookie: u64, way: usize) -> Option<&'static mut Connection> {
    let connection = CONNECTIONS.get_ptr_mut(set_of(cookie) * WAYS as u32 + way as u32)?;
    // SAFETY: as above.
    Some(unsafe { &mut *connection })
}

/// Whether a place is a socket's own.
#[inline(always)]
pub(crate) fn is_of(place: &u64, cookie: u64) -> bool {
    // SAFETY: a reference is valid; volatile because other sockets come and go.
    unsafe { read_volatile(place) == cookie }
}

/// Takes a place if it is free.
#[inline(always)]
pub(crate) fn take(place: &mut u64, cookie: u64) -> bool {
    is_of(place, 0) && swap(place, 0, cookie)
}

/// Gives up a place.
#[inline(always)]
pub(crate) fn give_up(place: &mut u64, cookie: u64) {
    swap(place, cookie, 0);
}

/// How many turns a service has had, this one not counted.
#[inline(always)]
pub(crate) fn take_turn(service: u32) -> u64 {
    CURSORS.get_ptr_mut(service).map_or(0, |turn| fetch_add(turn, 1))
}

/// Where the daemon listens for queries.
#[inline(always)]
pub(crate) fn name_server(namespace: &Namespace) -> Option<&'static NameServer> {
    // SAFETY: entries are replaced whole, and an old one is not used again before the program ends.
    unsafe { NAMESERVERS.get(namespace) }
}

/// Whether queries from this cgroup go where they are sent.
#[inline(always)]
pub(crate) fn is_excluded(cgroup: u64) -> bool {
    // SAFETY: the value is not read.
    unsafe { EXCLUDED.get(cgroup) }.is_some()
}

/// Notes a namespace that the daemon does not listen in; true the first time.
#[inline(always)]
pub(crate) fn see(namespace: &Namespace) -> bool {
    NAMESERVERS.insert(namespace, NameServer::default(), u64::from(BPF_NOEXIST)).is_ok()
}

/// Tells the daemon of it, if there is room.
#[inline(always)]
pub(crate) fn tell(sight: Sight) {
    let _ = SIGHTS.output(sight, 0);
}

#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    if let Some(counter) = STATS.get_ptr_mut(outcome as u32) {
        // This CPU's counter, but a hook can be preempted by another one on the same CPU.
        add(counter, 1);
    }
}

/// The word as it was before.
#[inline(always)]
fn fetch_add(word: *mut u64, change: u64) -> u64 {
    // SAFETY: every caller passes a word of a map, which stays where it is. Not relaxed: for that
    // LLVM emits an instruction that returns nothing, and uses what it returns all the same.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::AcqRel }>(word, change) }
}

#[inline(always)]
fn swap(word: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: as for `fetch_add`.
    let (before, _) = unsafe {
        atomic_cxchg::<u64, { AtomicOrdering::AcqRel }, { AtomicOrdering::Acquire }>(word, old, new)
    };
    before == old
}

/// Adds atomically, wrapping.
#[inline(always)]
fn add(word: *mut u64, change: u64) {
    // SAFETY: every caller passes a word of a map, which stays where it is.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, change) };
}
