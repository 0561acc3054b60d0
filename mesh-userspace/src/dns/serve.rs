//! Listening: sockets of any network namespace, with one core behind them.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
};

use super::{
    Core,
    answer::{Asked, Client, Transport},
    table::View,
};

/// TCP connections that one listener serves at a time; further ones wait to be accepted.
const CONNECTIONS: usize = 64;

/// How long a connection may stay silent, or a client leave an answer unread.
const IDLE: Duration = Duration::from_secs(2);

/// After a socket's error: one that stays must not take a processor.
const PAUSE: Duration = Duration::from_millis(100);

/// A UDP socket and a TCP listener at one address, in the network namespace they were made in.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    view: View,
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Listener {
    /// At an address of the namespace of this thread.
    pub(super) fn bind(address: SocketAddr, view: View) -> anyhow::Result<Self> {
        let key = match view {
            View::Node => "dns.listen",
            View::Outside => "dns.outside",
        };
        let udp = std::net::UdpSocket::bind(address);
        let udp = udp.with_context(|| format!("cannot listen on {key} {address} (UDP)"))?;
        let tcp = std::net::TcpListener::bind(address);
        let tcp = tcp.with_context(|| format!("cannot listen on {key} {address} (TCP)"))?;
        Ok(Self { view, ..Self::new(udp, tcp)? })
    }

    /// For tasks of the node, of sockets that are bound to one and the same address, wherever they were
    /// made. Needs the runtime that will serve them.
    pub fn new(udp: std::net::UdpSocket, tcp: std::net::TcpListener) -> io::Result<Self> {
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok(Self {
            address: udp.local_addr()?,
            view: View::Node,
            udp: UdpSocket::from_std(udp)?,
            tcp: TcpListener::from_std(tcp)?,
        })
    }

    /// Answers until it is dropped.
    pub async fn serve(self, core: Arc<Core>) {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Self { address, view, udp, tcp } = self;
        let id = COUNT.fetch_add(1, Ordering::Relaxed);
        let client = move |from: SocketAddr| Client::new(id, view, address.ip(), from.ip());
        tokio::join!(serve_udp(udp, &core, client), serve_tcp(tcp, &core, client));
    }
}

async fn serve_udp(socket: UdpSocket, core: &Arc<Core>, client: impl Fn(SocketAddr) -> Client) {
    let socket = Arc::new(socket);
    loop {
        let asked = match socket.readable().await {
            Ok(()) => receive(&socket, core, &client),
            Err(error) => Err(error),
        };
        let (asked, from) = match asked {
            Ok(asked) => asked,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // Answers that cannot be sent are lost, as any datagram may be.
        match asked {
            Asked::Ignored => {}
            Asked::Answered(reply) => drop(socket.send_to(&reply, from).await),
            Asked::Elsewhere(question) => {
                let (core, socket) = (core.clone(), socket.clone());
                tokio::spawn(async move {
                    let reply = core.forward(*question).await;
                    let _ = socket.send_to(&reply, from).await;
                });
            }
        }
    }
}

/// Takes a question that has come. Listeners that wait, of which each task has some, hold no buffer.
fn receive(
    socket: &UdpSocket,
    core: &Core,
    client: impl Fn(SocketAddr) -> Client,
) -> io::Result<(Asked, SocketAddr)> {
    // A question is never larger; what is cut off here does not parse.
    let mut buffer = [0; 4096];
    let (length, from) = socket.try_recv_from(&mut buffer)?;
    Ok((core.ask(&buffer[..length], client(from), Transport::Udp), from))
}

async fn serve_tcp(listener: TcpListener, core: &Arc<Core>, client: impl Fn(SocketAddr) -> Client) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = places.clone().acquire_owned().await.expect("nobody closes it");
        let Ok((stream, from)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let (core, client) = (core.clone(), client(from));
        tokio::spawn(async move {
            let _place = place;
            // A client that goes away is its own affair.
            let _ = converse(stream, &core, client).await;
        });
    }
}

/// One question after the other: a client cannot have more of them open than connections.
async fn converse(mut stream: TcpStream, core: &Core, client: Client) -> io::Result<()> {
    loop {
        let question = tokio::time::timeout(IDLE, async {
            let length = stream.read_u16().await?;
            let mut question = vec![0; length.into()];
            stream.read_exact(&mut question).await?;
            io::Result::Ok(question)
        });
        let question = question.await??;
        let mut reply = match core.ask(&question, client, Transport::Tcp) {
            Asked::Ignored => return Ok(()),
            Asked::Answered(reply) => reply,
            Asked::Elsewhere(question) => core.forward(*question).await,
        };
        let length = u16::try_from(reply.len()).expect("encoded to fit");
        reply.splice(..0, length.to_be_bytes());
        tokio::time::timeout(IDLE, stream.write_all(&reply)).await??;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net,
    };

    use hickory_resolver::proto::{
        op::{Message, Query, ResponseCode},
        rr::{Name, RecordType},
    };

    use super::*;

    /// Two listeners, as of two namespaces, in front of one core.
    #[tokio::test(flavor = "multi_thread")]
    async fn any_pair_of_sockets_can_be_handed_over() {
        let core = Arc::new(Core::default());
        let mut message = Message::query();
        message.queries.push(Query::query(Name::from_ascii("nobody.").unwrap(), RecordType::A));
        let question = message.to_vec().unwrap();
        for _ in 0..2 {
            // The TCP port is free more often than the UDP port.
            let (udp, tcp) = loop {
                let udp = net::UdpSocket::bind("127.0.0.1:0").unwrap();
                if let Ok(tcp) = net::TcpListener::bind(udp.local_addr().unwrap()) {
                    break (udp, tcp);
                }
            };
            let at = udp.local_addr().unwrap();
            let serving = tokio::spawn(Listener::new(udp, tcp).unwrap().serve(core.clone()));
            let question = question.clone();
            let replies = tokio::task::spawn_blocking(move || {
                let client = net::UdpSocket::bind("127.0.0.1:0").unwrap();
                client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                client.send_to(&question, at).unwrap();
                let mut udp = vec![0; 512];
                let length = client.recv(&mut udp).unwrap();
                udp.truncate(length);
                let mut stream = net::TcpStream::connect(at).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let mut length = [0; 2];
                for _ in 0..2 {
                    stream.write_all(&u16::try_from(question.len()).unwrap().to_be_bytes()).unwrap();
                    stream.write_all(&question).unwrap();
                    stream.read_exact(&mut length).unwrap();
                    let mut tcp = vec![0; u16::from_be_bytes(length).into()];
                    stream.read_exact(&mut tcp).unwrap();
                    assert_eq!(tcp, udp, "the same over TCP");
                }
                udp
            });
            let reply = Message::from_vec(&replies.await.unwrap()).unwrap();
            assert_eq!(reply.metadata.id, message.metadata.id);
            // A core that has heard no registry yet.
            assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
            serving.abort();
            let _ = serving.await;
            // Its end frees the address.
            net::UdpSocket::bind(at).unwrap();
        }
    }
}
