//! Servers that answer with their name, and a name server.

use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpListener, UdpSocket},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

use crate::{Dialogue, free_address, netns::Host, wait_until};

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

    /// A TCP server on 127.0.0.1 that greets its clients with one byte, and keeps their connections open.
    pub fn keeping() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let hits = Arc::new(AtomicU64::new(0));
        let counter = hits.clone();
        thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                counter.fetch_add(1, Ordering::Relaxed);
                let mut stream = stream.unwrap();
                let _ = stream.write_all(b"x");
                kept.push(stream);
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

/// A TCP server at port 8080 of a host. A Python statement says what becomes of each connection `s`
/// that came from `source`; the list `kept` keeps it open.
pub fn on(host: &Host, act: &str) -> Dialogue {
    let program = format!(
        r#"
import socket, sys, threading
listener, kept = socket.create_server(("{}", 8080)), []
def serve():
    while True:
        s, source = listener.accept()
        {act}
threading.Thread(target=serve, daemon=True).start()
print("up", flush=True)
sys.stdin.readline()
"#,
        host.address
    );
    let mut server = host.command("python3");
    server.args(["-c", &program]);
    let mut server = Dialogue::start(server);
    assert_eq!(server.hear(), "up");
    server
}

/// A real name server, dnsmasq, until the test ends.
pub struct Dns {
    pub port: u16,
    dnsmasq: Child,
    log: NamedTempFile,
}

impl Dns {
    /// It knows one name.
    pub fn start(name: &str, address: &str) -> Self {
        // Questions for anything else about the name are answered too: there is nothing.
        Self::with(&[&format!("--address=/{name}/{address}"), &format!("--local=/{name}/")])
    }

    /// It knows what these options say, on a port of 127.0.0.1.
    pub fn with(options: &[&str]) -> Self {
        Self::at(&free_address(), options)
    }

    /// The same at a loopback address and port.
    pub fn at(listen: &str, options: &[&str]) -> Self {
        let (address, port) = listen.rsplit_once(':').unwrap();
        let mut dnsmasq = Command::new("dnsmasq");
        dnsmasq.args(["--bind-interfaces", "--listen-address", address]).args(options);
        Self::run(dnsmasq, port.parse().unwrap())
    }

    /// The same on port 53 of a host's addresses.
    pub fn on(host: &Host, options: &[&str]) -> Self {
        let mut dnsmasq = host.command("dnsmasq");
        let addresses = format!("--listen-address={},{}", host.address, host.address6);
        dnsmasq.args(["--bind-interfaces", &addresses]).args(options);
        Self::run(dnsmasq, 53)
    }

    /// What starts dnsmasq, on all addresses if nothing else is said.
    pub fn run(mut dnsmasq: Command, port: u16) -> Self {
        let log = NamedTempFile::new().unwrap();
        dnsmasq.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]);
        dnsmasq.args(["--user=root", "--pid-file", "--log-queries", &format!("--port={port}")]);
        dnsmasq.arg(format!("--log-facility={}", log.path().display()));
        let dnsmasq = dnsmasq.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let dns = Self { port, dnsmasq, log };
        // It says so once it listens.
        wait_until("dnsmasq listens", || dns.log().contains("started, version"));
        dns
    }

    fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    /// The questions that it was asked: `A www.example.com`.
    pub fn asked(&self) -> Vec<String> {
        let log = self.log();
        let asked = log.lines().filter_map(|line| line.split_once(": query[")?.1.split_once(" from "));
        asked.map(|(question, _)| question.replace(']', "")).collect()
    }

    /// From now on it answers nothing, and its socket is still there.
    pub fn fall_silent(&self) {
        self.signal(Signal::STOP);
    }

    /// It answers again.
    pub fn wake(&self) {
        self.signal(Signal::CONT);
    }

    /// It reads its hosts files again.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.dnsmasq), signal).unwrap();
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        let _ = self.dnsmasq.kill();
        let _ = self.dnsmasq.wait();
    }
}
