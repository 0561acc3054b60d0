//! Registries whose packets are lost: a connection that was there goes on, and nothing comes of it.

use std::time::{Duration, Instant};

use mesh_tests::{Mesh, binary, figure, netns::Host, wait_until};

use crate::traffic::Traffic;

/// How soon it is noticed.
const LIMIT: Duration = Duration::from_secs(10);

/// Starts a daemon on a host. Its clients and their backends stay on this machine.
pub(crate) fn launch_on(node: &Host, mesh: &mut Mesh) {
    mesh.launch_as(node.command(binary().to_str().unwrap()));
    mesh.ready();
}

/// A service's instance is `one` until `change`, which is made while the registry's host is a black hole, and `two`
/// afterwards.
pub(crate) fn is_endured(what: &str, mesh: &Mesh, registry: &Host, vip: &str, change: impl FnOnce()) {
    let answers = |name: &str| mesh.dial(&format!("{vip}:80")) == name;
    wait_until("the first instance", || answers("one"));
    mesh.wait_for_registry("synced");
    let traffic = Traffic::start(mesh, vip);
    let hole = registry.black_hole();
    let began = Instant::now();
    mesh.wait_for_registry("stale");
    let noticed = began.elapsed();
    assert!(noticed < LIMIT, "noticed after {noticed:?}");
    let error = mesh.registry()["error"].to_string();
    change();
    assert!(answers("one"), "what it said last stays");
    assert!(hole.dropped() > 0, "the registry was not asked");

    drop(hole);
    let back = Instant::now();
    mesh.wait_for_registry("synced");
    let synced = back.elapsed();
    wait_until("the change", || answers("two"));
    figure(&format!(
        "{what} behind a black hole: noticed after {} ms ({error}), synced again {} ms after its end; {} connects, none failed",
        noticed.as_millis(),
        synced.as_millis(),
        traffic.end(&["one", "two"]),
    ));
}
