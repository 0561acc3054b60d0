//! What comes from etcd: its messages, and what others have put into its keys.

use super::*;
use crate::registry::{fuzz, rules::for_tests};

/// The first line is a page of the list, the others are messages of the watch.
pub(crate) fn messages(bytes: &[u8]) {
    let settings = serde_json::from_value(json!({ "endpoints": [] })).expect("it is whole");
    let mut client = Client::new(settings, for_tests());
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut errors = Vec::new();
    match parse::<Page>(lines.next().unwrap_or_default()) {
        Ok(page) => {
            client.mirror.begin();
            page.kvs.iter().for_each(|Kv { key, value, create_revision, .. }| {
                client.mirror.put(&key.0, &value.0, *create_revision);
            });
            client.mirror.listed();
        }
        Err(why) => errors.push(why),
    }
    fuzz::said(&client.mirror.read());
    for line in lines {
        let taken = parse(line).and_then(|message| client.take(message));
        errors.extend(taken.err());
        fuzz::said(&client.mirror.read());
    }
    fuzz::problems(&errors);
}

/// A key a line, below the prefix, and its value behind a tab; without a tab it is deleted. Nothing is left of what
/// is deleted.
pub(crate) fn records(bytes: &[u8]) {
    let mut mirror = Mirror::new("/mesh", for_tests());
    let mut keys = Vec::new();
    for (line, revision) in bytes.split(|byte| *byte == b'\n').zip(1..) {
        let mut parts = line.splitn(2, |byte| *byte == b'\t');
        let key = [b"/mesh/", parts.next().unwrap_or_default()].concat();
        match parts.next() {
            Some(value) => mirror.put(&key, value, revision),
            None => mirror.delete(&key),
        }
        keys.push(key);
        fuzz::said(&mirror.read());
    }
    keys.iter().for_each(|key| mirror.delete(key));
    let said = mirror.read();
    assert!(said.services.is_empty() && said.problems.is_empty(), "{said:?}");
}
