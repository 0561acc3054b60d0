//! The end of a socket, whichever way it comes: the task closed it, or is gone.

use aya_ebpf::programs::SockContext;

use crate::{
    context::{self, storage},
    forward, maps,
};

#[inline(always)]
#[expect(clippy::needless_pass_by_value, reason = "a hook's context is given to one function")]
pub(crate) fn run(ctx: SockContext) -> i32 {
    // SAFETY: a value owned by the socket, which outlives the program; nobody else has the socket any more.
    if let Some(origin) = unsafe { storage(&maps::ORIGIN, ctx.sock.cast(), 0).as_mut() } {
        forward::release(origin);
    }
    context::ALLOW
}
