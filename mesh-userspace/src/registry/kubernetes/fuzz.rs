//! What comes from Kubernetes: lists of objects, and messages of watches.

use super::*;
use crate::registry::{fuzz, rules::for_tests};

/// The first line is a list of Services, the second one a list of EndpointSlices; the others are messages of the watch of
/// Services, and, where they begin with a space, of that of EndpointSlices. Nothing is left when nothing is listed any more.
pub(crate) fn messages(bytes: &[u8]) {
    let place = Place { node: "n1".into(), zone: Some("z1".into()) };
    let mut mirror = Mirror::new(domain(), for_tests());
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut errors = Vec::new();
    mirror.begin(place.clone());
    for kind in [Kind::Service, Kind::Slice] {
        match parse::<Page>(lines.next().unwrap_or_default()) {
            Ok(page) => page.items.into_iter().for_each(|object| mirror.put(kind, object)),
            Err(why) => errors.push(why),
        }
    }
    mirror.listed();
    fuzz::said(&mirror.read());
    let mut version = String::new();
    for line in lines {
        let kind = if line.starts_with(b" ") { Kind::Slice } else { Kind::Service };
        match told(line, kind, &mut version) {
            Ok(None) => {}
            Ok(Some(Change { kind, gone: false, object })) => mirror.put(kind, object),
            Ok(Some(Change { kind, gone: true, object })) => mirror.delete(kind, &object),
            Err(why) => errors.push(why),
        }
        fuzz::said(&mirror.read());
    }
    fuzz::problems(&errors);
    let followed = mirror.read().services;
    mirror.begin(place.clone());
    assert_eq!(mirror.read().services, followed, "all of it made anew is something else");
    mirror.begin(place);
    mirror.listed();
    let said = mirror.read();
    assert!(said.services.is_empty() && said.problems.is_empty(), "{said:?}");
}
