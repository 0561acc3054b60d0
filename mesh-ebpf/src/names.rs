//! Queries go to the daemon, as long as it listens in the socket's network namespace; else to the name
//! server that was asked.

use core::{ffi::c_void, ptr::read_volatile};

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_pid_tgid, bpf_sk_lookup_tcp, bpf_sk_lookup_udp,
        bpf_sk_release,
    },
};
use mesh_common::abi::{IPPROTO_TCP, NameServer, Namespace, Origin, Port, Sight};

use crate::{context::Hook, maps};

const PORT: Port = Port::new(53);

/// For the socket look-ups: in the namespace of the socket that calls.
const CURRENT_NETNS: u64 = u64::MAX;

/// `LOOPBACK_IFINDEX` of linux/net/flow.h: the same in every network namespace.
const LOOPBACK: u32 = 1;

/// How deep below the root of the hierarchy a cgroup may be excluded.
const DEPTH: i32 = 32;

/// What a query that the daemon gets is to be taken for.
#[inline(always)]
pub(crate) fn redirected<const V4: bool>(hook: &Hook<V4>) -> Option<Origin> {
    if hook.port() != PORT {
        return None;
    }
    let asked = hook.address();
    let namespace = Namespace::new(hook.namespace(), asked.is_v4());
    let Some(server) = maps::name_server(&namespace) else {
        if maps::see(&namespace) {
            maps::tell(Sight::new(hook.namespace(), process()));
        }
        return None;
    };
    // The daemon asks the name servers that it was told.
    let is_exempt = server.port == Port::default() || server.process == process() || is_excluded();
    // Nothing on the loopback device is reached through another one.
    let is_elsewhere = !matches!(hook.device(), 0 | LOOPBACK);
    if is_exempt || is_elsewhere || !is_open(hook, server) {
        return None;
    }
    Some(Origin {
        vip: asked,
        vip_port: PORT,
        backend_address: server.address,
        backend_port: server.port,
        service: 0,
        backend: 0,
    })
}

/// Whether the task is in a cgroup whose queries go where they are sent, or below one.
#[inline(always)]
fn is_excluded() -> bool {
    // Nobody excludes the root.
    for level in 1..DEPTH {
        // SAFETY: a plain helper call; zero below the task's own cgroup.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            return false;
        }
        if maps::is_excluded(cgroup) {
            return true;
        }
    }
    false
}

/// Whether the daemon listens there: its sockets, which have its process id as their priority, end with it,
/// whatever it dies of.
#[inline(always)]
fn is_open<const V4: bool>(hook: &Hook<V4>, server: &NameServer) -> bool {
    // SAFETY: integers, all of which may be zero.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    // As in a packet that comes from the listener's own address.
    let size = if server.address.is_v4() {
        // SAFETY: writes of plain integers to a union.
        unsafe {
            let v4 = &mut tuple.__bindgen_anon_1.ipv4;
            (v4.saddr, v4.daddr) = (server.address.v4_word(), server.address.v4_word());
            v4.dport = server.port.bits();
        }
        12
    } else {
        // SAFETY: as above.
        unsafe {
            let v6 = &mut tuple.__bindgen_anon_1.ipv6;
            (v6.saddr, v6.daddr) = (server.address.words(), server.address.words());
            v6.dport = server.port.bits();
        }
        36
    };
    let tuple = &raw mut tuple;
    // SAFETY: plain helper calls; what they find is given back.
    unsafe {
        let found = if hook.protocol() == IPPROTO_TCP {
            bpf_sk_lookup_tcp(hook.context(), tuple, size, CURRENT_NETNS, 0)
        } else {
            bpf_sk_lookup_udp(hook.context(), tuple, size, CURRENT_NETNS, 0)
        };
        if found.is_null() {
            return false;
        }
        let is_ours = read_volatile(&raw const (*found).priority) == server.process;
        bpf_sk_release(found.cast::<c_void>());
        is_ours
    }
}

/// The process that calls, as the initial PID namespace numbers it.
#[inline(always)]
fn process() -> u32 {
    // SAFETY: a plain helper call.
    unsafe { (bpf_get_current_pid_tgid() >> 32) as u32 }
}
