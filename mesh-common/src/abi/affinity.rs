//! Which backend a workload keeps.

use super::{MAX_INDEX, low24};

/// Key of `AFFINITY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Client {
    /// The cgroup of the task that dials.
    pub workload: u64,
    pub service: u32,
    zero: u32,
}

impl Client {
    #[inline(always)]
    pub const fn new(workload: u64, service: u32) -> Self {
        Self { workload, service, zero: 0 }
    }
}

/// Value of `AFFINITY`: the backend a workload has, and when it last dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct AffinityWord(pub u64);

impl AffinityWord {
    /// Times wrap after 34 years of uptime.
    #[inline(always)]
    pub const fn new(backend: u32, now_ms: u64) -> Self {
        Self(backend as u64 | now_ms << 24)
    }

    #[inline(always)]
    pub const fn backend(self) -> u32 {
        low24(self.0)
    }

    /// The same time, another backend.
    pub const fn moved_to(self, backend: u32) -> Self {
        Self(backend as u64 | self.0 & !(MAX_INDEX as u64))
    }

    /// Whether the backend was last dialled within `timeout_ms`.
    #[inline(always)]
    pub const fn holds(self, now_ms: u64, timeout_ms: u64) -> bool {
        now_ms.saturating_sub(self.0 >> 24) <= timeout_ms
    }
}
