//! One address type for both families.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`: 16 bytes in network order, held as
/// four words because that is how the kernel's `bpf_sock_addr` hands them over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Address {
    words: [u32; 4],
}

const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Address {
    /// From the four words of `user_ip6`, each in memory order.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// From the one word of `user_ip4`, in memory order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// The four words for `user_ip6`.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The word for `user_ip4`; meaningful only when [`is_v4`](Self::is_v4).
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The address as an ordinary IP address: IPv4 if it is mapped.
    pub fn ip(&self) -> IpAddr {
        Ipv6Addr::from(self.octets()).to_canonical()
    }

    /// The 16 bytes in network order.
    pub fn octets(&self) -> [u8; 16] {
        let mut octets = [0; 16];
        for (four, word) in octets.chunks_exact_mut(4).zip(self.words) {
            four.copy_from_slice(&word.to_ne_bytes());
        }
        octets
    }

    /// From 16 bytes in network order.
    pub fn from_octets(octets: [u8; 16]) -> Self {
        let mut words = [0; 4];
        for (word, four) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([four[0], four[1], four[2], four[3]]);
        }
        Self { words }
    }
}

impl From<Ipv4Addr> for Address {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => Self::from_octets(ip.octets()),
        }
    }
}

/// An address prefix: what a `[vip] ranges` entry becomes in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Prefix {
    net: [u32; 4],
    mask: [u32; 4],
}

impl Prefix {
    /// Contains nothing; fills the unused entries of the kernel's list.
    pub const NONE: Self = Self { net: [u32::MAX; 4], mask: [0; 4] };

    /// `bits` counts from the start of the 16 bytes: an IPv4 /10 has 106.
    pub fn new(address: Address, bits: u8) -> Self {
        let mask = u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0);
        let mask = Address::from_octets(mask.to_be_bytes()).words;
        let mut net = address.words;
        for (net, mask) in net.iter_mut().zip(mask) {
            *net &= mask;
        }
        Self { net, mask }
    }

    /// Whether `address` lies in the prefix.
    #[inline(always)]
    pub const fn contains(&self, address: &Address) -> bool {
        let a = &address.words;
        (a[0] & self.mask[0]) == self.net[0]
            && (a[1] & self.mask[1]) == self.net[1]
            && (a[2] & self.mask[2]) == self.net[2]
            && (a[3] & self.mask[3]) == self.net[3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(s: &str) -> Address {
        s.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn an_ipv4_address_and_its_mapped_form_are_one() {
        assert_eq!(v4("127.128.0.10"), v4("::ffff:127.128.0.10"));
        assert!(v4("127.128.0.10").is_v4());
        assert!(!v4("fd00::1").is_v4());
        assert_eq!(v4("127.128.0.10").ip(), IpAddr::from([127, 128, 0, 10]));
    }

    #[test]
    fn a_prefix_ends_where_it_says() {
        let prefix = Prefix::new(v4("127.128.0.0"), 96 + 10);
        for inside in ["127.128.0.0", "127.191.255.255"] {
            assert!(prefix.contains(&v4(inside)), "{inside}");
        }
        for outside in ["127.127.255.255", "127.192.0.0", "128.128.0.0", "::7f80:0"] {
            assert!(!prefix.contains(&v4(outside)), "{outside}");
        }
        assert!(Prefix::new(v4("::"), 0).contains(&v4("10.0.0.1")));
    }

    proptest! {
        #[test]
        fn octets_round_trip(octets: [u8; 16]) {
            prop_assert_eq!(Address::from_octets(octets).octets(), octets);
        }

        #[test]
        fn the_empty_prefix_contains_nothing(octets: [u8; 16]) {
            prop_assert!(!Prefix::NONE.contains(&Address::from_octets(octets)));
        }

        #[test]
        fn a_prefix_contains_what_agrees_in_its_bits(a: u128, b: u128, bits in 0u8..=128) {
            let prefix = Prefix::new(Address::from_octets(a.to_be_bytes()), bits);
            let agree = bits == 0 || (a ^ b) >> (128 - u32::from(bits)) == 0;
            prop_assert_eq!(prefix.contains(&Address::from_octets(b.to_be_bytes())), agree);
        }
    }
}
