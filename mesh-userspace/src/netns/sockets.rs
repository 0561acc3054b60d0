//! The sockets of a namespace: listed, and closed under whoever holds them (`ss -K`).

use std::io;

use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::netlink::Netlink;
use crate::plan::Endpoint;
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
