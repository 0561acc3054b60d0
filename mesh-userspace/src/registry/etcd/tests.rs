use proptest::prelude::*;

use super::*;
use crate::registry::{remote::Client as _, rules};

fn settings(text: &Value) -> Settings {
    serde_json::from_value(text.clone()).unwrap()
}

fn client() -> Client {
    let settings = settings(&json!({ "endpoints": ["http://127.0.0.1:1"] }));
    settings.check(&rules::for_tests()).unwrap();
    Client::new(settings, rules::for_tests())
}

fn take(client: &mut Client, line: &str) -> Result<bool, String> {
    client.take(parse(line.as_bytes())?)
}

/// What etcd 3.4 said.
#[test]
fn messages_of_a_watch_are_followed() {
    let mut client = client();
    let created = r#"{"result":{"header":{"cluster_id":"14841639068965178418","member_id":"10276657743932975437","revision":"1","raft_term":"2"},"created":true}}"#;
    assert_eq!(take(&mut client, created), Ok(false));
    let key = BASE64_STANDARD.encode("/mesh/services/service.local/echo");
    let value = BASE64_STANDARD.encode(r#"{"port": 80}"#);
    let put = format!(
        r#"{{"result":{{"header":{{"revision":"2"}},"events":[{{"kv":{{"key":"{key}","create_revision":"2","mod_revision":"2","version":"1","value":"{value}"}}}}]}}}}"#
    );
    assert_eq!(take(&mut client, &put), Ok(true));
    assert_eq!(client.read().services.len(), 1);
    let delete = format!(
        r#"{{"result":{{"header":{{"revision":"3"}},"events":[{{"type":"DELETE","kv":{{"key":"{key}","mod_revision":"3"}}}}]}}}}"#
    );
    assert_eq!(take(&mut client, &delete), Ok(true));
    assert!(client.read().services.is_empty());

    let compacted = r#"{"result":{"header":{"revision":"9"},"canceled":true,"compact_revision":"8"}}"#;
    assert!(take(&mut client, compacted).unwrap_err().contains("compacted up to revision 8"));
    let failed = r#"{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}"#;
    assert!(take(&mut client, failed).unwrap_err().contains("no leader"));
    for none in ["", "{", "[1]", r#"{"result":{"events":[{"kv":{"key":"%"}}]}}"#] {
        assert!(take(&mut client, none).unwrap_err().starts_with("what it says is not etcd's: "), "{none}");
    }
}

#[test]
fn every_endpoint_is_tried_and_named() {
    let settings = settings(&json!({ "endpoints": ["http://127.0.0.1:1", "http://127.0.0.1:2"] }));
    let mut client = Client::new(settings, rules::for_tests());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(client.connect()).unwrap_err();
    for endpoint in ["etcd http://127.0.0.1:1: ", "etcd http://127.0.0.1:2: "] {
        assert!(error.contains(endpoint) && error.contains("refused"), "{error}");
    }
}

#[test]
fn what_secures_a_connection_is_checked_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name)
    };
    let (none, empty, lines) = (folder.path().join("none"), file("empty", ""), file("lines", "a\nb\n"));
    let (https, http) = (json!(["https://127.0.0.1:1"]), json!(["http://127.0.0.1:1"]));
    for (text, why) in [
        (
            json!({ "endpoints": http, "tls": { "ca_file": none } }),
            "tls is given, but no endpoint is https://",
        ),
        (json!({ "endpoints": https, "tls": { "ca_file": none } }), "none: No such file"),
        (json!({ "endpoints": https, "tls": { "ca_file": lines } }), "lines: no certificate"),
        (json!({ "endpoints": https, "tls": { "key_file": none } }), "cert_file and key_file go together"),
        (json!({ "endpoints": https, "tls": { "cert_file": lines, "key_file": lines } }), "cert_file "),
        (json!({ "endpoints": http, "username": "mesh" }), "username and password_file go together"),
        (
            json!({ "endpoints": http, "username": "mesh", "password_file": empty }),
            "empty: this is not one line",
        ),
        (
            json!({ "endpoints": http, "username": "mesh", "password_file": lines }),
            "lines: this is not one line",
        ),
    ] {
        let refused = settings(&text).check(&rules::for_tests()).unwrap_err();
        assert!(refused.contains(why), "{text}: {refused}");
    }
}

proptest! {
    #[test]
    fn no_answer_does_harm(text in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..60),
        r#"\{"(result|header|kvs|error)":(\{\}|\[\]|\{"(events|revision|created)":("[a-zA-Z0-9=]{0,8}"|\[\{\}\]|true)\})\}"#
            .prop_map(String::into_bytes),
    ]) {
        let _ = parse::<Page>(&text);
        let mut client = client();
        let _ = parse(&text).and_then(|message| client.take(message));
    }
}
