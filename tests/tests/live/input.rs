//! Bad input against a running daemon: every mistake is named, nothing that works is lost.

use std::{
    fs,
    time::{Duration, Instant},
};

use mesh_tests::{Mesh, server::Server, service, wait_until};

const VIP: &str = "127.128.4.1";

/// The registry's error as `mesh registry list` shows it, once there is one.
fn error(mesh: &Mesh) -> String {
    let registry = || mesh.json(&["registry", "list"])[0].clone();
    wait_until("an error is reported", || registry()["state"] == "stale");
    registry()["error"].as_str().unwrap().to_owned()
}

fn assert_serves(mesh: &Mesh, name: &str) {
    let answer = mesh.python(&format!(
        "import socket; print(socket.create_connection(('{VIP}', 80), 5).recv(9).decode())"
    ));
    assert_eq!(answer, name);
}

#[test]
fn bad_services_files_are_named_and_the_last_good_state_stays() {
    let server = Server::start("good");
    let good = service("echo", 80, VIP, &[("127.0.0.1", server.port())]);
    let mesh = Mesh::start(&good);
    let name = "service echo.service.local:80/tcp";
    let instance = |address: &str| service("echo", 80, VIP, &[(address, 80)]);
    let cases = [
        ("[[service]]\nname = ".to_owned(), "services.toml:2: ".to_owned()),
        (
            good.replace("port = 80\n", "port = 80\ncolour = 1\n"),
            "services.toml:5: unknown field `colour`".into(),
        ),
        (format!("{good}{good}"), format!("services.toml:12: {name}: the service is defined twice")),
        (
            service("echo", 80, "10.0.0.1", &[]),
            format!("services.toml:1: {name}: vip 10.0.0.1 is outside the configured ranges"),
        ),
        (format!("{good}{}", service("two", 80, VIP, &[])), format!("already taken by {name}")),
        (good.replace("port = 80\n", "port = 0\n"), "services.toml:4: ".into()),
        (good.replace("port = 80\n", "port = 65536\n"), "services.toml:4: ".into()),
        (good.replace("weight = 100", "weight = 0"), format!("{name}: every instance has weight 0")),
        (
            instance("169.254.169.254"),
            format!("{name}: instance \"echo-0\": address 169.254.169.254 is link-local"),
        ),
        (
            instance("127.128.0.1"),
            format!("{name}: instance \"echo-0\": address 127.128.0.1 lies in a VIP range"),
        ),
        ("#".repeat(50_000_000), "the file has 50000000 bytes; the limit is 33554432".into()),
        (String::new(), "the file is empty; what it held is kept".into()),
    ];
    for (text, expected) in cases {
        mesh.write(&text);
        let error = error(&mesh);
        assert!(error.contains(&expected), "{error}\nshould contain\n{expected}");
        assert!(error.contains("services.toml"), "{error}");
        assert_serves(&mesh, "good");
        mesh.write(&good);
        wait_until("all is well again", || mesh.json(&["registry", "list"])[0]["state"] == "synced");
    }
}

#[test]
fn bad_yaml_and_json_are_named_too() {
    let server = Server::start("good");
    for (extension, good, bad, expected) in [
        (
            "yaml",
            format!(
                "service:\n- {{name: echo, namespace: service.local, port: 80, vip: {VIP}, instance: [{{id: a, address: 127.0.0.1, port: {}}}]}}\n",
                server.port()
            ),
            "service:\n- name: [\n",
            ".yaml:",
        ),
        (
            "json",
            format!(
                r#"{{"service": [{{"name": "echo", "namespace": "service.local", "port": 80, "vip": "{VIP}", "instance": [{{"id": "a", "address": "127.0.0.1", "port": {}}}]}}]}}"#,
                server.port()
            ),
            "{\"service\": [\n{]}",
            ".json:2: ",
        ),
    ] {
        let mut mesh = Mesh::prepare("");
        mesh.services = mesh.services.with_extension(extension);
        mesh.configure("");
        mesh.write(&good);
        mesh.launch();
        mesh.ready();
        assert_serves(&mesh, "good");
        mesh.write(bad);
        let error = error(&mesh);
        assert!(error.contains(expected), "{error}");
        assert_serves(&mesh, "good");
    }
}

#[test]
fn loopback_backends_need_permission() {
    let mut mesh = Mesh::prepare(&service("echo", 80, VIP, &[("127.0.0.1", 80)]));
    let config =
        fs::read_to_string(&mesh.config).unwrap().replace("allow_loopback = true", "allow_loopback = false");
    fs::write(&mesh.config, config).unwrap();
    mesh.launch();
    wait_until("the refusal", || {
        mesh.log().contains("instance \"echo-0\": address 127.0.0.1 is a loopback address")
    });
    assert!(!mesh.mesh(&["status", "--wait=300ms"]).output().unwrap().status.success(), "never ready");
}

#[test]
fn a_directory_that_vanishes_takes_nothing_along_and_is_noticed_when_it_is_back() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut mesh = Mesh::prepare("");
    let folder = mesh.dir.path().join("services.d");
    fs::create_dir(&folder).unwrap();
    mesh.services = folder.join("echo.toml");
    mesh.write(&service("echo", 80, VIP, &[("127.0.0.1", one.port())]));
    let config = fs::read_to_string(&mesh.config).unwrap();
    let file = mesh.dir.path().join("services.toml");
    fs::write(&mesh.config, config.replace(file.to_str().unwrap(), folder.to_str().unwrap())).unwrap();
    mesh.launch();
    mesh.ready();
    assert_serves(&mesh, "one");

    fs::remove_dir_all(&folder).unwrap();
    assert!(error(&mesh).contains("services.d"));
    assert_serves(&mesh, "one");

    fs::create_dir(&folder).unwrap();
    mesh.write(&service("echo", 80, VIP, &[("127.0.0.1", two.port())]));
    wait_until("the new folder's content", || {
        mesh.kernel_backends(&format!("{VIP}:80")) == [format!("127.0.0.1:{}", two.port())]
    });
    // And what changes in it from then on is followed.
    for server in [&one, &two, &one] {
        mesh.write(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
        wait_until("a change", || {
            mesh.kernel_backends(&format!("{VIP}:80")) == [format!("127.0.0.1:{}", server.port())]
        });
    }
}

#[test]
fn an_empty_list_of_services_removes_them() {
    let server = Server::start("good");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    mesh.write("service = []");
    wait_until("the service is gone", || mesh.lb().as_array().unwrap().is_empty());
    // Ids and slots are free after a grace.
    wait_until("nothing is used any more", || {
        let status = mesh.json(&["status"]);
        let is_zero = |value: &serde_json::Value| *value == 0;
        let maps = status["maps"].as_array().unwrap();
        is_zero(&status["services"])
            && is_zero(&status["backends"])
            && maps.iter().all(|map| is_zero(&map["used"]))
    });
}

#[test]
fn a_file_that_an_editor_replaces_step_by_step_takes_nothing_along_and_one_that_is_removed_does() {
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut mesh = Mesh::prepare("");
    let folder = mesh.dir.path().join("services.d");
    fs::create_dir(&folder).unwrap();
    let other = folder.join("other.toml");
    fs::write(&other, service("other", 80, "127.128.4.2", &[("127.0.0.1", two.port())])).unwrap();
    let config = fs::read_to_string(&mesh.config).unwrap();
    fs::write(&mesh.config, config.replace(mesh.services.to_str().unwrap(), folder.to_str().unwrap()))
        .unwrap();
    mesh.services = folder.join("echo.toml");
    let text = service("echo", 80, VIP, &[("127.0.0.1", one.port())]);
    mesh.write(&text);
    mesh.launch();
    mesh.ready();
    let program = format!(
        r#"
import select, socket, sys
print("begins", flush=True)
dialled, failed = 0, []
while not select.select([sys.stdin], [], [], 0)[0]:
    dialled += 1
    try:
        socket.create_connection(("{VIP}", 80), 5).close()
    except OSError as e:
        failed.append(e)
print(dialled > 100, failed[:3], flush=True)
"#
    );
    let pause = || std::thread::sleep(Duration::from_millis(5));
    wait_until("an editor that is not held up for longer than a file may be away", || {
        mesh.wait_for_backends(&format!("{VIP}:80"), 1);
        let mut client = mesh.dialogue(&program);
        assert_eq!(client.hear(), "begins");
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let start = Instant::now();
            fs::rename(&mesh.services, folder.join("echo.toml~")).unwrap();
            pause();
            fs::write(&mesh.services, "").unwrap();
            longest = longest.max(start.elapsed());
            pause();
            fs::write(&mesh.services, &text).unwrap();
            pause();
        }
        client.go_on();
        let answer = client.hear();
        let soon = longest < Duration::from_millis(200);
        assert!(!soon || answer == "True []", "{answer}, away for {longest:?} at most");
        soon
    });

    fs::remove_file(&mesh.services).unwrap();
    wait_until("the service is gone", || mesh.lb().as_array().unwrap().len() == 1);
    assert_eq!(mesh.json(&["registry", "list"])[0]["state"], "synced");
}
