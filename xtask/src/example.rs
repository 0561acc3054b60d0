//! The two sides of the example: a backend and a client, each a process of its own.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, ensure};

use crate::tools::enter;

/// Serves HTTP on a port of the kernel's choice, which is printed first.
pub(crate) fn backend(name: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?.port());
    for stream in listener.incoming() {
        // A client that goes away is its own affair.
        let _ = stream.and_then(|stream| answer(stream, name));
    }
    Ok(())
}

fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut lines = BufReader::new(stream.try_clone()?.take(16 << 10)).lines();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let length = name.len() + 1;
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{name}\n")
}

#[derive(clap::Args)]
pub(crate) struct ClientArgs {
    /// The cgroup to enter first.
    cgroup: PathBuf,
    /// A name or an address, and a port.
    address: String,
    calls: u32,
}

/// Prints a line per call: who answered, and what `getpeername` says.
pub(crate) fn client(args: &ClientArgs) -> anyhow::Result<()> {
    enter(&args.cgroup)?;
    if args.calls == 0 {
        ensure!(args.address.to_socket_addrs()?.next().is_some(), "{} has no address", args.address);
    }
    for _ in 0..args.calls {
        let mut stream =
            TcpStream::connect(&args.address).with_context(|| format!("connect to {}", args.address))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let peer = stream.peer_addr()?;
        write!(stream, "GET / HTTP/1.1\r\nhost: backend\r\nconnection: close\r\n\r\n")?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        let (head, body) = response.split_once("\r\n\r\n").context("not an HTTP response")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "unexpected response: {head}");
        println!("{} {peer}", body.trim());
    }
    Ok(())
}
