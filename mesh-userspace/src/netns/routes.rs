//! Routes that refuse the VIP ranges: what no hook translates must not leave the node, nor reach
//! who listens on all addresses.

use std::{io, net::IpAddr};

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

/// The routes with our protocol number and this priority.
fn ours(netlink: &Netlink, priority: u32) -> io::Result<Vec<RouteMessage>> {
    let mut ours = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        for message in netlink.list::<RouteNetlinkMessage>(&RouteNetlinkMessage::GetRoute(all))? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            let priority = RouteAttribute::Priority(priority);
            if route.header.protocol == PROTOCOL && route.attributes.contains(&priority) {
                ours.push(route);
            }
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
