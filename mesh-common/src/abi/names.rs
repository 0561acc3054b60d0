//! What the hooks know of the daemon's listeners for queries.

use super::Port;
use crate::address::Address;

/// Key of `NAMESERVERS`: a network namespace, by its cookie, and a family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct Namespace {
    pub cookie: u64,
    family: u64,
}

impl Namespace {
    #[inline(always)]
    pub const fn new(cookie: u64, is_v4: bool) -> Self {
        Self { cookie, family: if is_v4 { 4 } else { 6 } }
    }
}

/// Value of `NAMESERVERS`: where the daemon listens for queries; a port of zero is nowhere. Changed
/// only by a whole new entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NameServer {
    pub address: Address,
    pub port: Port,
    zero: u16,
    /// The daemon's own, whose queries go where they are sent.
    pub process: u32,
}

impl NameServer {
    pub const fn new(address: Address, port: Port, process: u32) -> Self {
        Self { address, port, zero: 0, process }
    }
}

/// How many network namespaces the daemon listens in at most, twice: once for each family.
pub const MAX_NAMESERVERS: usize = 8192;

/// How many cgroups `EXCLUDED` can hold. Its keys are their ids; queries from there, and from below, go
/// where they are sent.
pub const MAX_EXCLUDED: usize = 1024;

/// Entry of `SIGHTS`: a first query from a network namespace that the daemon does not listen in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Sight {
    pub cookie: u64,
    /// Of the asker.
    pub process: u32,
    zero: u32,
}

impl Sight {
    #[inline(always)]
    pub const fn new(cookie: u64, process: u32) -> Self {
        Self { cookie, process, zero: 0 }
    }

    /// From the bytes of an entry.
    pub fn from_bytes(bytes: [u8; size_of::<Self>()]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = bytes;
        Self::new(u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u32::from_ne_bytes([i, j, k, l]))
    }
}
