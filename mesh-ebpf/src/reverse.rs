//! Reverse translation: backend → VIP, in `getpeername` and in the source of a datagram.

use mesh_common::abi::Origin;

use crate::context::{self, Hook};

/// The peer of a connected socket.
#[inline(always)]
pub(crate) fn peer<const V4: bool>(hook: &Hook<V4>) -> i32 {
    let is_peer = peer_of(hook);
    if let Some(connection) = hook.connection()
        && is_peer(&connection.origin)
    {
        hook.rewrite(&connection.origin.vip, connection.origin.vip_port);
    }
    context::ALLOW
}

/// The source of a datagram.
#[inline(always)]
pub(crate) fn source<const V4: bool>(hook: &Hook<V4>) -> i32 {
    let is_peer = peer_of(hook);
    if let Some(connection) = hook.connection()
        && is_peer(&connection.origin)
    {
        hook.rewrite(&connection.origin.vip, connection.origin.vip_port);
    } else if let Some(origin) = hook.peers().and_then(|peers| peers.peers.iter().find(|peer| is_peer(peer)))
    {
        hook.rewrite(&origin.vip, origin.vip_port);
    }
    context::ALLOW
}

/// A socket may have dialled something else since: then the address is not the backend it got.
#[inline(always)]
fn peer_of<const V4: bool>(hook: &Hook<V4>) -> impl Fn(&Origin) -> bool {
    let (address, port) = (hook.address(), hook.port());
    move |origin| origin.backend_port == port && origin.backend_address == address
}
