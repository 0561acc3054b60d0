use tempfile::TempDir;

use super::*;
use crate::{model::Answer, registry::rules};

const GOOD: &str = r#"
[[service]]
name = "a"
namespace = "service.local"
port = 80
[[service.instance]]
id = "a-1"
address = "10.0.0.1"
port = 8080
"#;

fn source(dir: &TempDir, file: &str, text: &str) -> Source {
    let path = dir.path().join(file);
    fs::write(&path, text).unwrap();
    Source::new(path, rules::for_tests(), None)
}

/// Reads `text` as a file of that name; the error's text, without the folder.
fn refusal(file: &str, text: &str) -> String {
    let dir = TempDir::new().unwrap();
    let news = source(&dir, file, text).read(&Which::All);
    assert_eq!(news.snapshot, None, "{text}");
    let error = news.error.unwrap_or_else(|| panic!("taken: {text}")).to_string();
    error.replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn the_three_formats_say_the_same() {
    let dir = TempDir::new().unwrap();
    let yaml = "service:\n- name: a\n  namespace: service.local\n  port: 80\n  instance:\n  - {id: a-1, address: 10.0.0.1, port: 8080}\n";
    let json = r#"{"service": [{"name": "a", "namespace": "service.local", "port": 80,
        "instance": [{"id": "a-1", "address": "10.0.0.1", "port": 8080}]}]}"#;
    let toml = source(&dir, "s.toml", GOOD).read(&Which::All).snapshot.unwrap();
    assert_eq!(toml.services.len(), 1);
    assert_eq!(source(&dir, "s.yaml", yaml).read(&Which::All).snapshot.unwrap(), toml);
    assert_eq!(source(&dir, "s.json", json).read(&Which::All).snapshot.unwrap(), toml);
}

#[test]
fn every_key_of_the_contract_is_taken() {
    let dir = TempDir::new().unwrap();
    let text = r#"
[[service]]
name      = "backend"
namespace = "service.local"
protocol  = "udp"
port      = 8080
port_name = "http"
vip       = "127.128.0.10"
aliases   = ["backend"]
answer    = "instances"
api_only  = true
policy    = "maglev"
affinity  = "3h"
drain     = "20s"
retry     = { attempts = 2, syn_timeout = "50ms" }
eject     = { failures = 5, base = "30s", max = "300s", max_percent = 50 }
check     = { type = "tcp", interval = "5s" }

[[service.instance]]
id      = "task-1"
address = "10.0.2.45"
port    = 31080
weight  = 100
zone    = "use1-az1"
health  = "draining"
"#;
    let news = source(&dir, "s.toml", text).read(&Which::All);
    assert_eq!(news.error, None);
    let snapshot = news.snapshot.unwrap();
    let service = snapshot.services.values().next().unwrap();
    assert_eq!(service.id.to_string(), "backend.service.local:8080/udp");
    assert_eq!((service.answer, service.api_only), (Answer::Instances, true));
    assert_eq!(service.instances[0].zone.as_deref(), Some("use1-az1"));
}

#[test]
fn bad_input_is_named_with_file_and_line() {
    let instance = |line: &str| GOOD.replace("address = \"10.0.0.1\"", line);
    let cases = [
        ("s.toml", "[[service]]\nname = ".to_owned(), "s.toml:2: "),
        ("s.yaml", "service:\n- name: [".to_owned(), "s.yaml:2: "),
        ("s.json", "{\"service\": [\n{]}".to_owned(), "s.json:2: "),
        (
            "s.toml",
            GOOD.replace("port = 80\n", "port = 80\ncolour = 1\n"),
            "s.toml:6: unknown field `colour`",
        ),
        ("s.yaml", "service:\n- name: a\n  colour: 1\n".to_owned(), "s.yaml:3: unknown field `colour`"),
        ("s.json", "{\"service\": [{\n\"colour\": 1}]}".to_owned(), "s.json:2: unknown field `colour`"),
        ("s.toml", GOOD.replace("port = 80\n", "port = 0\n"), "s.toml:5: "),
        ("s.toml", GOOD.replace("port = 80\n", "port = 65536\n"), "s.toml:5: "),
        ("s.toml", instance("address = \"10.0.0\""), "s.toml:8: "),
        (
            "s.toml",
            format!("{GOOD}{GOOD}"),
            "s.toml:11: service a.service.local:80/tcp: the service is defined twice",
        ),
        (
            "s.toml",
            GOOD.replace("port = 80\n", "port = 80\nvip = \"10.1.1.1\"\n"),
            "s.toml:2: service a.service.local:80/tcp: vip 10.1.1.1 is outside",
        ),
        (
            "s.toml",
            format!(
                "{}{}",
                GOOD.replace("port = 80\n", "port = 80\nvip = \"127.128.0.1\"\n"),
                GOOD.replace("\"a\"", "\"b\"").replace("port = 80\n", "port = 80\nvip = \"127.128.0.1\"\n")
            ),
            "s.toml:12: service b.service.local:80/tcp: vip 127.128.0.1 port 80/tcp is already taken by service a.service.local:80/tcp",
        ),
        (
            "s.toml",
            GOOD.replace("port = 80\n", "port = 80\nport_name = \"8080\"\n"),
            "s.toml:2: service a.service.local:80/tcp: port_name \"8080\" is not 1 to 15 letters",
        ),
        (
            "s.toml",
            GOOD.replace("port = 80\n", "port = 80\nanswer = \"all\"\n"),
            "s.toml:6: unknown variant `all`, expected `vip` or `instances`",
        ),
        (
            "s.toml",
            format!("{GOOD}{}", GOOD.replace("port = 80\n", "port = 81\nanswer = \"instances\"\n")),
            "s.toml:11: service a.service.local:81/tcp: answer or api_only differs from that of the same name's other port",
        ),
        (
            "s.toml",
            format!("{GOOD}weight = 0\n"),
            "s.toml:2: service a.service.local:80/tcp: every instance has weight 0",
        ),
        (
            "s.toml",
            instance("address = \"127.0.0.1\""),
            "s.toml:6: service a.service.local:80/tcp: instance \"a-1\": address 127.0.0.1 is a loopback address",
        ),
        (
            "s.toml",
            instance("address = \"127.128.0.9\""),
            "s.toml:6: service a.service.local:80/tcp: instance \"a-1\": address 127.128.0.9 lies in a VIP range",
        ),
        (
            "s.toml",
            GOOD.replace("\"a\"", "\"a b\""),
            "s.toml:2: service \"a b\": name \"a b\" is not a DNS name",
        ),
        ("s.conf", GOOD.to_owned(), "s.conf: the file's name must end in"),
    ];
    for (file, text, expected) in cases {
        let refusal = refusal(file, &text);
        assert!(refusal.starts_with(expected), "{refusal}\nshould start with\n{expected}");
        assert!(!refusal.contains('\n'), "{refusal}");
    }
}

#[test]
fn a_file_over_the_limit_is_refused() {
    let text = "#".repeat(50_000_000);
    assert_eq!(refusal("s.toml", &text), "s.toml: the file has 50000000 bytes; the limit is 33554432");
}

#[test]
fn a_bad_file_keeps_what_it_held() {
    let dir = TempDir::new().unwrap();
    let mut source = source(&dir, "s.toml", GOOD);
    assert!(source.read(&Which::All).snapshot.is_some());
    fs::write(dir.path().join("s.toml"), "[[service]]\nname = ").unwrap();
    let news = source.read(&Which::All);
    assert_eq!(news.snapshot, None);
    assert_eq!(news.error.unwrap().line, Some(2));
    fs::write(dir.path().join("s.toml"), GOOD).unwrap();
    let news = source.read(&Which::All);
    assert_eq!((news.snapshot, news.error), (None, None), "nothing changed");
}

#[test]
fn emptiness_by_accident_removes_nothing_but_an_empty_list_does() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s.toml");
    let mut source = source(&dir, "s.toml", GOOD);
    assert!(source.read(&Which::All).snapshot.is_some());
    for empty in ["", " \n", "# nothing\n"] {
        fs::write(&path, empty).unwrap();
        let news = source.read(&Which::All);
        assert_eq!(news.snapshot, None, "{empty:?}");
        assert!(news.error.unwrap().message.contains("what it held is kept"));
    }
    fs::remove_file(&path).unwrap();
    let news = source.read(&Which::All);
    assert!(news.snapshot.is_none() && news.error.is_some());

    fs::write(&path, "service = []").unwrap();
    let news = source.read(&Which::All);
    assert_eq!(news.error, None);
    assert_eq!(news.snapshot, Some(Snapshot { complete: true, ..Snapshot::default() }));
}

#[test]
fn an_empty_file_at_start_serves_nothing_and_prunes_nothing() {
    let dir = TempDir::new().unwrap();
    let news = source(&dir, "s.toml", "").read(&Which::All);
    assert_eq!(news.error, None);
    assert_eq!(news.snapshot, Some(Snapshot::default()));
}

#[test]
fn a_folder_is_the_sum_of_its_files() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("services.d");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a.toml"), GOOD).unwrap();
    fs::write(folder.join("b.toml"), GOOD.replace("\"a\"", "\"b\"")).unwrap();
    fs::write(folder.join("notes.txt"), "not ours").unwrap();
    fs::write(folder.join(".hidden.toml"), "not ours").unwrap();
    let mut source = Source::new(folder.clone(), rules::for_tests(), None);
    let news = source.read(&Which::All);
    assert_eq!(news.error, None);
    assert_eq!(news.snapshot.unwrap().services.len(), 2);

    // A bad file spoils only itself, a repeated service only the later file.
    fs::write(folder.join("c.toml"), "[").unwrap();
    fs::write(folder.join("d.toml"), GOOD).unwrap();
    let news = source.read(&Which::All);
    let snapshot = news.snapshot.unwrap();
    assert_eq!((snapshot.services.len(), snapshot.complete), (2, false));
    assert!(news.error.unwrap().path.ends_with("c.toml"));
    fs::remove_file(folder.join("c.toml")).unwrap();
    source.read(&Which::All);
    std::thread::sleep(GONE);
    let error = source.read(&Which::All).error.unwrap();
    assert!(error.path.ends_with("d.toml") && error.message.contains("defined twice"), "{error}");

    // A file that goes takes its services along; a folder that goes does not.
    fs::remove_file(folder.join("d.toml")).unwrap();
    fs::remove_file(folder.join("b.toml")).unwrap();
    source.read(&Which::All);
    std::thread::sleep(GONE);
    let snapshot = source.read(&Which::All).snapshot.unwrap();
    assert!(snapshot.complete && snapshot.services.len() == 1);
    fs::remove_file(folder.join("a.toml")).unwrap();
    assert!(source.read(&Which::All).error.unwrap().message.contains("kept"));
    fs::remove_dir_all(&folder).unwrap();
    let news = source.read(&Which::All);
    assert!(news.snapshot.is_none() && news.error.is_some());
}

#[test]
fn a_file_that_is_back_is_well_once_it_is_read() {
    let dir = TempDir::new().unwrap();
    let mut source = source(&dir, "s.toml", GOOD);
    assert!(source.read(&Which::All).snapshot.is_some());
    let (path, away) = (dir.path().join("s.toml"), dir.path().join("away"));
    fs::rename(&path, &away).unwrap();
    let lost = source.read(&Which::Settled).error;
    assert!(lost.is_some());
    fs::write(&path, "[").unwrap();
    assert_eq!(source.read(&Which::Settled).error, lost, "not read yet");
    assert_eq!(source.read(&Which::Settled).error.unwrap().line, Some(1));
    fs::remove_file(&path).unwrap();
    assert!(source.read(&Which::Settled).error.is_some());
    fs::rename(&away, &path).unwrap();
    source.read(&Which::Settled);
    assert_eq!(source.read(&Which::Settled).error, None);
    // The same file again needs no reading.
    fs::rename(&path, &away).unwrap();
    assert!(source.read(&Which::Settled).error.is_some());
    fs::rename(&away, &path).unwrap();
    assert_eq!(source.read(&Which::Settled).error, None);
}

#[test]
fn a_file_that_is_away_for_a_moment_keeps_its_services() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("services.d");
    fs::create_dir(&folder).unwrap();
    let (a, b) = (folder.join("a.toml"), folder.join("b.toml"));
    fs::write(&a, GOOD).unwrap();
    let text = GOOD.replace("\"a\"", "\"b\"");
    fs::write(&b, &text).unwrap();
    let mut source = Source::new(folder.clone(), rules::for_tests(), None);
    assert_eq!(source.read(&Which::All).snapshot.unwrap().services.len(), 2);
    // As an editor does: away, there but empty, written.
    fs::rename(&b, folder.join("b.toml~")).unwrap();
    let away = source.read(&Which::Settled).snapshot.unwrap();
    assert_eq!((away.services.len(), away.kept.len(), away.complete), (1, 1, false));
    fs::write(&b, "").unwrap();
    let back = source.read(&Which::Settled).snapshot.unwrap();
    assert_eq!((back.services.len(), back.kept.len(), back.complete), (2, 0, true));
    fs::write(&b, &text).unwrap();
    assert_eq!(source.read(&Which::All).snapshot, None, "nothing has changed");
    // Under another name it is the same at once.
    fs::rename(&b, folder.join("c.toml")).unwrap();
    let moved = source.read(&Which::All);
    assert_eq!((moved.error, moved.snapshot.unwrap().services.len()), (None, 2));
    std::thread::sleep(GONE);
    assert_eq!(source.read(&Which::Settled).snapshot.unwrap().services.len(), 2);
}

#[test]
fn a_write_in_progress_is_not_read_unless_it_settles() {
    let dir = TempDir::new().unwrap();
    let mut source = source(&dir, "s.toml", GOOD);
    assert!(source.read(&Which::All).snapshot.is_some());
    let path = dir.path().join("s.toml");
    let more = GOOD.replace("\"a\"", "\"b\"");
    fs::write(&path, format!("{GOOD}{more}")).unwrap();
    // Nobody said that it is complete: one look is not enough, two that agree are.
    assert!(source.read(&Which::Settled).snapshot.is_none());
    let other = Which::Named(HashSet::from(["other.toml".into()]));
    assert!(source.read(&other).snapshot.is_none());
    assert_eq!(source.read(&Which::Settled).snapshot.unwrap().services.len(), 2);
    // Told that it is complete, one look is.
    fs::write(&path, GOOD).unwrap();
    let named = Which::Named(HashSet::from(["s.toml".into()]));
    assert_eq!(source.read(&named).snapshot.unwrap().services.len(), 1);
}

#[test]
fn a_successor_does_not_publish_less_than_everything() {
    let dir = TempDir::new().unwrap();
    for bad in ["", "[[service]]\nname = "] {
        let path = source(&dir, "s.toml", bad).path;
        let kept = Some(Arc::new(Snapshot::default()));
        let mut source = Source::new(path.clone(), rules::for_tests(), kept);
        let news = source.read(&Which::All);
        assert!(news.snapshot.is_none() && news.error.is_some(), "{bad:?}");
        fs::write(&path, GOOD).unwrap();
        assert!(source.read(&Which::All).snapshot.is_some());
    }
}

#[test]
fn what_a_broken_file_held_is_kept_while_others_are_followed() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("services.d");
    fs::create_dir(&folder).unwrap();
    let b = GOOD.replace("\"a\"", "\"b\"");
    fs::write(folder.join("a.toml"), GOOD).unwrap();
    fs::write(folder.join("b.toml"), &b).unwrap();
    let new = |kept| Source::new(folder.clone(), rules::for_tests(), kept);
    let before = Arc::new(new(None).read(&Which::All).snapshot.unwrap());

    fs::write(folder.join("a.toml"), GOOD.replace("10.0.0.1", "10.0.0.9")).unwrap();
    fs::write(folder.join("b.toml"), "[").unwrap();
    let mut source = new(Some(before.clone()));
    let news = source.read(&Which::All);
    let snapshot = news.snapshot.unwrap();
    assert!(news.error.is_some() && !snapshot.complete);
    assert_eq!(snapshot.services.values().next().unwrap().instances[0].address.to_string(), "10.0.0.9");
    assert_eq!(snapshot.kept, before.services.skip(1));

    fs::write(folder.join("b.toml"), "service = []").unwrap();
    let snapshot = source.read(&Which::All).snapshot.unwrap();
    assert!(snapshot.complete && snapshot.services.len() == 1 && snapshot.kept.is_empty());
}

#[test]
fn a_pipe_is_no_services_file() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s.toml");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = Source::new(path, rules::for_tests(), None).read(&Which::All).error.unwrap();
    assert!(error.message.contains("not a file"), "{error}");
}

#[test]
fn large_files_are_taken_in_every_format() {
    let dir = TempDir::new().unwrap();
    let instance =
        |n: usize| format!("{{id: i{n}, address: 10.{}.{}.{}, port: 80}}", n >> 16, n >> 8 & 255, n & 255);
    let instances: Vec<_> = (0..65_536).map(instance).collect();
    let yaml = format!(
        "service:\n- name: a\n  namespace: service.local\n  port: 80\n  instance: [{}]\n",
        instances.join(", ")
    );
    let news = source(&dir, "s.yaml", &yaml).read(&Which::All);
    assert_eq!(news.error, None);
    assert_eq!(news.snapshot.unwrap().services.values().next().unwrap().instances.len(), 65_536);
}

#[test]
fn a_look_that_finds_nothing_new_still_tells_what_is_wrong() {
    let dir = TempDir::new().unwrap();
    let mut source = source(&dir, "s.toml", GOOD);
    assert!(source.read(&Which::All).snapshot.is_some());
    fs::write(dir.path().join("s.toml"), "[[service]]\nname = ").unwrap();
    let told = source.read(&Which::All).error;
    assert!(told.is_some());
    let again = source.read(&Which::Settled);
    assert_eq!((again.snapshot, again.error), (None, told));
}

#[test]
fn a_service_that_has_not_changed_is_the_same_one() {
    let dir = TempDir::new().unwrap();
    let another = GOOD.replace("\"a\"", "\"b\"").replace("a-1", "b-1");
    let mut source = source(&dir, "s.toml", &(GOOD.to_owned() + &another));
    let first = source.read(&Which::All).snapshot.unwrap();
    fs::write(&source.path, GOOD.to_owned() + &another.replace("80\n", "81\n")).unwrap();
    let second = source.read(&Which::All).snapshot.unwrap();
    let same: Vec<_> =
        first.services.values().zip(second.services.values()).map(|(a, b)| Arc::ptr_eq(a, b)).collect();
    assert_eq!(same, [true, false]);
    // And for the next run, which knows what is kept.
    let mut next = Source::new(source.path.clone(), rules::for_tests(), Some(Arc::new(second.clone())));
    let third = next.read(&Which::All).snapshot.unwrap();
    assert!(second.services.values().zip(third.services.values()).all(|(a, b)| Arc::ptr_eq(a, b)));
}
