//! Routes that refuse the VIP ranges: what no hook translates must not leave the node, nor reach
//! who listens on all addresses.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;

/// Who set the route, as `ip route` shows it.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(109);

/// Where 127.0.0.0/8 is found first: a range inside it needs its route beside it.
const LOCAL_TABLE: u8 = 255;

/// Refuses every address of `ranges` and no other, in the namespace of the calling thread. The
/// priority tells the routes of several daemons apart.
pub fn refuse(ranges: &[IpNet], priority: u32) -> io::Result<()> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let mut missing: Vec<_> = ranges.iter().map(|range| route(range, priority)).collect();
    for old in ours(&netlink, priority)? {
        let wanted = missing.iter().position(|route| destination(route) == destination(&old));
        match wanted {
            Some(at) => drop(missing.swap_remove(at)),
            None => netlink.ask(RouteNetlinkMessage::DelRoute(old), 0)?,
        }
    }
    for route in missing {
        let family = route.header.address_family;
        match netlink.ask(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_EXCL) {
            // Without IPv6 there is nothing to refuse.
            Err(_) if family == AddressFamily::Inet6 && !has_ipv6() => {}
            result => result?,
        }
    }
    Ok(())
}

/// Makes sure that the namespace of the calling thread has a table of local addresses. It has none before
/// anything is up in it; and a socket that is bound to an IPv4 address then would send from another one
/// for good (`inet_bind` in net/ipv4/af_inet.c: without a table, every address is a broadcast's).
pub fn make_local_table(priority: u32) -> io::Result<()> {
    /// RFC 5737: nobody has this address.
    const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 0));
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let route = route(&NOWHERE.into(), priority);
    // The table stays when its last route goes.
    netlink.ask(RouteNetlinkMessage::NewRoute(route.clone()), NLM_F_CREATE)?;
    netlink.ask(RouteNetlinkMessage::DelRoute(route), 0)
}

/// A network that the node has a route to, and that a VIP range takes addresses from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    range: IpNet,
    network: IpNet,
    /// Whether it takes all of them.
    pub whole: bool,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { range, network, whole } = self;
        if *whole {
            write!(f, "[vip] range {range} would make {network} unreachable, to which this node has a route")
        } else {
            write!(f, "[vip] range {range} is a part of {network}, to which this node has a route")
        }
    }
}

/// The networks, in the namespace of the calling thread, that lie in one of these ranges or around
/// it. The default route does not count, nor 127.0.0.0/8 around a range, nor what is refused anyway.
pub fn overlaps(ranges: &[IpNet]) -> io::Result<Vec<Overlap>> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let mut overlaps = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        let found = |message| match message {
            RouteNetlinkMessage::NewRoute(route) => ranges.iter().find_map(|range| overlap(*range, &route)),
            _ => None,
        };
        overlaps.extend(netlink.list(&RouteNetlinkMessage::GetRoute(all), found)?);
    }
    Ok(overlaps)
}

/// Every address of the node has a route too, in table local.
fn overlap(range: IpNet, route: &RouteMessage) -> Option<Overlap> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::from(*v4)),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::from(*v6)),
        _ => None,
    });
    let network = IpNet::new(address?, route.header.destination_prefix_length).ok()?;
    let whole = range.contains(&network);
    let is_reached = match route.header.kind {
        RouteType::Unicast => true,
        RouteType::Local => whole,
        _ => false,
    };
    let counts = is_reached && route.header.protocol != PROTOCOL && network.prefix_len() > 0;
    (counts && (whole || network.contains(&range))).then_some(Overlap { range, network, whole })
}

/// The routes with our protocol number and this priority.
fn ours(netlink: &Netlink, priority: u32) -> io::Result<Vec<RouteMessage>> {
    netlink.filter()?;
    let mut ours = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        all.header.table = LOCAL_TABLE;
        all.header.protocol = PROTOCOL;
        let is_ours = |message| match message {
            RouteNetlinkMessage::NewRoute(route) => (route.header.protocol == PROTOCOL
                && route.attributes.contains(&RouteAttribute::Priority(priority)))
            .then_some(route),
            _ => None,
        };
        match netlink.list(&RouteNetlinkMessage::GetRoute(all), is_ours) {
            Ok(found) => ours.extend(found),
            // A namespace where nothing was ever up has no such table yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ours)
}

fn destination(route: &RouteMessage) -> (u8, Option<&RouteAttribute>) {
    let is_destination = |attribute: &&RouteAttribute| matches!(attribute, RouteAttribute::Destination(_));
    (route.header.destination_prefix_length, route.attributes.iter().find(is_destination))
}

fn route(range: &IpNet, priority: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    let (family, address) = match range.network() {
        IpAddr::V4(v4) => (AddressFamily::Inet, RouteAddress::Inet(v4)),
        IpAddr::V6(v6) => (AddressFamily::Inet6, RouteAddress::Inet6(v6)),
    };
    route.header.address_family = family;
    route.header.destination_prefix_length = range.prefix_len();
    route.header.table = LOCAL_TABLE;
    route.header.protocol = PROTOCOL;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unreachable;
    route.attributes = vec![RouteAttribute::Destination(address), RouteAttribute::Priority(priority)];
    route
}

fn has_ipv6() -> bool {
    std::fs::read_to_string("/proc/thread-self/net/if_inet6").is_ok_and(|addresses| !addresses.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(range: &str, network: &str, kind: RouteType) -> Option<bool> {
        let mut route = route(&network.parse().unwrap(), 1);
        route.header.protocol = RouteProtocol::Kernel;
        route.header.kind = kind;
        overlap(range.parse().unwrap(), &route).map(|overlap| overlap.whole)
    }

    #[test]
    fn a_range_may_lie_in_a_wider_network_but_not_around_one() {
        assert_eq!(found("10.0.0.0/8", "10.213.0.0/24", RouteType::Unicast), Some(true));
        assert_eq!(found("10.213.0.0/24", "10.213.0.0/24", RouteType::Unicast), Some(true));
        assert_eq!(found("10.0.0.0/8", "10.213.0.1/32", RouteType::Local), Some(true));
        assert_eq!(found("10.96.0.0/12", "10.0.0.0/8", RouteType::Unicast), Some(false));
        assert_eq!(found("fd00::/64", "fd00::2/128", RouteType::Local), Some(true));
        for (range, network) in [("127.128.0.0/10", "127.0.0.0/8"), ("127.128.0.0/10", "127.0.0.1/32")] {
            assert_eq!(found(range, network, RouteType::Local), None, "{network} is the node's own");
        }
        for (range, network, kind) in [
            ("10.0.0.0/8", "0.0.0.0/0", RouteType::Unicast),
            ("fd00::/64", "::/0", RouteType::Unicast),
            ("10.0.0.0/8", "10.1.0.0/16", RouteType::BlackHole),
            ("10.0.0.0/8", "11.0.0.0/8", RouteType::Unicast),
        ] {
            assert_eq!(found(range, network, kind), None, "{network}");
        }
        let ours = route(&"10.0.0.0/8".parse().unwrap(), 1);
        assert_eq!(overlap("10.0.0.0/8".parse().unwrap(), &ours), None);
    }

    #[test]
    fn the_kernel_narrows_a_list_of_routes() {
        let netlink = Netlink::open(NETLINK_ROUTE).unwrap();
        netlink.filter().unwrap();
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = AddressFamily::Inet;
        wanted.header.table = LOCAL_TABLE;
        wanted.header.protocol = PROTOCOL;
        let others = netlink.list(&RouteNetlinkMessage::GetRoute(wanted), |message| match message {
            RouteNetlinkMessage::NewRoute(route) if route.header.protocol == PROTOCOL => None,
            other => Some(other),
        });
        assert!(others.unwrap_or_default().is_empty());
    }
}
