//! What the benchmark compares the hooks with, hooks that do nothing and hooks that translate but
//! keep nothing of the socket; and look-ups without a socket, for tests and benchmarks. Not part of the daemon.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the BPF target has no stable atomic add")]
#![expect(unsafe_code, reason = "BPF helpers and the socket context are raw pointers")]
#![expect(dead_code, reason = "a part of each module is not measured by itself")]

mod context;
mod forward;
mod health;
mod lookup;
mod maps;
mod names;
mod sockets;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext, TcContext},
};
use mesh_common::outcome::Outcome;

use crate::context::{ALLOW, Hook};

#[cgroup_sock_addr(connect4)]
fn empty_connect4(_: SockAddrContext) -> i32 {
    ALLOW
}

#[cgroup_sock_addr(connect6)]
fn empty_connect6(_: SockAddrContext) -> i32 {
    ALLOW
}

#[cgroup_sock_addr(sendmsg4)]
fn empty_sendmsg4(_: SockAddrContext) -> i32 {
    ALLOW
}

#[cgroup_sock_addr(recvmsg4)]
fn empty_recvmsg4(_: SockAddrContext) -> i32 {
    ALLOW
}

#[cgroup_sock(sock_release)]
fn empty_release(_: SockContext) -> i32 {
    ALLOW
}

#[sock_ops]
fn empty_sockops(_: SockOpsContext) -> u32 {
    ALLOW.cast_unsigned()
}

#[cgroup_sock_addr(connect4)]
fn plain_connect4(ctx: SockAddrContext) -> i32 {
    plain(&Hook::<true>::new(ctx))
}

#[cgroup_sock_addr(connect6)]
fn plain_connect6(ctx: SockAddrContext) -> i32 {
    plain(&Hook::<false>::new(ctx))
}

#[cgroup_sock_addr(sendmsg4)]
fn plain_sendmsg4(ctx: SockAddrContext) -> i32 {
    plain(&Hook::<true>::new(ctx))
}

#[inline(always)]
fn plain<const V4: bool>(hook: &Hook<V4>) -> i32 {
    if !maps::in_vip_ranges(&hook.address()) {
        return ALLOW;
    }
    forward::finish(forward::redirect(hook).err().unwrap_or(Outcome::Translated))
}

#[classifier]
fn lookup_draw(_: TcContext) -> i32 {
    lookup::draw()
}

#[classifier]
fn lookup_choose(_: TcContext) -> i32 {
    lookup::choose()
}

#[classifier]
fn lookup_check(_: TcContext) -> i32 {
    lookup::check()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
