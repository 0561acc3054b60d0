//! Servers that answer with their name.

use std::{
    io::Write,
    net::{SocketAddr, TcpListener, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// Serves until the test ends.
pub struct Server {
    pub address: SocketAddr,
    hits: Arc<AtomicU64>,
}

impl Server {
    /// A UDP server that answers every datagram.
    pub fn datagrams(name: &'static str, address: &str) -> Self {
        let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        let address = socket.local_addr().unwrap();
        let hits = Arc::new(AtomicU64::new(0));
        let counter = hits.clone();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                counter.fetch_add(1, Ordering::Relaxed);
                let _ = socket.send_to(name.as_bytes(), from);
            }
        });
        Self { address, hits }
    }

    /// A TCP server on a free port of 127.0.0.1.
    pub fn start(name: &'static str) -> Self {
        Self::start_at(name, "127.0.0.1:0")
    }

    pub fn start_at(name: &'static str, address: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        // The standard library's backlog of 128 is too short for the load tests.
        rustix::net::listen(&listener, 4096).unwrap();
        let address = listener.local_addr().unwrap();
        let hits = Arc::new(AtomicU64::new(0));
        let counter = hits.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                counter.fetch_add(1, Ordering::Relaxed);
                // A client that has gone is its own affair.
                let _ = stream.and_then(|mut stream| stream.write_all(name.as_bytes()));
            }
        });
        Self { address, hits }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Connections accepted, or datagrams received, so far.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }
}
