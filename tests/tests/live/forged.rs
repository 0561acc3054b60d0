//! Replies that the daemon's name server never sent, or that are none.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_tests::{figure, is_long};

use crate::dns::Names;

const RIGHT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FORGED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);

/// Forged replies to one question, and how long its right one may be held back for them: the daemon
/// gives up after 1.5 seconds.
const PER_QUESTION: u64 = 5000;
const DELAY: Duration = Duration::from_millis(700);

/// Replies that a socket has room for.
const BURST: u64 = 100;

#[test]
fn replies_that_the_name_server_never_sent_are_neither_passed_on_nor_kept() {
    let goal = if is_long() { 1_000_000 } else { 100_000 };
    let (forger, counts) = Forger::new();
    let names = asking(forger.address());
    thread::spawn(move || forger.serve());
    let right = RIGHT.to_string();
    let mut asked = 0;
    while counts.read.load(Ordering::Relaxed) < goal {
        let before = counts.read.load(Ordering::Relaxed);
        assert_eq!(names.short(&[&name(asked)]), right, "{}", name(asked));
        assert!(counts.read.load(Ordering::Relaxed) > before, "nothing forged was read");
        asked += 1;
    }
    figure(&format!(
        "{} forged replies to {asked} questions, {} of them read by the daemon; none was believed",
        counts.sent.load(Ordering::Relaxed),
        counts.read.load(Ordering::Relaxed)
    ));
    // What was kept is what was answered; what was only forged is not known.
    counts.silent.store(true, Ordering::Relaxed);
    for n in 0..asked {
        assert_eq!(names.short(&[&name(n)]), right, "{}", name(n));
    }
    assert_eq!(names.status(&[&name(asked)]), "SERVFAIL");
    // Who can send packets must not be able to fill the disk.
    let log = names.mesh.log();
    let lines = log.lines().count();
    assert!(lines < 50, "{lines} lines of log, such as {:?}", log.lines().last());
}

#[test]
fn a_reply_that_cannot_be_read_is_an_error_and_is_not_kept() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let names = asking(server.local_addr().unwrap());
    let (broken, whole) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (now, well) = (broken.clone(), whole.clone());
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            let Some(asked) = Asked::read(&buffer[..length]) else { continue };
            let right = asked.reply(asked.id, 0, &[&asked.question], Some(RIGHT));
            let reply = if well.load(Ordering::Relaxed) {
                right
            } else {
                broken_reply(now.load(Ordering::Relaxed), &asked, right)
            };
            let _ = server.send_to(&reply, from);
        }
    });
    for kind in 0..BROKEN {
        broken.store(kind, Ordering::Relaxed);
        assert_eq!(names.status(&[&name(kind)]), "SERVFAIL", "kind {kind}");
    }
    whole.store(true, Ordering::Relaxed);
    for kind in 0..BROKEN {
        assert_eq!(names.short(&[&name(kind)]), RIGHT.to_string(), "kind {kind}");
    }
}

const BROKEN: u64 = 6;

/// With the right id, from the right address.
fn broken_reply(kind: u64, asked: &Asked, mut right: Vec<u8>) -> Vec<u8> {
    let records = 12 + asked.question.len();
    match kind {
        // Cut off in the header, and in the record.
        0 => right.truncate(2),
        1 => right.truncate(right.len() - 2),
        // The question itself.
        2 => right[2] &= 0x7f,
        // More records than there are.
        3 => right[6..8].copy_from_slice(&[0xff, 0xff]),
        // The record's name points at itself, and its data is longer than the message.
        4 => right.splice(records.., [0xc0, u8::try_from(records).unwrap(), 0, 1, 0, 1]).for_each(drop),
        _ => {
            let length = right.len() - 6;
            right[length..length + 2].copy_from_slice(&[0xff, 0xff]);
        }
    }
    right
}

/// A daemon that asks one server.
fn asking(server: SocketAddr) -> Names {
    let mut names = Names::prepare("service = []", &[]);
    names.mesh.dns = names.mesh.dns.replace("upstream = []", &format!("upstream = [\"{server}\"]"));
    names.mesh.configure("");
    names.mesh.launch();
    names.mesh.ready();
    names
}

fn name(n: u64) -> String {
    format!("n{n}.forged.test")
}

/// What of a question is needed to answer it.
struct Asked {
    id: u16,
    /// Name, type and class, as they were sent.
    question: Vec<u8>,
}

impl Asked {
    /// None where it is not about one of the test's names: the daemon looks for circles.
    fn read(message: &[u8]) -> Option<Self> {
        let end = 12 + message.get(12..)?.iter().position(|byte| *byte == 0)? + 5;
        let question = message.get(12..end)?.to_vec();
        let ours = question.windows(8).any(|bytes| bytes == b"\x06forged\x04");
        ours.then(|| Self { id: u16::from_be_bytes([message[0], message[1]]), question })
    }

    /// The question about the name that is asked for next.
    fn next(&self) -> Vec<u8> {
        let digits = &self.question[2..usize::from(self.question[0]) + 1];
        let number: u64 = std::str::from_utf8(digits).unwrap().parse().unwrap();
        let label = format!("n{}", number + 1);
        let mut question = vec![u8::try_from(label.len()).unwrap()];
        question.extend(label.as_bytes());
        question.extend(&self.question[digits.len() + 2..]);
        question
    }

    /// An answer for what is asked, whatever the message says was asked.
    fn reply(&self, id: u16, code: u8, questions: &[&[u8]], address: Option<Ipv4Addr>) -> Vec<u8> {
        let count = |count: usize| u16::try_from(count).unwrap().to_be_bytes();
        let mut reply = id.to_be_bytes().to_vec();
        reply.extend([0x81, 0x80 | code]);
        reply.extend(count(questions.len()));
        reply.extend(count(address.iter().len()));
        reply.extend([0; 4]);
        reply.extend(questions.concat());
        if let Some(address) = address {
            reply.extend(&self.question[..self.question.len() - 4]);
            reply.extend([0, 1, 0, 1, 0, 0, 1, 44, 0, 4]);
            reply.extend(address.octets());
        }
        reply
    }
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    /// Taken from its socket by the daemon.
    read: AtomicU64,
    /// Nothing is answered any more.
    silent: AtomicBool,
}

/// A name server, and others that know its address and what it was asked.
struct Forger {
    server: UdpSocket,
    /// Its address, another port.
    beside: UdpSocket,
    /// Its port, another address.
    away: UdpSocket,
    counts: Arc<Counts>,
}

impl Forger {
    fn new() -> (Self, Arc<Counts>) {
        let (server, away) = std::iter::repeat_with(|| {
            let server = UdpSocket::bind("127.0.0.1:0").unwrap();
            let port = server.local_addr().unwrap().port();
            Some((server, UdpSocket::bind(("127.0.0.2", port)).ok()?))
        })
        .find_map(|both| both)
        .expect("it is tried for ever");
        let beside = UdpSocket::bind("127.0.0.1:0").unwrap();
        let counts = Arc::<Counts>::default();
        (Self { server, beside, away, counts: counts.clone() }, counts)
    }

    fn address(&self) -> SocketAddr {
        self.server.local_addr().unwrap()
    }

    fn serve(&self) {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = self.server.recv_from(&mut buffer) {
            let Some(asked) = Asked::read(&buffer[..length]) else { continue };
            if !self.counts.silent.load(Ordering::Relaxed) && self.forge(&asked, from).is_continue() {
                let right = asked.reply(asked.id, 0, &[&asked.question], Some(RIGHT));
                let _ = self.server.send_to(&right, from);
            }
        }
    }

    /// Breaks where the daemon listens no more.
    fn forge(&self, asked: &Asked, to: SocketAddr) -> ControlFlow<()> {
        let (start, next) = (Instant::now(), asked.next());
        for _ in 0..PER_QUESTION / BURST {
            let lost = unread(to)?.1;
            for _ in 0..BURST {
                let n = self.counts.sent.fetch_add(1, Ordering::Relaxed);
                let (socket, reply) = self.forged(n, asked, &next);
                // A socket that has gone says so to whoever sends next.
                let _ = socket.send_to(&reply, to);
            }
            let lost = loop {
                match unread(to)? {
                    (0, now) => break now - lost,
                    _ => thread::sleep(Duration::from_micros(50)),
                }
            };
            self.counts.read.fetch_add(BURST - lost, Ordering::Relaxed);
            if start.elapsed() > DELAY {
                break;
            }
        }
        ControlFlow::Continue(())
    }

    /// In each something is wrong: the id, the question or the source. All ids but the right one come in turn.
    fn forged(&self, n: u64, asked: &Asked, next: &[u8]) -> (&UdpSocket, Vec<u8>) {
        let question = &*asked.question;
        let id = asked.id.wrapping_add(1 + u16::try_from(n % 65535).unwrap());
        match n % 8 {
            0..3 => (&self.server, asked.reply(id, 0, &[question], Some(FORGED))),
            3 => (&self.server, asked.reply(id, 3, &[question], None)),
            4 => (
                &self.server,
                Asked { id, question: next.to_vec() }.reply(asked.id, 0, &[next], Some(FORGED)),
            ),
            5 => {
                let other = |from_end: usize, value| {
                    let mut other = question.to_vec();
                    let at = other.len() - from_end;
                    other[at] = value;
                    other
                };
                // Another type, another class.
                let (kind, class) = (other(3, 28), other(1, 3));
                let questions: &[&[u8]] = match n / 8 % 4 {
                    0 => &[],
                    1 => &[question, question],
                    2 => &[&kind],
                    _ => &[&class],
                };
                (&self.server, asked.reply(asked.id, 0, questions, Some(FORGED)))
            }
            6 => (&self.beside, asked.reply(asked.id, 0, &[question], Some(FORGED))),
            _ => (&self.away, asked.reply(asked.id, 0, &[question], Some(FORGED))),
        }
    }
}

/// Bytes that wait in the daemon's socket, and datagrams that found no room there.
fn unread(socket: SocketAddr) -> ControlFlow<(), (u64, u64)> {
    let sockets = fs::read_to_string("/proc/net/udp").unwrap();
    let at = format!("00000000:{:04X}", socket.port());
    let row = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    match row.into_iter().find(|row| row.get(1) == Some(&&*at)) {
        Some(row) => {
            let queued = row[4].split_once(':').unwrap().1;
            ControlFlow::Continue((
                u64::from_str_radix(queued, 16).unwrap(),
                row.last().unwrap().parse().unwrap(),
            ))
        }
        None => ControlFlow::Break(()),
    }
}
