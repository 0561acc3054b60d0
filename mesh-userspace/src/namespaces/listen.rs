//! Listening for queries in other network namespaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::PathBuf,
    sync::Arc,
};

use mesh_common::abi::{NameServer, Namespace, Port};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
};
use tokio::{runtime::Handle, task::AbortHandle};

use crate::{
    datapath::{self, Excluded, NameServers, Pins, Sights},
    dns,
    netns::{NetNs, routes},
    sys,
};

/// The ports to try, from the daemon's own on. Not 53, so that a task can be a name server on all addresses.
const PORTS: std::ops::RangeInclusive<u16> = 54..=65;

/// How many TCP connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// The daemon's listeners, and what the kernel knows of them.
pub struct Names {
    servers: NameServers,
    sights: Sights,
    excluded: Excluded,
    /// Cgroups, each with everything below it, whose queries go where they are sent.
    exclude: Vec<PathBuf>,
    core: Arc<dns::Core>,
    runtime: Handle,
    open: BTreeMap<u64, Open>,
}

/// What is open in a namespace.
struct Open {
    cookie: u64,
    serving: Vec<AbortHandle>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.serving.iter().for_each(AbortHandle::abort);
    }
}

/// A UDP socket and a TCP listener at one address.
type Pair = (UdpSocket, TcpListener);

impl Names {
    /// Nothing is known yet of any namespace.
    pub fn new(
        pins: &Pins,
        exclude: Vec<PathBuf>,
        core: Arc<dns::Core>,
        runtime: Handle,
    ) -> datapath::Result<Self> {
        let mut servers = NameServers::open(pins)?;
        // What an earlier daemon left, and what it was told of.
        servers.retain(|_| false)?;
        let (sights, excluded) = (Sights::open(pins)?, Excluded::open(pins)?);
        Ok(Self { servers, sights, excluded, exclude, core, runtime, open: BTreeMap::new() })
    }

    /// Excludes those that are there now: one that was made again has another id.
    pub(super) fn exclude(&mut self) -> io::Result<()> {
        // The number of its directory is a cgroup's id.
        let ids = self.exclude.iter().filter_map(|cgroup| fs::metadata(cgroup).ok()).map(|meta| meta.ino());
        self.excluded.set(&ids.collect()).map_err(io::Error::other)
    }

    /// Listens in a namespace, unless it does so already. The priority is that of the daemon's routes.
    pub(super) fn listen(&mut self, namespace: &NetNs, priority: u32) -> io::Result<()> {
        if self.open.contains_key(&namespace.inode) {
            return Ok(());
        }
        let (cookie, pairs) = namespace.run(|| {
            let mut pairs = Vec::new();
            routes::make_local_table(priority)?;
            for address in addresses(priority) {
                pairs.extend(pair(address, priority)?);
            }
            let cookie = pairs.first().map(|(udp, _)| sys::netns_cookie(udp.as_fd())).transpose()?;
            Ok((cookie, pairs))
        })?;
        let Some(cookie) = cookie else { return Ok(()) };
        let _runtime = self.runtime.enter();
        let mut open = Open { cookie, serving: Vec::new() };
        for (udp, tcp) in pairs {
            let address = udp.local_addr()?;
            let listener = dns::Listener::new(udp, tcp)?;
            open.serving.push(self.runtime.spawn(listener.serve(self.core.clone())).abort_handle());
            let server = NameServer::new(address.ip().into(), Port::new(address.port()), std::process::id());
            let key = Namespace::new(cookie, address.is_ipv4());
            self.servers.set(key, server).map_err(io::Error::other)?;
        }
        self.open.insert(namespace.inode, open);
        Ok(())
    }

    /// Listens where queries were seen.
    pub(super) fn answer_sights(&mut self, priority: u32) -> io::Result<()> {
        let mut result = Ok(());
        for sight in self.sights.take() {
            match NetNs::of_process(sight.process) {
                Ok(Some(namespace)) => result = result.and(self.listen(&namespace, priority)),
                Ok(None) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result.and(self.forget_rest())
    }

    /// Leaves all namespaces but these.
    pub(super) fn retain(&mut self, present: &BTreeSet<u64>) -> io::Result<()> {
        let before = self.open.len();
        self.open.retain(|inode, _| present.contains(inode));
        if self.open.len() == before { Ok(()) } else { self.forget_rest() }
    }

    /// The kernel tells again of namespaces that it does not know.
    fn forget_rest(&mut self) -> io::Result<()> {
        let open: BTreeSet<_> = self.open.values().map(|open| open.cookie).collect();
        self.servers.retain(|namespace| open.contains(&namespace.cookie)).map_err(io::Error::other)
    }
}

impl AsFd for Names {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sights.as_fd()
    }
}

/// Where a daemon is reached in every namespace, by the priority of its routes: the same after a restart,
/// because sockets that wait for an answer ask there again, and hardly ever another daemon's.
fn addresses(priority: u32) -> [IpAddr; 2] {
    let [.., high, low] = priority.to_be_bytes();
    [Ipv4Addr::new(127, 64, high, low).into(), Ipv6Addr::LOCALHOST.into()]
}

/// Sockets in the namespace of the calling thread; none where it does not have this family.
fn pair(address: IpAddr, priority: u32) -> io::Result<Option<Pair>> {
    let ports: Vec<_> = PORTS.collect();
    let (before, from) = ports.split_at(priority as usize % ports.len());
    for port in from.iter().chain(before) {
        let address = SocketAddr::new(address, *port);
        let sockets = open(address, SocketType::DGRAM)
            .and_then(|udp| open(address, SocketType::STREAM).map(|tcp| (udp.into(), tcp.into())));
        match sockets {
            Ok(sockets) => return Ok(Some(sockets)),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::ADDRINUSE) => {}
                Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => return Ok(None),
                _ => return Err(error),
            },
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, format!("ports {PORTS:?} of {address} are all in use")))
}

fn open(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    // The namespace is new: its loopback device may not be up yet.
    if address.is_ipv4() {
        sockopt::set_ip_freebind(&socket, true)?;
    } else {
        sockopt::set_ipv6_v6only(&socket, true)?;
        sockopt::set_ipv6_freebind(&socket, true)?;
    }
    // By this the hooks know it from a socket of somebody else's that came to have the address.
    sys::set_priority(socket.as_fd(), std::process::id())?;
    let is_stream = kind == SocketType::STREAM;
    if is_stream {
        // What an earlier daemon answered here may still be waited for.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &address)?;
    if is_stream {
        listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}
