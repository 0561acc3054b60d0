//! Programs that nobody here wrote, on hosts of their own.

use std::{fs, process::Child, process::Command, process::Stdio, time::Duration};

use mesh_tests::{Dialogue, Mesh, netns::Pair, service, text, wait_until};

const VIP: &str = "127.128.2.1";

/// A real nginx on the server's host, with a page on each of these ports that says the port.
struct Nginx(Child);

impl Nginx {
    fn start(hosts: &Pair, mesh: &Mesh, ports: &[u16]) -> Self {
        let dir = mesh.dir.path().join("nginx");
        fs::create_dir(&dir).unwrap();
        let servers: String = ports
            .iter()
            .map(|port| {
                format!("server {{ listen 10.213.0.2:{port}; location / {{ return 200 \"{port}\\n\"; }} }}\n")
            })
            .collect();
        let dir = dir.display();
        let config = format!(
            "daemon off; user root; pid {dir}/pid; error_log {dir}/error.log; events {{}}\n\
             http {{ access_log off; client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c;\n\
             uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e; {servers} }}\n"
        );
        let path = mesh.dir.path().join("nginx.conf");
        fs::write(&path, config).unwrap();
        let nginx = hosts.server.command("nginx").arg("-c").arg(&path).stdin(Stdio::null()).spawn().unwrap();
        let nginx = Self(nginx);
        wait_until("nginx answers", || {
            let answer = hosts
                .client
                .command("curl")
                .args(["-sf", &format!("http://10.213.0.2:{}", ports[0])])
                .output();
            answer.is_ok_and(|answer| answer.status.success())
        });
        nginx
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

fn curl(mesh: &Mesh, hosts: &Pair, args: &[&str]) -> String {
    let mut command: Command = mesh.inside(&hosts.client.enter()[0]);
    let output = command
        .arg(&hosts.client.enter()[1])
        .arg("curl")
        .args(["-sS", "--max-time", "10"])
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn curl_reaches_nginx_on_another_host_through_the_vip() {
    let hosts = Pair::new();
    let mesh = Mesh::start(&service("web", 80, VIP, &[("10.213.0.2", 8080), ("10.213.0.2", 8081)]));
    let _nginx = Nginx::start(&hosts, &mesh, &[8080, 8081]);
    let url = format!("http://{VIP}/");
    let answers: Vec<_> =
        (0..40).map(|_| curl(&mesh, &hosts, &["-w", "%{remote_ip}:%{remote_port}", &url])).collect();
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
    let hosts = Pair::new();
    let both = service("web", 80, VIP, &[("10.213.0.2", 8080), ("10.213.0.2", 8081)]);
    let mesh = Mesh::start(&both);
    let _nginx = Nginx::start(&hosts, &mesh, &[8080, 8081]);
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
    let mut command = mesh.inside(&hosts.client.enter()[0]);
    command.arg(&hosts.client.enter()[1]).args(["python3", "-c", &script]);
    let mut client = Dialogue::start(command);
    let first: u16 = client.hear().parse().unwrap();

    let other = if first == 8080 { 8081 } else { 8080 };
    mesh.write(&service("web", 80, VIP, &[("10.213.0.2", other)]));
    wait_until("only the other backend is left", || {
        mesh.kernel_backends(&format!("{VIP}:80")) == [format!("10.213.0.2:{other}")]
    });
    std::thread::sleep(Duration::from_millis(50));
    client.go_on();
    assert_eq!(client.hear(), "True");
    assert!(client.end().success());
    assert_eq!(curl(&mesh, &hosts, &[&format!("http://{VIP}/")]).trim(), other.to_string());
}
