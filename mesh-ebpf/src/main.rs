//! The kernel half of mesh: cgroup hooks that turn a VIP into a backend and back.
//!
//! A hook reads its context, asks `mesh-common`'s rules with map look-ups, and turns one
//! [`Outcome`](mesh_common::outcome::Outcome) into one counter and one verdict.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the BPF target has no stable atomic add")]
#![expect(unsafe_code, reason = "BPF helpers and the socket context are raw pointers")]

mod connect;
mod context;
mod getpeername;
mod maps;

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::context::{Family, Hook};

#[cgroup_sock_addr(connect4)]
fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    connect::run(&Hook::new(ctx, Family::V4))
}

#[cgroup_sock_addr(connect6)]
fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    connect::run(&Hook::new(ctx, Family::V6))
}

#[cgroup_sock_addr(getpeername4)]
fn mesh_getpeer4(ctx: SockAddrContext) -> i32 {
    getpeername::run(&Hook::new(ctx, Family::V4))
}

#[cgroup_sock_addr(getpeername6)]
fn mesh_getpeer6(ctx: SockAddrContext) -> i32 {
    getpeername::run(&Hook::new(ctx, Family::V6))
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
