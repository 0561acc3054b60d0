//! Dials cells of the socket matrix with tokio: `tokio-client [KIND ADDRESS PORT]...`.

use std::{
    env,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, UdpSocket},
};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let words: Vec<_> = env::args().skip(1).collect();
    for cell in words.chunks(3) {
        let [kind, address, port] = cell else { panic!("[KIND ADDRESS PORT]...") };
        let address = address.parse().expect("an address");
        let vip = SocketAddr::new(address, port.parse().expect("a port"));
        let (answer, peer) = match kind.as_str() {
            "tcp" => stream(tcp_socket(vip), vip).await,
            "mptcp" => stream(mptcp_socket(vip), vip).await,
            "udp-connected" => connected(vip).await,
            "udp-unconnected" => unconnected(vip).await,
            _ => panic!("no such kind: {kind}"),
        };
        println!("{answer} {} {}", peer.ip(), peer.port());
    }
}

fn tcp_socket(vip: SocketAddr) -> TcpSocket {
    if vip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap()
}

/// tokio makes none itself, but takes one.
fn mptcp_socket(vip: SocketAddr) -> TcpSocket {
    let family = if vip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::MPTCP)).unwrap();
    TcpSocket::from_std_stream(TcpStream::from(socket))
}

async fn stream(socket: TcpSocket, vip: SocketAddr) -> (String, SocketAddr) {
    let mut stream = socket.connect(vip).await.unwrap();
    let peer = stream.peer_addr().unwrap();
    stream.write_all(b"?").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    (answer, peer)
}

async fn connected(vip: SocketAddr) -> (String, SocketAddr) {
    let socket = udp_socket(vip).await;
    socket.connect(vip).await.unwrap();
    let peer = socket.peer_addr().unwrap();
    socket.send(b"?").await.unwrap();
    let mut answer = [0; 16];
    let length = socket.recv(&mut answer).await.unwrap();
    (String::from_utf8_lossy(&answer[..length]).into(), peer)
}

async fn unconnected(vip: SocketAddr) -> (String, SocketAddr) {
    let socket = udp_socket(vip).await;
    socket.send_to(b"?", vip).await.unwrap();
    let mut answer = [0; 16];
    let (length, source) = socket.recv_from(&mut answer).await.unwrap();
    (String::from_utf8_lossy(&answer[..length]).into(), source)
}

async fn udp_socket(vip: SocketAddr) -> UdpSocket {
    let any: SocketAddr = match vip {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    UdpSocket::bind(any).await.unwrap()
}
