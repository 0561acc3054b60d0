//! The sockets of a namespace: listed, and closed under whoever holds them (`ss -K`).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use netlink_packet_core::{DefaultNla, Emitable, NetlinkSerializable, Nla, NlasIterator};
use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6},
    inet::{self, ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::netlink::Netlink;
use crate::{model::Protocol, plan::Endpoint};
use mesh_common::abi::Port;

/// A TCP or UDP socket.
#[derive(Clone, Debug)]
pub struct Socket {
    family: u8,
    protocol: u8,
    id: SocketId,
}

impl Socket {
    /// The kernel's number for it, never used again.
    pub fn cookie(&self) -> u64 {
        u64::from_ne_bytes(self.id.cookie)
    }

    /// What it is connected to.
    pub fn peer(&self) -> Endpoint {
        Endpoint { address: self.id.destination_address.into(), port: Port::new(self.id.destination_port) }
    }
}

/// The sockets of a protocol, both families. The kernel does not list a TCP socket before it
/// listens or connects nor after it is closed, nor a UDP socket without a port.
pub fn list(protocol: u8) -> io::Result<Vec<Socket>> {
    let netlink = Netlink::open(NETLINK_SOCK_DIAG)?;
    let mut sockets = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
        let socket = |message| match message {
            SockDiagMessage::InetResponse(response) => {
                Some(Socket { family, protocol, id: response.header.socket_id })
            }
            _ => None,
        };
        sockets.extend(netlink.list(&request(family, protocol, id), socket)?);
    }
    Ok(sockets)
}

/// The TCP and MPTCP sockets that have a value in a map of socket storage, and the values. An MPTCP
/// socket stands for its first subflow, which has the same addresses.
///
/// The kernel shows no storage of a UDP socket (`inet_sk_diag_fill()` in net/ipv4/inet_diag.c),
/// and MPTCP sockets since Linux 5.9.
pub fn stored(map: BorrowedFd<'_>) -> io::Result<Vec<(Socket, Vec<u8>)>> {
    const MPTCP: u32 = 262;
    let netlink = Netlink::open(NETLINK_SOCK_DIAG)?;
    let mut stored = Vec::new();
    for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        for protocol in [Protocol::Tcp.number().into(), MPTCP] {
            let map = DefaultNla::new(REQUEST_MAP, map.as_raw_fd().to_ne_bytes().to_vec());
            let attributes = [
                DefaultNla::new(REQUEST_STORAGES, emitted(&[map])),
                DefaultNla::new(REQUEST_PROTOCOL, protocol.to_ne_bytes().to_vec()),
            ];
            let request = request(family, Protocol::Tcp.number(), id.clone());
            let socket = |message| {
                let SockDiagMessage::InetResponse(response) = message else { return None };
                let value = response.nlas.iter().find_map(value_of)?;
                let mut id = response.header.socket_id;
                if protocol == MPTCP {
                    // That of the subflow is not told: whichever it is.
                    id.cookie = [0xff; 8];
                }
                Some((Socket { family, protocol: Protocol::Tcp.number(), id }, value))
            };
            stored.extend(netlink.list(&Extended { request, attributes: emitted(&attributes) }, socket)?);
        }
    }
    Ok(stored)
}

// Numbers of linux/inet_diag.h and linux/sock_diag.h.
const REQUEST_STORAGES: u16 = 2;
const REQUEST_PROTOCOL: u16 = 3;
const REQUEST_MAP: u16 = 1;
/// Marked as one that holds others.
const STORAGES: u16 = 20 | 1 << 15;
const STORAGE: u16 = 1;
const STORAGE_VALUE: u16 = 3;

/// The value of the one map that was asked for.
fn value_of(attribute: &inet::nlas::Nla) -> Option<Vec<u8>> {
    let inet::nlas::Nla::Other(storages) = attribute else { return None };
    if storages.kind() != STORAGES {
        return None;
    }
    let storages = emitted_value(storages);
    let inside = |bytes: &[u8], kind| {
        let found = NlasIterator::new(bytes).flatten().find(|inner| inner.kind() == kind);
        found.map(|inner| inner.value().to_vec())
    };
    inside(&inside(&storages, STORAGE)?, STORAGE_VALUE)
}

fn emitted(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

fn emitted_value(attribute: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

/// A request with attributes, which the library does not know.
#[derive(Clone)]
struct Extended {
    request: SockDiagMessage,
    attributes: Vec<u8>,
}

impl NetlinkSerializable for Extended {
    fn message_type(&self) -> u16 {
        self.request.message_type()
    }

    fn buffer_len(&self) -> usize {
        NetlinkSerializable::buffer_len(&self.request) + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (request, attributes) = buffer.split_at_mut(NetlinkSerializable::buffer_len(&self.request));
        self.request.serialize(request);
        attributes.copy_from_slice(&self.attributes);
    }
}

/// Closes a socket; false if it is gone already.
pub fn destroy(socket: &Socket) -> io::Result<bool> {
    let request = request(socket.family, socket.protocol, socket.id.clone());
    match Netlink::open(NETLINK_SOCK_DIAG)?.ask(SockDiagDestroy::new(request), 0) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn request(family: u8, protocol: u8, socket_id: SocketId) -> SockDiagMessage {
    let (extensions, states) = (ExtensionFlags::empty(), StateFlags::all());
    SockDiagMessage::InetRequest(InetRequest { family, protocol, extensions, states, socket_id })
}
