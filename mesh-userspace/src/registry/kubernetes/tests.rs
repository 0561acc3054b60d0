use std::{fs, sync::Arc};

use proptest::prelude::*;
use serde_json::json;

use super::{
    mirror::{Mirror, Place},
    *,
};
use crate::model::{Answer, Health, Service as Model};

const ECHO: &str = "echo.default.svc.cluster.local:80/tcp";

fn mirror() -> Mirror {
    let mut mirror = Mirror::new(domain(), rules::for_tests());
    mirror.begin(Place { node: "n1".into(), zone: Some("z1".into()) });
    mirror
}

/// A Service with these fields in its `spec`, and port 80.
fn service(name: &str, spec: Value) -> Value {
    let mut all = json!({
        "type": "ClusterIP", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
        "ports": [{ "port": 80, "targetPort": 8080, "protocol": "TCP" }],
    });
    let Value::Object(spec) = spec else { panic!("fields") };
    all.as_object_mut().unwrap().extend(spec);
    json!({
        "metadata": { "namespace": "default", "name": name, "creationTimestamp": "2026-01-02T03:04:05Z" },
        "spec": all,
    })
}

/// The same with a label, or an annotation.
fn with(mut object: Value, what: &str, key: &str, value: &str) -> Value {
    object["metadata"][what][key] = value.into();
    object
}

fn endpoint(address: &str, more: Value) -> Value {
    let mut all = json!({ "addresses": [address], "conditions": { "ready": true, "serving": true } });
    let Value::Object(more) = more else { panic!("fields") };
    all.as_object_mut().unwrap().extend(more);
    all
}

fn state(ready: bool, serving: bool, terminating: bool) -> Value {
    json!({ "conditions": { "ready": ready, "serving": serving, "terminating": terminating } })
}

/// A slice of `echo`, at port 8080.
fn slice(name: &str, endpoints: &[Value]) -> Value {
    json!({
        "metadata": { "namespace": "default", "name": name, "labels": { "kubernetes.io/service-name": "echo" } },
        "addressType": "IPv4",
        "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
        "endpoints": endpoints,
    })
}

/// With Service `echo` and these endpoints.
fn echo(spec: Value, endpoints: &[Value]) -> Mirror {
    let mut mirror = mirror();
    mirror.put(Kind::Service, service("echo", spec));
    mirror.put(Kind::Slice, slice("echo-1", endpoints));
    mirror
}

/// The one service that there is.
fn only(mirror: &mut Mirror) -> Arc<Model> {
    let said = mirror.read();
    assert_eq!((&said.problems, said.services.len()), (&vec![], 1));
    said.services.values().next().unwrap().clone()
}

/// Address, weight and health of each instance.
fn shares(service: &Model) -> Vec<(String, u16, Health)> {
    service.instances.iter().map(|one| (one.address.to_string(), one.weight, one.health)).collect()
}

/// The addresses that get connections.
fn chosen(mirror: &mut Mirror) -> Vec<String> {
    let all = shares(&only(mirror));
    all.into_iter().filter(|(_, weight, _)| *weight > 0).map(|(address, ..)| address).collect()
}

#[test]
fn a_service_is_its_ready_endpoints_and_others_keep_what_they_have() {
    let mut mirror = echo(
        json!({}),
        &[
            endpoint("10.0.0.1", json!({ "targetRef": { "kind": "Pod", "name": "echo-a" }, "zone": "z1" })),
            endpoint("10.0.0.2", state(false, false, false)),
            endpoint("10.0.0.3", state(false, true, true)),
            endpoint("10.0.0.4", state(false, false, true)),
            // As with publishNotReadyAddresses.
            endpoint("10.0.0.5", state(true, true, true)),
            // Nothing is said.
            json!({ "addresses": ["10.0.0.6"] }),
        ],
    );
    let service = only(&mut mirror);
    assert_eq!(service.id.to_string(), ECHO);
    assert_eq!((service.vip, service.answer, service.affinity), (None, Answer::Vip, None));
    let expected = [
        ("10.0.0.1", 100, Health::Healthy),
        ("10.0.0.2", 0, Health::Unhealthy),
        ("10.0.0.3", 100, Health::Draining),
        ("10.0.0.4", 0, Health::Draining),
        ("10.0.0.5", 100, Health::Healthy),
        ("10.0.0.6", 100, Health::Healthy),
    ];
    assert_eq!(shares(&service), expected.map(|(address, weight, health)| (address.into(), weight, health)));
    let first = &service.instances[0];
    assert_eq!((&*first.id, first.port.get(), first.zone.as_deref()), ("echo-a", 8080, Some("z1")));
    assert_eq!(service.instances[1].id, "10.0.0.2");
}

#[test]
fn ports_are_known_by_their_names() {
    let ports = json!([
        { "name": "web", "port": 80 }, { "name": "dns", "port": 53, "protocol": "UDP" },
        { "name": "dns-tcp", "port": 53, "protocol": "TCP" }, { "name": "late", "port": 90 },
    ]);
    let mut mirror = echo(json!({ "ports": ports }), &[]);
    let mut one = slice("echo-1", &[endpoint("10.0.0.1", json!({}))]);
    one["ports"] = json!([
        { "name": "web", "port": 8080 }, { "name": "dns", "port": 5353, "protocol": "UDP" },
        { "name": "dns-tcp", "port": 5354, "protocol": "TCP" }, { "name": "web", "port": 1, "protocol": "SCTP" },
        { "name": "all" }, { "name": "other", "port": 9 },
    ]);
    // Pods of a Deployment that is rolled out may listen elsewhere.
    let mut two = slice("echo-2", &[endpoint("10.0.0.2", json!({}))]);
    two["ports"] = json!([{ "name": "web", "port": 8081, "protocol": "TCP" }]);
    mirror.put(Kind::Slice, one);
    mirror.put(Kind::Slice, two);
    let said = mirror.read();
    let places = |service: &Arc<Model>| {
        let at = service.instances.iter().map(|one| format!("{}:{}", one.address, one.port));
        (service.id.to_string(), service.port_name.clone().unwrap(), at.collect::<Vec<_>>().join(" "))
    };
    let all: Vec<_> = said.services.values().map(places).collect();
    let expected = [
        ("echo.default.svc.cluster.local:53/tcp", "dns-tcp", "10.0.0.1:5354"),
        ("echo.default.svc.cluster.local:80/tcp", "web", "10.0.0.1:8080 10.0.0.2:8081"),
        ("echo.default.svc.cluster.local:90/tcp", "late", ""),
        ("echo.default.svc.cluster.local:53/udp", "dns", "10.0.0.1:5353"),
    ];
    assert_eq!(all, expected.map(|(id, name, places)| (id.into(), name.into(), places.into())));
}

#[test]
fn affinity_cluster_ips_and_annotations_are_followed() {
    let ip = |ip: &str| json!({ "clusterIP": ip, "clusterIPs": [ip] });
    let vip = |spec| only(&mut echo(spec, &[])).vip.map(|vip| vip.to_string());
    assert_eq!(vip(ip("127.128.0.9")).as_deref(), Some("127.128.0.9"));
    assert_eq!(vip(ip("10.96.0.9")), None);
    let both = json!({ "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:6d65:7368::9"] });
    assert_eq!(vip(both).as_deref(), Some("fd00:6d65:7368::9"));

    let sticky = |config: Value| json!({ "sessionAffinity": "ClientIP", "sessionAffinityConfig": config });
    let affinity = |spec| only(&mut echo(spec, &[])).affinity.map(|time| time.as_secs());
    assert_eq!(affinity(sticky(json!({ "clientIP": { "timeoutSeconds": 60 } }))), Some(60));
    assert_eq!(affinity(sticky(Value::Null)), Some(10_800));
    assert_eq!(affinity(json!({ "sessionAffinity": "None" })), None);

    let mut mirror = mirror();
    let mut object = service("echo", sticky(Value::Null));
    for (key, value) in [("policy", "random"), ("vip", "127.128.0.1"), ("affinity", "5s"), ("drain", "1s")] {
        object = with(object, "annotations", &format!("mesh.{key}"), value);
    }
    mirror.put(Kind::Service, with(object, "annotations", "example.org/x", "y"));
    let service = only(&mut mirror);
    assert_eq!(service.vip, Some("127.128.0.1".parse().unwrap()));
    assert_eq!((service.affinity, service.drain), (Some(Duration::from_secs(5)), Duration::from_secs(1)));
}

#[test]
fn headless_services_are_answered_with_instances_and_others_are_left_alone() {
    let headless = json!({ "clusterIP": "None", "clusterIPs": ["None"] });
    assert_eq!(only(&mut echo(headless, &[])).answer, Answer::Instances);
    let label = |key, value| {
        let mut mirror = mirror();
        mirror.put(Kind::Service, with(service("echo", json!({})), "labels", key, value));
        mirror.read()
    };
    let said = label("service.kubernetes.io/headless", "");
    assert_eq!(said.services.values().next().unwrap().answer, Answer::Instances);
    for (key, value, count) in [
        ("mesh.exclude", "true", 0),
        ("mesh.exclude", "false", 1),
        ("service.kubernetes.io/service-proxy-name", "other", 0),
        ("service.kubernetes.io/service-proxy-name", "mesh", 1),
    ] {
        let said = label(key, value);
        assert_eq!((said.services.len(), said.problems.len()), (count, 0), "{key}={value}");
    }
    let mut mirror = mirror();
    let name = json!({ "type": "ExternalName", "externalName": "example.org", "ports": null });
    mirror.put(Kind::Service, service("echo", name));
    assert_eq!((mirror.read().services.len(), mirror.read().problems.len()), (0, 0));
    // It becomes another one, and is excluded.
    mirror.put(Kind::Service, service("echo", json!({})));
    assert_eq!(mirror.read().services.len(), 1);
    mirror.put(Kind::Service, with(service("echo", json!({})), "labels", "mesh.exclude", "true"));
    assert_eq!(mirror.read().services.len(), 0);
}

#[test]
fn a_local_policy_leaves_endpoints_of_other_nodes_out() {
    let on = |address, node: Value, state: Value| {
        let mut endpoint = endpoint(address, state);
        endpoint["nodeName"] = node;
        endpoint
    };
    let local = || json!({ "internalTrafficPolicy": "Local" });
    let ready = || state(true, true, false);
    let all = [
        on("10.0.0.1", "n1".into(), ready()),
        on("10.0.0.2", "n2".into(), ready()),
        on("10.0.0.3", Value::Null, ready()),
    ];
    assert_eq!(chosen(&mut echo(local(), &all)), ["10.0.0.1"]);
    assert_eq!(chosen(&mut echo(json!({}), &all)).len(), 3);
    assert_eq!(chosen(&mut echo(local(), &all[1..])), [""; 0]);
    // The last one here still serves.
    let ends = [on("10.0.0.1", "n1".into(), state(false, true, true)), all[1].clone()];
    assert_eq!(chosen(&mut echo(local(), &ends)), ["10.0.0.1"]);
}

#[test]
fn hints_are_followed_where_all_have_them_and_some_are_for_here() {
    let zones = |zones: &[&str]| {
        let zones: Vec<_> = zones.iter().map(|name| json!({ "name": name })).collect();
        json!({ "hints": { "forZones": zones } })
    };
    let one = endpoint("10.0.0.1", zones(&["z1"]));
    let two = endpoint("10.0.0.2", zones(&["z2"]));
    let both = endpoint("10.0.0.3", zones(&["z2", "z1"]));
    let none = endpoint("10.0.0.4", json!({}));
    let chosen = |all: &[&Value]| {
        let all: Vec<_> = all.iter().map(|one| (*one).clone()).collect();
        chosen(&mut echo(json!({}), &all))
    };
    assert_eq!(chosen(&[&one, &two]), ["10.0.0.1"]);
    assert_eq!(chosen(&[&one, &two, &both]), ["10.0.0.1", "10.0.0.3"]);
    assert_eq!(chosen(&[&one, &two, &none]).len(), 3);
    assert_eq!(chosen(&[&two]), ["10.0.0.2"]);
    // What is not ready has no say.
    let mut unready = none.clone();
    unready["conditions"]["ready"] = false.into();
    assert_eq!(chosen(&[&one, &two, &unready]), ["10.0.0.1"]);
    // One that ends is there when nobody else is.
    let mut ends = two.clone();
    ends["conditions"] = state(false, true, true)["conditions"].clone();
    assert_eq!(chosen(&[&ends]), ["10.0.0.2"]);
    // Nodes come before zones.
    let hint =
        |node, zone| json!({ "hints": { "forNodes": [{ "name": node }], "forZones": [{ "name": zone }] } });
    let here = endpoint("10.0.0.5", hint("n1", "z1"));
    let near = endpoint("10.0.0.6", hint("n2", "z1"));
    assert_eq!(chosen(&[&here, &near]), ["10.0.0.5"]);
    assert_eq!(chosen(&[&near, &two]), ["10.0.0.6"]);
}

#[test]
fn both_families_are_backends_and_each_has_its_own_hints() {
    let pod = json!({ "targetRef": { "kind": "Pod", "name": "echo-a" } });
    let mut mirror = echo(json!({}), &[endpoint("10.0.0.1", pod.clone())]);
    let mut six = slice("echo-6", &[endpoint("fd00::1", pod)]);
    six["addressType"] = "IPv6".into();
    six["endpoints"][0]["hints"] = json!({ "forZones": [{ "name": "z1" }] });
    mirror.put(Kind::Slice, six);
    assert_eq!(chosen(&mut mirror), ["10.0.0.1", "fd00::1"]);
    let ids: Vec<_> = only(&mut mirror).instances.iter().map(|one| one.id.clone()).collect();
    assert_eq!(ids, ["echo-a", "echo-a/ipv6"]);
}

#[test]
fn an_endpoint_in_two_slices_is_one_and_slices_come_go_and_move() {
    let ends = endpoint("10.0.0.1", state(false, true, true));
    let mut mirror = echo(json!({}), &[ends, endpoint("10.0.0.2", json!({}))]);
    mirror.put(Kind::Slice, slice("echo-2", &[endpoint("10.0.0.1", json!({}))]));
    let both = only(&mut mirror);
    assert_eq!(shares(&both)[0], ("10.0.0.1".into(), 100, Health::Healthy));
    assert_eq!(both.instances.len(), 2);
    mirror.delete(Kind::Slice, &slice("echo-1", &[]));
    mirror.delete(Kind::Slice, &slice("echo-1", &[]));
    assert_eq!(only(&mut mirror).instances.len(), 1);

    // It becomes another Service's, then nobody's.
    mirror.put(Kind::Service, service_b());
    let moved = |owner: Value| {
        let mut slice = slice("echo-2", &[endpoint("10.0.0.1", json!({}))]);
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = owner;
        slice
    };
    let counts = |mirror: &mut Mirror| {
        mirror.read().services.values().map(|service| service.instances.len()).collect::<Vec<_>>()
    };
    mirror.put(Kind::Slice, moved("b".into()));
    assert_eq!(counts(&mut mirror), [1, 0]);
    mirror.put(Kind::Slice, moved(Value::Null));
    assert_eq!(counts(&mut mirror), [0, 0]);
    // Slices may come before their Service, and stay when it goes.
    mirror.delete(Kind::Service, &service("echo", json!({})));
    mirror.put(Kind::Slice, moved("echo".into()));
    assert_eq!(counts(&mut mirror), [0]);
    mirror.put(Kind::Service, service("echo", json!({})));
    assert_eq!(counts(&mut mirror), [0, 1]);
}

fn service_b() -> Value {
    service("b", json!({}))
}

#[test]
fn a_listing_leaves_out_what_is_gone_and_what_is_the_same_stays_the_same() {
    let mut mirror = echo(json!({}), &[endpoint("10.0.0.1", json!({}))]);
    mirror.put(Kind::Slice, slice("echo-2", &[endpoint("10.0.0.2", json!({}))]));
    mirror.put(Kind::Service, service_b());
    mirror.put(Kind::Service, json!({ "metadata": { "name": "é" } }));
    let before = mirror.read();
    assert_eq!((before.services.len(), before.problems), (2, vec!["\"\"/\"é\" is no object's name".into()]));
    mirror.begin(Place { node: "n1".into(), zone: Some("z1".into()) });
    mirror.put(Kind::Service, service("echo", json!({})));
    mirror.put(Kind::Slice, slice("echo-1", &[endpoint("10.0.0.1", json!({}))]));
    mirror.put(Kind::Slice, slice("echo-2", &[endpoint("10.0.0.2", json!({}))]));
    mirror.listed();
    let after = only(&mut mirror);
    assert!(Arc::ptr_eq(&after, &before.services[&after.id]));

    mirror.begin(Place::default());
    mirror.put(Kind::Service, service("echo", json!({})));
    mirror.put(Kind::Slice, slice("echo-2", &[endpoint("10.0.0.2", json!({}))]));
    mirror.listed();
    assert_eq!(chosen(&mut mirror), ["10.0.0.2"]);
    // A change of another one's leaves it alone.
    mirror.put(Kind::Service, service_b());
    let before = mirror.read().services;
    mirror.put(Kind::Slice, slice("echo-2", &[endpoint("10.0.0.3", json!({}))]));
    let after = mirror.read().services;
    let same: Vec<_> = before.keys().map(|id| Arc::ptr_eq(&before[id], &after[id])).collect();
    assert_eq!(same, [true, false]);
}

#[test]
fn a_hostile_or_spoilt_record_is_refused_alone_and_by_name() {
    let good = endpoint("10.0.0.1", json!({}));
    let of = |endpoint: Value| slice("bad", &[endpoint]);
    let at = |address: &str| of(endpoint(address, json!({})));
    let changed = |path: &str, value: Value| {
        let mut slice = at("10.0.0.9");
        *slice.pointer_mut(path).unwrap() = value;
        slice
    };
    let object = |spec| service("other", spec);
    let annotated = |key, value| with(object(json!({})), "annotations", key, value);
    let (name, endpoints) = ("EndpointSlice default/bad: ", "Service default/other: ");
    for (kind, bad, label, why) in [
        (Kind::Slice, at("127.0.0.1"), name, "is a loopback address"),
        (Kind::Slice, at("169.254.169.254"), name, "is link-local"),
        (Kind::Slice, at("127.128.0.5"), name, "lies in a VIP range"),
        (Kind::Slice, at("0.0.0.0"), name, "is the unspecified address"),
        (Kind::Slice, at("224.0.0.1"), name, "is not a unicast address"),
        (Kind::Slice, at("db.example"), name, "no address of the slice's type"),
        (Kind::Slice, at("fd00::1"), name, "no address of the slice's type"),
        (Kind::Slice, at("10.0.0.9\n"), name, "endpoint \\\"10.0.0.9\\\\n\\\": it has no address"),
        (Kind::Slice, of(json!({ "addresses": [] })), name, "no address of the slice's type"),
        (Kind::Slice, of(json!({})), name, "no address of the slice's type"),
        (Kind::Slice, of(json!(7)), name, "invalid type"),
        (Kind::Slice, of(endpoint("10.0.0.9", json!({ "zone": "ü" }))), name, "zone \"ü\""),
        (
            Kind::Slice,
            of(endpoint("10.0.0.9", json!({ "targetRef": { "name": "a b" } }))),
            name,
            "instance id \"a b\"",
        ),
        (Kind::Slice, changed("/ports/0/port", json!(-1)), name, "port -1 is not from 1 to 65535"),
        (Kind::Slice, changed("/ports/0/port", json!(0)), name, "port 0 is not from 1 to 65535"),
        (Kind::Slice, changed("/ports/0/port", json!(65_536)), name, "port 65536 is not from 1 to 65535"),
        (Kind::Slice, changed("/ports/0/port", json!("x")), name, "invalid type"),
        (Kind::Slice, changed("/endpoints", json!("x")), name, "endpoints is not a list"),
        (Kind::Slice, changed("/addressType", json!("FQDN")), name, "addresses of type FQDN"),
        (Kind::Slice, changed("/addressType", json!(1)), name, "invalid type"),
        (Kind::Service, object(json!({ "ports": [{ "port": -80 }] })), endpoints, "-80"),
        (Kind::Service, object(json!({ "ports": [{ "port": 0 }] })), endpoints, "0"),
        (Kind::Service, object(json!({ "ports": [{ "port": 1_000_000 }] })), endpoints, "1000000"),
        (Kind::Service, object(json!({ "ports": "x" })), endpoints, "invalid type"),
        (Kind::Service, object(json!({ "ports": [{ "port": 1, "name": "ü" }] })), endpoints, "port_name"),
        (
            Kind::Service,
            object(json!({
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": -5 } },
            })),
            endpoints,
            "timeoutSeconds -5 is not above 0",
        ),
        (Kind::Service, annotated("mesh.vip", "8.8.8.8"), endpoints, "outside the configured ranges"),
        (Kind::Service, annotated("mesh.vip", "x"), endpoints, "x"),
        (Kind::Service, annotated("mesh.port", "81"), endpoints, "annotation mesh.port: the Service's ports"),
        (Kind::Service, annotated("mesh.colour", "red"), endpoints, "annotation mesh.colour is not known"),
        (Kind::Service, annotated("mesh.aliases", "ü"), endpoints, "alias"),
    ] {
        let mut mirror = echo(json!({}), std::slice::from_ref(&good));
        mirror.put(kind, bad.clone());
        let said = mirror.read();
        let ids: Vec<_> = said.services.keys().map(ToString::to_string).collect();
        assert_eq!(ids, [ECHO], "{bad}");
        assert_eq!(said.services.values().next().unwrap().instances.len(), 1, "{bad}");
        let [problem] = &*said.problems else { panic!("{bad}: {:?}", said.problems) };
        assert!(problem.starts_with(label) && problem.contains(why) && !problem.contains('\n'), "{problem}");
        mirror.delete(kind, &bad);
        assert_eq!(mirror.read().problems, [""; 0]);
    }
}

#[test]
fn what_is_spoilt_stays_as_it_was_and_endpoints_are_followed_all_the_same() {
    let mut mirror = echo(json!({}), &[endpoint("10.0.0.1", json!({}))]);
    let spoilt = with(service("echo", json!({})), "annotations", "mesh.policy", "worst");
    mirror.put(Kind::Service, spoilt);
    mirror.put(Kind::Slice, slice("echo-1", &[endpoint("10.0.0.2", json!({}))]));
    let said = mirror.read();
    assert_eq!((said.services.len(), said.problems.len()), (1, 1));
    assert_eq!(shares(said.services.values().next().unwrap())[0].0, "10.0.0.2");
    let mut spoilt = slice("echo-1", &[]);
    spoilt["addressType"] = Value::Null;
    mirror.put(Kind::Slice, spoilt);
    let said = mirror.read();
    assert_eq!((shares(said.services.values().next().unwrap()).len(), said.problems.len()), (1, 2));
    mirror.put(Kind::Service, service("echo", json!({})));
    mirror.put(Kind::Slice, slice("echo-1", &[]));
    assert_eq!(only(&mut mirror).instances, []);
}

#[test]
fn ports_that_cannot_be_translated_are_named() {
    let ports = json!([{ "name": "a", "port": 80 }, { "name": "b", "port": 81, "protocol": "SCTP" }]);
    let said = echo(json!({ "ports": ports }), &[]).read();
    assert_eq!(said.services.len(), 1);
    assert_eq!(said.problems, ["Service default/echo: port 81: SCTP is not translated"]);
}

#[test]
fn who_came_first_keeps_what_both_want() {
    let wanting = |name: &str, created: &str| {
        let mut object = with(service(name, json!({})), "annotations", "mesh.vip", "127.128.0.1");
        object["metadata"]["creationTimestamp"] = created.into();
        object
    };
    let names = |mirror: &mut Mirror| {
        let said = mirror.read();
        (said.services.keys().map(|id| id.name.clone()).collect::<Vec<_>>(), said.problems)
    };
    let mut mirror = mirror();
    mirror.put(Kind::Service, wanting("z", "2026-01-01T00:00:00Z"));
    mirror.put(Kind::Service, wanting("a", "2026-01-02T00:00:00Z"));
    let (names_now, problems) = names(&mut mirror);
    assert_eq!((names_now.join(" "), problems.len()), ("z".into(), 1));
    let problem = "service a.default.svc.cluster.local:80/tcp: vip 127.128.0.1 port 80/tcp is already taken by service z";
    assert!(problems[0].starts_with(problem), "{problems:?}");
    // Its endpoints do not bring it in.
    let mut of_a = slice("a-1", &[endpoint("10.0.0.1", json!({}))]);
    of_a["metadata"]["labels"]["kubernetes.io/service-name"] = "a".into();
    mirror.put(Kind::Slice, of_a);
    assert_eq!(names(&mut mirror).0, ["z"]);
    mirror.delete(Kind::Service, &wanting("z", ""));
    assert_eq!(names(&mut mirror), (vec!["a".into()], vec![]));
    assert_eq!(only(&mut mirror).instances.len(), 1);
}

/// A kubeconfig of one cluster at `server`, and one user.
fn kubeconfig(server: &str, user: &Value) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kubeconfig");
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{ "name": "c", "cluster": { "server": server } }],
        "users": [{ "name": "u", "user": user }],
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
    });
    fs::write(&path, text.to_string()).unwrap();
    (dir, path)
}

#[tokio::test]
async fn a_server_behind_a_vip_and_users_that_are_programs_are_refused() {
    let exec =
        json!({ "exec": { "apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/false" } });
    for (server, user, why) in [
        ("https://127.128.0.1", json!({}), "127.128.0.1 lies in a VIP range"),
        ("https://[fd00:6d65:7368::1]:6443", json!({}), "lies in a VIP range"),
        ("http://127.0.0.1:1", exec, "its user is a program to run"),
        ("http://127.0.0.1:1", json!({ "token": "t" }), "Connection refused"),
        ("https://127.0.0.1:1", json!({ "token": "t" }), "Connection refused"),
    ] {
        let (_dir, path) = kubeconfig(server, &user);
        let settings = serde_json::from_value(json!({ "kubeconfig": path })).unwrap();
        let mut client = Client::new(settings, None, rules::for_tests());
        let refused = remote::Client::connect(&mut client).await.unwrap_err();
        assert!(refused.starts_with("kubernetes ") && refused.contains(why), "{server}: {refused}");
        assert!(remote::Client::news(&mut client).await.unwrap_err().ends_with("not connected"));
    }
    let settings = serde_json::from_value(json!({ "kubeconfig": "/nowhere" })).unwrap();
    let mut client = Client::new(settings, None, rules::for_tests());
    assert!(remote::Client::connect(&mut client).await.unwrap_err().contains("/nowhere"));
}

#[test]
fn settings_are_checked() {
    for (settings, why) in [
        (json!({ "namespaces": ["a/b"] }), "namespaces: \"a/b\""),
        (json!({ "domain": "" }), "domain \"\""),
        (json!({ "node": "../x" }), "node \"../x\""),
    ] {
        let settings: Settings = serde_json::from_value(settings).unwrap();
        assert!(settings.check().unwrap_err().contains(why));
    }
    let settings: Settings = serde_json::from_value(json!({ "namespaces": ["a", "b"] })).unwrap();
    assert_eq!((settings.check(), settings.source()), (Ok(()), "in-cluster svc.cluster.local a b".into()));
}

proptest! {
    #[test]
    fn no_object_does_harm(
        text in r#"(\{|\[|"|[a-z0-9.:/]|,|\}|\]|é){0,40}"#,
        number in any::<i64>(),
        path in prop::sample::select(vec![
            "/metadata", "/metadata/name", "/metadata/namespace", "/metadata/labels", "/spec", "/spec/ports",
            "/spec/ports/0", "/spec/ports/0/port", "/spec/clusterIP", "/spec/clusterIPs", "/addressType",
            "/ports", "/ports/0", "/ports/0/port", "/endpoints", "/endpoints/0", "/endpoints/0/addresses",
            "/endpoints/0/addresses/0", "/endpoints/0/conditions", "/endpoints/0/conditions/ready",
        ]),
    ) {
        let odd = serde_json::from_str(&text).unwrap_or(Value::String(text));
        for odd in [odd, number.into(), Value::Null] {
            for kind in [Kind::Service, Kind::Slice] {
                let mut mirror = echo(json!({}), &[endpoint("10.0.0.1", json!({}))]);
                let mut bad = match kind {
                    Kind::Service => service_b(),
                    Kind::Slice => slice("bad", &[endpoint("10.0.0.9", json!({}))]),
                };
                if let Some(place) = bad.pointer_mut(path) {
                    *place = odd.clone();
                }
                mirror.put(kind, bad.clone());
                let said = mirror.read();
                prop_assert!(said.services.values().any(|service| service.id.to_string() == ECHO));
                prop_assert!(said.problems.iter().all(|problem| !problem.contains('\n')));
                mirror.delete(kind, &bad);
                mirror.put(kind, odd.clone());
                mirror.read();
            }
        }
    }
}
