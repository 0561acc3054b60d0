use std::{str::FromStr, time::Duration};

use serde_json::{Value, json};

use super::super::{records::Attributes, state::State, translate};
use crate::{
    model,
    registry::{Rules, rules},
};

fn call(state: &mut State, operation: &str, input: Value) -> Value {
    let what = format!("{operation} {input}");
    state.call(operation, input, &rules::for_tests()).unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// The exception and its message.
fn refused(state: &mut State, operation: &str, input: Value) -> String {
    state.take_changes();
    let error = state.call(operation, input, &rules::for_tests()).unwrap_err();
    assert!(state.take_changes().is_empty(), "{error}: what is refused changes nothing");
    error.to_string()
}

/// A namespace with one service; their ids.
fn service(state: &mut State) -> (String, String) {
    call(state, "CreateHttpNamespace", json!({ "Name": "service.local" }));
    let namespaces = call(state, "ListNamespaces", json!({}));
    let namespace = namespaces["Namespaces"][0]["Id"].as_str().unwrap().to_owned();
    let input = json!({ "Name": "echo", "NamespaceId": namespace, "HealthCheckCustomConfig": { "FailureThreshold": 1 } });
    let service = call(state, "CreateService", input)["Service"]["Id"].as_str().unwrap().to_owned();
    (namespace, service)
}

fn register(service: &str, id: &str, attributes: impl Into<Value>) -> Value {
    let attributes = attributes.into();
    json!({ "ServiceId": service, "InstanceId": id, "Attributes": attributes })
}

fn at(address: &str, port: u16) -> Value {
    json!({ "AWS_INSTANCE_IPV4": address, "AWS_INSTANCE_PORT": port.to_string() })
}

fn translated(state: &State, service: &str) -> (Option<model::Service>, Vec<String>) {
    let record = state.service(service).unwrap();
    let namespace = state.namespace(&record.namespace).unwrap();
    translate::service(namespace, record, state.instances(service), &rules::for_tests()).unwrap()
}

#[test]
fn what_is_in_use_cannot_be_deleted_and_names_are_taken_once() {
    let mut state = State::default();
    let (namespace, service) = service(&mut state);
    let again = refused(&mut state, "CreateHttpNamespace", json!({ "Name": "SERVICE.local" }));
    assert!(again.starts_with("NamespaceAlreadyExists: "), "{again}");
    let input = json!({ "Name": "Echo", "NamespaceId": namespace });
    assert!(refused(&mut state, "CreateService", input).starts_with("ServiceAlreadyExists: "));
    call(&mut state, "RegisterInstance", register(&service, "a", at("10.0.0.1", 80)));
    assert!(refused(&mut state, "DeleteService", json!({ "Id": service })).contains("still has 1 instances"));
    assert!(
        refused(&mut state, "DeleteNamespace", json!({ "Id": namespace })).starts_with("ResourceInUse: ")
    );
    call(&mut state, "DeregisterInstance", json!({ "ServiceId": service, "InstanceId": "a" }));
    call(&mut state, "DeleteService", json!({ "Id": service }));
    call(&mut state, "DeleteNamespace", json!({ "Id": namespace }));
    for (operation, input, expected) in [
        ("GetNamespace", json!({ "Id": namespace }), "NamespaceNotFound: "),
        ("GetService", json!({ "Id": service }), "ServiceNotFound: "),
        ("ListInstances", json!({ "ServiceId": service }), "ServiceNotFound: "),
        ("GetOperation", json!({ "OperationId": "op-1" }), "OperationNotFound: "),
        ("GetService", json!({}), "InvalidInput: missing field `Id`"),
        ("Nonsense", json!({}), "UnknownOperationException: "),
        ("ListTagsForResource", json!({ "ResourceARN": "arn:x" }), "ResourceNotFoundException: "),
    ] {
        let error = refused(&mut state, operation, input);
        assert!(error.starts_with(expected), "{operation}: {error}");
    }
}

#[test]
fn the_same_request_again_does_nothing_and_another_with_its_id_is_refused() {
    let mut state = State::default();
    let create = json!({ "Name": "one", "CreatorRequestId": "r" });
    let first = call(&mut state, "CreateHttpNamespace", create.clone());
    state.take_changes();
    assert_eq!(call(&mut state, "CreateHttpNamespace", create), first);
    assert!(state.take_changes().is_empty());
    let other = json!({ "Name": "two", "CreatorRequestId": "r" });
    assert!(refused(&mut state, "CreateHttpNamespace", other).starts_with("DuplicateRequest: "));

    let (_, service) = service(&mut state);
    let input = register(&service, "a", at("10.0.0.1", 80));
    let first = call(&mut state, "RegisterInstance", input.clone());
    state.take_changes();
    assert_eq!(call(&mut state, "RegisterInstance", input), first);
    assert!(state.take_changes().is_empty());
}

#[test]
fn hostile_records_are_refused_by_name() {
    let mut state = State::default();
    let (namespace, service) = service(&mut state);
    for (attributes, expected) in [
        (at("169.254.169.254", 80), "AWS_INSTANCE_IPV4: address 169.254.169.254 is link-local"),
        (at("127.0.0.1", 80), "is a loopback address"),
        (at("127.128.0.1", 80), "lies in a VIP range"),
        (at("10.0.0.999", 80), "AWS_INSTANCE_IPV4 \"10.0.0.999\" is not such an address"),
        (json!({ "AWS_INSTANCE_IPV6": "10.0.0.1" }), "AWS_INSTANCE_IPV6 \"10.0.0.1\" is not such"),
        (json!({ "AWS_INSTANCE_IPV4": "10.0.0.1", "AWS_INSTANCE_PORT": "-1" }), "AWS_INSTANCE_PORT \"-1\""),
        (json!({ "AWS_INSTANCE_IPV4": "10.0.0.1", "AWS_INSTANCE_PORT": "0" }), "AWS_INSTANCE_PORT is 0"),
        (json!({ "mesh.weight": "-1" }), "mesh.weight \"-1\""),
        (json!({ "mesh.lease": "soon" }), "mesh.lease \"soon\""),
        (json!({ "AVAILABILITY_ZONE": "a b" }), "AVAILABILITY_ZONE \"a b\" is not a DNS name"),
        (json!({ "k\u{e9}y": "v" }), "attribute \"k\u{e9}y\""),
        (json!({ "key": "\u{1f980}" }), "attribute key: a value is"),
        (json!({ "key": 1 }), "invalid type"),
    ] {
        let error = refused(&mut state, "RegisterInstance", register(&service, "a", attributes));
        assert!(error.starts_with("InvalidInput: ") && error.contains(expected), "{error}");
    }
    for id in ["", "a b", "\u{e9}", "../x\n", &"a".repeat(65)] {
        let error = refused(&mut state, "RegisterInstance", register(&service, id, at("10.0.0.1", 80)));
        assert!(error.starts_with("InvalidInput: "), "{error}");
    }
    for (key, value, expected) in [
        ("mesh.vip", "10.0.0.1", "vip 10.0.0.1 is outside the configured ranges"),
        ("mesh.vip", "nowhere", "invalid IP address"),
        ("mesh.port", "-1", "mesh.port \"-1\" is not a number"),
        ("mesh.port", "70000", "invalid value"),
        ("mesh.policy", "best", "unknown variant"),
        ("mesh.colour", "red", "mesh.colour is not known"),
        ("mesh.eject.max_percent", "101", "max_percent 101 is more than 100"),
        ("mesh.aliases", "a..b", "alias \"a..b\" is not a DNS name"),
    ] {
        let attributes = json!({ "ServiceId": service, "Attributes": { key: value } });
        let error = refused(&mut state, "UpdateServiceAttributes", attributes);
        assert!(error.starts_with("InvalidInput: ") && error.contains(expected), "{error}");
    }

    // Somebody else's VIP.
    let owner =
        json!({ "ServiceId": service, "Attributes": { "mesh.vip": "127.128.0.9", "mesh.port": "80" } });
    call(&mut state, "UpdateServiceAttributes", owner);
    let thief = call(&mut state, "CreateService", json!({ "Name": "thief", "NamespaceId": namespace }));
    let theft = json!({ "ServiceId": thief["Service"]["Id"], "Attributes": { "mesh.vip": "127.128.0.9", "mesh.port": "80" } });
    let error = refused(&mut state, "UpdateServiceAttributes", theft);
    assert!(error.contains("mesh.vip 127.128.0.9 belongs to service echo.service.local"), "{error}");
}

#[test]
fn a_service_is_what_its_attributes_and_instances_say() {
    let mut state = State::default();
    let (_, service) = service(&mut state);
    assert_eq!(translated(&state, &service), (None, vec![]), "nothing to dial yet");
    call(&mut state, "RegisterInstance", register(&service, "a", at("10.0.0.1", 80)));
    let (echo, _) = translated(&state, &service);
    assert_eq!(echo.unwrap().id.to_string(), "echo.service.local:80/tcp", "the instances' common port");
    call(&mut state, "DeregisterInstance", json!({ "ServiceId": service, "InstanceId": "a" }));
    let (echo, _) = translated(&state, &service);
    assert_eq!(echo.unwrap().id.port.get(), 80, "a name outlives its last instance");

    let attributes = json!({
        "mesh.port": "8080", "mesh.protocol": "udp", "mesh.vip": "127.128.0.9", "mesh.aliases": "e, echo2",
        "mesh.policy": "maglev", "mesh.affinity": "3h", "mesh.drain": "5s", "mesh.eject.failures": "2",
        "other": "kept",
    });
    call(&mut state, "UpdateServiceAttributes", json!({ "ServiceId": service, "Attributes": attributes }));
    let mut one = at("10.0.0.1", 80);
    one["mesh.weight"] = "7".into();
    one["AVAILABILITY_ZONE"] = "z1".into();
    call(&mut state, "RegisterInstance", register(&service, "a", one));
    call(&mut state, "RegisterInstance", register(&service, "b", json!({ "AWS_INSTANCE_IPV6": "fd00::1" })));
    call(&mut state, "RegisterInstance", register(&service, "c", at("10.0.0.1", 80)));
    call(&mut state, "RegisterInstance", register(&service, "d", json!({ "AWS_INSTANCE_CNAME": "x" })));
    let unhealthy = json!({ "ServiceId": service, "InstanceId": "b", "Status": "UNHEALTHY" });
    call(&mut state, "UpdateInstanceCustomHealthStatus", unhealthy);
    let (echo, left_out) = translated(&state, &service);
    let echo = echo.unwrap();
    assert_eq!(echo.id.to_string(), "echo.service.local:8080/udp");
    assert_eq!((echo.aliases.join(" "), echo.policy), ("e echo2".into(), model::Policy::Maglev));
    assert_eq!((echo.affinity, echo.drain), (Some(Duration::from_secs(10_800)), Duration::from_secs(5)));
    assert_eq!((echo.eject.failures, echo.vip), (2, Some("127.128.0.9".parse().unwrap())));
    let [a, b] = &*echo.instances else { panic!("{echo:?}") };
    assert_eq!((a.port.get(), a.weight, a.zone.as_deref()), (80, 7, Some("z1")));
    assert_eq!((b.port.get(), b.weight, b.health), (8080, 100, model::Health::Unhealthy));
    assert_eq!(left_out, ["service echo.service.local: instance c: 10.0.0.1 port 80 is used twice"]);
    // Rules that became stricter leave out single records.
    let strict = Rules { allow: vec![FromStr::from_str("fd00::/8").unwrap()], ..rules::for_tests() };
    let record = state.service(&service).unwrap();
    let namespace = state.namespace(&record.namespace).unwrap();
    let (echo, left_out) = translate::service(namespace, record, state.instances(&service), &strict).unwrap();
    assert_eq!((echo.unwrap().instances.len(), left_out.len()), (1, 2));
}

#[test]
fn discovery_filters_by_health_and_attributes() {
    let mut state = State::default();
    let (_, service) = service(&mut state);
    for (id, stage, status) in [("a", "x", "HEALTHY"), ("b", "x", "UNHEALTHY"), ("c", "y", "UNHEALTHY")] {
        let mut attributes = at("10.0.0.1", 80);
        attributes["stage"] = stage.into();
        attributes["AWS_INIT_HEALTH_STATUS"] = status.into();
        call(&mut state, "RegisterInstance", register(&service, id, attributes));
    }
    for (more, expected) in [
        (json!({}), "a"),
        (json!({ "HealthStatus": "HEALTHY" }), "a"),
        (json!({ "HealthStatus": "UNHEALTHY" }), "bc"),
        (json!({ "HealthStatus": "ALL" }), "abc"),
        (json!({ "HealthStatus": "ALL", "MaxResults": 2 }), "ab"),
        (json!({ "QueryParameters": { "stage": "y" } }), "c"),
        (json!({ "QueryParameters": { "stage": "y" }, "HealthStatus": "HEALTHY" }), ""),
        (json!({ "QueryParameters": { "stage": "z" } }), ""),
        (json!({ "OptionalParameters": { "stage": "y" }, "HealthStatus": "ALL" }), "c"),
        (json!({ "OptionalParameters": { "stage": "z" }, "HealthStatus": "ALL" }), "abc"),
    ] {
        let mut input = json!({ "NamespaceName": "service.local", "ServiceName": "echo" });
        input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let found = call(&mut state, "DiscoverInstances", input.clone());
        let ids =
            found["Instances"].as_array().unwrap().iter().map(|one| one["InstanceId"].as_str().unwrap());
        assert_eq!(ids.collect::<String>(), expected, "{input}");
        assert_eq!(found["InstancesRevision"], 3);
    }
    let input = json!({ "NamespaceName": "service.local", "ServiceName": "echo", "MaxResults": 0 });
    assert!(refused(&mut state, "DiscoverInstances", input).contains("MaxResults 0"));
}

#[test]
fn pages_hold_everything_once_while_things_come_and_go() {
    let mut state = State::default();
    let (_, service) = service(&mut state);
    for n in 0..250 {
        call(&mut state, "RegisterInstance", register(&service, &format!("{n:03}"), at("10.0.0.1", n + 1)));
    }
    let mut seen = Vec::new();
    let mut input = json!({ "ServiceId": service });
    loop {
        let page = call(&mut state, "ListInstances", input.clone());
        seen.extend(
            page["Instances"].as_array().unwrap().iter().map(|one| one["Id"].as_str().unwrap().to_owned()),
        );
        // What was seen last goes away; the next page does not mind.
        let last = json!({ "ServiceId": service, "InstanceId": seen.last().unwrap() });
        call(&mut state, "DeregisterInstance", last);
        let Some(token) = page.get("NextToken") else { break };
        input["NextToken"] = token.clone();
    }
    assert_eq!(seen, (0..250).map(|n| format!("{n:03}")).collect::<Vec<_>>());
    let filters =
        json!({ "Filters": [{ "Name": "TYPE", "Values": ["CREATE_NAMESPACE"], "Condition": "EQ" }] });
    assert_eq!(call(&mut state, "ListOperations", filters)["Operations"].as_array().unwrap().len(), 1);
    let filters = json!({ "Filters": [{ "Name": "COLOUR", "Values": ["x"] }] });
    assert!(refused(&mut state, "ListNamespaces", filters).contains("cannot be filtered by \"COLOUR\""));
}

/// What was stored makes the same state again.
#[test]
fn a_state_is_the_sum_of_its_changes() {
    let mut state = State::default();
    let (namespace, service) = service(&mut state);
    call(&mut state, "RegisterInstance", register(&service, "a/b", at("10.0.0.1", 80)));
    call(&mut state, "RegisterInstance", register(&service, "b", at("10.0.0.2", 80)));
    call(&mut state, "DeregisterInstance", json!({ "ServiceId": service, "InstanceId": "b" }));
    let mut records = std::collections::BTreeMap::new();
    for (key, value) in state.take_changes() {
        match value {
            Some(value) => drop(records.insert(key, value)),
            None => drop(records.remove(&key)),
        }
    }
    let mut again = State::default();
    records.iter().for_each(|(key, value)| again.load(key, value).unwrap());
    for (operation, input) in [
        ("GetNamespace", json!({ "Id": namespace })),
        ("GetService", json!({ "Id": service })),
        ("ListInstances", json!({ "ServiceId": service })),
        ("ListOperations", json!({})),
    ] {
        assert_eq!(call(&mut again, operation, input.clone()), call(&mut state, operation, input));
    }
    assert_eq!(again.new_id("x"), state.new_id("x"));
    assert!(again.load("nonsense", b"{}").is_err() && again.load("ns-1", b"{}").is_err());
    assert_eq!(translate::lease(&Attributes::new()), Ok(None));
}

#[test]
fn a_service_of_an_http_namespace_or_of_type_http_is_api_only_and_others_choose_their_answer() {
    let mut state = State::default();
    let (_, http) = service(&mut state);
    call(&mut state, "CreatePrivateDnsNamespace", json!({ "Name": "dns.example", "Vpc": "any" }));
    let namespace = state.namespace_named("dns.example").unwrap().id.clone();
    let mut create = |more: Value| {
        let mut input = json!({ "Name": format!("s{}", state.services.len()), "NamespaceId": namespace });
        input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let created = call(&mut state, "CreateService", input);
        created["Service"]["Id"].as_str().unwrap().to_owned()
    };
    let api = create(json!({ "Type": "HTTP" }));
    let records = json!([{ "Type": "SRV", "TTL": 60 }]);
    let plain = create(json!({ "DnsConfig": { "RoutingPolicy": "MULTIVALUE", "DnsRecords": records } }));
    let tags = json!([{ "Key": "mesh.answer", "Value": "instances" }]);
    let instances = create(json!({ "Tags": tags }));
    for (id, api_only, answer) in [
        (&http, true, model::Answer::Vip),
        (&api, true, model::Answer::Vip),
        (&plain, false, model::Answer::Vip),
        (&instances, false, model::Answer::Instances),
    ] {
        call(&mut state, "RegisterInstance", register(id, "a", at("10.0.0.1", 8080)));
        let service = translated(&state, id).0.unwrap();
        assert_eq!((service.api_only, service.answer), (api_only, answer), "{}", service.id);
    }
    for (key, value) in [("mesh.answer", "both"), ("mesh.api_only", "true")] {
        let input = json!({ "ServiceId": plain, "Attributes": { key: value } });
        assert!(refused(&mut state, "UpdateServiceAttributes", input).starts_with("InvalidInput: "));
    }
}
