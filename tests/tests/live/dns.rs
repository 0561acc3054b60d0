//! Names, as real resolvers see them.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

use mesh_tests::{
    Dialogue, Mesh, binary, figure,
    server::{Dns, Server},
    service, text, wait_until,
};

const VIP: &str = "127.128.6.1";

/// A daemon that listens on a loopback address of its own, and asks these for what it does not know.
pub(crate) struct Names {
    pub(crate) mesh: Mesh,
    address: Ipv4Addr,
}

impl Names {
    pub(crate) fn prepare(services: &str, upstream: &[&Dns]) -> Self {
        static COUNT: AtomicU8 = AtomicU8::new(1);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let address = Ipv4Addr::new(127, 64 + high % 32, low, COUNT.fetch_add(1, Ordering::Relaxed));
        let upstream: Vec<_> = upstream.iter().map(|dns| format!("127.0.0.1:{}", dns.port)).collect();
        let mut mesh = Mesh::prepare(services);
        mesh.dns = format!("listen = [\"{address}:53\"]\nupstream = {upstream:?}");
        mesh.configure("");
        Self { mesh, address }
    }

    fn start(services: &str, upstream: &[&Dns]) -> Self {
        let mut names = Self::prepare(services, upstream);
        names.mesh.launch();
        names.mesh.ready();
        names
    }

    /// What `dig` prints of the answer.
    fn dig(&self, question: &[&str]) -> String {
        let output = Command::new("dig")
            .args([&format!("@{}", self.address), "+tries=1", "+timeout=8", "+nocookie"])
            .args(question)
            .output()
            .unwrap();
        text(&output)
    }

    /// The data of the records alone.
    pub(crate) fn short(&self, question: &[&str]) -> String {
        self.dig(&[question, &["+short"]].concat()).trim().to_owned()
    }

    /// `NOERROR` and the like.
    pub(crate) fn status(&self, question: &[&str]) -> String {
        let all = self.dig(question);
        let status = all.split_once("status: ").and_then(|(_, rest)| rest.split_once(','));
        status.unwrap_or_else(|| panic!("{all}")).0.to_owned()
    }

    /// A Python program inside whose resolv.conf names only the daemon, led line by line.
    fn task(&self, search: &str, program: &str) -> Dialogue {
        let resolv = self.mesh.dir.path().join("resolv.conf");
        fs::write(&resolv, format!("nameserver {}\nsearch {search}\noptions timeout:2\n", self.address))
            .unwrap();
        let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.display());
        let mut command = self.mesh.inside("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh", "python3", "-c", program]);
        Dialogue::start(command)
    }
}

/// `echo` on port 80, with the alias `short`.
fn echo(server: &Server) -> String {
    let text = service("echo", 80, VIP, &[("127.0.0.1", server.port())]);
    text.replacen("port", "aliases = [\"short\"]\nport", 1)
}

#[test]
fn dig_gets_every_kind_of_answer() {
    let server = Server::start("echo");
    let names = Names::start(&echo(&server), &[]);
    for name in ["echo.service.local", "short.service.local", "short", "EcHo.SERVICE.local"] {
        assert_eq!(names.short(&[name]), VIP, "{name}");
    }
    assert_eq!(names.short(&["echo.service.local", "SRV"]), "1 1 80 echo.service.local.");
    assert_eq!(names.short(&["_80._tcp.echo.service.local", "SRV"]), "1 1 80 echo.service.local.");
    assert_eq!(names.short(&["-x", VIP]), "echo.service.local.");
    assert_eq!(names.short(&["echo.service.local", "+tcp"]), VIP);
    assert!(names.dig(&["EcHo.SERVICE.local"]).contains("EcHo.SERVICE.local.\t5\tIN\tA"));

    let nodata = names.dig(&["echo.service.local", "AAAA"]);
    assert!(nodata.contains("status: NOERROR") && nodata.contains("ANSWER: 0, AUTHORITY: 1"), "{nodata}");
    let nobody = names.dig(&["nobody.service.local"]);
    assert!(
        nobody.contains("status: NXDOMAIN") && nobody.contains("service.local.\t\t0\tIN\tSOA"),
        "{nobody}"
    );
    assert!(nobody.contains(";; flags: qr aa rd ra;") && nobody.contains("; EDNS: version: 0"), "{nobody}");
    assert_eq!(names.status(&["echo.service.local", "+edns=1", "+noednsneg"]), "BADVERS");
    assert!(names.dig(&["service.local", "AXFR"]).contains("Transfer failed"));
    assert_eq!(names.status(&["version.bind", "TXT", "CH"]), "REFUSED");
    assert_eq!(names.status(&["echo.service.local", "+opcode=NOTIFY"]), "NOTIMP");
    assert_eq!(names.status(&["www.example.com"]), "REFUSED", "there is no upstream");
}

#[test]
fn a_task_calls_by_alias_whatever_its_search_domains_are() {
    let server = Server::start("echo");
    let upstream = Dns::with(&["--local=/ec2.internal/", "--local=//"]);
    let names = Names::start(&echo(&server), &[&upstream]);
    let mut task = names.task(
        "ec2.internal service.local",
        r#"
import socket
for name in ["short", "echo", "echo.service.local", "short.service.local."]:
    with socket.create_connection((name, 80), timeout=10) as s:
        print(s.recv(100).decode(), s.getpeername()[0], flush=True)
"#,
    );
    for _ in 0..4 {
        assert_eq!(task.hear(), format!("echo {VIP}"));
    }
    assert!(task.end().success());
    assert!(upstream.asked().contains(&"A short.ec2.internal".to_owned()), "{:?}", upstream.asked());
}

#[test]
fn a_running_task_learns_of_a_new_name_and_of_a_name_that_is_gone() {
    let server = Server::start("echo");
    let upstream = Dns::with(&["--local=/short/"]);
    let other = service("other", 80, "127.128.6.2", &[("127.0.0.1", server.port())]);
    let names = Names::start(&other, &[&upstream]);
    // Says yes or no, then waits for the answer to change, and says how long that took.
    let mut task = names.task(
        ".",
        r#"
import socket, sys, time
def known():
    try:
        return bool(socket.getaddrinfo("echo.service.local", 80) and socket.getaddrinfo("short", 80))
    except socket.gaierror as error:
        assert error.errno in (socket.EAI_NONAME, socket.EAI_NODATA), error
        return False
for _ in range(2):
    before = known()
    print(before, flush=True)
    while known() == before:
        time.sleep(0.001)
    print(time.monotonic_ns(), flush=True)
"#,
    );
    for (before, services) in [("False", other.clone() + &echo(&server)), ("True", other)] {
        assert_eq!(task.hear(), before);
        let start = mesh_tests::now();
        names.mesh.write(&services);
        let seen: u64 = task.hear().parse().unwrap();
        let what = if before == "False" { "a new name" } else { "a name's end" };
        figure(&format!("{what} in a running task: {:.1} ms", seen.saturating_sub(start) as f64 / 1e6));
    }
    assert!(task.end().success());
}

#[test]
fn names_below_the_suffixes_never_leave_the_node_and_others_do_once() {
    let server = Server::start("echo");
    let upstream = Dns::with(&[
        "--local-ttl=60",
        "--address=/www.example.com/192.0.2.1",
        "--txt-record=www.example.com,hello",
        "--local=/example.com/",
    ]);
    let names = Names::start(&echo(&server), &[&upstream]);
    for name in
        ["echo.service.local", "nobody.service.local", "x.echo.service.local", "service.local", "short"]
    {
        for kind in ["A", "AAAA", "SRV", "TXT", "ANY"] {
            names.status(&[name, kind]);
        }
    }
    for address in [VIP, "127.128.6.99"] {
        names.status(&["-x", address]);
    }
    assert_eq!(upstream.asked().iter().filter(|asked| !asked.ends_with(".mesh-loop")).count(), 0);

    let asked = |name: &str| upstream.asked().iter().filter(|asked| *asked == name).count();
    for _ in 0..3 {
        assert_eq!(names.short(&["www.example.com", "TXT"]), "\"hello\"");
    }
    assert_eq!(asked("TXT www.example.com"), 1, "the others came from the cache");
    assert_eq!(names.short(&["www.example.com"]), "192.0.2.1");
    let nobody = names.dig(&["nobody.example.com"]);
    assert!(nobody.contains("status: NXDOMAIN") && nobody.contains("flags: qr rd ra;"), "{nobody}");
}

#[test]
fn an_answer_too_large_for_udp_is_fetched_and_passed_on_over_tcp() {
    let long: Vec<_> = (0..12).map(|n| format!(",{n}{}", "x".repeat(240))).collect();
    let upstream = Dns::with(&[&format!("--txt-record=big.test{}", long.concat())]);
    let names = Names::start("service = []", &[&upstream]);
    assert_eq!(names.short(&["big.test", "TXT"]).len(), 12 * 244 + 1, "with its own retry over TCP");
    let cut = names.dig(&["big.test", "TXT", "+ignore"]);
    assert!(cut.contains("flags: qr tc rd ra;") && cut.contains("ANSWER: 0"), "{cut}");
    assert_eq!(names.short(&["big.test", "TXT", "+tcp"]).len(), 12 * 244 + 1);
}

#[test]
fn a_silent_upstream_costs_nobody_the_node_s_own_names() {
    let server = Server::start("echo");
    let upstream = Dns::with(&["--address=/www.example.com/192.0.2.1"]);
    let names = Names::start(&echo(&server), &[&upstream]);
    upstream.fall_silent();
    let flood = UdpSocket::bind("127.0.0.1:0").unwrap();
    for n in 0..1000u16 {
        let mut question = n.to_be_bytes().to_vec();
        question.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        let label = format!("n{n}");
        question.push(u8::try_from(label.len()).unwrap());
        question.extend(label.as_bytes());
        question.extend(b"\x04test\x00\x00\x01\x00\x01");
        flood.send_to(&question, (names.address, 53)).unwrap();
    }
    assert_eq!(names.short(&["short"]), VIP);
    assert_eq!(names.short(&["short", "+tcp"]), VIP);
    assert_eq!(names.status(&["www.example.com"]), "SERVFAIL");
}

#[test]
fn name_servers_that_ask_the_daemon_in_turn_are_left_out() {
    // The daemon's address is known only when it is made, the server's must be in its configuration.
    let mut names = Names::prepare("service = []", &[]);
    let circle = Dns::with(&[&format!("--server={}", names.address)]);
    let good = Dns::with(&["--address=/www.example.com/192.0.2.1", "--local=//"]);
    let both = format!("[\"127.0.0.1:{}\", \"127.0.0.1:{}\"]", circle.port, good.port);
    names.mesh.dns = names.mesh.dns.replace("upstream = []", &format!("upstream = {both}"));
    names.mesh.configure("");
    names.mesh.launch();
    names.mesh.ready();
    let named = format!("the name server 127.0.0.1:{} asks this daemon in turn", circle.port);
    wait_until("the circle is named", || {
        names.mesh.json(&["status"])["problems"].to_string().contains(&named)
    });
    assert_eq!(
        names.mesh.json(&["status"])["dns"]["upstream"],
        serde_json::json!([format!("127.0.0.1:{}", good.port)])
    );
    let before = circle.asked().len();
    assert_eq!(names.short(&["www.example.com"]), "192.0.2.1");
    assert_eq!(circle.asked().len(), before);
}

#[test]
fn garbage_and_idle_connections_keep_nobody_out() {
    let server = Server::start("echo");
    let names = Names::start(&echo(&server), &[]);
    let at = (names.address, 53);
    let hostile = UdpSocket::bind("127.0.0.1:0").unwrap();
    hostile.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let header = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01";
    let question = b"\x05short\x00\x00\x01\x00\x01";
    for rest in [
        &b"\xc0\x0c\x00\x01\x00\x01"[..],
        b"\xff\xff\xff",
        // A question with an OPT record that is longer than the message, and one with two of them.
        &[&question[..], b"\x00\x00\x29\xff\xff\x00\x00\x00\x00\xff\xff"].concat(),
        &[&question[..], b"\x00\x00\x29\x10\x00\x00\x00\x00\x00\x00\x04\x00\x0a\x00\xff"].concat(),
    ] {
        hostile.send_to(&[&header[..], rest].concat(), at).unwrap();
        let mut reply = [0; 512];
        let length = hostile.recv(&mut reply).unwrap();
        assert_eq!(
            (&reply[..2], reply[3] & 15),
            (&b"\x12\x34"[..], 1),
            "FORMERR, not {:?}",
            &reply[..length]
        );
    }
    // An option that is cut off is left out.
    let cut = b"\x00\x00\x29\x10\x00\x00\x00\x00\x00\x00\x06\x00\x0a\x00\x03ab";
    hostile.send_to(&[&header[..], question, cut].concat(), at).unwrap();
    let mut reply = [0; 512];
    let length = hostile.recv(&mut reply).unwrap();
    assert_eq!(reply[3] & 15, 0, "{:?}", &reply[..length]);
    for length in [0, 1, 11, 600, 5000, 60000] {
        hostile.send_to(&vec![0xa5; length], at).unwrap();
    }
    // Answers to questions that nobody asked.
    hostile.send_to(b"\x12\x34\x81\x80\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01", at).unwrap();
    assert!(hostile.recv(&mut [0; 512]).is_err(), "an answer to garbage");
    assert!(!names.mesh.log().contains("EDNS"), "a line of log for what any task may send");

    let start = Instant::now();
    let idle: Vec<_> = (0..200).map(|_| TcpStream::connect(at).unwrap()).collect();
    assert_eq!(names.short(&["short"]), VIP);
    // They are let go, and whoever waited behind them is served.
    wait_until("an answer over TCP", || names.short(&["short", "+tcp"]) == VIP);
    figure(&format!("TCP behind 200 idle connections: {:?}", start.elapsed()));
    drop(idle);
    let mut half = TcpStream::connect(at).unwrap();
    half.write_all(&[0xff, 0xff, 1, 2, 3]).unwrap();
    assert_eq!(half.read(&mut [0; 10]).unwrap(), 0, "closed");
}

#[test]
fn what_is_not_in_the_maps_has_no_name_and_what_is_not_known_yet_is_not_denied() {
    let (one, two) = (service("one", 80, VIP, &[]), service("two", 80, "127.128.6.2", &[]));
    let mut names = Names::prepare("service = ", &[]);
    names.mesh.configure("[datapath]\nmax_services = 1\n");
    names.mesh.launch();
    wait_until("it listens", || names.dig(&["one.service.local"]).contains("status: "));
    assert_eq!(names.status(&["one.service.local"]), "SERVFAIL", "no registry was heard");
    assert_eq!(names.status(&["short"]), "SERVFAIL", "it may become an alias");
    names.mesh.write(&(one + &two));
    wait_until("the services", || names.short(&["one.service.local"]) == VIP);
    assert!(names.mesh.json(&["status"])["problems"].to_string().contains("127.128.6.2 port 80"));
    assert_eq!(names.status(&["two.service.local"]), "NXDOMAIN");
}

#[test]
fn an_address_that_is_taken_is_named_and_listened_at_once_it_is_free() {
    let server = Server::start("echo");
    let mut names = Names::prepare(&echo(&server), &[]);
    let taken = UdpSocket::bind((names.address, 53)).unwrap();
    let config = names.mesh.config.to_str().unwrap();
    let check = names.mesh.mesh(&["check", "--pre", "--config", config]).output().unwrap();
    assert!(text(&check).contains(&format!("dns.listen {}:53", names.address)), "{}", text(&check));
    names.mesh.launch();
    names.mesh.ready();
    let expected = format!("cannot listen on dns.listen {}:53 (UDP)", names.address);
    assert!(names.mesh.json(&["status"])["problems"].to_string().contains(&expected));
    drop(taken);
    wait_until("it answers", || names.short(&["short"]) == VIP);
    assert!(!names.mesh.json(&["status"])["problems"].to_string().contains(&expected));
}

#[test]
fn the_command_says_why_and_the_metrics_how_often() {
    let server = Server::start("echo");
    let upstream = Dns::with(&["--address=/www.example.com/192.0.2.1", "--local=//"]);
    let names = Names::start(&echo(&server), &[&upstream]);
    let query = |question: &[&str]| names.mesh.json(&[&["dns", "query"], question].concat());
    let short = query(&["short"]);
    assert_eq!(
        (&short[0]["type"], &short[0]["rcode"], &short[0]["answer"]),
        (&"A".into(), &"NOERROR".into(), &"own".into())
    );
    assert_eq!(short[0]["reason"], "alias of service echo.service.local");
    assert_eq!(short[0]["records"][0]["data"], VIP);
    assert_eq!((&short[1]["type"], &short[1]["rcode"]), (&"AAAA".into(), &"NOERROR".into()));
    assert_eq!(query(&["nobody.service.local", "srv"])[0]["rcode"], "NXDOMAIN");
    let www = &query(&["www.example.com", "A"])[0];
    assert_eq!((&www["answer"], &www["records"][0]["data"]), (&"forwarded".into(), &"192.0.2.1".into()));
    assert!(www["reason"].as_str().unwrap().contains(&format!("forwarded to 127.0.0.1:{}", upstream.port)));
    let table = names.mesh.mesh(&["dns", "query", "echo.service.local"]).output().unwrap();
    assert!(
        text(&table)
            .contains("NOERROR, own: service echo.service.local\n  echo.service.local. 5 A 127.128.6.1"),
        "{}",
        text(&table)
    );
    let wrong = names.mesh.mesh(&["dns", "query", "a..b"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(1));

    for question in [["short", "A"], ["nobody.service.local", "MX"], ["www.example.com", "A"]] {
        names.status(&question);
    }
    let page =
        Command::new("curl").args(["-sS", &format!("http://{}/metrics", names.mesh.web)]).output().unwrap();
    for row in [
        "mesh_dns_queries_total{answer=\"own\",type=\"A\",rcode=\"NOERROR\"} 1",
        "mesh_dns_queries_total{answer=\"own\",type=\"other\",rcode=\"NXDOMAIN\"} 1",
        "mesh_dns_queries_total{answer=\"forwarded\",type=\"A\",rcode=\"NOERROR\"} 1",
        "mesh_dns_query_duration_seconds_count{answer=\"own\"} 2",
    ] {
        assert!(text(&page).contains(row), "{row}\nis missing in\n{}", text(&page));
    }
}

#[test]
fn suffixes_and_upstream_follow_the_configuration() {
    let upstream = Dns::with(&["--address=/www.corp/192.0.2.1", "--local=//"]);
    let mut names = Names::start("service = []", &[]);
    assert_eq!(names.status(&["www.corp"]), "REFUSED");
    names.mesh.dns =
        names.mesh.dns.replace("upstream = []", &format!("upstream = [\"127.0.0.1:{}\"]", upstream.port));
    names.mesh.configure("");
    wait_until("the new upstream", || names.short(&["www.corp"]) == "192.0.2.1");
    names.mesh.dns += "\nsuffixes = [\"corp\"]";
    names.mesh.configure("");
    wait_until("the new suffix", || names.status(&["www.corp"]) == "NXDOMAIN");
}

#[test]
fn the_node_s_resolv_conf_is_followed_and_never_leads_back() {
    let mut names = Names::prepare("service = []", &[]);
    names.mesh.dns = names.mesh.dns.replace("upstream = []", "upstream = \"auto\"");
    names.mesh.configure("");
    let [.., high, low] = names.address.octets();
    let other = Ipv4Addr::new(127, 63, high, low);
    let _upstream = Dns::at(&format!("{other}:53"), &["--address=/www.example.com/192.0.2.1", "--local=//"]);
    let resolv = names.mesh.dir.path().join("node-resolv.conf");
    fs::write(&resolv, format!("nameserver {}\n", names.address)).unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.display());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).arg(binary());
    names.mesh.launch_as(command);
    names.mesh.ready();
    let problems = names.mesh.json(&["status"])["problems"].to_string();
    assert!(problems.contains("names no server but this daemon"), "{problems}");
    assert_eq!(names.status(&["www.example.com"]), "SERVFAIL");
    fs::write(&resolv, format!("nameserver {}\nnameserver {other}\n", names.address)).unwrap();
    wait_until("the new name server", || names.short(&["www.example.com"]) == "192.0.2.1");
    assert_eq!(names.mesh.json(&["status"])["problems"], serde_json::json!([]));
}
