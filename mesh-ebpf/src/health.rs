//! What the handshakes of translated sockets say of their backends.
//!
//! A callback asked for at the start of a handshake sees how it ends. One that the task ended by
//! closing the socket is not seen: by then `sock_release` has taken the socket's connection away.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RETRANS_CB, BPF_SOCK_OPS_RETRANS_CB_FLAG,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
        BPF_TCP_SYN_SENT,
    },
    helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_skc_to_mptcp_sock},
    programs::SockOpsContext,
};
use mesh_common::{
    abi::{Connection, Origin, Penalty, Port},
    health::{Fitness, HealthWord},
};

use crate::{context, maps, sockets};

const CALLBACKS: u32 = BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RETRANS_CB_FLAG;

/// How often a change that another CPU gets in the way of is tried.
const TRIES: u32 = 4;

#[inline(always)]
#[expect(clippy::needless_pass_by_value, reason = "a hook's context is given to one function")]
pub(crate) fn run(ctx: SockOpsContext) -> i32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            if let Some(connection) = connection(&ctx)
                && connection.flags & Connection::DIALS != 0
            {
                connection.flags &= !Connection::DIALS;
                // A connect to a VIP that failed before its handshake; this is another one.
                if !is_peer(&ctx, &connection.origin) {
                    maps::let_go(connection);
                    return context::ALLOW;
                }
                connection.flags |= Connection::WATCHED;
                // What another program has asked for on this socket stays as it is.
                let ours = CALLBACKS & !ctx.cb_flags();
                connection.flags |= ours;
                ask(&ctx, ctx.cb_flags() | ours);
            }
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB if ctx.cb_flags() & CALLBACKS != 0 => {
            if let Some(connection) = watched(&ctx) {
                succeeded(connection);
                stop(&ctx, connection);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(0) == BPF_TCP_SYN_SENT && ctx.arg(1) == BPF_TCP_CLOSE => {
            if let Some(connection) = watched(&ctx) {
                failed(connection);
                maps::let_go(connection);
                stop(&ctx, connection);
            }
        }
        // The packet did not leave this machine: a firewall of its own, no memory.
        BPF_SOCK_OPS_RETRANS_CB if ctx.arg(2).cast_signed() < 0 => {
            if let Some(connection) = watched(&ctx) {
                stop(&ctx, connection);
            }
        }
        _ => {}
    }
    context::ALLOW
}

#[inline(always)]
fn connection(ctx: &SockOpsContext) -> Option<&'static mut Connection> {
    // SAFETY: plain accesses to the hook's own context; the union's other member only describes its bits.
    let (cookie, socket) = unsafe { (bpf_get_socket_cookie(ctx.ops.cast()), (*ctx.ops).__bindgen_anon_2.sk) };
    if socket.is_null() {
        return None;
    }
    // SAFETY: a plain helper call; null for a socket that is no subflow of an MPTCP socket.
    let parent = unsafe { bpf_skc_to_mptcp_sock(socket.cast()) };
    let connection = if parent.is_null() {
        sockets::connection(cookie, socket.cast())?
    } else {
        // SAFETY: a value owned by the socket, which outlives the program.
        unsafe { sockets::storage(&maps::ORIGIN, parent.cast(), 0).as_mut()? }
    };
    (connection.held != 0).then_some(connection)
}

/// The same, if the end of its handshake is still to be heard of.
#[inline(always)]
fn watched(ctx: &SockOpsContext) -> Option<&'static mut Connection> {
    connection(ctx).filter(|connection| connection.flags & Connection::WATCHED != 0)
}

/// Whether a socket dials the backend that it was sent to.
#[inline(always)]
fn is_peer(ctx: &SockOpsContext, origin: &Origin) -> bool {
    // SAFETY: the kernel passes a valid context; volatile keeps each access one whole word.
    let (v4, v6, port) = unsafe {
        let word = |at: usize| read_volatile(&raw const (*ctx.ops).remote_ip6[at]);
        let v4 = read_volatile(&raw const (*ctx.ops).remote_ip4);
        (v4, [word(0), word(1), word(2), word(3)], read_volatile(&raw const (*ctx.ops).remote_port))
    };
    let backend = &origin.backend_address;
    let same = if backend.is_v4() { backend.v4_word() == v4 } else { backend.words() == v6 };
    same && origin.backend_port == Port::from_remote_port(port)
}

#[inline(always)]
fn stop(ctx: &SockOpsContext, connection: &mut Connection) {
    let ours = connection.flags & CALLBACKS;
    connection.flags &= !(CALLBACKS | Connection::WATCHED);
    ask(ctx, ctx.cb_flags() & !ours);
}

#[inline(always)]
fn ask(ctx: &SockOpsContext, callbacks: u32) {
    // All bits are ones the kernel knows, so this cannot fail.
    let _ = ctx.set_cb_flags(callbacks.cast_signed());
}

#[inline(always)]
fn succeeded(connection: &Connection) {
    let id = connection.origin.backend;
    for _ in 0..TRIES {
        let old = maps::health(id);
        if old == HealthWord::default() {
            return;
        }
        if maps::swap_health(id, old, HealthWord::default()) {
            if old.is_ejected() {
                maps::give_ejection_back(connection.origin.service);
            }
            return;
        }
    }
}

#[inline(always)]
fn failed(connection: &Connection) {
    let (id, service) = (connection.origin.backend, connection.origin.service);
    let Some(settings) = maps::settings(service) else { return };
    // A backend that is gone has nothing to lose, and its id may be another's soon.
    if settings.eject.failures == 0 || maps::backend(id).is_none_or(|backend| backend.service != service) {
        return;
    }
    for _ in 0..TRIES {
        let old = maps::health(id);
        if old.is_ejected() && connection.flags & Connection::PROBE == 0 {
            // Dialled before it was ejected, or because everything else was too.
            return;
        }
        let new = old.failed();
        let due = new.failures() >= u64::from(settings.eject.failures);
        let ejects = !old.is_ejected() && due && maps::take_ejection(service, settings.eject.most);
        let new = if ejects || old.is_ejected() { new.ejected(now_ms(), settings.penalty) } else { new };
        if maps::swap_health(id, old, new) {
            return;
        }
        if ejects {
            maps::give_ejection_back(service);
        }
    }
}

/// Whether a backend may be chosen now. Whoever is told that it is due is the one to try it.
#[inline(always)]
pub(crate) fn fitness(id: u32, now_ms: u64, penalty: Penalty) -> Fitness {
    let word = maps::health(id);
    let fitness = word.fitness(now_ms);
    if fitness == Fitness::Due && !maps::swap_health(id, word, word.tried(now_ms, penalty)) {
        return Fitness::Ejected;
    }
    fitness
}

/// Milliseconds since the machine started.
#[inline(always)]
pub(crate) fn now_ms() -> u64 {
    // SAFETY: a plain helper call.
    unsafe { bpf_ktime_get_ns() / 1_000_000 }
}
