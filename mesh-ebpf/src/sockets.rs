//! What is known of each connected socket, found by its cookie.
//!
//! A place in `SOCKETS` costs two atomic operations. Socket storage costs several times as much,
//! so it holds only what finds no place there.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE, btf_maps::SkStorage, helpers::generated::bpf_sk_storage_get,
};
use mesh_common::abi::{Connection, Socket};

use crate::maps;

/// For [`storage`]: make the value if there is none.
pub(crate) const CREATE: u64 = BPF_SK_STORAGE_GET_F_CREATE as u64;

/// A socket's connection, if it was translated.
#[inline(always)]
pub(crate) fn connection(cookie: u64, socket: *mut c_void) -> Option<&'static mut Connection> {
    match place(cookie) {
        Some(place) => Some(&mut place.connection),
        // SAFETY: a value owned by the socket, which outlives the program.
        None => unsafe { storage(&maps::ORIGIN, socket, 0).as_mut() },
    }
}

/// Where to keep what a socket dials: where it has been kept before, else where there is room.
#[inline(always)]
pub(crate) fn new_connection(cookie: u64, socket: *mut c_void) -> Option<&'static mut Connection> {
    if let Some(connection) = connection(cookie, socket) {
        return Some(connection);
    }
    if let Some(set) = maps::set_of(cookie) {
        for place in set {
            if maps::swap_cookie(place, 0, cookie) {
                return Some(&mut place.connection);
            }
        }
    }
    // SAFETY: as above.
    unsafe { storage(&maps::ORIGIN, socket, CREATE).as_mut() }
}

/// The end of a socket.
#[inline(always)]
pub(crate) fn release(cookie: u64, socket: *mut c_void) {
    if let Some(set) = maps::set_of(cookie) {
        // All of them: two threads that connect one UDP socket at once may each have taken one.
        for place in set {
            if maps::is_of(place, cookie) {
                maps::hold(&mut place.connection, 0);
                maps::swap_cookie(place, cookie, 0);
            }
        }
    }
    // SAFETY: as above.
    if let Some(connection) = unsafe { storage(&maps::ORIGIN, socket, 0).as_mut() } {
        maps::hold(connection, 0);
    }
}

#[inline(always)]
fn place(cookie: u64) -> Option<&'static mut Socket> {
    maps::set_of(cookie)?.iter_mut().find(|place| maps::is_of(place, cookie))
}

/// A socket's value in a storage map; null if there is none, or no memory for a new one. The
/// kernel zeroes a new one.
#[inline(always)]
pub(crate) fn storage<T>(map: &SkStorage<T>, socket: *mut c_void, flags: u64) -> *mut T {
    let map = ptr::from_ref(map).cast_mut().cast();
    // SAFETY: the map holds values of type T, and the verifier has seen where the socket comes from.
    unsafe { bpf_sk_storage_get(map, socket, ptr::null_mut(), flags).cast() }
}
