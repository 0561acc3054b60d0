//! Every kind of socket, of every family, in every runtime; and TCP Fast Open.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    process::Command,
    slice, thread,
};

use mesh_tests::{Mesh, datagram_service, documents, done, netns::Network, service, text};
use rustix::net::{AddressFamily, SocketType, bind, ipproto, listen, socket, sockopt::socket_protocol};

const PORT: &str = "80";
const CLIENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients");

const FAMILIES: [(&str, &str); 3] =
    [("v4", "127.128.16.1"), ("v6", "fd00:6d65:7368::16"), ("v4-mapped", "::ffff:127.128.16.1")];

struct Kind {
    title: &'static str,
    /// For the clients.
    word: &'static str,
    /// The protocol that the backend hears.
    heard: &'static str,
}

const KINDS: [Kind; 4] = [
    Kind { title: "TCP", word: "tcp", heard: "tcp" },
    Kind { title: "UDP connected", word: "udp-connected", heard: "udp" },
    Kind { title: "UDP unconnected", word: "udp-unconnected", heard: "udp" },
    Kind { title: "MPTCP", word: "mptcp", heard: "mptcp" },
];

/// What a cell's marks refer to.
const NOTES: [(&str, &str); 5] = [
    ("¹", "dialled three times: operations run at once, in the kernel's workers, and from a polled ring"),
    ("²", "opened by a system call and handed to the runtime"),
    ("³", "under `mptcpize run`"),
    ("⁴", "dialled as v4-mapped, which the runtime takes for IPv4: it shows the VIP as v4"),
    (
        "⁵",
        "Java shows the address that it was given to dial; for UDP the source of the answer, too, is the VIP",
    ),
];

/// A runtime, and each way to start its client.
struct Runtime {
    title: &'static str,
    starts: Vec<Vec<String>>,
    mptcp: Mptcp,
    /// Whether it shows a v4-mapped address as v4.
    unmaps: bool,
    /// Whether it shows what a socket was given to dial, rather than what the kernel says.
    echoes: bool,
}

/// How a runtime comes by MPTCP sockets.
enum Mptcp {
    Own,
    HandedIn,
    Mptcpize,
}

impl Runtime {
    fn new(title: &'static str, start: &[&str], mptcp: Mptcp) -> Self {
        let start = start.iter().copied().map(str::to_owned).collect();
        Self { title, starts: vec![start], mptcp, unmaps: false, echoes: false }
    }

    /// A cell of the table, or what is wrong with it.
    fn cell(&self, kind: &Kind, family: &str, vip: &str, line: &str) -> Result<String, String> {
        let mut expected: IpAddr = vip.parse().unwrap();
        let dialled = if expected.is_ipv4() { '4' } else { '6' };
        if self.unmaps {
            expected = expected.to_canonical();
        }
        let words: Vec<_> = line.split(' ').collect();
        let is_such = |heard: &str| heard.strip_prefix(kind.heard).is_some_and(|on| on.contains(dialled));
        let is_vip = |peer: &[&str]| peer.len() == 2 && peer[0].parse() == Ok(expected) && peer[1] == PORT;
        if words.len() < 3 || !is_such(words[0]) || !words[1..].chunks(2).all(is_vip) {
            return Err(format!("{}, {}, {family}: {line:?}", self.title, kind.title));
        }
        let mut marks = String::from(if self.starts.len() > 1 { "¹" } else { "" });
        if kind.word == "mptcp" {
            marks += match self.mptcp {
                Mptcp::Own => "",
                Mptcp::HandedIn => "²",
                Mptcp::Mptcpize => "³",
            };
        }
        if self.unmaps && family == "v4-mapped" {
            marks += "⁴";
        }
        if self.echoes && kind.word != "udp-unconnected" {
            marks += "⁵";
        }
        Ok(format!("VIP {marks}").trim().to_owned())
    }

    /// The lines that its client prints, one for each kind and family; so for each way to start it.
    fn lines(&self, mesh: &Mesh) -> Vec<Vec<String>> {
        let [others @ .., mptcp] = &KINDS;
        let all = |start: &Vec<String>| {
            // All TCP sockets of such a process are MPTCP.
            let wrapped = match self.mptcp {
                Mptcp::Own | Mptcp::HandedIn => start.clone(),
                Mptcp::Mptcpize => [&["mptcpize".into(), "run".into()], &start[..]].concat(),
            };
            [run(mesh, start, others), run(mesh, &wrapped, slice::from_ref(mptcp))].concat()
        };
        self.starts.iter().map(all).collect()
    }
}

/// Runs a client inside for these kinds, in every family; a line for each.
fn run(mesh: &Mesh, start: &[String], kinds: &[Kind]) -> Vec<String> {
    let cells = kinds.iter().flat_map(|kind| FAMILIES.map(|(_, vip)| [kind.word, vip, PORT]));
    let mut client = mesh.inside("timeout");
    let output = client.arg("60").args(start).args(cells.flatten()).output().unwrap();
    assert!(output.status.success(), "{start:?}: {}\n{}", output.status, text(&output));
    let lines: Vec<_> = String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), kinds.len() * FAMILIES.len(), "{start:?}: {lines:?}");
    lines
}

fn runtimes(dir: &Path) -> [Runtime; 7] {
    let built = |name: &str| dir.join(name).display().to_string();
    let source = |name: &str| format!("{CLIENTS}/{name}");
    let (sockets, go) = (built("sockets"), built("client"));
    let mut build = Command::new("gcc");
    done(build.args(["-Wall", "-Werror", "-o", &sockets, &source("sockets.c"), "-luring"]));
    // One file, and nothing but Go's own library.
    let mut build = Command::new("go");
    build.args(["build", "-o", &go, &source("client.go")]).current_dir(dir);
    build.env("GO111MODULE", "off").env("GOPATH", dir);
    done(build.env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go")));

    let mut io_uring = Runtime::new("io_uring", &[&sockets, "inline"], Mptcp::Own);
    io_uring.starts.extend(["workers", "poller"].map(|how| vec![sockets.clone(), how.into()]));
    let mut java = Runtime::new("Java", &["java", &source("Client.java")], Mptcp::Mptcpize);
    (java.unmaps, java.echoes) = (true, true);
    let mut go = Runtime::new("Go", &[&go], Mptcp::HandedIn);
    go.unmaps = true;
    [
        Runtime::new("libc", &[&sockets, "libc"], Mptcp::Own),
        io_uring,
        Runtime::new("tokio", &[env!("CARGO_BIN_EXE_tokio-client")], Mptcp::HandedIn),
        Runtime::new("asyncio", &["python3", &source("asyncio_client.py")], Mptcp::HandedIn),
        Runtime::new("Node", &["node", &source("client.mjs")], Mptcp::Mptcpize),
        java,
        go,
    ]
}

/// Listens for MPTCP, which plain TCP may dial too; hears a message, and answers with the protocol
/// that the connection really speaks and the family of the client's socket.
fn stream_backend(address: &str) -> u16 {
    let address: SocketAddr = address.parse().unwrap();
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let listener = socket(family, SocketType::STREAM, Some(ipproto::MPTCP)).unwrap();
    bind(&listener, &address).unwrap();
    listen(&listener, 16).unwrap();
    let listener = TcpListener::from(listener);
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((mut stream, client)) = listener.accept() {
            let is_mptcp = socket_protocol(&stream).unwrap() == Some(ipproto::MPTCP);
            let protocol = if is_mptcp { "mptcp" } else { "tcp" };
            let answer = protocol.to_owned() + &families_of("tcp", client);
            // A client that has gone is its own affair.
            if matches!(stream.read(&mut [0; 16]), Ok(1..)) {
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    port
}

/// Answers datagrams as [`stream_backend`] does.
fn datagram_backend(address: &str) -> u16 {
    let socket = UdpSocket::bind(address).unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((_, client)) = socket.recv_from(&mut [0; 16]) {
            let answer = "udp".to_owned() + &families_of("udp", client);
            let _ = socket.send_to(answer.as_bytes(), client);
        }
    });
    port
}

/// The families in which the kernel lists a socket on this port: one that dials v4-mapped is an
/// IPv6 socket.
fn families_of(protocol: &str, client: SocketAddr) -> String {
    let port = format!(":{:04X}", client.port());
    let is_listed = |list: &str| {
        let list = fs::read_to_string(format!("/proc/net/{protocol}{list}")).unwrap();
        list.lines().any(|line| line.split_whitespace().nth(1).is_some_and(|local| local.ends_with(&port)))
    };
    // Somebody else's socket may have the same port.
    [("", "4"), ("6", "6")].iter().filter(|(list, _)| is_listed(list)).map(|(_, family)| *family).collect()
}

#[test]
fn every_kind_of_socket_of_every_family_in_every_runtime_shows_the_vip() {
    let [(_, four), (_, six), _] = FAMILIES;
    let services = service("four", 80, four, &[("127.0.0.1", stream_backend("127.0.0.1:0"))])
        + &service("six", 80, six, &[("::1", stream_backend("[::1]:0"))])
        + &datagram_service("four-udp", 80, four, &[("127.0.0.1", datagram_backend("127.0.0.1:0"))])
        + &datagram_service("six-udp", 80, six, &[("::1", datagram_backend("[::1]:0"))]);
    let mesh = Mesh::start(&services);
    let runtimes = runtimes(mesh.dir.path());
    let lines = runtimes.each_ref().map(|runtime| runtime.lines(&mesh));

    let mut table =
        format!("| socket | {} |\n", runtimes.each_ref().map(|runtime| runtime.title).join(" | "));
    table += &format!("|---|{}\n", "---|".repeat(runtimes.len()));
    let mut wrong = Vec::new();
    let rows = KINDS.iter().flat_map(|kind| FAMILIES.map(|(family, vip)| (kind, family, vip)));
    for (row, (kind, family, vip)) in rows.enumerate() {
        table += &format!("| {}, {family} |", kind.title);
        for (runtime, starts) in runtimes.iter().zip(&lines) {
            let cells = starts.iter().map(|lines| runtime.cell(kind, family, vip, &lines[row]));
            match cells.collect::<Result<Vec<_>, _>>() {
                Ok(cells) => table += &format!(" {} |", cells[0]),
                Err(what) => wrong.push(what),
            }
        }
        table += "\n";
    }
    assert!(wrong.is_empty(), "not the VIP, or not such a socket:\n{}", wrong.join("\n"));
    for (mark, note) in NOTES {
        table += &format!("\n{mark} {note}.\n");
    }
    documents("sockets.md", &table);
}

#[test]
fn fast_open_sends_its_first_bytes_to_the_backend_and_shows_the_vip() {
    let host = Network::new().host();
    let [(_, four), (_, six), _] = FAMILIES;
    let services =
        service("four", 80, four, &[("127.0.0.1", 8080)]) + &service("six", 80, six, &[("::1", 8080)]);
    let mesh = Mesh::start(&services);
    // On a host of its own, where the switch for servers is turned on. The first dial may have to
    // fetch a cookie; the SYN of the second one has carried the question. Linux 6.18 loses an MPTCP
    // connection with data in its SYN once in a while (one of 632 such programs, without mesh): the
    // client waits for an answer, and the server to accept. One that is lost may be dialled again.
    let program = format!(
        r#"
import faulthandler, select, socket, threading
faulthandler.dump_traceback_later(50, exit=True)
TCP_FASTOPEN_CONNECT, SYN_DATA, MPTCP, SOL_MPTCP, MPTCP_INFO = 30, 32, 262, 284, 1
with open("/proc/sys/net/ipv4/tcp_fastopen", "w") as switch:
    switch.write("3")
listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, MPTCP)
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
listener.bind(("::", 8080))
listener.listen()
def serve():
    while True:
        connection, _ = listener.accept()
        connection.send(b"heard " + connection.recv(9))
        connection.close()
threading.Thread(target=serve, daemon=True).start()
def by_sendto(s, vip):
    s.sendto(b"it", socket.MSG_FASTOPEN, vip)
def by_connect(s, vip):
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    s.connect(vip)
    s.send(b"it")
lost = []
def asked(family, protocol, dial, vip):
    s = socket.socket(family, socket.SOCK_STREAM, protocol)
    dial(s, (vip, {PORT}))
    if protocol == MPTCP and not lost and not select.select([s], [], [], 5)[0]:
        lost.append(s)
        return asked(family, protocol, dial, vip)
    return s
for family, vip in ((socket.AF_INET, "{four}"), (socket.AF_INET6, "{six}"), (socket.AF_INET6, "::ffff:{four}")):
    for protocol in (0, MPTCP):
        for dial in (by_sendto, by_connect):
            for attempt in (1, 2):
                s = asked(family, protocol, dial, vip)
                peer, answer = s.getpeername()[:2], s.recv(9).decode()
                assert (peer, answer) == ((vip, {PORT}), "heard it"), (protocol, dial, peer, answer)
                options = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[5]
                assert attempt == 1 or options & SYN_DATA, (vip, protocol, dial, options)
                assert protocol == 0 or s.getsockopt(SOL_MPTCP, MPTCP_INFO, 64), "fell back to TCP"
"#
    );
    let [nsenter, net] = host.enter();
    let output =
        mesh.inside(nsenter).args([&net, "timeout", "60", "python3", "-c", &program]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}
