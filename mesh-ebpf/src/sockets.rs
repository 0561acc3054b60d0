//! What is known of each socket, found by its cookie.
//!
//! A place in `SOCKETS` costs two atomic operations. Socket storage costs several times as much,
//! so it holds only what finds no place there.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE, btf_maps::SkStorage, helpers::generated::bpf_sk_storage_get,
};
use mesh_common::abi::Connection;

use crate::maps;

/// For [`storage`]: make the value if there is none.
pub(crate) const CREATE: u64 = BPF_SK_STORAGE_GET_F_CREATE as u64;

/// A socket's connection, if it was translated.
#[inline(always)]
pub(crate) fn connection(cookie: u64, socket: *mut c_void) -> Option<&'static mut Connection> {
    let cookies = maps::cookies(cookie)?;
    for (way, place) in cookies.iter().enumerate() {
        if maps::is_of(place, cookie) {
            return maps::connection(cookie, way);
        }
    }
    // SAFETY: a value owned by the socket, which outlives the program.
    unsafe { storage(&maps::ORIGIN, socket, 0).as_mut() }
}

/// Where to keep the connection of a socket that has none: in a place, if there is a free one.
#[inline(always)]
pub(crate) fn new_connection(cookie: u64, socket: *mut c_void) -> Option<&'static mut Connection> {
    let cookies = maps::cookies(cookie)?;
    for (way, place) in cookies.iter_mut().enumerate() {
        if maps::take(place, cookie) {
            return maps::connection(cookie, way);
        }
    }
    // SAFETY: as above.
    unsafe { storage(&maps::ORIGIN, socket, CREATE).as_mut() }
}

/// The end of a socket.
#[inline(always)]
pub(crate) fn release(cookie: u64, socket: *mut c_void) {
    let Some(cookies) = maps::cookies(cookie) else { return };
    for (way, place) in cookies.iter_mut().enumerate() {
        if maps::is_of(place, cookie) {
            if let Some(connection) = maps::connection(cookie, way) {
                maps::let_go(connection);
            }
            maps::give_up(place, cookie);
            return;
        }
    }
    // SAFETY: as above.
    if let Some(connection) = unsafe { storage(&maps::ORIGIN, socket, 0).as_mut() } {
        maps::let_go(connection);
    }
}

/// A socket's value in a storage map; null if there is none, or no memory for a new one. The
/// kernel zeroes a new one.
#[inline(always)]
pub(crate) fn storage<T>(map: &SkStorage<T>, socket: *mut c_void, flags: u64) -> *mut T {
    let map = ptr::from_ref(map).cast_mut().cast();
    // SAFETY: the map holds values of type T, and the verifier has seen where the socket comes from.
    unsafe { bpf_sk_storage_get(map, socket, ptr::null_mut(), flags).cast() }
}
