//! Programs that nobody here wrote, on hosts of their own.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use mesh_tests::{
    Dialogue, Mesh, datagram_service, free_address,
    netns::{Host, Network},
    server::Dns,
    service, text, wait_until,
};

const VIP: &str = "127.128.2.1";

/// A real nginx.
struct Nginx(Child);

impl Nginx {
    /// Starts it by `command`, with these `server` blocks.
    fn start(mut command: Command, mesh: &Mesh, servers: &str) -> Self {
        let dir = mesh.dir.path().join("nginx");
        fs::create_dir(&dir).unwrap();
        let (path, pid) = (dir.join("nginx.conf"), dir.join("pid"));
        let dir = dir.display();
        let config = format!(
            "daemon off; user root; pid {dir}/pid; error_log {dir}/error.log; events {{}}\n\
             http {{ access_log off; client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c;\n\
             uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e; {servers} }}\n"
        );
        fs::write(&path, config).unwrap();
        let nginx = Self(command.arg("-c").arg(&path).stdin(Stdio::null()).spawn().unwrap());
        // It writes that when it listens.
        wait_until("nginx listens", || fs::metadata(&pid).is_ok_and(|file| file.len() > 0));
        nginx
    }

    /// On a host, with a page on each of these ports that says the port.
    fn on(host: &Host, mesh: &Mesh, ports: &[u16]) -> Self {
        let page = |port: &u16| {
            let address = &host.address;
            format!("server {{ listen {address}:{port}; location / {{ return 200 \"{port}\\n\"; }} }}\n")
        };
        Self::start(host.command("nginx"), mesh, &ports.iter().map(page).collect::<String>())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Its workers end with it on SIGTERM.
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.0),
            rustix::process::Signal::TERM,
        );
        let _ = self.0.wait();
    }
}

fn curl(mesh: &Mesh, host: &Host, args: &[&str]) -> String {
    let output = mesh.on(host, "curl").args(["-sS", "--max-time", "10"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn curl_reaches_nginx_on_another_host_through_the_vip() {
    let network = Network::new();
    let (client, server) = (network.host(), network.host());
    let mesh = Mesh::start(&service("web", 80, VIP, &[(&server.address, 8080), (&server.address, 8081)]));
    let _nginx = Nginx::on(&server, &mesh, &[8080, 8081]);
    let url = format!("http://{VIP}/");
    let answers: Vec<_> =
        (0..40).map(|_| curl(&mesh, &client, &["-w", "%{remote_ip}:%{remote_port}", &url])).collect();
    for answer in &answers {
        let (port, peer) = answer.split_once('\n').unwrap();
        assert!(["8080", "8081"].contains(&port), "{answer}");
        assert_eq!(peer, format!("{VIP}:80"), "what curl shows as the peer");
    }
    assert!(
        answers.iter().any(|answer| answer.starts_with("8080"))
            && answers.iter().any(|answer| answer.starts_with("8081"))
    );
}

#[test]
fn a_kept_alive_connection_stays_on_a_backend_that_leaves_the_registry() {
    let network = Network::new();
    let (client, server) = (network.host(), network.host());
    let both = service("web", 80, VIP, &[(&server.address, 8080), (&server.address, 8081)]);
    let mesh = Mesh::start(&both);
    let _nginx = Nginx::on(&server, &mesh, &[8080, 8081]);
    let script = format!(
        r#"
import http.client, sys, time
c = http.client.HTTPConnection("{VIP}", 80, timeout=10)
def get():
    c.request("GET", "/")
    return c.getresponse().read().decode().strip()
first = get()
print(first, flush=True)
sys.stdin.readline()
print(all(get() == first for _ in range(100)), flush=True)
"#
    );
    let mut command = mesh.on(&client, "python3");
    command.args(["-c", &script]);
    let mut browser = Dialogue::start(command);
    let first: u16 = browser.hear().parse().unwrap();

    let other = if first == 8080 { 8081 } else { 8080 };
    mesh.write(&service("web", 80, VIP, &[(&server.address, other)]));
    wait_until("only the other backend is left", || {
        mesh.kernel_backends(&format!("{VIP}:80")) == [format!("{}:{other}", server.address)]
    });
    std::thread::sleep(Duration::from_millis(50));
    browser.go_on();
    assert_eq!(browser.hear(), "True");
    assert!(browser.end().success());
    assert_eq!(curl(&mesh, &client, &[&format!("http://{VIP}/")]).trim(), other.to_string());
}

const NAME: &str = "web.test";

/// A name service whose one server says nothing any more and is replaced by another one. `resolves`
/// is asked what the name is: at first the one server's answer, in the end the other one's.
fn replace_the_name_server(mut resolves: impl FnMut(&Mesh) -> String) {
    let servers = ["127.0.0.2", "127.0.0.3"].map(|address| Dns::start(NAME, address));
    let only = |server: &Dns| {
        let text = datagram_service("dns", 53, VIP, &[("127.0.0.1", server.port)]);
        text.replace("policy", "drain = \"300ms\"\npolicy")
    };
    let mesh = Mesh::start(&only(&servers[0]));
    assert_eq!(resolves(&mesh), "127.0.0.2");
    servers[0].fall_silent();
    mesh.write(&only(&servers[1]));
    wait_until("the other server's answer", || resolves(&mesh) == "127.0.0.3");
}

/// A program inside whose only name server is the VIP; it resolves the name for each line it reads.
fn resolver(mesh: &Mesh, program: &[&str]) -> Dialogue {
    let resolv = mesh.dir.path().join("resolv.conf");
    fs::write(&resolv, format!("nameserver {VIP}\noptions timeout:1 attempts:1\n")).unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.display());
    let mut command = mesh.inside("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).args(program).arg(NAME);
    Dialogue::start(command)
}

fn replace_the_name_server_of(program: &[&str]) {
    let mut running = None;
    replace_the_name_server(|mesh| {
        let resolver = running.get_or_insert_with(|| resolver(mesh, program));
        resolver.go_on();
        resolver.hear()
    });
}

#[test]
fn glibc_s_resolver_recovers_when_its_name_server_is_replaced() {
    let program = r#"
import socket, sys
for _ in sys.stdin:
    try:
        print(socket.getaddrinfo(sys.argv[1], 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0], flush=True)
    except socket.gaierror as error:
        print(error, flush=True)
"#;
    replace_the_name_server_of(&["python3", "-c", program]);
}

#[test]
fn go_s_resolver_recovers_when_its_name_server_is_replaced() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (cache, program) = (here.join("../target/go"), here.join("../target/go/resolve"));
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(here.join("clients/resolve.go"));
    build.env("CGO_ENABLED", "0").env("GO111MODULE", "off").env("GOPATH", &cache).env("GOCACHE", &cache);
    let built = build.output().unwrap();
    assert!(built.status.success(), "{}", text(&built));
    replace_the_name_server_of(&[program.to_str().unwrap()]);
}

#[test]
fn nginx_s_resolver_recovers_when_its_name_server_is_replaced() {
    let [page, proxy] = [free_address(), free_address()];
    let (_, port) = page.rsplit_once(':').unwrap();
    // Each address that the name may have is a server that says so.
    let pages: String = ["127.0.0.2", "127.0.0.3"]
        .iter()
        .map(|address| {
            format!("server {{ listen {address}:{port}; location / {{ return 200 {address}; }} }}\n")
        })
        .collect();
    let servers = format!(
        "{pages} server {{ listen {proxy}; resolver {VIP} valid=1s ipv6=off; resolver_timeout 2s;\n\
         location / {{ set $name {NAME}; proxy_pass http://$name:{port}; }} }}"
    );
    let mut running = None;
    replace_the_name_server(|mesh| {
        // Of all of them it alone keeps one connected socket for its questions.
        running.get_or_insert_with(|| Nginx::start(mesh.inside("nginx"), mesh, &servers));
        let answer =
            Command::new("curl").args(["-sS", "--max-time", "10", &format!("http://{proxy}/")]).output();
        text(&answer.unwrap())
    });
}
