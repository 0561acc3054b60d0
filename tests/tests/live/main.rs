//! mesh on a real kernel, with real sockets and real servers. Needs root: `cargo xtask test`.

mod affinity;
mod attack;
mod commands;
mod connect;
mod daemon;
mod datagram;
mod dns;
mod eject;
mod embedded;
mod hammer;
mod input;
mod intercept;
mod kept;
mod kubernetes;
mod left;
mod load;
mod matrix;
mod occupancy;
mod policy;
mod routes;
mod servers;
mod sockets;
mod storm;
mod thirdparty;
mod versions;
mod watchdog;
