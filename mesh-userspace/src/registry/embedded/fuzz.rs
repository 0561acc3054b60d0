//! What callers of the embedded registry's API make of it.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, body::Bytes};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{engine::Call, http, records::Service, state::State, translate, wire::Format};
use crate::registry::{fuzz, rules::for_tests, services};

/// A registry, and what is on its disk.
struct Registry {
    state: State,
    disk: BTreeMap<String, Vec<u8>>,
}

impl Registry {
    /// With the namespace `ns-0000000000000001` and its service `srv-0000000000000003`.
    fn new() -> Self {
        let mut registry = Self { state: State::default(), disk: BTreeMap::new() };
        let input = json!({ "Name": "service.local", "Vpc": "vpc-1" });
        registry.call("CreatePrivateDnsNamespace", input).expect("it is good");
        let namespace = registry.state.namespaces.keys().next().expect("it was made").clone();
        let input = json!({ "Name": "echo", "NamespaceId": namespace });
        registry.call("CreateService", input).expect("it is good");
        assert!(registry.state.services.contains_key("srv-0000000000000003"));
        registry
    }

    /// One call; one that is refused changes nothing, and the answer can be read in both formats.
    fn call(&mut self, operation: &str, input: Value) -> super::error::Result<Value> {
        let answer = self.state.call(operation, input, &for_tests());
        let changes = self.state.take_changes();
        assert!(answer.is_ok() || changes.is_empty(), "{operation}: {answer:?}");
        for (key, value) in changes {
            match value {
                Some(value) => drop(self.disk.insert(key, value)),
                None => drop(self.disk.remove(&key)),
            }
        }
        let told = answer.as_ref().map_or_else(super::error::Error::body, Clone::clone);
        for format in [Format::Json, Format::Cbor] {
            format.decode(&format.encode(&told)).expect("the answer can be read");
        }
        answer
    }

    /// What it is to mesh follows the rules, and is the same after a restart.
    fn check(&self) {
        let mut restarted = State::default();
        for (key, value) in &self.disk {
            restarted.load(key, value).expect("it was stored");
        }
        assert_eq!(self.said(), Self::of(&restarted));
    }

    fn said(&self) -> Vec<(Value, BTreeMap<String, super::records::Instance>)> {
        let rules = for_tests();
        for service in self.state.services.values() {
            let namespace = self.state.namespace(&service.namespace).expect("it has services");
            match translate::service(namespace, service, self.state.instances(&service.id), &rules) {
                Ok((service, problems)) => {
                    fuzz::services(&services(service.map(Arc::new)));
                    fuzz::problems(&problems);
                }
                Err(why) => fuzz::problems(&[why]),
            }
        }
        Self::of(&self.state)
    }

    fn of(state: &State) -> Vec<(Value, BTreeMap<String, super::records::Instance>)> {
        let json = |service: &Service| serde_json::to_value(service).expect("it is stored as JSON");
        state.services.values().map(|one| (json(one), state.instances(&one.id).clone())).collect()
    }
}

/// On each line an operation, a blank, and its JSON.
pub(crate) fn calls(bytes: &[u8]) {
    let mut registry = Registry::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let mut parts = line.splitn(2, |byte| *byte == b' ');
        let Ok(operation) = std::str::from_utf8(parts.next().unwrap_or_default()) else { continue };
        if let Ok(input) = Format::Json.decode(parts.next().unwrap_or_default()) {
            let _ = registry.call(operation, input);
        }
    }
    registry.check();
}

/// One request: its path, its headers a line each, an empty line, and its body.
pub(crate) fn http(bytes: &[u8]) {
    let mut lines = bytes.splitn(2, |byte| *byte == b'\n');
    let mut request = Request::post(lines.next().unwrap_or_default());
    let mut rest = lines.next().unwrap_or_default();
    loop {
        let mut lines = rest.splitn(2, |byte| *byte == b'\n');
        let line = lines.next().unwrap_or_default();
        rest = lines.next().unwrap_or_default();
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { break };
        request = request.header(&line[..colon], line[colon + 1..].trim_ascii());
    }
    let Ok(request) = request.body(Full::new(Bytes::copy_from_slice(rest))) else { return };
    let mut registry = Registry::new();
    let (calls, mut asked) = mpsc::channel(1);
    let engine = async {
        while let Some(Call { operation, input, answer }) = asked.recv().await {
            let _ = answer.send(registry.call(&operation, input));
        }
        unreachable!("the caller waits for its answer")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let (status, body) = runtime.expect("a clock is all it needs").block_on(async {
        let response: Result<_, Infallible> = tokio::select! {
            response = http::answer(request, &calls) => response,
            never = engine => never,
        };
        let (head, body) = response.expect("it never fails").into_parts();
        (head.status, body.collect().await.expect("it is whole").to_bytes())
    });
    assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR);
    let told = Format::Json.decode(&body).or_else(|_| Format::Cbor.decode(&body)).expect("an object");
    assert!(status.is_success() || told["__type"].is_string(), "{told}");
    registry.check();
}
