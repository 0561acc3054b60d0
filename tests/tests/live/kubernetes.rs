//! Kubernetes' own tests of services, by their names: kubernetes/kubernetes, test/e2e/network,
//! service.go and conntrack.go. Under each name is what that test asks for.
//!
//! A pod is a network namespace with an address, and a cgroup below the managed one: a workload.
//! docs/limits.md names the tests that are not here.

use std::{fs, thread, time::Duration};

mod cluster;

use cluster::{Cluster, Pod, all, endpoints, of, sticky};
use mesh_tests::{Dialogue, datagram_service, service, wait_until};

/// "should serve a basic endpoint from pods": none, pod1, pod1 and pod2, pod2, none.
#[test]
fn should_serve_a_basic_endpoint_from_pods() {
    let cluster = Cluster::new();
    let client = cluster.client("execpod");
    let name = "endpoint-test2";
    cluster.publish(name, &[]);
    let vip = cluster.vip(name);
    assert_eq!(client.call(&vip, 80), "ECONNREFUSED");

    let pod1 = cluster.server("pod1", &[80]);
    cluster.publish(name, &[&pod1]);
    client.finds(&vip, &[&pod1]);

    let pod2 = cluster.server("pod2", &[80]);
    cluster.publish(name, &[&pod1, &pod2]);
    client.finds(&vip, &[&pod1, &pod2]);

    drop(pod1);
    cluster.publish(name, &[&pod2]);
    client.finds(&vip, &[&pod2]);

    drop(pod2);
    cluster.publish(name, &[]);
    assert_eq!(client.call(&vip, 80), "ECONNREFUSED");
}

/// "should serve multiport endpoints from pods": ports 80 and 81 lead to port 100 of one pod and
/// port 101 of another, which come and go on their own.
#[test]
fn should_serve_multiport_endpoints_from_pods() {
    let cluster = Cluster::new();
    let client = cluster.client("execpod");
    let name = "multi-endpoint-test";
    let publish = |at_80: &[(&str, u16)], at_81: &[(&str, u16)]| {
        cluster.mesh.write(&(service(name, 80, "", at_80) + &service(name, 81, "", at_81)));
        cluster.wait_for_endpoints(name, 80, at_80);
        cluster.wait_for_endpoints(name, 81, at_81);
        let vip = cluster.vip(name);
        [client.call(&vip, 80), client.call(&vip, 81)]
    };
    assert_eq!(publish(&[], &[]), ["ECONNREFUSED", "ECONNREFUSED"]);
    let pod1 = cluster.server("pod1", &[100]);
    let at_80 = [(pod1.address(), 100)];
    assert_eq!(publish(&at_80, &[]), ["pod1", "ECONNREFUSED"]);
    let pod2 = cluster.server("pod2", &[101]);
    let at_81 = [(pod2.address(), 101)];
    assert_eq!(publish(&at_80, &at_81), ["pod1", "pod2"]);
    assert_eq!(publish(&[], &at_81), ["ECONNREFUSED", "pod2"]);
    assert_eq!(publish(&[], &[]), ["ECONNREFUSED", "ECONNREFUSED"]);
}

/// "should be updated after adding or deleting ports": a service with one port gets another one,
/// with a pod of its own, and loses it again.
#[test]
fn should_be_updated_after_adding_or_deleting_ports() {
    let cluster = Cluster::new();
    let client = cluster.client("execpod");
    let name = "edit-port-test";
    let (pod1, pod2) = (cluster.server("pod1", &[100]), cluster.server("pod2", &[101]));
    let one = service(name, 80, "", &[(pod1.address(), 100)]);
    let two = service(name, 81, "", &[(pod2.address(), 101)]);
    cluster.mesh.write(&one);
    cluster.wait_for_endpoints(name, 80, &[(pod1.address(), 100)]);
    let vip = cluster.vip(name);
    assert_eq!([client.call(&vip, 80), client.call(&vip, 81)], ["pod1", "ECONNREFUSED"]);
    cluster.mesh.write(&(one.clone() + &two));
    cluster.wait_for_endpoints(name, 81, &[(pod2.address(), 101)]);
    assert_eq!([client.call(&vip, 80), client.call(&vip, 81)], ["pod1", "pod2"]);
    cluster.mesh.write(&one);
    cluster.wait_for_endpoints(name, 81, &[]);
    assert_eq!([client.call(&vip, 80), client.call(&vip, 81)], ["pod1", "ECONNREFUSED"]);
    assert_eq!(cluster.vip(name), vip);
}

/// "should preserve source pod IP for traffic thru service cluster IP": the server sees the
/// address of each of two client pods.
#[test]
fn should_preserve_source_pod_ip_for_traffic_thru_service_cluster_ip() {
    let cluster = Cluster::new();
    let server = cluster.server("echo-sourceip", &[80]);
    cluster.publish("sourceip-test", &[&server]);
    let vip = cluster.vip("sourceip-test");
    for client in [cluster.client("pause-pod-1"), cluster.client("pause-pod-2")] {
        let answer = client.answers("SOCK_STREAM", &vip, 80, 1);
        assert_eq!(answer[0].split(' ').nth(1), Some(client.address()), "{answer:?}");
    }
}

/// "should allow pods to hairpin back to themselves through services": a service's only pod
/// reaches itself at the VIP.
#[test]
fn should_allow_pods_to_hairpin_back_to_themselves_through_services() {
    let cluster = Cluster::new();
    let pod = cluster.server("hairpin", &[80]);
    cluster.publish("hairpin-test", &[&pod]);
    let answer = pod.answers("SOCK_STREAM", &cluster.vip("hairpin-test"), 80, 1);
    assert!(answer[0].starts_with(&format!("hairpin {} ", pod.address())), "{answer:?}");
}

/// "should be able to up and down services": of two services with three pods each one goes, which
/// the other does not notice; a third one comes and has another VIP.
#[test]
fn should_be_able_to_up_and_down_services() {
    let cluster = Cluster::new();
    let client = cluster.client("execpod");
    let pods1 = cluster.servers(["1a", "1b", "1c"]);
    let pods2 = cluster.servers(["2a", "2b", "2c"]);
    let (pods1, pods2) = (pods1.each_ref(), pods2.each_ref());
    let (svc1, svc2) = (of("up-down-1", &pods1), of("up-down-2", &pods2));
    cluster.mesh.write(&(svc1 + &svc2));
    cluster.wait_for_endpoints("up-down-1", 80, &endpoints(&pods1));
    cluster.wait_for_endpoints("up-down-2", 80, &endpoints(&pods2));
    let (vip1, vip2) = (cluster.vip("up-down-1"), cluster.vip("up-down-2"));
    client.finds(&vip1, &pods1);
    client.finds(&vip2, &pods2);

    cluster.mesh.write(&svc2);
    client.finds_nothing(&vip1);
    client.finds(&vip2, &pods2);

    let pods3 = cluster.servers(["3a", "3b", "3c"]);
    let pods3 = pods3.each_ref();
    cluster.mesh.write(&(svc2 + &of("up-down-3", &pods3)));
    cluster.wait_for_endpoints("up-down-3", 80, &endpoints(&pods3));
    let vip3 = cluster.vip("up-down-3");
    assert_ne!(vip3, vip2);
    client.finds(&vip2, &pods2);
    client.finds(&vip3, &pods3);
}

/// "should work after the service has been recreated": the same name, removed and put back, leads
/// to its pods again.
#[test]
fn should_work_after_the_service_has_been_recreated() {
    let cluster = Cluster::new();
    let client = cluster.client("execpod");
    let pod = cluster.server("service-deletion-pod", &[80]);
    cluster.publish("service-deletion", &[&pod]);
    let vip = cluster.vip("service-deletion");
    client.finds(&vip, &[&pod]);
    cluster.mesh.write("service = []");
    client.finds_nothing(&vip);
    assert!(cluster.mesh.json(&["service", "list"]).as_array().unwrap().is_empty());
    cluster.publish("service-deletion", &[&pod]);
    client.finds(&cluster.vip("service-deletion"), &[&pod]);
}

/// "should work after restarting kube-proxy": two services with three pods each work after the
/// agent was restarted. Here they also work in between.
#[test]
fn should_work_after_restarting_kube_proxy() {
    let mut cluster = Cluster::new();
    let client = cluster.client("execpod");
    let pods1 = cluster.servers(["1a", "1b", "1c"]);
    let pods2 = cluster.servers(["2a", "2b", "2c"]);
    let (pods1, pods2) = (pods1.each_ref(), pods2.each_ref());
    cluster.mesh.write(&(of("restart-proxy-1", &pods1) + &of("restart-proxy-2", &pods2)));
    cluster.wait_for_endpoints("restart-proxy-1", 80, &endpoints(&pods1));
    cluster.wait_for_endpoints("restart-proxy-2", 80, &endpoints(&pods2));
    let (vip1, vip2) = (cluster.vip("restart-proxy-1"), cluster.vip("restart-proxy-2"));
    let both_work = || {
        client.finds(&vip1, &pods1);
        client.finds(&vip2, &pods2);
    };
    assert_ne!(vip1, vip2);
    both_work();
    cluster.mesh.kill();
    both_work();
    cluster.mesh.launch();
    cluster.mesh.ready();
    both_work();
    assert_eq!((cluster.vip("restart-proxy-1"), cluster.vip("restart-proxy-2")), (vip1, vip2));
}

/// "should work after restarting apiserver": a service works after the registry was away, and a
/// new one does not get its VIP. Here the agent, too, is started anew while the registry is away.
#[test]
fn should_work_after_restarting_apiserver() {
    let mut cluster = Cluster::new();
    let client = cluster.client("execpod");
    let pods1 = cluster.servers(["1a", "1b", "1c"]);
    let pods1 = pods1.each_ref();
    cluster.publish("restart-apiserver-1", &pods1);
    let vip1 = cluster.vip("restart-apiserver-1");
    client.finds(&vip1, &pods1);

    let away = cluster.mesh.services.with_extension("away");
    fs::rename(&cluster.mesh.services, &away).unwrap();
    wait_until("the registry is missed", || cluster.mesh.json(&["registry", "list"])[0]["state"] == "stale");
    client.finds(&vip1, &pods1);
    cluster.mesh.kill();
    cluster.mesh.launch();
    wait_until("the agent is back", || cluster.mesh.mesh(&["status"]).output().unwrap().status.success());
    client.finds(&vip1, &pods1);
    fs::rename(&away, &cluster.mesh.services).unwrap();
    cluster.mesh.ready();
    assert_eq!(cluster.vip("restart-apiserver-1"), vip1);
    client.finds(&vip1, &pods1);

    let pods2 = cluster.servers(["2a", "2b", "2c"]);
    let pods2 = pods2.each_ref();
    cluster.mesh.write(&(of("restart-apiserver-1", &pods1) + &of("restart-apiserver-2", &pods2)));
    cluster.wait_for_endpoints("restart-apiserver-2", 80, &endpoints(&pods2));
    let vip2 = cluster.vip("restart-apiserver-2");
    assert_ne!(vip1, vip2);
    client.finds(&vip1, &pods1);
    client.finds(&vip2, &pods2);
}

/// "should create endpoints for unready pods": a pod that is not ready is reached while the
/// service tolerates that, not when it no longer does, and again, terminating, when it does again.
/// Whether a service tolerates it is for its registry to say, by leaving the pod in or out.
#[test]
fn should_create_endpoints_for_unready_pods() {
    let cluster = Cluster::new();
    let (client, pod) = (cluster.client("execpod"), cluster.server("slow-terminating-unready-pod", &[80]));
    let name = "tolerate-unready";
    cluster.mesh.write(&all(&of(name, &[&pod]), "unhealthy"));
    cluster.wait_for_endpoints(name, 80, &endpoints(&[&pod]));
    let vip = cluster.vip(name);
    client.finds(&vip, &[&pod]);
    cluster.mesh.write(&of(name, &[]));
    client.finds_nothing(&vip);
    cluster.mesh.write(&all(&of(name, &[&pod]), "draining"));
    cluster.wait_for_endpoints(name, 80, &endpoints(&[&pod]));
    client.finds(&vip, &[&pod]);
}

/// "should have session affinity work for service with type clusterIP": with three pods, 15 calls
/// of a client pod stay with one of them.
#[test]
fn should_have_session_affinity_work_for_service_with_type_cluster_ip() {
    let cluster = Cluster::new();
    let pods = cluster.servers(["a", "b", "c"]);
    let (pods, name) = (pods.each_ref(), "affinity-clusterip");
    cluster.mesh.write(&sticky(&of(name, &pods), "3h"));
    cluster.wait_for_endpoints(name, 80, &endpoints(&pods));
    assert!(cluster.client("execpod-affinity").stays(&cluster.vip(name)));
}

/// "should have session affinity timeout work for service with type clusterIP": 15 calls within
/// the timeout stay with one pod; of calls that are further apart one gets another pod.
#[test]
fn should_have_session_affinity_timeout_work_for_service_with_type_cluster_ip() {
    let cluster = Cluster::new();
    let pods = cluster.servers(["a", "b", "c"]);
    let (pods, name) = (pods.each_ref(), "affinity-clusterip-timeout");
    cluster.mesh.write(&sticky(&of(name, &pods), "1s"));
    cluster.wait_for_endpoints(name, 80, &endpoints(&pods));
    let (client, vip) = (cluster.client("execpod-affinity"), cluster.vip(name));
    // A machine that stands still for a second must not be taken for a fault.
    wait_until("it is sticky until the timeout", || client.stays(&vip));
    let first = client.call(&vip, 80);
    wait_until("the timeout ends it", || {
        thread::sleep(Duration::from_millis(1100));
        client.call(&vip, 80) != first
    });
}

/// "should be able to switch session affinity for service with type clusterIP": without affinity
/// a client pod's calls reach several pods, with it again one.
#[test]
fn should_be_able_to_switch_session_affinity_for_service_with_type_cluster_ip() {
    let cluster = Cluster::new();
    let pods = cluster.servers(["a", "b", "c"]);
    let (pods, name) = (pods.each_ref(), "affinity-clusterip-transition");
    let (on, off) = (sticky(&of(name, &pods), "3h"), of(name, &pods));
    cluster.mesh.write(&on);
    cluster.wait_for_endpoints(name, 80, &endpoints(&pods));
    let (client, vip) = (cluster.client("execpod-affinity"), cluster.vip(name));
    assert!(client.stays(&vip));
    cluster.mesh.write(&off);
    wait_until("calls reach several pods", || !client.stays(&vip));
    cluster.mesh.write(&on);
    wait_until("calls stay with one pod", || client.stays(&vip));
}

/// "should be rejected when no endpoints exist": the error is REFUSED.
#[test]
fn should_be_rejected_when_no_endpoints_exist() {
    let cluster = Cluster::new();
    let client = cluster.client("execpod-noendpoints");
    let udp = datagram_service("no-pods", 80, "", &[]);
    cluster.mesh.write(&(of("no-pods", &[]) + &udp));
    let vip = cluster.vip("no-pods");
    wait_until("both are in the kernel", || cluster.mesh.lb().as_array().unwrap().len() == 2);
    assert_eq!((client.call(&vip, 80), client.ask(&vip, 80)), ("ECONNREFUSED".into(), "ECONNREFUSED".into()));
}

/// "should be rejected for evicted pods (no endpoints exist)": the error is REFUSED also where
/// there once was a pod.
#[test]
fn should_be_rejected_for_evicted_pods_no_endpoints_exist() {
    let cluster = Cluster::new();
    let (client, pod) = (cluster.client("execpod-evictedpods"), cluster.server("evicted-pod", &[80]));
    cluster.publish("evicted-pods", &[&pod]);
    let vip = cluster.vip("evicted-pods");
    client.finds(&vip, &[&pod]);
    drop(pod);
    cluster.publish("evicted-pods", &[]);
    assert_eq!(client.call(&vip, 80), "ECONNREFUSED");
}

/// "should fallback to terminating endpoints when there are no ready endpoints with
/// internalTrafficPolicy=Cluster": five times two client pods reach the only pod, which terminates.
#[test]
fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints() {
    let cluster = Cluster::new();
    let pod = cluster.server("echo-hostname-0", &[80]);
    let name = "svc-proxy-terminating";
    cluster.publish(name, &[&pod]);
    cluster.mesh.write(&all(&of(name, &[&pod]), "draining"));
    wait_until("it is known to terminate", || {
        cluster.mesh.json(&["backend", "list"])[0]["state"] == "draining"
    });
    let vip = cluster.vip(name);
    for client in [cluster.client("pause-pod-0"), cluster.client("pause-pod-1")] {
        client.finds(&vip, &[&pod]);
    }
}

/// "should serve endpoints on same port and different protocols": port 80 over TCP and UDP, then
/// TCP only, then UDP only.
#[test]
fn should_serve_endpoints_on_same_port_and_different_protocols() {
    let cluster = Cluster::new();
    let (client, pod) = (cluster.client("execpod"), cluster.server("pod1", &[80]));
    let name = "multiprotocol-test";
    let (tcp, udp) = (of(name, &[&pod]), datagram_service(name, 80, "", &endpoints(&[&pod])));
    for (services, over_tcp, over_udp) in
        [(tcp.clone() + &udp, "pod1", "pod1"), (tcp, "pod1", "ECONNREFUSED"), (udp, "ECONNREFUSED", "pod1")]
    {
        cluster.mesh.write(&services);
        let vip = cluster.vip(name);
        wait_until(&format!("{over_tcp} over TCP and {over_udp} over UDP"), || {
            [client.call(&vip, 80), client.ask(&vip, 80)] == [over_tcp, over_udp]
        });
    }
}

/// For each line that it reads, three sockets ask the VIP, each from the port it always has: one
/// that is connected, one that is not, and a new one. Prints who answered each, and its port.
const FLOWS: &str = r#"
import socket, sys
vip = (sys.argv[1], 80)
def new(port):
    s = socket.socket(type=socket.SOCK_DGRAM)
    s.settimeout(0.5)
    s.bind(("", port))
    return s
def send(s):
    try:
        s.send(b"?")
    except OSError:
        # Not connected yet, or no longer.
        s.connect(vip)
        s.send(b"?")
def ask(s, send):
    try:
        send(s)
        name, _, port = s.recv(64).decode().split()
        assert int(port) == s.getsockname()[1]
        return name
    except OSError:
        return "nobody"
connected, free = new(12345), new(12346)
for _ in sys.stdin:
    fresh = new(12347)
    answers = ask(connected, send), ask(free, lambda s: s.sendto(b"?", vip)), ask(fresh, send)
    fresh.close()
    print(*answers, flush=True)
"#;

/// A client pod's three flows to a service.
struct Flows(Dialogue);

impl Flows {
    fn start(client: &Pod, vip: &str) -> Self {
        let mut python = client.python(FLOWS);
        python.arg(vip);
        Self(Dialogue::start(python))
    }

    fn ask(&mut self) -> String {
        self.0.go_on();
        self.0.hear()
    }

    /// Waits until all of them reach this pod; from then on they do not miss it.
    fn reach(&mut self, name: &str) {
        let all = [name; 3].join(" ");
        wait_until(&format!("all flows reach {name}"), || self.ask() == all);
        for _ in 0..10 {
            assert_eq!(self.ask(), all);
        }
    }
}

fn svc_udp(pods: &[&Pod]) -> String {
    let text = datagram_service("svc-udp", 80, "", &endpoints(pods));
    text.replace("policy", "drain = \"100ms\"\npolicy")
}

/// "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service": a
/// client pod that never stops to send, from one port, is answered by the first pod, and when
/// that is deleted by the second one.
#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service() {
    let cluster = Cluster::new();
    let client = cluster.client("pod-client");
    cluster.mesh.write(&svc_udp(&[]));
    let mut flows = Flows::start(&client, &cluster.vip("svc-udp"));
    assert_eq!(flows.ask(), "nobody nobody nobody");
    let pod1 = cluster.server("pod-server-1", &[80]);
    cluster.mesh.write(&svc_udp(&[&pod1]));
    flows.reach("pod-server-1");
    let pod2 = cluster.server("pod-server-2", &[80]);
    drop(pod1);
    cluster.mesh.write(&svc_udp(&[&pod2]));
    flows.reach("pod-server-2");
}

/// "should be able to preserve UDP traffic when initial unready endpoints get ready": a client pod
/// sends while the only pod is known, but not ready and not serving; when it is, it answers.
#[test]
fn should_be_able_to_preserve_udp_traffic_when_initial_unready_endpoints_get_ready() {
    let cluster = Cluster::new();
    let (client, mut pod) = (cluster.client("pod-client"), cluster.client("pod-server-1"));
    cluster.mesh.write(&svc_udp(&[]));
    let mut flows = Flows::start(&client, &cluster.vip("svc-udp"));
    assert_eq!(flows.ask(), "nobody nobody nobody");
    cluster.mesh.write(&all(&svc_udp(&[&pod]), "unhealthy"));
    cluster.wait_for_endpoints("svc-udp", 80, &endpoints(&[&pod]));
    assert_eq!(flows.ask(), "nobody nobody nobody");
    pod.serve(&[80]);
    cluster.mesh.write(&svc_udp(&[&pod]));
    flows.reach("pod-server-1");
}
