//! The end of a socket, whichever way it comes: the task closed it, or is gone.

use aya_ebpf::{helpers::generated::bpf_get_socket_cookie, programs::SockContext};

use crate::{context, sockets};

#[inline(always)]
#[expect(clippy::needless_pass_by_value, reason = "a hook's context is given to one function")]
pub(crate) fn run(ctx: SockContext) -> i32 {
    // SAFETY: a plain helper call on the hook's own context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
    sockets::release(cookie, ctx.sock.cast());
    context::ALLOW
}
