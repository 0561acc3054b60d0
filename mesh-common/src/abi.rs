//! What lies in the maps.
//!
//! A change here that an older program could misread needs a new [`VERSION`]: the version is
//! part of the pin path, so programs of one layout never meet maps of another.

use core::mem::offset_of;

use crate::{
    address::{Address, Prefix},
    health::HealthWord,
    select::Policy,
};

pub use affinity::{AffinityWord, Client};
pub use names::{MAX_EXCLUDED, MAX_NAMESERVERS, NameServer, Namespace, Sight};

mod affinity;
mod names;

/// The layout's version.
pub const VERSION: u32 = 5;

/// The most `[vip] ranges` a node can have: the kernel checks each before any look-up.
pub const MAX_VIP_RANGES: usize = 8;

/// The kernel's list of VIP ranges, a read-only variable set when the programs are loaded.
pub type VipRanges = [Prefix; MAX_VIP_RANGES];

/// The largest service id, backend id, slot index and slot count: they are packed in 24 bits.
pub const MAX_INDEX: u32 = (1 << 24) - 1;

/// A TCP or UDP port in network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Port(u16);

impl Port {
    /// From a number as people write it.
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    /// As people write it.
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// From `bpf_sock_addr.user_port`: the low half in network byte order.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the high half is zero")]
    pub const fn from_user_port(user_port: u32) -> Self {
        Self(user_port as u16)
    }

    /// From `bpf_sock_ops.remote_port`: the last two bytes in memory, in network byte order.
    #[inline(always)]
    pub const fn from_remote_port(remote_port: u32) -> Self {
        let [_, _, high, low] = remote_port.to_ne_bytes();
        Self(u16::from_ne_bytes([high, low]))
    }

    /// As it is in memory, for the kernel's own structures.
    #[inline(always)]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// For `bpf_sock_addr.user_port`.
    #[inline(always)]
    pub const fn user_port(self) -> u32 {
        self.0 as u32
    }
}

/// Key of `FRONTENDS`; its value is a service id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Frontend {
    pub address: Address,
    pub port: Port,
    /// The IP protocol number: 6 or 17.
    pub protocol: u8,
    zero: u8,
}

impl Frontend {
    #[inline(always)]
    pub const fn new(address: Address, port: Port, protocol: u8) -> Self {
        Self { address, port, protocol, zero: 0 }
    }
}

/// Value of `SERVICES`: the one word through which a reader sees a service.
///
/// Zero is a service that does not exist; a count of zero is one without a usable backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct ServiceWord(pub u64);

impl ServiceWord {
    const EXISTS: u64 = 1 << 48;
    const POLICY: u32 = 49;
    const STICKY: u64 = 1 << 52;

    /// `base` and `count` must be at most [`MAX_INDEX`].
    pub const fn new(base: u32, count: u32, policy: Policy, sticky: bool) -> Self {
        assert!(base <= MAX_INDEX && count <= MAX_INDEX);
        let sticky = if sticky { Self::STICKY } else { 0 };
        Self(base as u64 | (count as u64) << 24 | Self::EXISTS | (policy as u64) << Self::POLICY | sticky)
    }

    /// Whether a workload keeps its backend: the service has an affinity.
    #[inline(always)]
    pub const fn is_sticky(self) -> bool {
        self.0 & Self::STICKY != 0
    }

    /// How a backend is chosen.
    #[inline(always)]
    pub const fn policy(self) -> Policy {
        match (self.0 >> Self::POLICY) & 7 {
            1 => Policy::LeastConnections,
            2 => Policy::RoundRobin,
            3 => Policy::Maglev,
            _ => Policy::Random,
        }
    }

    /// Whether there is such a service.
    #[inline(always)]
    pub const fn exists(self) -> bool {
        self.0 & Self::EXISTS != 0
    }

    /// Index of the service's first slot.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        low24(self.0)
    }

    /// How many slots it has, all in one range.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        low24(self.0 >> 24)
    }
}

/// Value of `SLOTS`: one cell of a service's alias table.
///
/// A slot yields its backend with probability threshold / 65,536, otherwise its alias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct SlotWord(pub u64);

impl SlotWord {
    /// `backend` and `alias` must be at most [`MAX_INDEX`].
    pub const fn new(backend: u32, alias: u32, threshold: u16) -> Self {
        assert!(backend <= MAX_INDEX && alias <= MAX_INDEX);
        Self(backend as u64 | (alias as u64) << 24 | (threshold as u64) << 48)
    }

    #[inline(always)]
    pub const fn backend(self) -> u32 {
        low24(self.0)
    }

    #[inline(always)]
    pub const fn alias(self) -> u32 {
        low24(self.0 >> 24)
    }

    #[inline(always)]
    pub const fn threshold(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "masked to 24 bits")]
const fn low24(word: u64) -> u32 {
    (word & MAX_INDEX as u64) as u32
}

/// Value of `BACKENDS`. Never changed while a slot refers to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    pub address: Address,
    /// The service it belongs to.
    pub service: u32,
    pub port: Port,
    zero: u16,
    pub flags: u16,
    /// Its share of new connections; zero if it gets none. The only field that changes in place,
    /// together with `flags` within the last word.
    pub weight: u16,
}

impl Backend {
    /// Set on every backend that exists; an entry of zeroes is a free id.
    pub const IN_USE: u16 = 1;

    /// Words of one entry, which the kernel pads. The last one says whether it is in use.
    pub const WORDS: u32 = 4;

    pub const fn new(address: Address, port: Port, service: u32, weight: u16) -> Self {
        Self { address, port, service, zero: 0, flags: Self::IN_USE, weight }
    }

    #[inline(always)]
    pub const fn in_use(&self) -> bool {
        self.flags & Self::IN_USE != 0
    }

    /// As they lie in memory.
    pub const fn words(&self) -> [u64; Self::WORDS as usize] {
        let [a, b, c, d] = self.address.words();
        let (port, state) = (join(self.port.0, self.zero), join(self.flags, self.weight));
        [whole(a, b), whole(c, d), whole(self.service, port), whole(state, 0)]
    }

    pub const fn from_words(words: [u64; Self::WORDS as usize]) -> Self {
        let [[a, b], [c, d], [service, port], [state, _]] =
            [halves(words[0]), halves(words[1]), halves(words[2]), halves(words[3])];
        let ([port, zero], [flags, weight]) = (quarters(port), quarters(state));
        Self { address: Address::from_words([a, b, c, d]), service, port: Port(port), zero, flags, weight }
    }
}

/// Value of `SETTINGS`: what a service's connects follow. Words, so that each is valid on its own
/// while the daemon changes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Settings {
    /// How long a workload keeps its backend, in milliseconds since it last dialled.
    pub affinity_ms: u64,
    pub eject: Eject,
    pub penalty: Penalty,
    /// How long sockets outlive the backend they are connected to, in milliseconds.
    pub drain_ms: u64,
}

/// When a backend is ejected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Eject {
    /// After so many failed connects in a row; zero is never.
    pub failures: u32,
    /// While fewer than this many of the service's backends are.
    pub most: u32,
}

/// For how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Penalty {
    pub base_ms: u32,
    pub max_ms: u32,
}

impl Settings {
    /// Words of one entry.
    pub const WORDS: u32 = 4;

    pub const fn words(&self) -> [u64; Self::WORDS as usize] {
        [
            self.affinity_ms,
            pair(self.eject.failures, self.eject.most),
            pair(self.penalty.base_ms, self.penalty.max_ms),
            self.drain_ms,
        ]
    }

    #[expect(clippy::cast_possible_truncation, reason = "halves of a word")]
    pub const fn from_words(words: [u64; Self::WORDS as usize]) -> Self {
        let [affinity_ms, eject, penalty, drain_ms] = words;
        Self {
            affinity_ms,
            eject: Eject { failures: eject as u32, most: (eject >> 32) as u32 },
            penalty: Penalty { base_ms: penalty as u32, max_ms: (penalty >> 32) as u32 },
            drain_ms,
        }
    }
}

const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// What was dialled, and what it was translated to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Origin {
    pub vip: Address,
    pub backend_address: Address,
    pub vip_port: Port,
    pub backend_port: Port,
    pub service: u32,
    pub backend: u32,
}

impl Origin {
    /// Whether both were dialled at the same address.
    #[inline(always)]
    pub fn is_of(&self, other: &Self) -> bool {
        self.vip_port == other.vip_port && self.vip == other.vip
    }
}

/// What is known of a socket that is connected to a VIP or, with `held` at zero, has sent it a
/// datagram: value of `CONNECTIONS` and of `ORIGIN`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Connection {
    /// The backend on whose count the socket is; zero if on none. Exchanged in one step, so that
    /// whoever takes the socket off does it once.
    pub held: u64,
    pub origin: Origin,
    /// [`PROBE`](Self::PROBE), [`DIALS`](Self::DIALS), [`WATCHED`](Self::WATCHED), and the sock_ops callbacks that were asked for.
    pub flags: u32,
    /// Makes it a line of the CPU's cache.
    zero: u64,
}

impl Connection {
    /// This connect asks whether an ejected backend works again.
    pub const PROBE: u32 = 1 << 31;

    /// Its handshake has not begun: whatever begins later, a further subflow of MPTCP, is not it.
    pub const DIALS: u32 = 1 << 30;

    /// How its handshake ends is still to be heard of.
    pub const WATCHED: u32 = 1 << 29;

    /// The words that a connection begins with in every layout: by them a version takes over the
    /// sockets of another one, older or newer. What is added comes behind; the map gets another
    /// name if one of these is to change.
    pub const WORDS: u32 = 7;

    #[inline(always)]
    pub const fn new(held: u32, origin: Origin, flags: u32) -> Self {
        Self { held: held as u64, origin, flags, zero: 0 }
    }

    pub const fn words(&self) -> [u64; Self::WORDS as usize] {
        let ([a, b, c, d], [e, f, g, h]) = (self.origin.vip.words(), self.origin.backend_address.words());
        let ports = join(self.origin.vip_port.0, self.origin.backend_port.0);
        [
            self.held,
            whole(a, b),
            whole(c, d),
            whole(e, f),
            whole(g, h),
            whole(ports, self.origin.service),
            whole(self.origin.backend, self.flags),
        ]
    }

    pub const fn from_words(words: [u64; Self::WORDS as usize]) -> Self {
        let [held, vip @ .., backend, flags] = words;
        let [a, b, c, d] = vip;
        let ([a, b], [c, d], [e, f], [g, h]) = (halves(a), halves(b), halves(c), halves(d));
        let ([ports, service], [backend, flags]) = (halves(backend), halves(flags));
        let [vip_port, backend_port] = quarters(ports);
        let origin = Origin {
            vip: Address::from_words([a, b, c, d]),
            backend_address: Address::from_words([e, f, g, h]),
            vip_port: Port(vip_port),
            backend_port: Port(backend_port),
            service,
            backend,
        };
        Self { held, origin, flags, zero: 0 }
    }
}

/// The word whose bytes in memory are those of both halves.
const fn whole(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

const fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

const fn join(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

const fn quarters(half: u32) -> [u16; 2] {
    let [a, b, c, d] = half.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

/// Value of `SOCKETS`: the places for sockets whose cookies are equal modulo [`SETS`]. A cookie is
/// the kernel's number for a socket, never used again; zero where there is none. The connection
/// of way `w` of set `s` is `CONNECTIONS[s * WAYS + w]`. A socket that finds no place keeps its
/// connection in `ORIGIN`, where a new entry costs more.
pub type Cookies = [u64; WAYS];

/// Places of a set.
pub const WAYS: usize = 4;
/// How many sets there are, a power of two.
pub const SETS: u32 = 8192;

/// The IP protocol number of TCP.
pub const IPPROTO_TCP: u8 = 6;

/// How many VIPs an unconnected UDP socket can talk to at a time, besides its first.
pub const MAX_PEERS: usize = 8;

/// Value of `PEERS`, kept with a UDP socket that talks to more than one VIP: which backend stands
/// for which of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Peers {
    pub peers: [Origin; MAX_PEERS],
    /// Where the next new one goes, counted on and on.
    pub next: u32,
}

const _: () = {
    assert!(size_of::<Frontend>() == 20 && align_of::<Frontend>() == 4);
    assert!(size_of::<Backend>() == 28 && align_of::<Backend>() == 4);
    assert!(size_of::<Backend>().next_multiple_of(8) == 8 * Backend::WORDS as usize);
    assert!(size_of::<Origin>() == 44 && align_of::<Origin>() == 4);
    assert!(size_of::<Connection>() == 64);
    assert!(offset_of!(Connection, flags) + 4 == 8 * Connection::WORDS as usize);
    assert!(size_of::<Peers>() == MAX_PEERS * 44 + 4);
    assert!(size_of::<Settings>() == 8 * Settings::WORDS as usize);
    assert!(size_of::<HealthWord>() == 8 && size_of::<AffinityWord>() == 8);
    assert!(size_of::<Client>() == 16 && SETS.is_power_of_two());
    assert!(size_of::<Prefix>() == 32);
    assert!(size_of::<Namespace>() == 16 && size_of::<NameServer>() == 24 && size_of::<Sight>() == 16);
    assert!(size_of::<ServiceWord>() == 8 && size_of::<SlotWord>() == 8);
};

/// The names of the maps, as the kernel shows them and as they are pinned.
pub mod map {
    pub const FRONTENDS: &str = "FRONTENDS";
    pub const SERVICES: &str = "SERVICES";
    pub const SETTINGS: &str = "SETTINGS";
    pub const SLOTS: &str = "SLOTS";
    pub const BACKENDS: &str = "BACKENDS";
    pub const LOAD: &str = "LOAD";
    pub const HEALTH: &str = "HEALTH";
    pub const EJECTED: &str = "EJECTED";
    pub const CURSORS: &str = "CURSORS";
    pub const AFFINITY: &str = "AFFINITY";
    pub const SOCKETS: &str = "SOCKETS";
    pub const CONNECTIONS: &str = "CONNECTIONS";
    pub const ORIGIN: &str = "ORIGIN";
    pub const PEERS: &str = "PEERS";
    pub const STATS: &str = "STATS";
    pub const NAMESERVERS: &str = "NAMESERVERS";
    pub const SIGHTS: &str = "SIGHTS";
    pub const EXCLUDED: &str = "EXCLUDED";
    pub const ALL: [&str; 18] = [
        FRONTENDS,
        SERVICES,
        SETTINGS,
        SLOTS,
        BACKENDS,
        LOAD,
        HEALTH,
        EJECTED,
        CURSORS,
        AFFINITY,
        SOCKETS,
        CONNECTIONS,
        ORIGIN,
        PEERS,
        STATS,
        NAMESERVERS,
        SIGHTS,
        EXCLUDED,
    ];
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for types that may cross the border")]
mod pod {
    use super::{Backend, Client, Frontend, NameServer, Namespace, Prefix};

    // SAFETY: repr(C), integer fields only, no padding (sizes asserted above), any bytes valid.
    unsafe impl aya::Pod for Frontend {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Backend {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Client {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Prefix {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Namespace {}
    // SAFETY: as above.
    unsafe impl aya::Pod for NameServer {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_port_is_big_endian_in_memory() {
        assert_eq!(Port::new(0x1f90).0.to_ne_bytes(), [0x1f, 0x90]);
        assert_eq!(Port::from_user_port(Port::new(8080).user_port()).get(), 8080);
    }

    #[test]
    fn an_empty_service_still_differs_from_none() {
        assert!(ServiceWord::new(0, 0, Policy::Random, false).exists());
        assert!(!ServiceWord::default().exists());
    }

    #[test]
    fn an_affinity_ends_when_it_was_not_used_for_as_long() {
        let word = AffinityWord::new(MAX_INDEX, 1_000_000);
        assert_eq!(word.backend(), MAX_INDEX);
        assert!(word.holds(1_000_000, 0) && word.holds(1_000_500, 500) && !word.holds(1_000_501, 500));
        // Another CPU's clock may be a little behind.
        assert!(word.holds(999_999, 0));
    }

    proptest! {
        #[test]
        fn a_service_word_round_trips(base in 0..=MAX_INDEX, count in 0..=MAX_INDEX) {
            for policy in [Policy::Random, Policy::LeastConnections, Policy::RoundRobin, Policy::Maglev] {
                for sticky in [false, true] {
                    let word = ServiceWord::new(base, count, policy, sticky);
                    prop_assert_eq!((word.base(), word.count(), word.policy()), (base, count, policy));
                    prop_assert!(word.exists() && word.is_sticky() == sticky);
                }
            }
        }

        #[test]
        fn a_connection_round_trips(words: [u64; Connection::WORDS as usize]) {
            prop_assert_eq!(Connection::from_words(words).words(), words);
        }

        #[test]
        fn a_backend_is_written_as_it_lies_in_memory(address: [u32; 4], port: u16, service: u32, weight: u16) {
            let backend = Backend::new(Address::from_words(address), Port::new(port), service, weight);
            prop_assert_eq!(Backend::from_words(backend.words()), backend);
            let bytes: Vec<u8> = backend.words().iter().flat_map(|word| word.to_ne_bytes()).collect();
            prop_assert_eq!(&bytes[..16], &backend.address.octets());
            prop_assert_eq!(&bytes[16..20], service.to_ne_bytes());
            prop_assert_eq!(&bytes[20..22], port.to_be_bytes());
            prop_assert_eq!(&bytes[core::mem::offset_of!(Backend, weight)..][..2], weight.to_ne_bytes());
            prop_assert_eq!(&bytes[core::mem::offset_of!(Backend, flags)..][..2], Backend::IN_USE.to_ne_bytes());
        }

        #[test]
        fn settings_round_trip(words: [u64; 4]) {
            let settings = Settings::from_words(words);
            prop_assert_eq!(settings.words(), words);
        }

        #[test]
        fn a_slot_word_round_trips(backend in 0..=MAX_INDEX, alias in 0..=MAX_INDEX, threshold: u16) {
            let word = SlotWord::new(backend, alias, threshold);
            prop_assert_eq!((word.backend(), word.alias(), word.threshold()), (backend, alias, threshold));
        }
    }
}
