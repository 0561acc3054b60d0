//! The socket-address context, seen the same way for both families.

use core::{
    ffi::c_void,
    ptr::{read_volatile, write_volatile},
};

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval, bpf_skc_to_mptcp_sock,
    },
    programs::SockAddrContext,
};
use mesh_common::{
    abi::{Connection, Frontend, Peers, Port},
    address::Address,
    outcome::Verdict,
};

use crate::{
    maps,
    sockets::{self, CREATE, storage},
};

/// Goes back to the kernel: let the call go on.
pub(crate) const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// The context of a hook of one family: that of the address the program passed. The family is
/// part of the type, so that every access to the context has a constant offset.
pub(crate) struct Hook<const V4: bool> {
    ctx: SockAddrContext,
}

// The verifier allows only whole-word accesses at constant offsets of the context. Volatile
// keeps LLVM from merging neighbours into a copy.
macro_rules! read {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the kernel passes a valid context for the duration of the program.
        unsafe { read_volatile(&raw const (*$ctx).$($field)+) }
    };
}

macro_rules! write {
    ($ctx:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for read; both address families may be written by these attach types.
        unsafe { write_volatile(&raw mut (*$ctx).$($field)+, $value) }
    };
}

impl<const V4: bool> Hook<V4> {
    #[inline(always)]
    pub(crate) fn new(ctx: SockAddrContext) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.ctx.sock_addr
    }

    /// The address in the call.
    #[inline(always)]
    pub(crate) fn address(&self) -> Address {
        let raw = self.raw();
        if V4 {
            return Address::from_v4_word(read!(raw, user_ip4));
        }
        Address::from_words([
            read!(raw, user_ip6[0]),
            read!(raw, user_ip6[1]),
            read!(raw, user_ip6[2]),
            read!(raw, user_ip6[3]),
        ])
    }

    #[inline(always)]
    pub(crate) fn port(&self) -> Port {
        Port::from_user_port(read!(self.raw(), user_port))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "IP protocols are one byte; MPTCP shows 6 here")]
    pub(crate) fn protocol(&self) -> u8 {
        read!(self.raw(), protocol) as u8
    }

    /// What the call dials, as a key of `FRONTENDS`.
    #[inline(always)]
    pub(crate) fn frontend(&self, address: Address) -> Frontend {
        Frontend::new(address, self.port(), self.protocol())
    }

    /// The cookie of the socket's network namespace.
    #[inline(always)]
    pub(crate) fn namespace(&self) -> u64 {
        // SAFETY: a plain helper call on the hook's own context (Linux 5.7).
        unsafe { bpf_get_netns_cookie(self.context()) }
    }

    /// The device that the socket is bound to; zero for none.
    #[inline(always)]
    pub(crate) fn device(&self) -> u32 {
        read!(self.socket().cast::<bpf_sock>(), bound_dev_if)
    }

    /// For helpers.
    #[inline(always)]
    pub(crate) fn context(&self) -> *mut c_void {
        self.raw().cast()
    }

    /// Puts another address in the call; false if this family cannot hold it.
    #[inline(always)]
    pub(crate) fn rewrite(&self, address: &Address, port: Port) -> bool {
        let raw = self.raw();
        if V4 {
            if !address.is_v4() {
                return false;
            }
            write!(raw, address.v4_word(), user_ip4);
        } else {
            let words = address.words();
            write!(raw, words[0], user_ip6[0]);
            write!(raw, words[1], user_ip6[1]);
            write!(raw, words[2], user_ip6[2]);
            write!(raw, words[3], user_ip6[3]);
        }
        write!(raw, port.user_port(), user_port);
        true
    }

    /// What a socket dialled.
    #[inline(always)]
    pub(crate) fn connection(&self) -> Option<&'static mut Connection> {
        sockets::connection(self.cookie(), self.socket())
    }

    /// Where to keep what a socket dials that has not dialled before.
    #[inline(always)]
    pub(crate) fn new_connection(&self) -> Option<&'static mut Connection> {
        sockets::new_connection(self.cookie(), self.socket())
    }

    /// Where a connect keeps what it dials, on no count any more; none if there is no memory for it.
    #[inline(always)]
    pub(crate) fn connection_to_write(&self) -> Option<&'static mut Connection> {
        // SAFETY: a plain helper call (Linux 5.19); null for a socket that is no subflow.
        let parent = unsafe { bpf_skc_to_mptcp_sock(self.socket()) };
        // An MPTCP socket connects through a subflow, a socket that the kernel made, and that is
        // what this hook is given; but `getpeername` is asked of the MPTCP socket, and it is what
        // the task closes.
        let before = if parent.is_null() {
            let cookie = self.cookie();
            match sockets::connection(cookie, self.socket()) {
                Some(connection) => connection,
                // Nothing of a new place is read here, because that would be waited for.
                None => return sockets::new_connection(cookie, self.socket()),
            }
        } else {
            // SAFETY: a value owned by the socket, which outlives the program.
            unsafe { storage(&maps::ORIGIN, parent.cast(), CREATE).as_mut()? }
        };
        maps::let_go(before);
        Some(before)
    }

    /// The backends an unconnected socket talks to, if there are any.
    #[inline(always)]
    pub(crate) fn peers(&self) -> Option<&Peers> {
        // SAFETY: as for `new_connection`.
        unsafe { storage(&maps::PEERS, self.socket(), 0).as_ref() }
    }

    /// The same, zeroed the first time; none if there is no memory for it.
    #[inline(always)]
    pub(crate) fn peers_mut(&self) -> Option<&'static mut Peers> {
        // SAFETY: as for `new_connection`.
        unsafe { storage(&maps::PEERS, self.socket(), CREATE).as_mut() }
    }

    #[inline(always)]
    fn socket(&self) -> *mut c_void {
        // SAFETY: as for read; the union's other member only describes its bits.
        unsafe { (*self.raw()).__bindgen_anon_1.sk.cast() }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: a plain helper call on the hook's own context.
        unsafe { bpf_get_socket_cookie(self.raw().cast()) }
    }
}

/// A verdict as the kernel wants it: 0 alone would be EPERM, so the errno goes first.
#[inline(always)]
pub(crate) fn answer(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Allow => ALLOW,
        Verdict::Refuse => {
            // SAFETY: a plain helper call; allowed for connect and sendmsg hooks since Linux 5.18.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            REFUSE
        }
    }
}
