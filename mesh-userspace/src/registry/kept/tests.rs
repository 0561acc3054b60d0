use tempfile::TempDir;

use super::*;
use crate::registry::{rules, services as by_id};

const SERVICES: &str = r#"
[[service]]
name = "a"
namespace = "service.local"
port = 80
vip = "127.128.0.10"
aliases = ["alpha"]
policy = "maglev"
affinity = "3h 7ms"
drain = "0s"
slow_start = "30s"
panic_percent = 20
eject = { failures = 7, base = "1s 5ms", max = "2m", max_percent = 33 }
[[service.instance]]
id = "a-1"
address = "10.0.0.1"
port = 8080
weight = 7
zone = "here"
health = "draining"
[[service.instance]]
id = "a-2"
address = "fd00::2"
port = 8080
[[service]]
name = "b"
namespace = "service.local"
protocol = "udp"
port = 53
port_name = "dns"
answer = "instances"
api_only = true
"#;

const SOURCE: &str = "/etc/mesh/services.d";

fn delivered(services: &str) -> State {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s.toml");
    fs::write(&path, services).unwrap();
    let services = format::parse(&path, services, &rules::for_tests()).unwrap();
    let mut state = State::new("file", SOURCE.into());
    let snapshot = Snapshot::complete(by_id(services.unwrap().into_iter().map(Arc::new)));
    state.update(Some(snapshot.into()), None);
    state
}

fn keeper(dir: &TempDir) -> Keeper {
    Keeper::new(dir.path(), &[])
}

fn restored(dir: &TempDir) -> State {
    restore(dir.path(), "file", SOURCE.into(), &rules::for_tests())
}

fn file(dir: &TempDir) -> PathBuf {
    path_of(&folder(dir.path()), "file", SOURCE)
}

#[test]
fn what_was_delivered_is_there_after_a_restart_but_is_not_everything_there_is() {
    let dir = TempDir::new().unwrap();
    assert!(restored(&dir).snapshot.is_none());
    let state = delivered(SERVICES);
    keeper(&dir).write(std::slice::from_ref(&state));

    let again = restored(&dir);
    assert_eq!((again.sync, again.last_sync, again.is_heard()), (Sync::Stale, state.last_sync, false));
    let snapshot = again.snapshot.unwrap();
    assert_eq!(snapshot.kept, state.snapshot.unwrap().services, "every field");
    assert!(snapshot.services.is_empty() && !snapshot.complete);
}

#[test]
fn a_service_whose_instances_all_have_no_weight_is_kept_too() {
    let dir = TempDir::new().unwrap();
    let mut state = delivered(SERVICES);
    let services = state.snapshot.take().unwrap().services.clone();
    let services = by_id(services.into_iter().map(|(_, mut service)| {
        Arc::make_mut(&mut service).instances.iter_mut().for_each(|one| one.weight = 0);
        service
    }));
    state.update(Some(Snapshot::complete(services.clone()).into()), None);
    keeper(&dir).write(&[state]);
    assert_eq!(restored(&dir).snapshot.unwrap().kept, services);
}

#[test]
fn only_what_has_changed_is_written_and_the_last_answer_is_remembered() {
    let dir = TempDir::new().unwrap();
    let mut keeper = keeper(&dir);
    let mut state = delivered(SERVICES);
    keeper.write(&[state.clone()]);
    let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(file(&dir)).unwrap());
    let before = inode();
    let later = state.last_sync.unwrap() + Duration::from_secs(1000);
    state = delivered(SERVICES);
    state.last_sync = Some(later);
    keeper.write(&[state.clone()]);
    assert_eq!((inode(), restored(&dir).last_sync), (before, Some(later)));
    // One that has not answered is as old as it was.
    state.update(None, Some("gone".into()));
    state.last_sync = Some(later + Duration::from_secs(1));
    keeper.write(&[state]);
    assert_eq!((inode(), restored(&dir).last_sync), (before, Some(later)));

    keeper.write(&[delivered("service = []")]);
    assert!(restored(&dir).snapshot.unwrap().kept.is_empty());
}

#[test]
fn what_a_file_must_not_say_is_left_out() {
    let dir = TempDir::new().unwrap();
    keeper(&dir).write(&[delivered(SERVICES)]);
    let good = fs::read_to_string(file(&dir)).unwrap();
    let names = |text: &str| -> Option<Vec<String>> {
        fs::write(file(&dir), text).unwrap();
        let snapshot = restored(&dir).snapshot?;
        Some(snapshot.kept.keys().map(|id| id.name.clone()).collect())
    };
    assert_eq!(names(&good).unwrap(), ["a", "b"]);
    for (from, to) in [
        ("10.0.0.1", "169.254.169.254"),
        ("10.0.0.1", "127.0.0.1"),
        ("10.0.0.1", "127.128.0.1"),
        ("127.128.0.10", "8.8.8.8"),
        ("\"a\"", "\"a b\""),
        ("\"a-2\"", "\"a-1\""),
        ("2m", "30days"),
    ] {
        assert!(good.contains(from));
        assert_eq!(names(&good.replacen(from, to, 1)).unwrap(), ["b"], "{to}");
    }
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        (SOURCE, "/etc/mesh/others.d"),
        ("\"type\":\"file\"", "\"type\":\"etcd\""),
        ("\"weight\":7", "\"weight\":-7"),
        ("}", ""),
    ] {
        assert!(good.contains(from));
        assert_eq!(names(&good.replacen(from, to, 1)), None, "{to}");
    }
    for text in ["", "{", "null", "\0\0\0\0", &good[..good.len() / 2]] {
        assert_eq!(names(text), None, "{text}");
    }
    fs::remove_file(file(&dir)).unwrap();
    fs::create_dir(file(&dir)).unwrap();
    assert!(restored(&dir).snapshot.is_none());
}

#[test]
fn a_write_that_was_cut_short_leaves_the_old() {
    let dir = TempDir::new().unwrap();
    keeper(&dir).write(&[delivered(SERVICES)]);
    let mut unfinished = file(&dir).into_os_string();
    unfinished.push(".new");
    fs::write(&unfinished, "{\"version\":1,\"ty").unwrap();
    assert_eq!(restored(&dir).snapshot.unwrap().kept.len(), 2);
    keeper(&dir).write(&[delivered(SERVICES)]);
    assert!(!Path::new(&unfinished).exists());
}

#[test]
fn a_registry_that_is_not_configured_any_more_is_forgotten_but_not_all_of_them() {
    let dir = TempDir::new().unwrap();
    let mut keeper = keeper(&dir);
    keeper.write(&[delivered(SERVICES)]);
    let foreign = folder(dir.path()).join("README");
    fs::write(&foreign, "not ours").unwrap();
    keeper.write(&[]);
    assert!(restored(&dir).snapshot.is_some(), "a configuration without registries removes nothing");
    keeper.write(&[State::new("file", "/elsewhere".into())]);
    assert!(restored(&dir).snapshot.is_none() && foreign.exists());
    keeper.write(&[delivered(SERVICES)]);
    assert!(restored(&dir).snapshot.is_some());
}
