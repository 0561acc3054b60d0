//! The instances of a service, as answers have them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{
    catalog::weigh::selectable,
    model::{Instance, Service},
};

/// As many of a kind as one answer has: what Route 53 gives of a multivalue answer.
const MOST: usize = 8;

/// The selectable instances of all ports of one name.
#[derive(Debug, Default)]
pub(super) struct Instances {
    /// Those of each port, in the ports' order.
    pub(super) targets: Box<[Box<[Target]>]>,
    /// Where they are, in order: IPv4 comes first.
    pub(super) addresses: Box<[IpAddr]>,
}

impl Instances {
    /// Of the services that are the ports.
    pub(super) fn of<'a>(ports: impl Iterator<Item = Option<&'a Service>>) -> Self {
        let target =
            |one: &Instance| Target { address: one.address, port: one.port.get(), weight: one.weight };
        let targets = ports.map(|service| service.into_iter().flat_map(selectable).map(target).collect());
        let targets: Box<[Box<[_]>]> = targets.collect();
        let mut addresses: Vec<_> = targets.iter().flatten().map(|target| target.address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Self { targets, addresses: addresses.into() }
    }

    /// Some of each family.
    pub(super) fn some_addresses(&self) -> impl Iterator<Item = &IpAddr> {
        let (v4, v6) = self.addresses.split_at(self.addresses.partition_point(IpAddr::is_ipv4));
        some(v4).chain(some(v6))
    }
}

/// Where an instance listens.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) weight: u16,
}

/// At most eight, from a place on that is another one each time: each is first as often as the others.
pub(super) fn some<T>(all: &[T]) -> impl Iterator<Item = &T> {
    let start = fastrand::usize(..all.len().max(1));
    all[start..].iter().chain(&all[..start]).take(MOST)
}

/// What an address is called below the name of its service. An instance's id may hold what no DNS name can.
pub(super) fn label(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string().replace('.', "-"),
        // In full, so that it does not begin or end with a dash.
        IpAddr::V6(v6) => v6.segments().map(|segment| format!("{segment:x}")).join("-"),
    }
}

/// The address that [`label`] calls so.
pub(super) fn address(text: &str) -> Option<IpAddr> {
    let v4 = text.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::from);
    let address = v4.or_else(|_| text.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::from)).ok()?;
    (label(address) == text).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_one_label() {
        for (text, expected) in
            [("10.0.2.45", "10-0-2-45"), ("fd00:213::1", "fd00-213-0-0-0-0-0-1"), ("::", "0-0-0-0-0-0-0-0")]
        {
            let known: IpAddr = text.parse().unwrap();
            assert_eq!(label(known), expected);
            assert_eq!(address(expected), Some(known));
        }
        for other in ["10-0-2", "10.0.2.45", "fd00-213--1", "FD00-213-0-0-0-0-0-1", "10-0-2-256", "", "x"] {
            assert_eq!(address(other), None, "{other}");
        }
    }

    #[test]
    fn some_are_eight_at_most_and_each_is_first_at_times() {
        let all: Vec<_> = (0..20).collect();
        let mut first = [0; 20];
        for _ in 0..4000 {
            let some: Vec<_> = some(&all).copied().collect();
            assert_eq!(some.len(), 8);
            assert!(some.iter().all(|one| some.iter().filter(|other| *other == one).count() == 1));
            first[some[0]] += 1;
        }
        assert!(first.iter().all(|times| (50..400).contains(times)), "{first:?}");
        let mut three: Vec<_> = some(&[1, 2, 3]).copied().collect();
        three.sort_unstable();
        assert_eq!(three, [1, 2, 3]);
        assert_eq!(some::<u8>(&[]).count(), 0);
    }
}
