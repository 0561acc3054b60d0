//! The live tests on other kernels: Debian's, under qemu's own emulation, with this machine's
//! files as the guest's. Needs root: `cargo xtask test`.
#![cfg(target_arch = "x86_64")]

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use mesh_tests::{binary, figure, text, wait_until};
use tempfile::TempDir;

/// What the guest needs besides what is built in.
const MODULES: [&str; 8] =
    ["virtio_pci", "virtiofs", "overlay", "veth", "bridge", "tcp_diag", "udp_diag", "mptcp_diag"];

/// Tests of the datapath. What is about the rest of the daemon does not depend on the kernel.
const TESTS: [&str; 7] = [
    "connect::",
    "datagram::",
    "eject::",
    "left::",
    "policy::every_socket",
    "routes::",
    "watchdog::pins_that_are_taken_away",
];

/// These race with short times, which emulation cannot keep.
const NOT_EMULATED: [&str; 4] = [
    "left::a_backend_that_comes_back_in_time",
    "left::a_backend_that_gets_the_id",
    "left::a_restart_keeps_the_drain_times",
    "eject::one_connect_tries_it_again",
];

/// The guest's first program. Its root is the host's, read through virtiofs; what it writes is
/// gone with it.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /order); do insmod /modules/$module; done
mount -t virtiofs -o ro root /host && mount -t tmpfs scratch /scratch && mkdir /scratch/upper /scratch/work
mount -t overlay -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work root /new
for dir in proc sys dev; do mount --move /$dir /new/$dir; done
mount -t tmpfs tmp /new/tmp
mount -t tmpfs run /new/run
mount -t cgroup2 none /new/sys/fs/cgroup
ip link set lo up
ulimit -n 20000
chroot /new /bin/sh -c "$(cat /command)"
echo "guest ended with $?"
poweroff -f
"#;

#[test]
fn the_datapath_works_on_linux_6_1() {
    run("6.1");
}

#[test]
fn the_datapath_works_on_linux_6_12() {
    run("6.12");
}

/// A kernel that `cargo xtask setup` has unpacked.
struct Kernel {
    dir: PathBuf,
    release: String,
}

impl Kernel {
    fn find(series: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kernels").join(series);
        let releases = fs::read_dir(dir.join("lib/modules"));
        let releases =
            releases.unwrap_or_else(|error| panic!("{}: {error}: run `cargo xtask setup`", dir.display()));
        let release = releases.flatten().next().expect("one kernel").file_name();
        Self { dir, release: release.into_string().unwrap() }
    }

    fn image(&self) -> PathBuf {
        self.dir.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// The modules and those that they need, in the order in which they go in.
    fn modules(&self) -> Vec<PathBuf> {
        run_ok(Command::new("/sbin/depmod").arg("-b").arg(&self.dir).arg(&self.release));
        let mut all = Vec::new();
        for module in MODULES {
            let mut list = Command::new("/sbin/modprobe");
            list.arg("-d").arg(&self.dir).args(["-S", &self.release, "--show-depends", module]);
            for line in run_ok(&mut list).lines() {
                if let Some(path) = line.strip_prefix("insmod ").map(|path| PathBuf::from(path.trim()))
                    && !all.contains(&path)
                {
                    all.push(path);
                }
            }
        }
        all
    }
}

fn run(series: &str) {
    let kernel = Kernel::find(series);
    let dir = TempDir::with_prefix("mesh-kernel").unwrap();
    let initrd = initrd(dir.path(), &kernel);
    let socket = dir.path().join("virtiofs.sock");
    let mut files = Command::new(virtiofsd());
    files
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", "source=/,cache=always,sandbox=chroot"]);
    let _files = Running(files.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    wait_until("the guest's files are served", || socket.exists());

    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        // With a thread for each CPU one may still run what another has patched: "Oops: int3" in a static branch.
        "tcg,thread=single",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "3G",
        "-nodefaults",
        "-nographic",
        "-no-reboot",
    ]);
    qemu.args(["-object", "memory-backend-memfd,id=memory,size=3G,share=on", "-numa", "node,memdev=memory"]);
    qemu.arg("-chardev").arg(format!("socket,id=files,path={}", socket.display()));
    qemu.args(["-device", "vhost-user-fs-pci,chardev=files,tag=root", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(kernel.image()).arg("-initrd").arg(initrd);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
    let mut qemu = Running(qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
    let mut ended = None;
    for line in BufReader::new(qemu.0.stdout.take().unwrap()).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).trim().to_owned();
        println!("{line}");
        if let Some(result) = line.strip_prefix("test result: ") {
            figure(&format!("Linux {}: {result}", kernel.release));
        }
        ended = line.strip_prefix("guest ended with ").map(str::to_owned).or(ended);
    }
    assert_eq!(ended.as_deref(), Some("0"), "on Linux {}", kernel.release);
}

/// The first file system: busybox, the modules, and what to run.
fn initrd(dir: &Path, kernel: &Kernel) -> PathBuf {
    let root = dir.join("initrd");
    for folder in ["bin", "proc", "sys", "dev", "host", "scratch", "new", "modules"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let mut order = String::new();
    for module in kernel.modules() {
        let name = module.file_name().unwrap().to_str().unwrap().trim_end_matches(".xz");
        let file = fs::File::create(root.join("modules").join(name)).unwrap();
        // Newer kernels' packages hold them compressed.
        let tool = if module.extension().is_some_and(|end| end == "xz") { "xzcat" } else { "cat" };
        assert!(Command::new(tool).arg(&module).stdout(file).status().unwrap().success());
        order += &format!("{name}\n");
    }
    fs::write(root.join("order"), order).unwrap();
    fs::write(root.join("command"), command()).unwrap();
    fs::write(root.join("init"), INIT).unwrap();
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let pack = "find . | cpio --quiet -o -H newc > ../initrd.cpio";
    run_ok(Command::new("sh").args(["-c", pack]).current_dir(&root));
    dir.join("initrd.cpio")
}

/// What the guest runs: the live tests, as they were built for this machine.
fn command() -> String {
    // Python as such, not a program that looks for one: emulation is slow.
    let python = run_ok(Command::new("python3").args(["-c", "import sys; print(sys.executable)"]));
    let python = Path::new(python.trim()).parent().unwrap().to_owned();
    let skipped: Vec<_> = NOT_EMULATED.iter().map(|test| format!("--skip {test}")).collect();
    format!(
        "export PATH={}:/usr/sbin:/usr/bin:/sbin:/bin MESH_TEST_EMULATED=1; cd {}; {} check --pre; {} --color never --test-threads 2 {} {}",
        python.display(),
        env!("CARGO_MANIFEST_DIR"),
        binary().display(),
        live().display(),
        skipped.join(" "),
        TESTS.join(" ")
    )
}

/// The live tests, built at the same time as these.
fn live() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let is_live = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap_or_default();
        name.starts_with("live-") && path.extension().is_none()
    };
    let found = fs::read_dir(deps).unwrap().flatten().map(|entry| entry.path()).filter(is_live);
    found
        .max_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok())
        .expect("the live tests are built")
}

/// Where Debian's packages put it.
fn virtiofsd() -> &'static str {
    let places = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];
    places.into_iter().find(|place| Path::new(place).exists()).expect("virtiofsd: run `cargo xtask setup`")
}

fn run_ok(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
