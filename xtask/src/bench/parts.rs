//! The parts of the benchmark that run inside a task: small servers and clients.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rustix::net::sockopt::set_socket_linger;

/// How long the first answer may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a client waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Of the client with a rate: more than are stuck at a time where one backend of three is silent.
const THREADS: u32 = 64;
/// Connections that a client with keep-alive uses in turn.
const CONNECTIONS: usize = 16;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(clap::Subcommand)]
enum Part {
    /// Says one byte to whoever connects, and closes.
    Greet { addresses: Vec<SocketAddr> },
    /// Prints after how many microseconds a call worked.
    Call {
        address: SocketAddr,
        #[arg(long)]
        http: bool,
        #[arg(long)]
        greeting: bool,
    },
    /// Connects, reads the greeting and resets, one after the other, to the addresses in turn. Prints how many
    /// connections it made and how many seconds that took.
    Connects { seconds: f64, addresses: Vec<SocketAddr> },
    /// Connects, and for each line of its input makes so many requests on that connection. Prints their
    /// latencies in nanoseconds: mean, p50, p99.
    Steady { requests: u32, address: SocketAddr },
    /// For each line of its input so many connects one after the other, each to the greeting, to the addresses
    /// in turn. Prints the same of them.
    Dials { connects: u32, addresses: Vec<SocketAddr> },
    /// Requests at a fixed rate, to the addresses in turn. Prints a line for each: when it was due
    /// and how long it took, in microseconds, and what went wrong.
    Requests {
        addresses: Vec<SocketAddr>,
        #[arg(long)]
        rate: u32,
        #[arg(long)]
        seconds: u32,
        #[arg(long)]
        keep_alive: bool,
    },
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.part {
        Part::Greet { addresses } => greet(addresses),
        Part::Call { address, http, greeting } => call(*address, *http, *greeting),
        Part::Connects { seconds, addresses } => connects(addresses, Duration::from_secs_f64(*seconds)),
        Part::Steady { requests, address } => steady(*address, *requests),
        Part::Dials { connects, addresses } => dials(addresses, *connects),
        Part::Requests { addresses, rate, seconds, keep_alive } => {
            requests(addresses, *rate, *seconds, *keep_alive)
        }
    }
}

fn greet(addresses: &[SocketAddr]) -> anyhow::Result<()> {
    let listeners = addresses.iter().map(TcpListener::bind).collect::<io::Result<Vec<_>>>()?;
    thread::scope(|scope| {
        for listener in &listeners {
            rustix::net::listen(listener, 4096)?;
            scope.spawn(|| {
                for stream in listener.incoming() {
                    // A client that goes away is its own affair.
                    let _ = stream.and_then(|mut stream| stream.write_all(b"x"));
                }
            });
        }
        Ok(())
    })
}

fn call(address: SocketAddr, http: bool, greeting: bool) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let answer = open(address).and_then(|mut stream| match (http, greeting) {
            (true, _) => request(&mut stream, false),
            (_, true) => Ok(stream.read_exact(&mut [0])?),
            _ => Ok(()),
        });
        match answer {
            Ok(()) => break,
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(error.context(format!("{address} does not answer")));
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
    println!("{}", start.elapsed().as_micros());
    Ok(())
}

fn connects(addresses: &[SocketAddr], time: Duration) -> anyhow::Result<()> {
    let (start, mut count) = (Instant::now(), 0_u64);
    for address in addresses.iter().cycle().take_while(|_| start.elapsed() < time) {
        dial(*address)?;
        count += 1;
    }
    println!("{count} {}", start.elapsed().as_secs_f64());
    Ok(())
}

fn dial(address: SocketAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.read_exact(&mut [0])?;
    // A reset instead of TIME_WAIT: ports are not used up.
    Ok(set_socket_linger(&stream, Some(Duration::ZERO))?)
}

fn steady(address: SocketAddr, requests: u32) -> anyhow::Result<()> {
    let mut stream = open(address)?;
    slices(requests, || request(&mut stream, true))
}

fn dials(addresses: &[SocketAddr], connects: u32) -> anyhow::Result<()> {
    let mut next = addresses.iter().cycle();
    slices(connects, || dial(*next.next().context("no address to dial")?))
}

/// A slice for each line of the input, and its figures in nanoseconds. What ran before it has cooled the
/// caches: the first fifth is not counted.
fn slices(count: u32, mut one: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    for line in io::stdin().lines() {
        line?;
        (0..count / 5).try_for_each(|_| one())?;
        let mut took = Vec::new();
        for _ in 0..count {
            let start = Instant::now();
            one()?;
            took.push(start.elapsed().as_nanos());
        }
        took.sort_unstable();
        let mean = took.iter().sum::<u128>() / took.len() as u128;
        println!("{mean} {} {}", took[took.len() / 2], took[took.len() * 99 / 100]);
    }
    Ok(())
}

fn requests(addresses: &[SocketAddr], rate: u32, seconds: u32, keep_alive: bool) -> anyhow::Result<()> {
    ensure!(!addresses.is_empty(), "no address to ask");
    let idle = Mutex::new(VecDeque::new());
    if keep_alive {
        for address in addresses.iter().cycle().take(CONNECTIONS) {
            let mut stream = open(*address)?;
            request(&mut stream, true)?;
            idle.lock().unwrap_or_else(PoisonError::into_inner).push_back(stream);
        }
    }
    // Says that it is about to begin.
    println!("connected");
    let (next, start) = (AtomicU32::new(0), Instant::now());
    let one = |number: u32| -> anyhow::Result<()> {
        let kept = idle.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let mut stream = match kept {
            Some(stream) => stream,
            None => open(addresses[number as usize % addresses.len()])?,
        };
        request(&mut stream, keep_alive)?;
        if keep_alive {
            idle.lock().unwrap_or_else(PoisonError::into_inner).push_back(stream);
        }
        Ok(())
    };
    let work = || {
        let mut lines = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= rate * seconds {
                return lines;
            }
            let due = Duration::from_secs(1) * number / rate;
            thread::sleep(due.saturating_sub(start.elapsed()));
            let result = one(number);
            let took = start.elapsed().saturating_sub(due).as_micros();
            let wrong =
                result.err().map_or_else(String::new, |error| format!("{error:#}").replace('\n', " "));
            lines.push(format!("{} {took} {wrong}", due.as_micros()));
        }
    };
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });
    println!("{}", all.join("\n"));
    Ok(())
}

fn open(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request, and its answer to the end.
fn request(stream: &mut TcpStream, keep_alive: bool) -> anyhow::Result<()> {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    write!(stream, "GET / HTTP/1.1\r\nHost: bench\r\nConnection: {connection}\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let (mut line, mut status, mut length) = (String::new(), String::new(), 0);
    loop {
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "the connection was closed");
        if status.is_empty() {
            line.trim().clone_into(&mut status);
        }
        match line.trim().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse()?;
            }
            None if line.trim().is_empty() => break,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).context("the body")?;
    if !status.starts_with("HTTP/1.1 200") {
        bail!("{status}");
    }
    Ok(())
}
