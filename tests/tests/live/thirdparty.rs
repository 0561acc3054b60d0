//! Programs that know nothing of mesh behave inside the managed cgroup as they do outside.

use std::{
    collections::BTreeMap,
    process::{Command, Output, Stdio},
};

use mesh_tests::{Mesh, figure, is_long, server::Server, service};

const RUNNER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/cpython.py");

/// CPython's own tests, by name or all of a module.
fn suite(mut python: Command, tests: &[&str]) -> Command {
    python.arg(RUNNER).args(tests).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    python
}

/// Each test and how it ended; some of them print lines of their own.
fn results(output: &Output) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(&output.stdout);
    let ends = text.lines().filter_map(|line| line.split_once(' '));
    let ends = ends.filter(|(_, ended)| ["ok", "failed", "skipped"].contains(ended));
    ends.map(|(name, ended)| (name.into(), ended.into())).collect()
}

#[test]
fn cpython_s_own_socket_tests_end_inside_as_they_do_outside() {
    let server = Server::start("echo");
    let mesh = Mesh::start(&service("echo", 80, "127.128.15.1", &[("127.0.0.1", server.port())]));
    let modules: &[&str] = if is_long() {
        &["test.test_socket", "test.test_asyncio", "test.test_ssl"]
    } else {
        // Of asyncio's tests those that are about sockets and streams.
        &["test.test_socket", "test.test_asyncio.test_sock_lowlevel", "test.test_asyncio.test_streams"]
    };
    let outside = suite(Command::new("python3"), modules).spawn().unwrap();
    let inside = suite(mesh.inside("python3"), modules).spawn().unwrap();
    let outside = results(&outside.wait_with_output().unwrap());
    let inside = results(&inside.wait_with_output().unwrap());
    let passed = outside.values().filter(|ended| *ended == "ok").count();
    figure(&format!(
        "CPython's own tests: {} outside, of which {passed} passed, and {} inside",
        outside.len(),
        inside.len()
    ));
    assert!(passed > 500, "the suite did not run: {outside:?}");
    let differing: Vec<_> = outside.keys().filter(|name| inside.get(*name) != outside.get(*name)).collect();
    for name in differing {
        // Some of them depend on time, and the machine is busy: each gets another chance, alone.
        let again = results(&suite(mesh.inside("python3"), &[name]).output().unwrap());
        assert_eq!(again.get(name), outside.get(name), "{name}: {:?} inside at first", inside.get(name));
    }
}
