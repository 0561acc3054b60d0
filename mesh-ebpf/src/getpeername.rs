//! Reverse translation: backend → VIP.

use crate::context::{self, Hook};

#[inline(always)]
pub(crate) fn run(hook: &Hook) -> i32 {
    // A socket may have dialled something else since: then the peer is not the backend it got.
    if let Some(origin) = hook.origin()
        && origin.backend_port == hook.port()
        && origin.backend_address == hook.address()
    {
        hook.rewrite(&origin.vip, origin.vip_port);
    }
    context::ALLOW
}
