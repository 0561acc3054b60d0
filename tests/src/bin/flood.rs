//! A task that asks too much: `flood ADDRESS RATE NAME...` sends so many questions a second for these names from one
//! socket, answered or not, until its input ends or says something. Then it prints how many a second that were, and
//! how many answers there were a second.

use std::{
    env,
    io::{self, IoSlice},
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};

/// As many questions a system call.
const BATCH: usize = 256;

/// Between two batches where there is time left.
const PAUSE: Duration = Duration::from_micros(500);

static ENDS: AtomicBool = AtomicBool::new(false);
static ANSWERS: AtomicU64 = AtomicU64::new(0);

fn main() {
    let [address, rate, names @ ..] = &env::args().skip(1).collect::<Vec<_>>()[..] else {
        panic!("flood ADDRESS RATE NAME...");
    };
    let address: SocketAddr = address.parse().expect("an address and port");
    let rate: u128 = rate.parse().expect("a number");
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket.connect(address).expect("a route");
    let hearing = socket.try_clone().expect("a second handle");
    hearing.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    thread::spawn(|| {
        let _ = io::stdin().read_line(&mut String::new());
        ENDS.store(true, Ordering::Relaxed);
    });
    let hearing = thread::spawn(move || {
        while !ENDS.load(Ordering::Relaxed) {
            if hearing.recv(&mut [0; 512]).is_ok() {
                ANSWERS.fetch_add(1, Ordering::Relaxed);
            }
        }
    });

    let questions: Vec<_> = names.iter().cycle().zip(0..).take(BATCH).map(question).collect();
    let slices: Vec<_> = questions.iter().map(|question| [IoSlice::new(question)]).collect();
    let mut controls: Vec<_> = questions.iter().map(|_| SendAncillaryBuffer::default()).collect();
    let batch = slices.iter().zip(&mut controls).map(|(slice, control)| MMsgHdr::new(slice, control));
    let mut batch: Vec<_> = batch.collect();
    let start = Instant::now();
    let mut sent = 0;
    while !ENDS.load(Ordering::Relaxed) {
        let due = start.elapsed().as_micros() * rate / 1_000_000 - sent;
        let due = usize::try_from(due).map_or(BATCH, |due| due.min(BATCH));
        if due < BATCH {
            thread::sleep(PAUSE);
        }
        // The first error only ends the batch; a listener that is gone for a moment is one.
        sent += sendmmsg(&socket, &mut batch[..due], SendFlags::empty()).unwrap_or_default() as u128;
    }
    let micros = start.elapsed().as_micros();
    hearing.join().expect("no panic");
    let answers = u128::from(ANSWERS.load(Ordering::Relaxed));
    println!("{} {}", sent * 1_000_000 / micros, answers * 1_000_000 / micros);
}

/// For the addresses of a name.
fn question((name, id): (&String, u16)) -> Vec<u8> {
    let mut message = [id.to_be_bytes(), [1, 0], [0, 1], [0; 2], [0; 2], [0; 2]].concat();
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).expect("a label"));
        message.extend(label.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}
