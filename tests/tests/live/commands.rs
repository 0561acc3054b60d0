//! The commands and the pages, as a user sees them.

use std::process::Command;

use mesh_tests::{Mesh, binary, server::Server, service, text};
use serde_json::{Value, json};

const VIP: &str = "127.128.5.1";

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn run(mesh: &Mesh, args: &[&str]) -> String {
    let output = mesh.mesh(args).output().unwrap();
    assert!(output.status.success(), "mesh {args:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_objects_have_the_fields_that_do_not_change() {
    let server = Server::start("echo");
    let aliased = service("echo", 80, VIP, &[("127.0.0.1", server.port())]).replacen(
        "port",
        "aliases = [\"e\"]\nport",
        1,
    );
    let mesh = Mesh::start(&aliased);

    let services = mesh.json(&["service", "list"]);
    let expected = json!([{
        "name": "echo", "namespace": "service.local", "protocol": "tcp", "port": 80, "vips": [VIP], "aliases": ["e"],
        "policy": "random", "backends": {"total": 1, "active": 1, "draining": 0, "unhealthy": 0, "ejected": 0},
    }]);
    assert_eq!(services, expected);
    assert_eq!(mesh.json(&["service", "get", "echo"]), expected[0]);
    assert_eq!(mesh.json(&["service", "get", "echo.service.local:80"]), expected[0]);

    let backend = &mesh.json(&["backend", "list"])[0];
    assert_eq!(
        keys(backend),
        [
            "address",
            "connections",
            "id",
            "instance",
            "namespace",
            "port",
            "service",
            "state",
            "weight",
            "zone"
        ]
    );
    assert_eq!(
        (&backend["instance"], &backend["state"], &backend["port"]),
        (&json!("echo-0"), &json!("active"), &json!(server.port()))
    );
    assert_eq!(backend["id"], mesh.lb()[0]["backends"][0]["id"]);

    let status = mesh.json(&["status"]);
    assert_eq!(
        (&status["ready"], &status["services"], &status["backends"]),
        (&json!(true), &json!(1), &json!(1))
    );
    assert_eq!(status["programs"].as_array().unwrap().len(), 10);
    assert!(status["programs"].as_array().unwrap().iter().all(|program| program["attached"] == true));
    let registry = &status["registries"][0];
    assert_eq!((&registry["type"], &registry["state"]), (&json!("file"), &json!("synced")));
    assert!(registry["last_sync"].as_str().unwrap().ends_with('Z'));
    assert_eq!((&registry["services"], &registry["instances"]), (&json!(1), &json!(1)));
    assert_eq!(
        keys(registry),
        ["age_seconds", "error", "instances", "last_sync", "problems", "services", "source", "state", "type"]
    );
    assert_eq!(keys(&mesh.json(&["registry", "list"])[0]), keys(registry));
    assert!(
        status["maps"].as_array().unwrap().contains(&json!({"name": "FRONTENDS", "used": 1, "max": 16384}))
    );
}

#[test]
fn explain_says_what_a_connect_would_do() {
    let server = Server::start("echo");
    let mesh = Mesh::start(
        &(service("echo", 80, VIP, &[("127.0.0.1", server.port())])
            + &service("empty", 81, "127.128.5.2", &[])),
    );
    let verdict = |target: &str| mesh.json(&["explain", target])[0]["verdict"].as_str().unwrap().to_owned();
    assert_eq!(verdict(&format!("{VIP}:80")), "translated");
    assert_eq!(verdict("echo:80"), "translated");
    assert_eq!(verdict("echo.service.local"), "translated");
    assert_eq!(verdict("empty:81"), "refused");
    assert_eq!(verdict(&format!("{VIP}:99")), "refused");
    assert_eq!(verdict("127.128.77.77:80"), "refused");
    assert_eq!(verdict("10.0.0.1:80"), "untouched");
    let share = &mesh.json(&["explain", "echo:80"])[0]["backends"][0];
    assert_eq!(
        (&share["address"], &share["port"], &share["share"]),
        (&json!("127.0.0.1"), &json!(server.port()), &json!(1.0))
    );

    let unknown = mesh.mesh(&["explain", "nobody:80"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown).contains("no service is named \"nobody\""));
    assert!(
        run(&mesh, &["explain", "echo:80"]).contains("not from here"),
        "the test itself is outside the cgroup"
    );
    let inside =
        mesh.inside(binary()).args(["explain", "echo:80", "--socket"]).arg(&mesh.socket).output().unwrap();
    assert!(!text(&inside).contains("not from here"), "{}", text(&inside));
}

#[test]
fn tables_are_for_people() {
    let server = Server::start("echo");
    let mesh = Mesh::start(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    let services = run(&mesh, &["service", "list"]);
    let lines: Vec<Vec<_>> = services.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "NAMESPACE", "PORT", "VIP", "ACTIVE"]);
    assert_eq!(lines[1], ["echo", "service.local", "80/tcp", VIP, "1/1"]);
    assert_eq!(run(&mesh, &["service", "list", "--no-headers"]).lines().count(), 1);
    assert!(run(&mesh, &["service", "list", "-o", "wide"]).contains("POLICY"));
    assert!(run(&mesh, &["service", "list", "-o", "yaml"]).contains("name: echo"));
    let registries = run(&mesh, &["registry", "list"]);
    let lines: Vec<Vec<_>> = registries.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0].join(" "), "TYPE SOURCE STATE SERVICES INSTANCES LAST SYNC AGE ERROR");
    assert_eq!(lines[1][..5], ["file", mesh.services.to_str().unwrap(), "synced", "1", "1"]);
    assert_eq!(run(&mesh, &["registry", "list", "--no-headers"]).lines().count(), 1);
    assert!(run(&mesh, &["registry", "list", "-o", "yaml"]).contains("state: synced"));
    assert_eq!(run(&mesh, &["status", "--brief"]).lines().count(), 1);
    assert!(run(&mesh, &["status"]).contains("10 of 10 attached"));
    assert!(run(&mesh, &["status", "--verbose"]).contains("mesh_connect4 attached"));
    assert!(run(&mesh, &["backend", "list"]).contains(&format!("127.0.0.1:{}", server.port())));
    assert!(run(&mesh, &["bpf", "lb"]).contains("100.00 %"), "the pin folder is asked of the daemon");
    assert!(run(&mesh, &["bpf", "maps"]).contains("ORIGIN"));
    assert!(run(&mesh, &["bpf", "programs"]).contains("mesh_getpeer6"));
}

#[test]
fn exit_codes_tell_failure_from_misuse() {
    let code = |args: &[&str]| Command::new(binary()).args(args).output().unwrap().status.code();
    assert_eq!(code(&["status", "--socket", "/nowhere"]), Some(1));
    assert_eq!(code(&["no-such-command"]), Some(2));
    assert_eq!(code(&["status", "-o", "colour"]), Some(2));
    assert_eq!(code(&["status", "--brief", "--verbose"]), Some(2));
    assert_eq!(code(&["status", "--wait=soon"]), Some(2));
    assert_eq!(code(&["status", "--wait=100ms", "--socket", "/nowhere"]), Some(1));
    assert_eq!(code(&["config", "validate", "/nowhere"]), Some(1));
    assert_eq!(code(&["--help"]), Some(0));
}

#[test]
fn config_validate_reads_the_services_files_too() {
    let mesh = Mesh::prepare(&service("echo", 80, VIP, &[("127.0.0.1", 80)]));
    let validate = || mesh.mesh(&["config", "validate", mesh.config.to_str().unwrap()]).output().unwrap();
    assert!(text(&validate()).contains("valid; 1 registries, 1 services"), "{}", text(&validate()));
    mesh.write("[[service]]\nname = 1");
    assert_eq!(validate().status.code(), Some(1));
    assert!(text(&validate()).contains("services.toml:2: "), "{}", text(&validate()));
}

#[test]
fn check_passes_before_and_after_the_start() {
    let mut mesh = Mesh::prepare(&service("echo", 80, VIP, &[("127.0.0.1", 80)]));
    let config = mesh.config.to_str().unwrap().to_owned();
    let check = |mesh: &Mesh, pre: &[&str]| {
        let output =
            mesh.mesh(&[&["check", "-o", "json", "--config", &config], pre].concat()).output().unwrap();
        let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.success(), findings)
    };
    let (passed, findings) = check(&mesh, &["--pre"]);
    assert!(passed, "{findings:#}");
    let failed = |findings: &Value| -> Vec<String> {
        let all = findings.as_array().unwrap().iter();
        all.filter(|finding| finding["result"] == "fail")
            .map(|finding| finding["check"].to_string())
            .collect()
    };
    let (passed, findings) = check(&mesh, &[]);
    assert!(!passed);
    assert_eq!(failed(&findings), ["\"daemon\""]);
    mesh.launch();
    mesh.ready();
    let (passed, findings) = check(&mesh, &[]);
    assert!(passed, "{findings:#}");
    mesh.write("[");
    mesh_tests::wait_until("the check names the registry", || {
        failed(&check(&mesh, &[]).1).contains(&"\"registry\"".to_owned())
    });
}

#[test]
fn completions_and_man_pages_are_made() {
    let mesh = Mesh::prepare("");
    for shell in ["bash", "zsh", "fish"] {
        assert!(run(&mesh, &["completion", shell]).contains("mesh"));
    }
    let dir = mesh.dir.path().join("man");
    run(&mesh, &["man", dir.to_str().unwrap()]);
    let page = std::fs::read_to_string(dir.join("mesh-service-list.1")).unwrap();
    assert!(page.contains("no\\-headers"), "{page}");
}

#[test]
fn metrics_and_health_are_served() {
    let server = Server::start("echo");
    let mut mesh = Mesh::prepare("[[service]]\nname = ");
    mesh.launch();
    let get = |mesh: &Mesh, path: &str| {
        let url = format!("http://{}{path}", mesh.web);
        text(&Command::new("curl").args(["-s", "-w", "%{http_code}", &url]).output().unwrap())
    };
    mesh_tests::wait_until("the page is served", || get(&mesh, "/healthz") != "000");
    assert_eq!(get(&mesh, "/healthz"), "ok\n200");
    assert!(get(&mesh, "/readyz").ends_with("503"), "no registry has delivered");
    mesh.write(&service("echo", 80, VIP, &[("127.0.0.1", server.port())]));
    mesh.ready();
    assert!(get(&mesh, "/readyz").ends_with("200"));

    mesh.python(&format!(
        "import socket\nfor _ in range(3): socket.create_connection(('{VIP}', 80), 5)\nfor _ in range(2): socket.socket().connect_ex(('{VIP}', 9))"
    ));
    let metrics = get(&mesh, "/metrics");
    for line in [
        "# TYPE mesh_connect_outcomes counter",
        "mesh_connect_outcomes_total{outcome=\"translated\"} 3",
        "mesh_connect_outcomes_total{outcome=\"no_frontend\"} 2",
        "mesh_backends{state=\"active\"} 1",
        "mesh_map_entries{map=\"SLOTS\"} 1",
        "mesh_map_capacity{map=\"BACKENDS\"} 65536",
        "mesh_config_last_reload_successful 1",
        "# UNIT mesh_reconcile_duration_seconds seconds",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    let source = mesh.services.display();
    assert!(
        metrics.contains(&format!("mesh_registry_up{{type=\"file\",source=\"{source}\"}} 1")),
        "{metrics}"
    );
    let synced = format!("mesh_registry_last_sync_timestamp_seconds{{type=\"file\",source=\"{source}\"}} 1");
    assert!(metrics.contains(&synced), "{metrics}");
}
