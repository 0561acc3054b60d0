//! How a test tells in the kernel whether a look-up was right: services have numbers, and a
//! backend's address says whose it is and since which generation of its service.
//!
//! Used by the look-ups of `mesh-ebpf-bench` and by who runs them; the daemon knows nothing of it.

use crate::{
    abi::{Frontend, Port},
    address::Address,
};

/// What becomes of a look-up, and the word of `LOOKUPS` that counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    Right = 0,
    /// The backend is another service's.
    Wrong = 1,
    /// Half of one backend, half of another.
    Torn = 2,
    /// A backend of the service, but not any more, or not yet.
    Untimely = 3,
    /// None, though the service always has one.
    Missed = 4,
    /// None, of a service that comes and goes.
    Absent = 5,
}

impl Verdict {
    pub const ALL: [Self; 6] =
        [Self::Right, Self::Wrong, Self::Torn, Self::Untimely, Self::Missed, Self::Absent];
}

/// Word of `LOOKUPS`: how many services are dialled.
pub const SERVICES: u32 = 6;
/// Word of `LOOKUPS`: the services with smaller numbers always have a backend.
pub const STAYING: u32 = 7;
/// Word of `LOOKUPS`: takes what would not be computed otherwise.
pub const KEPT: u32 = 8;
/// How many services can be checked.
pub const MOST: u32 = 4096;
/// Words of `LOOKUPS`.
pub const WORDS: u32 = 16 + 2 * MOST;

/// Word of `LOOKUPS`: the oldest generation of a service that may still be met.
#[inline(always)]
pub const fn oldest(service: u32) -> u32 {
    16 + 2 * service
}

/// Word of `LOOKUPS`: the newest generation that may be met already.
#[inline(always)]
pub const fn newest(service: u32) -> u32 {
    17 + 2 * service
}

/// What is dialled: fd00:6d65:7368::/96 holds all of them.
#[inline(always)]
pub const fn frontend(service: u32) -> Frontend {
    let net = [u32::from_ne_bytes([0xfd, 0x00, 0x6d, 0x65]), u32::from_ne_bytes([0x73, 0x68, 0, 0]), 0];
    let address = Address::from_words([net[0], net[1], net[2], service.to_be()]);
    Frontend::new(address, Port::new(80), 6)
}

/// Where a backend of a service listens: every part of it says whose it is, or follows from the rest.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the low half")]
pub const fn endpoint(service: u32, generation: u32, backend: u32) -> (Address, Port) {
    let words = [backend, service, generation, !(backend ^ service ^ generation)];
    (Address::from_words(words), Port::new(generation as u16))
}

/// What is to be said of a look-up of a service that led here.
#[inline(always)]
pub fn verdict(service: u32, oldest: u64, newest: u64, address: &Address, port: Port) -> Verdict {
    let [backend, whose, generation, _] = address.words();
    if (*address, port) != endpoint(whose, generation, backend) {
        Verdict::Torn
    } else if whose != service {
        Verdict::Wrong
    } else if u64::from(generation) < oldest || u64::from(generation) > newest {
        Verdict::Untimely
    } else {
        Verdict::Right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_says_whose_it_is() {
        let (address, port) = endpoint(7, 3, 1);
        assert_eq!(verdict(7, 2, 3, &address, port), Verdict::Right);
        assert_eq!(verdict(8, 2, 3, &address, port), Verdict::Wrong);
        assert_eq!(verdict(7, 4, 5, &address, port), Verdict::Untimely);
        assert_eq!(verdict(7, 1, 2, &address, port), Verdict::Untimely);
        let (other, other_port) = endpoint(6, 4, 1);
        assert_eq!(verdict(7, 2, 3, &address, other_port), Verdict::Torn);
        for word in 1..4 {
            let mut words = address.words();
            words[word] = other.words()[word];
            let torn = Address::from_words(words);
            assert_eq!(torn == address, verdict(7, 2, 3, &torn, port) != Verdict::Torn, "word {word}");
        }
    }
}
