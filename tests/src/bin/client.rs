//! A raw TCP client for the load tests: `client ADDRESS THREADS CONNECTS`.
//!
//! Dials as often as asked, shared among the threads, and prints for each connect when it
//! began and ended (nanoseconds, CLOCK_MONOTONIC) and who answered, or the error.

use std::{
    env,
    io::Read,
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

fn main() {
    let [address, threads, connects] = &env::args().skip(1).collect::<Vec<_>>()[..] else {
        panic!("client ADDRESS THREADS CONNECTS");
    };
    let address: SocketAddr = address.parse().expect("an address and port");
    let threads: usize = threads.parse().expect("a number");
    let connects: usize = connects.parse().expect("a number");

    let dial = move || (0..connects / threads).map(|_| call(address)).collect::<Vec<_>>();
    let workers: Vec<_> = (0..threads).map(|_| thread::spawn(dial)).collect();
    let mut text = String::new();
    for (start, end, answer) in workers.into_iter().flat_map(|worker| worker.join().expect("no panic")) {
        text += &format!("{start} {end} {answer}\n");
    }
    print!("{text}");
}

fn call(address: SocketAddr) -> (u64, u64, String) {
    let start = mesh_tests::now();
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5));
    let end = mesh_tests::now();
    let answer = stream.and_then(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        if stream.peer_addr()? != address {
            return Ok("wrong-peer".into());
        }
        let mut name = String::new();
        stream.read_to_string(&mut name)?;
        Ok(name)
    });
    (start, end, answer.unwrap_or_else(|error| format!("{:?}", error.kind())))
}
