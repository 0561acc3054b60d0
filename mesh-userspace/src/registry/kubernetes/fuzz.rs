//! What comes from Kubernetes: lists of objects, and messages of watches.

use std::collections::BTreeMap;

use super::*;
use crate::registry::{fuzz, rules::for_tests};

/// The first line is a list of Services, the second one a list of EndpointSlices; the others are messages of the watch of
/// Services, and, where they begin with a space, of that of EndpointSlices. When the same is listed, nothing changes; when
/// nothing is listed, nothing is left.
pub(crate) fn messages(bytes: &[u8]) {
    let place = Place { node: "n1".into(), zone: Some("z1".into()) };
    let mut mirror = Mirror::new(domain(), for_tests());
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let (mut objects, mut errors) = (BTreeMap::new(), Vec::new());
    let key = |kind: Kind, object: &Value| {
        let Value::Object(metadata) = &object["metadata"] else { return String::new() };
        let part = |key| metadata.get(key).and_then(Value::as_str).unwrap_or_default();
        format!("{kind:?} {}/{}", part("namespace"), part("name"))
    };
    mirror.begin(place.clone());
    for kind in [Kind::Service, Kind::Slice] {
        let page = parse::<Page>(lines.next().unwrap_or_default());
        for object in page.map_err(|why| errors.push(why)).into_iter().flat_map(|page| page.items) {
            objects.insert(key(kind, &object), (kind, object.clone()));
            mirror.put(kind, object);
        }
    }
    mirror.listed();
    fuzz::said(&mirror.read());
    let mut version = String::new();
    for line in lines {
        let kind = if line.starts_with(b" ") { Kind::Slice } else { Kind::Service };
        match told(line, kind, &mut version) {
            Ok(None) => {}
            Ok(Some(Change { kind, gone: false, object })) => {
                objects.insert(key(kind, &object), (kind, object.clone()));
                mirror.put(kind, object);
            }
            Ok(Some(Change { kind, gone: true, object })) => {
                objects.remove(&key(kind, &object));
                mirror.delete(kind, &object);
            }
            Err(why) => errors.push(why),
        }
        fuzz::said(&mirror.read());
    }
    fuzz::problems(&errors);
    let followed = mirror.read().services;
    mirror.begin(place.clone());
    objects.into_values().for_each(|(kind, object)| mirror.put(kind, object));
    mirror.listed();
    assert_eq!(mirror.read().services, followed, "it is listed as something else");
    mirror.begin(place);
    mirror.listed();
    let said = mirror.read();
    assert!(said.services.is_empty() && said.problems.is_empty(), "{said:?}");
}
