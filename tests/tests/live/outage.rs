//! Times in which a registry is of no use: clients notice nothing, and the daemon does.

use std::{fs, path::Path, time::Instant};

use mesh_tests::{
    Mesh, binary, figure,
    netns::{BlackHole, Host},
    wait_until,
};

use crate::traffic::Traffic;

/// What happens to a registry, whose service is at port 80 of a VIP.
pub(crate) struct Outage<'a> {
    pub(crate) what: &'a str,
    pub(crate) mesh: &'a Mesh,
    pub(crate) vip: &'a str,
    /// What is said of it.
    pub(crate) error: &'a str,
    /// Who serves before it, and who does after the change that is made meanwhile.
    pub(crate) servers: [&'a str; 2],
}

impl Outage<'_> {
    /// It goes from `begin` to `end`.
    pub(crate) fn endure<T>(self, begin: impl FnOnce() -> T, change: impl FnOnce(), end: impl FnOnce(T)) {
        let Self { what, mesh, vip, error, servers } = self;
        let [before, after] = servers;
        let answers = |name: &str| mesh.dial(&format!("{vip}:80")) == name;
        wait_until("who serves before", || answers(before));
        mesh.wait_for_registry("synced");
        let traffic = Traffic::start(mesh, vip);
        let began = Instant::now();
        let outage = begin();
        mesh.wait_for_registry("stale");
        let noticed = began.elapsed();
        wait_until(&format!("it says {error}"), || mesh.registry()["error"].to_string().contains(error));
        change();
        assert!(answers(before), "what it said last stays");

        let back = Instant::now();
        end(outage);
        mesh.wait_for_registry("synced");
        let synced = back.elapsed();
        wait_until("who serves after", || answers(after));
        figure(&format!(
            "{what}: noticed after {} ms, synced again {} ms after its end; {} connects, none failed",
            noticed.as_millis(),
            synced.as_millis(),
            traffic.end(&servers),
        ));
    }
}

/// The host of a registry is a black hole; who serves is `one`, and after the change `two`.
pub(crate) fn in_a_black_hole(registry: &str, mesh: &Mesh, vip: &str, host: &Host, change: impl FnOnce()) {
    let what = format!("{registry} in a black hole");
    let end = |hole: BlackHole| assert!(hole.dropped() > 0, "nobody was asked");
    let outage = Outage { what: &what, mesh, vip, error: "", servers: ["one", "two"] };
    outage.endure(|| host.black_hole(), change, end);
}

/// The registry is away. A daemon that is started anew, also as after a reboot, serves what it said last.
pub(crate) fn starts_without_it(mesh: &mut Mesh, vip: &str, server: (&str, u16), launch: impl Fn(&mut Mesh)) {
    let (name, port) = server;
    let (kept, says) = (mesh.dir.path().join("state/registries"), format!("\"port\":{port}"));
    wait_until("it is on disk", || {
        let files = fs::read_dir(&kept).into_iter().flatten().flatten();
        let mut texts = files.map(|file| fs::read_to_string(file.path()).unwrap_or_default());
        texts.any(|text| text.contains(&says))
    });
    for reboots in [false, true] {
        mesh.kill();
        if reboots {
            assert!(mesh.cleanup().status.success());
        }
        launch(mesh);
        mesh.ready();
        assert_eq!(mesh.dial(&format!("{vip}:80")), name);
        assert_eq!(mesh.registry()["state"], "stale");
    }
}

/// Starts a daemon on a host. Its clients and their backends stay on this machine.
pub(crate) fn launch_on(node: &Host, mesh: &mut Mesh) {
    mesh.launch_as(node.command(binary().to_str().unwrap()));
    mesh.ready();
}

#[test]
fn the_page_on_registries_names_tests_that_there_are() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(tests.join("../docs/registries.md")).unwrap();
    let last = page.lines().filter_map(|line| line.strip_suffix("` |")?.rsplit_once("| `"));
    let names: Vec<_> = last.filter_map(|(_, name)| name.split_once("::")).collect();
    assert!(!names.is_empty());
    for (module, test) in names {
        let source = fs::read_to_string(tests.join(format!("tests/live/{module}.rs"))).unwrap();
        assert!(source.contains(&format!("#[test]\nfn {test}() {{")), "there is no {module}::{test}");
    }
}
