//! What others take away from a running daemon, and what an earlier version left.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::{self, JoinHandle},
    time::Duration,
};

use mesh_tests::{Dialogue, Mesh, binary, server::Server, service, text, wait_until, wipe};

const VIP: &str = "127.128.18.1";

/// Connects that go on until the test says what must have happened meanwhile.
pub(crate) struct Load(JoinHandle<Output>);

impl Load {
    pub(crate) fn start(mesh: &Mesh, vip: &str) -> Self {
        let mut client = mesh.inside(env!("CARGO_BIN_EXE_client"));
        client.args([&format!("{vip}:80"), "2", "30000"]).stdout(Stdio::piped());
        let client = client.spawn().unwrap();
        Self(thread::spawn(|| client.wait_with_output().unwrap()))
    }

    pub(crate) fn runs(&self) -> bool {
        !self.0.is_finished()
    }

    /// None may have failed: each got one of these answers.
    pub(crate) fn end(self, answers: &[&str]) -> usize {
        let output = self.0.join().unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        assert_eq!(lines.lines().count(), 30_000);
        let is_answer = |line: &str| answers.contains(&line.rsplit(' ').next().unwrap());
        let failed: Vec<_> = lines.lines().filter(|line| !is_answer(line)).collect();
        assert!(failed.is_empty(), "{} connects failed: {:?}", failed.len(), failed.first());
        30_000
    }
}

fn echo(server: &Server) -> String {
    service("echo", 80, VIP, &[("127.0.0.1", server.port())])
}

fn dial(mesh: &Mesh) -> String {
    mesh.dial(&format!("{VIP}:80"))
}

/// Everything that is pinned.
fn pins(folder: &Path) -> Vec<String> {
    let mut pins = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            pins.extend(self::pins(&entry.path()));
        } else {
            pins.push(entry.path().display().to_string());
        }
    }
    pins.sort();
    pins
}

#[test]
fn pins_that_are_taken_away_are_put_back_and_no_connect_notices() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&echo(&server));
    let before = pins(&mesh.pin_dir);
    assert!(before.len() > 20, "{before:?}");
    // By then the daemon looks at the folders' times alone.
    for pin in [mesh.map_pin("SLOTS"), mesh.pin_dir.join("link/mesh_connect4")] {
        thread::sleep(Duration::from_secs(4));
        fs::remove_file(&pin).unwrap();
        wait_until("it is pinned again", || pin.exists());
    }
    let load = Load::start(&mesh, VIP);
    let mut times = 0;
    while load.runs() || times < 2 {
        let all = times % 2 == 0;
        let maps = mesh.map_pin("SLOTS").parent().unwrap().to_owned();
        wipe(if all { &mesh.pin_dir } else { &maps });
        wait_until("everything is pinned again", || pins(&mesh.pin_dir) == before);
        times += 1;
    }
    load.end(&["echo"]);
    // What was put back is what was there: the next start adopts it.
    assert!(mesh.log().contains("had been taken away, and was put back"), "{}", mesh.log());
    mesh.kill();
    assert_eq!(dial(&mesh), "echo");
    mesh.write("[[service]]\nname =");
    mesh.launch();
    wait_until("the API answers", || mesh.mesh(&["status"]).output().unwrap().status.success());
    assert_eq!(dial(&mesh), "echo", "without a registry, from the maps alone");
}

#[test]
fn a_program_that_somebody_detached_is_attached_again() {
    let server = Server::start("echo");
    let mesh = Mesh::start(&echo(&server));
    for program in ["mesh_connect4", "mesh_sockops"] {
        let link = mesh.pin_dir.join("link").join(program);
        let info =
            || mesh.bpf("programs").as_array().unwrap().iter().find(|row| row["name"] == program).cloned();
        let before = info().unwrap()["link"].clone();
        let detach = Command::new("bpftool").args(["link", "detach", "pinned"]).arg(&link).output().unwrap();
        assert!(detach.status.success(), "{}", text(&detach));
        wait_until("it is attached by another link", || {
            info().is_some_and(|row| row["attached"] == true && row["link"] != before)
        });
    }
    assert_eq!(dial(&mesh), "echo");
    mesh.ready();
}

#[test]
fn programs_of_others_are_listed_and_left_alone() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&echo(&server));
    let object =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/bpfel-unknown-none/release/mesh-ebpf-bench");
    let mut hooks = Command::new(env!("CARGO_BIN_EXE_hooks"));
    hooks.arg(object).arg(&mesh.pin_dir).arg("empty").arg(&mesh.cgroup);
    let mut hooks = Dialogue::start(hooks);
    hooks.go_on();
    hooks.hear();
    let check = |mesh: &Mesh| {
        text(&Command::new(binary()).args(["check", "--pre", "--config"]).arg(&mesh.config).output().unwrap())
    };
    let listed = |text: &str| text.contains("programs of others") && text.contains("empty_connect4 (id ");
    let before = check(&mesh);
    assert!(listed(&before) && !before.contains("mesh_connect4 (id "), "{before}");
    assert_eq!(dial(&mesh), "echo");
    // Neither the watchdog, nor a restart, nor a cleanup takes them away.
    mesh.stop();
    mesh.launch();
    mesh.ready();
    mesh.stop();
    assert!(mesh.cleanup().status.success());
    assert!(listed(&check(&mesh)), "{}", check(&mesh));
    hooks.end();
    wait_until("its own end takes them away", || !listed(&check(&mesh)));
}

/// A BPF file system of the test's own.
struct BpfMount(tempfile::TempDir);

impl BpfMount {
    fn new() -> Self {
        let mount = Self(tempfile::TempDir::with_prefix("mesh-bpffs").unwrap());
        mount.mount();
        mount
    }

    fn mount(&self) {
        assert!(
            Command::new("mount").args(["-t", "bpf", "bpf"]).arg(self.0.path()).status().unwrap().success()
        );
    }

    fn unmount(&self) -> bool {
        let mut unmount = Command::new("umount");
        unmount.arg("--lazy").arg(self.0.path()).stderr(Stdio::null());
        unmount.status().is_ok_and(|status| status.success())
    }
}

impl Drop for BpfMount {
    fn drop(&mut self) {
        while self.unmount() {}
    }
}

#[test]
fn a_bpf_file_system_that_is_unmounted_is_named_and_used_again_when_it_is_back() {
    let server = Server::start("echo");
    let bpffs = BpfMount::new();
    let mut mesh = Mesh::prepare(&echo(&server));
    mesh.pin_dir = bpffs.0.path().join("mesh");
    mesh.configure("");
    mesh.launch();
    mesh.ready();
    let before = pins(&mesh.pin_dir);
    assert!(bpffs.unmount());
    let problems = || String::from_utf8(mesh.mesh(&["status"]).output().unwrap().stdout).unwrap();
    wait_until("it is named", || problems().contains("not on a BPF file system"));
    assert_eq!(dial(&mesh), "echo", "programs and maps are held by the daemon");
    bpffs.mount();
    wait_until("everything is pinned again", || pins(&mesh.pin_dir) == before);
    wait_until("no problem is left", || !problems().contains("not on a BPF file system"));
    mesh.kill();
    assert_eq!(dial(&mesh), "echo");
    mesh.cleanup();
}

/// A process in a mount namespace that has no BPF file system.
struct Bare(Child);

impl Bare {
    fn new() -> Self {
        let script = "while umount /sys/fs/bpf 2>/dev/null; do :; done; echo bare; read -r end";
        let mut shell = Command::new("unshare");
        shell.args(["--mount", "--propagation", "private", "sh", "-c", script]);
        let mut shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(shell.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "bare\n");
        Self(shell)
    }

    fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.0.id())).arg(program);
        command
    }

    fn mounts(&self) -> usize {
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", self.0.id())).unwrap();
        mounts.lines().filter(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf")).count()
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn two_daemons_that_start_at_once_mount_one_bpf_file_system() {
    let server = Server::start("echo");
    let bare = Bare::new();
    let mut mesh = Mesh::prepare(&echo(&server));
    // As the other daemon, between its look and its mount.
    let place = fs::File::open(format!("/proc/{}/root/sys/fs/bpf", bare.0.id())).unwrap();
    place.lock().unwrap();
    mesh.launch_as(bare.inside(binary()));
    let waits = |line: &str| line.contains("-> FLOCK") && line.contains(&format!(" {} ", mesh.pid()));
    wait_until("it waits for the other", || fs::read_to_string("/proc/locks").unwrap().lines().any(waits));
    assert!(bare.inside("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]).status().unwrap().success());
    drop(place);
    mesh.ready();
    assert_eq!(bare.mounts(), 1);
    assert_eq!(dial(&mesh), "echo");
    mesh.stop();
}

#[test]
fn maps_of_another_version_are_replaced_without_a_failed_connect() {
    let server = Server::start("echo");
    let mut mesh = Mesh::start(&echo(&server));
    let before = pins(&mesh.pin_dir);
    let ours = mesh.map_pin("SLOTS").parent().unwrap().to_owned();
    let load = Load::start(&mesh, VIP);
    let mut times = 0;
    while load.runs() || times < 2 {
        mesh.kill();
        // As if that daemon had another layout: what runs in the kernel has maps that are not ours.
        fs::rename(&ours, mesh.pin_dir.join("abi-0")).unwrap();
        mesh.launch();
        mesh.ready();
        assert_eq!(pins(&mesh.pin_dir), before, "nothing of it is left");
        times += 1;
    }
    // A connection that is made just before shows its backend just after.
    load.end(&["echo", "wrong-peer"]);
}
