//! Pods, services, and what is asked of them.

use std::{collections::BTreeSet, process::Command};

use mesh_tests::{
    Dialogue, Mesh, Workload,
    netns::{Host, Network},
    service, wait_until,
};

/// Answers each call with its name and the caller's address, on these ports of TCP and UDP.
const SERVER: &str = r#"
import socket, sys, threading
name, *ports = sys.argv[1:]
def answer(source):
    return f"{name} {source[0]} {source[1]}".encode()
def tcp(listener):
    while True:
        s, source = listener.accept()
        s.recv(1)
        s.sendall(answer(source))
        s.close()
def udp(s):
    while True:
        source = s.recvfrom(64)[1]
        s.sendto(answer(source), source)
for port in map(int, ports):
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind(("", port))
    threading.Thread(target=tcp, args=[socket.create_server(("", port))], daemon=True).start()
    threading.Thread(target=udp, args=[datagrams], daemon=True).start()
print("up", flush=True)
sys.stdin.readline()
"#;

/// Calls so often and prints the answers, or the errors.
const CLIENT: &str = r#"
import errno, socket, sys
kind, address, port, times = sys.argv[1:]
for _ in range(int(times)):
    s = socket.socket(type=getattr(socket, kind))
    s.settimeout(5)
    try:
        s.connect((address, int(port)))
        s.send(b"?")
        print(s.recv(64).decode())
    except OSError as error:
        print(errno.errorcode.get(error.errno, error))
    s.close()
"#;

/// Upstream's AffinityConfirmCount.
const AFFINITY_CONFIRM_COUNT: usize = 15;

/// A node, and the pods' network.
pub(super) struct Cluster {
    pub(super) mesh: Mesh,
    pub(super) network: Network,
}

pub(super) struct Pod {
    pub(super) name: &'static str,
    pub(super) host: Host,
    pub(super) workload: Workload,
    pub(super) server: Option<Dialogue>,
}

impl Cluster {
    pub(super) fn new() -> Self {
        Self { mesh: Mesh::start("service = []"), network: Network::new() }
    }

    /// A pod that serves nothing.
    pub(super) fn client(&self, name: &'static str) -> Pod {
        Pod { name, host: self.network.host(), workload: self.mesh.workload(name), server: None }
    }

    /// A pod that serves on these ports.
    pub(super) fn server(&self, name: &'static str, ports: &[u16]) -> Pod {
        let mut pod = self.client(name);
        pod.serve(ports);
        pod
    }

    pub(super) fn servers<const N: usize>(&self, names: [&'static str; N]) -> [Pod; N] {
        names.map(|name| self.server(name, &[80]))
    }

    /// The VIP that a service is given.
    pub(super) fn vip(&self, name: &str) -> String {
        let mut vip = String::new();
        wait_until("the service has a VIP", || {
            let list = self.mesh.json(&["service", "list"]);
            let service = list.as_array().unwrap().iter().find(|service| service["name"] == name);
            vip = service.map_or("", |service| service["vips"][0].as_str().unwrap()).to_owned();
            !vip.is_empty()
        });
        vip
    }

    /// Waits until a service leads to these and nowhere else.
    pub(super) fn wait_for_endpoints(&self, name: &str, port: u16, endpoints: &[(&str, u16)]) {
        let frontend = format!("{}:{port}", self.vip(name));
        let expected: BTreeSet<_> =
            endpoints.iter().map(|(address, port)| format!("{address}:{port}")).collect();
        wait_until(&format!("{name} leads to {expected:?}"), || {
            self.mesh.kernel_backends(&frontend).into_iter().collect::<BTreeSet<_>>() == expected
        });
    }

    /// Replaces all services by this one, at port 80 of these pods.
    pub(super) fn publish(&self, name: &str, pods: &[&Pod]) {
        self.mesh.write(&of(name, pods));
        self.wait_for_endpoints(name, 80, &endpoints(pods));
    }
}

impl Pod {
    pub(super) fn python(&self, program: &str) -> Command {
        let [nsenter, net] = self.host.enter();
        let mut python = self.workload.command(nsenter);
        python.args([&net, "python3", "-c", program]);
        python
    }

    pub(super) fn serve(&mut self, ports: &[u16]) {
        let mut python = self.python(SERVER);
        python.arg(self.name).args(ports.iter().map(u16::to_string));
        let mut server = Dialogue::start(python);
        assert_eq!(server.hear(), "up");
        self.server = Some(server);
    }

    pub(super) fn address(&self) -> &str {
        &self.host.address
    }

    /// The whole answers to so many calls.
    pub(super) fn answers(&self, kind: &str, vip: &str, port: u16, times: usize) -> Vec<String> {
        let mut python = self.python(CLIENT);
        python.args([kind, vip, &port.to_string(), &times.to_string()]);
        let output = python.output().unwrap();
        assert!(output.status.success(), "{}", mesh_tests::text(&output));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// Who answers one TCP call, or the error.
    pub(super) fn call(&self, vip: &str, port: u16) -> String {
        first_word(&self.answers("SOCK_STREAM", vip, port, 1)[0])
    }

    /// The same over UDP.
    pub(super) fn ask(&self, vip: &str, port: u16) -> String {
        first_word(&self.answers("SOCK_DGRAM", vip, port, 1)[0])
    }

    pub(super) fn calls(&self, vip: &str, times: usize) -> BTreeSet<String> {
        self.answers("SOCK_STREAM", vip, 80, times).iter().map(|answer| first_word(answer)).collect()
    }

    /// Upstream's verifyServeHostnameServiceUp: 50 calls for each of the pods reach all of them
    /// and nobody else.
    pub(super) fn finds(&self, vip: &str, pods: &[&Pod]) {
        let expected = pods.iter().map(|pod| pod.name.to_owned()).collect();
        assert_eq!(self.calls(vip, 50 * pods.len()), expected);
    }

    /// Upstream's verifyServeHostnameServiceDown.
    pub(super) fn finds_nothing(&self, vip: &str) {
        wait_until("the service is down", || self.call(vip, 80) == "ECONNREFUSED");
    }

    /// Upstream's checkAffinity, where calls are to stay with one pod.
    pub(super) fn stays(&self, vip: &str) -> bool {
        let answers = self.calls(vip, AFFINITY_CONFIRM_COUNT);
        assert!(!answers.contains("ECONNREFUSED"), "{answers:?}");
        answers.len() == 1
    }
}

fn first_word(answer: &str) -> String {
    answer.split(' ').next().unwrap_or_default().to_owned()
}

pub(super) fn endpoints<'a>(pods: &[&'a Pod]) -> Vec<(&'a str, u16)> {
    pods.iter().map(|pod| (pod.address(), 80)).collect()
}

/// A service at port 80 of these pods.
pub(super) fn of(name: &str, pods: &[&Pod]) -> String {
    service(name, 80, "", &endpoints(pods))
}

/// The same with affinity, of the client and for this long.
pub(super) fn sticky(services: &str, timeout: &str) -> String {
    services.replace("policy", &format!("affinity = {timeout:?}\npolicy"))
}

/// The same with all pods in this state.
pub(super) fn all(services: &str, health: &str) -> String {
    services.replace("weight", &format!("health = {health:?}\nweight"))
}
