use proptest::prelude::*;

use super::*;
use crate::registry::{remote::Client as _, rules};

fn client() -> Client {
    let settings = Settings { endpoints: vec!["http://127.0.0.1:1".into()], prefix: prefix() };
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
    let settings = Settings {
        endpoints: vec!["http://127.0.0.1:1".into(), "http://127.0.0.1:2".into()],
        prefix: prefix(),
    };
    let mut client = Client::new(settings, rules::for_tests());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(client.connect()).unwrap_err();
    for endpoint in ["etcd http://127.0.0.1:1: ", "etcd http://127.0.0.1:2: "] {
        assert!(error.contains(endpoint) && error.contains("refused"), "{error}");
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
