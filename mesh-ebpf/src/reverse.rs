//! Reverse translation: backend → VIP, in `getpeername` and in the source of a datagram.

use mesh_common::abi::Origin;

use crate::context::{self, Hook};

#[inline(always)]
pub(crate) fn run<const V4: bool>(hook: &Hook<V4>) -> i32 {
    let (address, port) = (hook.address(), hook.port());
    // A socket may have dialled something else since: then the peer is not the backend it got.
    let matches = |origin: &&Origin| origin.backend_port == port && origin.backend_address == address;
    let connected = hook.origin().filter(matches);
    let peer = || hook.peers().and_then(|peers| peers.peers.iter().find(matches));
    if let Some(origin) = connected.or_else(peer) {
        hook.rewrite(&origin.vip, origin.vip_port);
    }
    context::ALLOW
}
