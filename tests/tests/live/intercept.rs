//! Tasks' queries come to the daemon, whichever name server they ask, as long as it lives.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use mesh_tests::{
    Dialogue, Mesh, binary, datagram_service, figure, free_address,
    netns::{Host, Network},
    server::{self, Dns},
    service, text, wait_until,
};

pub(crate) const VIP: &str = "127.128.28.1";
/// Of a service that is a name server.
const DNS_VIP: &str = "127.128.28.53";

/// Answers `elsewhere.test` with another address than the daemon's name server does.
pub(crate) const UPSTREAM: &str = "192.0.2.1";
const ORIGINAL: &str = "192.0.2.2";

/// A host with a name server, which tasks are told to ask, and one with a service.
pub(crate) struct Place {
    network: Network,
    pub(crate) mesh: Mesh,
    pub(crate) resolver: Host,
    pub(crate) original: Dns,
    _served: Dialogue,
    upstream: Dns,
}

impl Place {
    fn prepare() -> Self {
        Self::with("", &free_address())
    }

    /// With these further settings, and a name server at this address to ask.
    fn with(more: &str, asks: &str) -> Self {
        let upstream =
            Dns::at(asks, &[&format!("--address=/elsewhere.test/{UPSTREAM}"), "--local=/elsewhere.test/"]);
        let network = Network::new();
        let (resolver, backend) = (network.host(), network.host());
        let original = Dns::on(&resolver, &[&format!("--address=/elsewhere.test/{ORIGINAL}")]);
        let served =
            server::on(&backend, r#"s.recv(4096); s.sendall(b"HTTP/1.0 200 OK\r\n\r\necho"); s.close()"#);
        let echo = service("echo", 8080, VIP, &[(&backend.address, 8080)]);
        let text = echo.replacen("port", "aliases = [\"short\"]\nport", 1)
            + &service("dns", 53, DNS_VIP, &[(&resolver.address, 53)])
            + &datagram_service("dns-udp", 53, DNS_VIP, &[(&resolver.address, 53)]);
        let mut mesh = Mesh::prepare(&text);
        mesh.dns = format!("listen = []\nupstream = [\"{asks}\"]\n{more}");
        mesh.configure("");
        Self { network, mesh, resolver, original, _served: served, upstream }
    }

    pub(crate) fn start() -> Self {
        let mut place = Self::prepare();
        place.launch();
        place
    }

    fn launch(&mut self) {
        self.mesh.launch();
        self.mesh.ready();
    }

    /// A host on which the daemon listens.
    pub(crate) fn host(&self) -> Host {
        let host = self.network.host();
        wait_until("the daemon listens", || self.dig(&host, &[]) == UPSTREAM);
        host
    }

    /// A program with a resolv.conf of its own, which names the name server.
    fn command(&self, host: &Host, program: &str) -> Command {
        self.command_asking(&self.resolver.address, host, program)
    }

    pub(crate) fn command_asking(&self, server: &str, host: &Host, program: &str) -> Command {
        let resolv = self.mesh.dir.path().join("resolv.conf");
        fs::write(&resolv, format!("nameserver {server}\noptions timeout:1\n")).unwrap();
        let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.display());
        let mut command = self.mesh.on(host, "unshare");
        command.args(["--mount", "sh", "-c", &script, "sh", program]);
        command
    }

    /// Whether the kernel side knows the namespace with this cookie.
    fn knows(&self, cookie: u64) -> bool {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["--json", "map", "dump", "pinned"]).arg(self.mesh.map_pin("NAMESERVERS"));
        let entries: serde_json::Value = serde_json::from_slice(&bpftool.output().unwrap().stdout).unwrap();
        let bytes = cookie.to_ne_bytes().map(|byte| serde_json::json!(format!("0x{byte:02x}")));
        let is_it = |entry: &serde_json::Value| entry["key"].as_array().unwrap().starts_with(&bytes);
        entries.as_array().unwrap().iter().any(is_it)
    }

    /// What a task is answered about `elsewhere.test`.
    fn dig(&self, host: &Host, more: &[&str]) -> String {
        let mut dig = self.mesh.on(host, "dig");
        self.asks(&mut dig, more)
    }

    fn asks(&self, dig: &mut Command, more: &[&str]) -> String {
        let server = format!("@{}", self.resolver.address);
        dig.args([&server, "+short", "+timeout=1", "+tries=2", "elsewhere.test"]).args(more);
        text(&dig.output().unwrap()).trim().to_owned()
    }
}

/// Looks up each name that it is given, and says the address or why there is none.
const LOOKUP: &str = r#"
import socket, sys
for line in sys.stdin:
    try:
        print(socket.getaddrinfo(line.strip(), 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0], flush=True)
    except OSError as error:
        print(error, flush=True)
"#;

#[test]
fn queries_come_to_the_daemon_and_go_where_they_are_sent_once_it_is_gone() {
    let mut place = Place::prepare();
    let host = place.network.host();
    let mut python = place.command(&host, "python3");
    python.args(["-c", LOOKUP]);
    let mut task = Dialogue::start(python);
    let mut look_up = |name: &str| {
        task.say(name);
        task.hear()
    };
    assert_eq!(look_up("elsewhere.test"), ORIGINAL);
    for round in 0..2 {
        place.launch();
        wait_until("the daemon listens", || look_up("elsewhere.test") == UPSTREAM);
        for name in ["echo.service.local", "short.service.local", "short", "ECHO.Service.Local"] {
            assert_eq!(look_up(name), VIP, "{name}");
        }
        let output = place.command(&host, "curl").args(["--silent", "http://short:8080"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "echo", "{output:?}");
        place.mesh.kill();
        assert_eq!(look_up("elsewhere.test"), ORIGINAL, "after kill {round}");
        assert_ne!(look_up("echo.service.local"), VIP);
    }
}

#[test]
fn every_way_to_ask_is_answered_from_the_address_that_was_asked() {
    let place = Place::start();
    let host = place.host();
    // Name servers that are there and that are not; the daemon's own address, where nobody listens here.
    let program = format!(
        r#"
import socket, dns.message, dns.query
QUERY = dns.message.make_query("elsewhere.test", "A")
def address(message):
    return message.answer[0][0].address
def served(family, servers, source):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(5)
    s.bind((source, 0))
    # One after the other, as glibc and dig do; then all at once, as musl does.
    for server in servers:
        s.sendto(QUERY.to_wire(), (server, 53))
        answer, peer = s.recvfrom(4096)
        assert peer[:2] == (server, 53) and address(dns.message.from_wire(answer)) == "{UPSTREAM}", (server, peer)
    for server in servers:
        s.sendto(QUERY.to_wire(), (server, 53))
    for _ in servers:
        answer, peer = s.recvfrom(4096)
        assert peer[0] in servers and address(dns.message.from_wire(answer)) == "{UPSTREAM}", peer
    for server in servers:
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.settimeout(5)
        s.bind((source, 0))
        s.connect((server, 53))
        s.send(QUERY.to_wire())
        answer, peer = s.recvfrom(4096)
        assert peer[:2] == s.getpeername()[:2] == (server, 53), (server, peer, s.getpeername())
        assert address(dns.message.from_wire(answer)) == "{UPSTREAM}", server
        with socket.socket(family) as s:
            s.settimeout(5)
            s.bind((source, 0))
            s.connect((server, 53))
            assert s.getpeername()[:2] == (server, 53)
            answer = dns.query.tcp(QUERY, server, sock=s)
            assert address(answer) == "{UPSTREAM}", server
v4 = ["{four}", "192.0.2.53", "127.0.0.53", "127.64.0.53"]
served(socket.AF_INET, v4, "")
served(socket.AF_INET, v4, "{source}")
v6 = ["{six}", "2001:db8::53", "::1"]
served(socket.AF_INET6, v6, "")
served(socket.AF_INET6, v6, "{source6}")
served(socket.AF_INET6, ["::ffff:{four}", "::ffff:192.0.2.53"], "")
for server in v4 + v6:
    # It refuses answers from elsewhere.
    assert address(dns.query.udp(QUERY, server, timeout=5)) == "{UPSTREAM}", server
# What is bound to a device would not hear the daemon, which is not on it.
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"v0")
s.sendto(QUERY.to_wire(), ("{four}", 53))
assert address(dns.message.from_wire(s.recv(4096))) == "{ORIGINAL}"
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
s.sendto(QUERY.to_wire(), ("{four}", 53))
assert address(dns.message.from_wire(s.recv(4096))) == "{UPSTREAM}"
"#,
        four = place.resolver.address,
        six = place.resolver.address6,
        source = host.address,
        source6 = host.address6,
    );
    let before = place.original.asked().len();
    let output = place.mesh.on(&host, "/usr/bin/python3").args(["-c", &program]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(place.original.asked().len(), before + 1, "the one from the device");
}

#[test]
fn a_namespace_without_a_name_is_found_by_its_first_query_and_left_when_it_ends() {
    let place = Place::start();
    let host = place.host();
    // A thread that the daemon knows already goes to a namespace of its own, and has a name server there.
    let program = r#"
import ctypes, fcntl, socket, struct, sys, threading, time
sys.stdin.readline()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x40000000) == 0, ctypes.get_errno()
SIOCSIFFLAGS, UP = 0x8914, 1
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(server, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", UP))
server.bind(("127.0.0.1", 53))
SO_NETNS_COOKIE = 71
print(*struct.unpack("Q", server.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)), flush=True)
sys.stdin.readline()
def serve():
    while True:
        _, client = server.recvfrom(512)
        server.sendto(b"original", client)
threading.Thread(target=serve, daemon=True).start()
start, asked = time.monotonic(), 0
while True:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.sendto(b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05short\x00\x00\x01\x00\x01", ("127.0.0.1", 53))
        asked += 1
        if s.recv(512) != b"original":
            break
        assert time.monotonic() - start < 5, "only found by the next full look"
        time.sleep(0.001)
print(f"{asked - 1} queries, {1e3 * (time.monotonic() - start):.1f} ms", flush=True)
sys.stdin.readline()
"#;
    let mut python = place.mesh.on(&host, "python3");
    python.args(["-c", program]);
    let mut task = Dialogue::start(python);
    // Two looks.
    thread::sleep(Duration::from_secs(2));
    task.go_on();
    let cookie = task.hear().parse().unwrap();
    assert!(!place.knows(cookie));
    task.go_on();
    figure(&format!("before the daemon heard a namespace without a name: {}", task.hear()));
    assert!(place.knows(cookie));
    assert!(task.end().success());
    wait_until("the namespace is let go", || !place.knows(cookie));
}

#[test]
fn a_namespace_that_ends_is_let_go() {
    let place = Place::start();
    let host = place.host();
    let cables = place.network.cables();
    let start = Instant::now();
    drop(host);
    wait_until("its cable is gone", || place.network.cables() == cables - 1);
    figure(&format!("a namespace that ended was held for {:.1} ms", start.elapsed().as_secs_f64() * 1e3));
}

#[test]
fn a_task_can_be_a_name_server_on_all_addresses() {
    const OWN: &str = "192.0.2.3";
    let place = Place::start();
    let (host, other) = (place.host(), place.network.host());
    let mut dnsmasq = place.mesh.on(&host, "dnsmasq");
    dnsmasq.arg(format!("--address=/elsewhere.test/{OWN}"));
    let _server = Dns::run(dnsmasq, 53);
    // Whose queries are not intercepted.
    for address in [&host.address, &host.address6] {
        for more in ["+notcp", "+tcp"] {
            let mut dig = other.command("dig");
            dig.args([&format!("@{address}"), "+short", "elsewhere.test", more]);
            assert_eq!(text(&dig.output().unwrap()).trim(), OWN, "{address} {more}");
        }
    }
    assert_eq!(place.dig(&host, &[]), UPSTREAM);
}

#[test]
fn with_interception_turned_off_queries_go_where_they_are_sent() {
    let mut place = Place::start();
    let host = place.host();
    place.mesh.kill();
    place.mesh.dns += "\nintercept = false";
    place.mesh.configure("");
    place.launch();
    // As long as it would take to find the namespace again.
    thread::sleep(Duration::from_secs(2));
    assert_eq!(place.dig(&host, &[]), ORIGINAL);
    assert_eq!(place.dig(&host, &["+tcp"]), ORIGINAL);
}

#[test]
fn the_daemon_s_own_questions_go_where_they_are_sent() {
    // On the port that is intercepted, in the namespace that the daemon is in.
    let [.., high, low] = std::process::id().to_be_bytes();
    let mut place = Place::with("", &format!("127.96.{high}.{low}:53"));
    let daemon = place.mesh.inside(binary());
    place.mesh.launch_as(daemon);
    place.mesh.ready();
    place.host();
    // Where the daemon is, tasks' queries come to it.
    let own = format!("@{}", place.resolver.address);
    let in_its_namespace = || {
        let mut dig = place.mesh.inside("dig");
        text(&dig.args([&own, "+short", "+timeout=1", "+tries=1", "elsewhere.test"]).output().unwrap())
    };
    wait_until("the daemon listens where it is", || in_its_namespace().trim() == UPSTREAM);
    assert!(place.upstream.asked().contains(&"A elsewhere.test".to_owned()));
    assert_eq!(place.mesh.json(&["status"])["problems"], serde_json::json!([]));
}

#[test]
fn killing_the_daemon_under_a_load_of_queries_costs_no_more_than_a_retry() {
    let mut place = Place::start();
    let host = place.host();
    let program = r#"
import socket, sys, threading, time
done, failed, counts, longest = threading.Event(), [], [0] * 4, [0] * 4
def ask(n):
    while not done.is_set():
        start = time.monotonic()
        try:
            socket.getaddrinfo("elsewhere.test", 80, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            failed.append(error)
        counts[n] += 1
        longest[n] = max(longest[n], time.monotonic() - start)
threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
print("up", flush=True)
sys.stdin.readline()
done.set()
for thread in threads:
    thread.join()
print(len(failed), f"the longest of {sum(counts)} look-ups took {1e3 * max(longest):.1f} ms, failed: {failed}", flush=True)
"#;
    let mut python = place.command(&host, "python3");
    python.args(["-c", program]);
    let mut task = Dialogue::start(python);
    assert_eq!(task.hear(), "up");
    // glibc asks again after a second, on the same socket: a daemon that is not back by then is refused to it.
    let mut late = 1;
    for _ in 0..5 {
        let killed = Instant::now();
        place.mesh.kill();
        place.launch();
        wait_until("the daemon listens", || place.dig(&host, &[]) == UPSTREAM);
        late += u32::from(killed.elapsed() > Duration::from_millis(900));
        // The queries that it had when it was killed are asked again after a second.
        thread::sleep(Duration::from_secs(2));
    }
    // It does not come back at all.
    place.mesh.kill();
    thread::sleep(Duration::from_secs(2));
    task.go_on();
    let told = task.hear();
    let (failed, rest) = told.split_once(' ').unwrap();
    figure(&format!("while the daemon was killed 6 times: {rest}"));
    assert!(
        failed.parse::<u32>().unwrap() <= 4 * late,
        "more than one for each thread, {late} times: {rest}"
    );
}

#[test]
fn a_vip_that_is_a_name_server_s_leads_there() {
    let place = Place::start();
    let host = place.host();
    for more in ["+notcp", "+tcp"] {
        let mut dig = place.mesh.on(&host, "dig");
        dig.args([&format!("@{DNS_VIP}"), "+short", "elsewhere.test", more]);
        assert_eq!(text(&dig.output().unwrap()).trim(), ORIGINAL, "{more}");
    }
}

#[test]
fn workloads_that_are_excluded_ask_whom_they_ask() {
    let more = "exclude = [\"/excluded\", \"some/later\"]";
    let mut place = Place::with(more, &free_address());
    let host = place.network.host();
    let asks = |workload: &str| {
        let [nsenter, net] = host.enter();
        let mut dig = place.mesh.workload(workload).command(nsenter);
        place.asks(dig.args([&net, "dig"]), &[])
    };
    assert_eq!([asks("excluded"), asks("some")], [ORIGINAL; 2]);
    place.mesh.launch();
    place.mesh.ready();
    let asks = |workload: &str| {
        let [nsenter, net] = host.enter();
        let mut dig = place.mesh.workload(workload).command(nsenter);
        place.asks(dig.args([&net, "dig"]), &[])
    };
    wait_until("the daemon listens", || asks("some") == UPSTREAM);
    for workload in ["excluded", "excluded/below", "excluded/some/deeper"] {
        assert_eq!(asks(workload), ORIGINAL, "{workload}");
    }
    for workload in ["excluded-not", "some/excluded"] {
        assert_eq!(asks(workload), UPSTREAM, "{workload}");
    }
    // One that comes later is found within a second.
    wait_until("the new cgroup is excluded", || asks("some/later") == ORIGINAL);
}

/// The flood is what is sent; its own answers may be lost. The other task asks as glibc does, which repeats a question
/// after a second: every one of its look-ups must have its answer.
#[test]
fn one_task_s_flood_of_queries_fails_no_other_task_s_look_up() {
    let place = Place::start();
    let (hostile, host) = (place.host(), place.host());
    let mut flood = place.mesh.on(&hostile, env!("CARGO_BIN_EXE_flood"));
    flood.args([&format!("{}:53", place.resolver.address), "100000"]);
    flood.args(["echo.service.local", "nobody.service.local", "elsewhere.test"]);
    let mut flood = Dialogue::start(flood);
    wait_until("the flood has begun", || {
        let page = Command::new("curl").args(["-sS", &format!("http://{}/metrics", place.mesh.web)]).output();
        let page = text(&page.unwrap());
        let told = page.lines().find_map(|line| {
            line.strip_prefix("mesh_dns_queries_total{answer=\"own\",type=\"A\",rcode=\"NXDOMAIN\"} ")
        });
        told.is_some_and(|count| count.parse::<u64>().unwrap() > 1000)
    });
    let program = r#"
import socket, time
times = []
for _ in range(1000):
    for name in ("short", "elsewhere.test"):
        start = time.monotonic()
        socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)
        times.append(time.monotonic() - start)
times.sort()
print(" / ".join(f"{1e3 * times[len(times) * n // 1000]:.2f}" for n in (500, 990, 999)))
"#;
    let output = place.command(&host, "python3").args(["-c", program]).output().unwrap();
    flood.go_on();
    let told = flood.hear();
    let (offered, answered) = told.split_once(' ').unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(answered.parse::<u64>().unwrap() > 0, "the flood came to nobody");
    place.mesh.ready();
    assert_eq!(place.dig(&hostile, &[]), UPSTREAM, "the task that asked too much is answered again");
    figure(&format!(
        "beside a task that sends {offered} queries/s and is answered {answered}, a look-up takes another one (p50 / p99 / p99.9) {} ms",
        text(&output).trim()
    ));
}
