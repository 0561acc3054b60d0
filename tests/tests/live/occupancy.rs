//! How full the maps are: what `status` and the metrics say is what lies in the maps.

use std::{collections::BTreeMap, process::Command};

use mesh_tests::{Mesh, server::Server, service, text, wait_until};
use serde_json::Value;

const VIP: &str = "127.128.10.1";

/// Entries in use, by map.
type Usage = BTreeMap<String, u64>;

fn usage(rows: &Value) -> Usage {
    let used = |row: &Value| Some((row["name"].as_str()?.to_owned(), row["used"].as_u64()?));
    rows.as_array().unwrap().iter().filter_map(used).collect()
}

/// As the daemon says, once that is what another program reads from the pins.
fn settled(mesh: &Mesh) -> Usage {
    wait_until("status and the maps agree", || {
        usage(&mesh.json(&["status"])["maps"]) == usage(&mesh.bpf("maps"))
    });
    usage(&mesh.json(&["status"])["maps"])
}

fn counts<const N: usize>(usage: &Usage, maps: [&str; N]) -> [u64; N] {
    maps.map(|map| usage[map])
}

fn sticky(server: &Server) -> String {
    let text = service("echo", 80, VIP, &[("127.0.0.1", server.port())]);
    text.replacen("port = ", "affinity = \"1h\"\ndrain = \"1h\"\nport = ", 1)
}

fn others(count: usize, backends: usize) -> String {
    let addresses: Vec<_> = (1..=backends).map(|n| format!("10.0.0.{n}")).collect();
    let instances: Vec<_> = addresses.iter().map(|address| (address.as_str(), 80)).collect();
    (0..count).map(|n| service(&format!("s{n}"), 80, "", &instances)).collect()
}

#[test]
fn status_and_metrics_say_what_lies_in_the_maps_after_changes_and_crashes() {
    const TABLES: [&str; 5] = ["FRONTENDS", "SERVICES", "BACKENDS", "SLOTS", "SOCKETS"];
    let (one, two) = (Server::start("one"), Server::start("two"));
    let mut mesh = Mesh::start(&sticky(&two));
    let dial = format!(
        "import socket, sys\nheld = [socket.create_connection(('{VIP}', 80), 5) for _ in range(5)]\nprint('held', flush=True)\nsys.stdin.readline()"
    );
    let mut holder = mesh.dialogue(&dial);
    assert_eq!(holder.hear(), "held");
    let now = settled(&mesh);
    assert_eq!(counts(&now, TABLES), [1, 1, 1, 1, 5]);
    assert_eq!(now["AFFINITY"], 1);

    for round in 0..24 {
        mesh.write(
            &(sticky(if round % 2 == 0 { &one } else { &two }) + &others(1 + 5 * round % 9, 1 + round % 4)),
        );
        if round % 4 == 3 {
            // In the middle of the change, or before it, or after it.
            std::thread::sleep(std::time::Duration::from_millis(3 * round as u64 % 20));
            mesh.kill();
            mesh.launch();
            mesh.ready();
        }
    }
    mesh.write(&(sticky(&one) + &others(7, 3)));
    wait_until("the last change", || {
        mesh.kernel_backends(&format!("{VIP}:80")) == [format!("127.0.0.1:{}", one.port())]
            && mesh.json(&["service", "list"]).as_array().unwrap().len() == 8
    });
    let mut workload = mesh.workload("other").command("python3");
    let once = format!("import socket; socket.create_connection(('{VIP}', 80), 5).recv(9)");
    assert!(workload.args(["-c", &once]).status().unwrap().success());

    // The backend that is gone has its id for as long as sockets are connected to it.
    let now = settled(&mesh);
    assert_eq!(counts(&now, TABLES), [8, 8, 1 + 7 * 3 + 1, 1 + 7 * 3, 5]);
    assert_eq!(counts(&now, ["SETTINGS", "EJECTED", "CURSORS"]), [8; 3]);
    assert_eq!(counts(&now, ["LOAD", "HEALTH", "CONNECTIONS"]), [23, 23, 5]);
    assert_eq!(now["AFFINITY"], 2, "the workload that dialled before, and the other");
    let metrics =
        Command::new("curl").args(["-s", &format!("http://{}/metrics", mesh.web)]).output().unwrap();
    let metrics = text(&metrics);
    for row in mesh.json(&["status"])["maps"].as_array().unwrap() {
        let (name, used, max) = (row["name"].as_str().unwrap(), &row["used"], &row["max"]);
        for line in [
            format!("mesh_map_entries{{map=\"{name}\"}} {used}\n"),
            format!("mesh_map_capacity{{map=\"{name}\"}} {max}\n"),
        ] {
            assert!(metrics.contains(&line), "no {line} in\n{metrics}");
        }
    }

    holder.end();
    wait_until("the id is free", || settled(&mesh)["BACKENDS"] == 22);
    assert_eq!(settled(&mesh)["SOCKETS"], 0);
}
