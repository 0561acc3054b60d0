//! What stands between the daemon and a registry.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use mesh_tests::Mesh;

use crate::outage::Outage;

const NONSENSE: &[u8] = b"no such protocol\r\n";

/// Passes on what both say over TCP.
#[derive(Clone)]
pub(crate) struct Between {
    pub(crate) address: String,
    answers: Arc<Mutex<Answers>>,
    /// Holds watches of etcd back until told to let them through.
    pub(crate) hold: Arc<AtomicBool>,
    pub(crate) held: Arc<AtomicBool>,
}

/// What becomes of the registry's answers.
#[derive(Clone, Copy)]
pub(crate) enum Answers {
    Pass,
    /// A byte a second.
    Slow,
    /// As many bytes of nonsense.
    Garbage,
}

impl Between {
    pub(crate) fn start(registry: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let between = Self {
            address: listener.local_addr().unwrap().to_string(),
            answers: Arc::new(Mutex::new(Answers::Pass)),
            hold: Arc::default(),
            held: Arc::default(),
        };
        let (registry, between_them) = (registry.to_owned(), between.clone());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&registry) else { continue };
                let (back, forth) = (between_them.clone(), between_them.clone());
                let (from, to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || pass(from, to, |said| back.answer(said)));
                thread::spawn(move || pass(client, server, |said| forth.ask(said)));
            }
        });
        between
    }

    /// Passes on datagrams as well, to a name server. While it is slow, its answers are too long for them.
    pub(crate) fn pass_datagrams(&self, server: &str) {
        let socket = UdpSocket::bind(&self.address).unwrap();
        let (server, between) = (server.to_owned(), self.clone());
        thread::spawn(move || {
            let mut buffer = [0; 1 << 12];
            while let Ok((size, client)) = socket.recv_from(&mut buffer) {
                let mut said = buffer[..size].to_vec();
                let answers = *between.answers.lock().unwrap();
                match answers {
                    Answers::Pass => {
                        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
                        other.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                        let answer = other.send_to(&said, &server).and_then(|_| other.recv(&mut buffer));
                        let Ok(size) = answer else { continue };
                        said = buffer[..size].to_vec();
                    }
                    // It is an answer, and it is truncated.
                    Answers::Slow => said[2] |= 0x82,
                    Answers::Garbage => said = NONSENSE.into(),
                }
                let _ = socket.send_to(&said, client);
            }
        });
    }

    /// The registry says a byte a second for a while, and then nonsense. `change` makes it say that the first or the second
    /// server, which is `one` or `two`, is who serves.
    pub(crate) fn endure(
        &self,
        registry: &str,
        mesh: &Mesh,
        vip: &str,
        errors: [&str; 2],
        change: impl Fn(usize),
    ) {
        let [slow, garbage] = errors;
        let what = format!("{registry} at a byte a second");
        Outage { what: &what, mesh, vip, error: slow, servers: ["one", "two"] }.endure(
            || self.answers(Answers::Slow),
            || change(1),
            |()| self.answers(Answers::Pass),
        );
        let what = format!("{registry} talking nonsense");
        Outage { what: &what, mesh, vip, error: garbage, servers: ["two", "one"] }.endure(
            || self.answers(Answers::Garbage),
            || change(0),
            |()| self.answers(Answers::Pass),
        );
    }

    /// From now on, also of what has been said and not passed on yet.
    pub(crate) fn answers(&self, answers: Answers) {
        *self.answers.lock().unwrap() = answers;
    }

    /// How many bytes to let through now.
    fn ask(&self, said: &mut [u8]) -> usize {
        while self.hold.load(Relaxed) && said.starts_with(b"POST /v3/watch") {
            self.held.store(true, Relaxed);
            thread::yield_now();
        }
        said.len()
    }

    fn answer(&self, said: &mut [u8]) -> usize {
        let answers = *self.answers.lock().unwrap();
        match answers {
            Answers::Pass => said.len(),
            Answers::Slow => {
                thread::sleep(Duration::from_secs(1));
                1
            }
            Answers::Garbage => {
                said.iter_mut().zip(NONSENSE.iter().cycle()).for_each(|(byte, other)| *byte = *other);
                said.len()
            }
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, lets_through: impl Fn(&mut [u8]) -> usize) {
    let mut buffer = [0; 1 << 16];
    while let Ok(size @ 1..) = from.read(&mut buffer) {
        let mut passed = 0;
        while passed < size {
            let count = lets_through(&mut buffer[passed..size]);
            if to.write_all(&buffer[passed..passed + count]).is_err() {
                return;
            }
            passed += count;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
