//! Look-ups as a connect makes them, but without a socket: run by `BPF_PROG_TEST_RUN`, which the
//! kernel does not offer for hooks of sockets.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE, btf_maps::Array, helpers::generated::bpf_get_prandom_u32, macros::btf_map,
};
use mesh_common::{
    lookup::{self, Verdict, WORDS},
    outcome::Outcome,
};

use crate::forward;

/// See [`mesh_common::lookup`].
#[btf_map]
static LOOKUPS: Array<u64, { WORDS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// What the others cost besides the look-up.
#[inline(always)]
pub(crate) fn draw() -> i32 {
    let frontend = lookup::frontend(drawn());
    // Kept, so that it is made.
    count(lookup::KEPT, u64::from(frontend.address.words()[3]));
    0
}

#[inline(always)]
pub(crate) fn choose() -> i32 {
    match forward::choose(lookup::frontend(drawn())) {
        Ok(choice) => count(lookup::KEPT, u64::from(choice.origin.backend_address.words()[3])),
        Err(_) => count(Verdict::Missed as u32, word(Verdict::Missed as u32) + 1),
    }
    0
}

/// Says of each look-up whether it led to a backend of the service that was dialled.
#[inline(always)]
pub(crate) fn check() -> i32 {
    let service = drawn();
    let oldest = word(lookup::oldest(service));
    let verdict = match forward::choose(lookup::frontend(service)) {
        Ok(choice) => {
            // Whatever has been announced since the look-up ended, this had been before.
            let newest = word(lookup::newest(service));
            let origin = choice.origin;
            lookup::verdict(service, oldest, newest, &origin.backend_address, origin.backend_port)
        }
        Err(Outcome::NoFrontend) if u64::from(service) >= word(lookup::STAYING) => Verdict::Absent,
        Err(_) => Verdict::Missed,
    };
    count(verdict as u32, word(verdict as u32) + 1);
    0
}

/// A service, at random.
#[inline(always)]
fn drawn() -> u32 {
    // SAFETY: a plain helper call.
    let random = unsafe { bpf_get_prandom_u32() };
    ((u64::from(random) * word(lookup::SERVICES)) >> 32) as u32
}

#[inline(always)]
fn word(index: u32) -> u64 {
    // SAFETY: a non-null look-up points at the whole word.
    LOOKUPS.get_ptr(index).map_or(0, |word| unsafe { read_volatile(word) })
}

/// There is one reader, which is the only one that counts.
#[inline(always)]
fn count(index: u32, value: u64) {
    if let Some(word) = LOOKUPS.get_ptr_mut(index) {
        // SAFETY: as above.
        unsafe { write_volatile(word, value) };
    }
}
