//! The kernel half of mesh: cgroup hooks that turn a VIP into a backend and back.
//!
//! A hook reads its context, asks `mesh-common`'s rules with map look-ups, and turns one
//! [`Outcome`](mesh_common::outcome::Outcome) into one counter and one verdict.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the BPF target has no stable atomic add")]
#![expect(unsafe_code, reason = "BPF helpers and the socket context are raw pointers")]

mod context;
mod forward;
mod health;
mod maps;
mod names;
mod release;
mod reverse;
mod sockets;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};

use crate::context::Hook;

#[cgroup_sock_addr(connect4)]
fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    forward::connect(&Hook::<true>::new(ctx))
}

#[cgroup_sock_addr(connect6)]
fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    forward::connect(&Hook::<false>::new(ctx))
}

#[cgroup_sock_addr(getpeername4)]
fn mesh_getpeer4(ctx: SockAddrContext) -> i32 {
    reverse::peer(&Hook::<true>::new(ctx))
}

#[cgroup_sock_addr(getpeername6)]
fn mesh_getpeer6(ctx: SockAddrContext) -> i32 {
    reverse::peer(&Hook::<false>::new(ctx))
}

#[cgroup_sock_addr(sendmsg4)]
fn mesh_sendmsg4(ctx: SockAddrContext) -> i32 {
    forward::datagram(&Hook::<true>::new(ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn mesh_sendmsg6(ctx: SockAddrContext) -> i32 {
    forward::datagram(&Hook::<false>::new(ctx))
}

#[cgroup_sock_addr(recvmsg4)]
fn mesh_recvmsg4(ctx: SockAddrContext) -> i32 {
    reverse::source(&Hook::<true>::new(ctx))
}

#[cgroup_sock_addr(recvmsg6)]
fn mesh_recvmsg6(ctx: SockAddrContext) -> i32 {
    reverse::source(&Hook::<false>::new(ctx))
}

#[cgroup_sock(sock_release)]
fn mesh_release(ctx: SockContext) -> i32 {
    release::run(ctx)
}

#[sock_ops]
fn mesh_sockops(ctx: SockOpsContext) -> u32 {
    health::run(ctx).cast_unsigned()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
