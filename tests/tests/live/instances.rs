//! Names that are answered with the addresses of instances, as real clients see them.

use std::{collections::BTreeSet, fs, net::Ipv4Addr, process::Command};

use mesh_tests::{
    Mesh, binary,
    netns::{Host, Network},
    server::{self, Dns, Server},
    service, text, wait_until,
};

const VIP: &str = "127.128.33.1";

/// What `dig` prints of the answer of this server.
fn dig(mut command: Command, server: &str, question: &[&str]) -> String {
    let at = format!("@{server}");
    let output = command.args([&at, "+tries=1", "+timeout=8"]).args(question).output().unwrap();
    text(&output)
}

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(ToOwned::to_owned).collect()
}

#[test]
fn a_service_that_chooses_it_answers_with_its_instances_and_their_ports() {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let listen = Ipv4Addr::new(127, 64 + high % 32, low, 200).to_string();
    let backends: Vec<_> = (1..=10).map(|n| format!("127.{}.{low}.{n}", 32 + high % 32)).collect();
    let servers: Vec<_> =
        backends.iter().map(|address| Server::start_at("echo", &format!("{address}:0"))).collect();
    let at: Vec<_> =
        backends.iter().zip(&servers).map(|(address, server)| (&**address, server.port())).collect();
    let chosen = |instances: &[(&str, u16)]| {
        let text = service("echo", 80, VIP, instances);
        text.replacen("port", "port_name = \"http\"\naliases = [\"short\"]\nanswer = \"instances\"\nport", 1)
    };
    let mut mesh = Mesh::prepare(&chosen(&at));
    mesh.dns = format!("listen = [\"{listen}:53\"]\nupstream = []");
    mesh.configure("");
    mesh.launch();
    mesh.ready();
    let short =
        |question: &[&str]| lines(&dig(Command::new("dig"), &listen, &[question, &["+short"]].concat()));

    let all: BTreeSet<_> = backends.iter().cloned().collect();
    let mut seen = BTreeSet::new();
    for name in ["echo.service.local", "short"].iter().cycle().take(200) {
        let some = short(&[name]);
        assert!(some.len() == 8 && some.is_subset(&all), "{name}: {some:?}");
        seen.extend(some);
        if seen == all {
            break;
        }
    }
    assert_eq!(seen, all, "each has its turn");
    assert_eq!(short(&["echo.service.local", "AAAA"]), BTreeSet::new());

    // SRV leads to each instance's own port, with the address at hand.
    let srv = dig(Command::new("dig"), &listen, &["_http._tcp.echo.service.local", "SRV"]);
    assert!(srv.contains("ANSWER: 8, AUTHORITY: 0, ADDITIONAL: 9"), "eight and EDNS: {srv}");
    for (address, port) in &at[..1] {
        let host = format!("{}.echo.service.local", address.replace('.', "-"));
        assert_eq!(short(&[&host]), lines(address));
        wait_until("this one's turn", || {
            let expected = format!("1 100 {port} {host}.");
            short(&["echo.service.local", "SRV"]).contains(&expected)
        });
    }
    let why = mesh.json(&["dns", "query", "short", "A"]);
    assert_eq!(why[0]["reason"], "alias of service echo.service.local, which answers with its instances");

    // Unhealthy ones are left out, and the VIP works as before.
    let sick = chosen(&at).replacen("weight", "health = \"unhealthy\"\nweight", 8);
    mesh.write(&sick);
    wait_until("the healthy ones", || short(&["short"]) == backends[8..].iter().cloned().collect());
    let dialled = mesh.python(&format!(
        "import socket; print(socket.create_connection((\"{VIP}\", 80), 5).recv(9).decode())"
    ));
    assert_eq!(dialled, "echo");
    mesh.write(&service("echo", 80, VIP, &at));
    wait_until("the VIP again", || short(&["echo.service.local"]) == lines(VIP));
}

/// Asks for the service's SRV records, and dials one of them, then the name itself.
const CLIENT: &str = r#"
import socket, subprocess
srv = subprocess.check_output(["dig", "+short", "_80._tcp.echo.service.local", "SRV"], text=True)
for line in srv.splitlines():
    _, _, port, target = line.split()
    with socket.create_connection((target.rstrip("."), int(port)), 10) as s:
        print(s.recv(9).decode(), s.getpeername()[0], s.getpeername()[1])
for info in socket.getaddrinfo("echo.service.local", 8080, type=socket.SOCK_STREAM):
    print(info[4][0])
"#;

/// A client on a host whose resolv.conf names only this server.
fn client(mesh: &Mesh, mut command: Command, server: &str) -> String {
    let resolv = mesh.dir.path().join("resolv.conf");
    fs::write(&resolv, format!("nameserver {server}\noptions timeout:2\n")).unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.display());
    let output =
        command.args(["--mount", "sh", "-c", &script, "sh", "python3", "-c", CLIENT]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

#[test]
fn another_machine_gets_healthy_instances_and_the_node_s_own_tasks_the_vip() {
    let network = Network::new();
    let [node, backend, resolver, stranger, task]: [Host; 5] = std::array::from_fn(|_| network.host());
    let upstream = Dns::on(&resolver, &["--address=/www.example.com/192.0.2.1", "--local=//"]);
    let _server = server::on(&backend, "s.sendall(b\"echo\"); s.close()");
    // One that does not listen, and is said to be unhealthy.
    let at = [(&*backend.address, 8080), (&*stranger.address, 8080)];
    let mut services = service("echo", 80, VIP, &at);
    services += "health = \"unhealthy\"\n";
    let mut mesh = Mesh::prepare(&services);
    let (v4, v6) = (&node.address, &node.address6);
    mesh.dns =
        format!("listen = []\noutside = [\"{v4}:53\", \"[{v6}]:53\"]\nupstream = [\"{}\"]", resolver.address);
    mesh.configure("");
    mesh.launch_as(node.command(binary().to_str().unwrap()));
    mesh.ready();
    assert_eq!(
        mesh.json(&["status"])["dns"]["outside"],
        serde_json::json!([format!("{v4}:53"), format!("[{v6}]:53")])
    );

    for server in [v4, v6] {
        let ask = |question: &[&str]| dig(stranger.command("dig"), server, question);
        wait_until("it answers", || ask(&["echo.service.local", "+short"]).trim() == backend.address);
        assert_eq!(ask(&["echo.service.local", "+short", "+tcp"]).trim(), backend.address);
        let nobody = ask(&["nobody.service.local"]);
        // Who is not told that it asks others has no reason to have it ask others.
        assert!(nobody.contains("status: NXDOMAIN") && nobody.contains(";; flags: qr aa rd;"), "{nobody}");
        for question in [&["www.example.com"][..], &["www.example.com", "+tcp"]] {
            assert!(ask(question).contains("status: REFUSED"), "{question:?}");
        }
    }
    let here = dig(node.command("dig"), v4, &["www.example.com"]);
    assert!(here.contains("status: REFUSED"), "also on the machine itself: {here}");
    assert!(
        !upstream.asked().iter().any(|asked| asked.ends_with("www.example.com")),
        "{:?}",
        upstream.asked()
    );

    let heard = client(&mesh, stranger.command("unshare"), v4);
    assert_eq!(heard, format!("echo {0} 8080\n{0}\n", backend.address));
    // The same question to the same address, in the datapath.
    let asked = |host: &Host, program: &str| mesh.on(host, program);
    wait_until("the daemon listens", || {
        dig(asked(&task, "dig"), v4, &["www.example.com", "+short"]).trim() == "192.0.2.1"
    });
    let heard = client(&mesh, asked(&task, "unshare"), v4);
    assert_eq!(heard, format!("echo {VIP} 80\n{VIP}\n"));

    // What has become unhealthy is not answered any more.
    mesh.write(&service("echo", 80, VIP, &at[1..]));
    wait_until("the other one", || {
        dig(stranger.command("dig"), v4, &["echo.service.local", "+short"]).trim() == stranger.address
    });
}
