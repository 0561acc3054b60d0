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

/// Debian packages that the tests need, and a command that works where each of them is there.
const PACKAGES: [(&str, &str); 13] = [
    ("curl", "curl --version"),
    ("nginx", "nginx -v"),
    ("dnsmasq-base", "dnsmasq --version"),
    ("iproute2", "ip -V"),
    ("util-linux", "nsenter --version"),
    ("python3", "python3 --version"),
    // Debian keeps Python's own tests apart; apt-get takes a name that begins with ^ for a pattern.
    ("^libpython3[.][0-9]+-testsuite$", "python3 -c 'import test.test_socket'"),
    // The runtimes of the socket matrix.
    ("gcc", "gcc --version"),
    ("liburing-dev", "echo '#include <liburing.h>' | gcc -E -"),
    ("golang-go", "go version"),
    ("nodejs", "node --version"),
    // A runtime alone would not run a source file.
    ("default-jdk-headless", "javac --version"),
    ("mptcpize", "mptcpize --version"),
];

pub(crate) fn everything() -> anyhow::Result<()> {
    toolchain()?;
    packages()
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
    let linker = tools::tools().join("bin/bpf-linker");
    let version = Command::new(&linker).arg("--version").output();
    if version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim().ends_with(BPF_LINKER)) {
        return Ok(());
    }
    let llvm = llvm_version()?;
    eprintln!(
        "setup: building bpf-linker {BPF_LINKER} with rustc's own LLVM {llvm} into target/tools (about a minute)"
    );
    let build = tools::tools().join("build");
    run(cargo()
        .args([
            "install",
            "bpf-linker",
            "--locked",
            "--quiet",
            "--version",
            BPF_LINKER,
            "--no-default-features",
        ])
        .args(["--features", &format!("llvm-{llvm},rust-llvm-{llvm}")])
        .arg("--root")
        .arg(tools::tools())
        .env("CARGO_TARGET_DIR", &build))
    .context("bpf-linker could not be built; a C++ compiler is needed (Debian: `apt-get install g++`)")?;
    fs::remove_dir_all(build)?;
    Ok(())
}

fn llvm_version() -> anyhow::Result<String> {
    let version = output(Command::new("rustc").arg("-vV").current_dir(tools::root()))?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "));
    let major =
        llvm.and_then(|llvm| llvm.split('.').next()).context("rustc does not say its LLVM version")?;
    Ok(major.to_owned())
}

/// What the tests need besides.
pub(crate) fn packages() -> anyhow::Result<()> {
    let missing: Vec<_> =
        PACKAGES.iter().filter(|(_, probe)| !works(probe)).map(|(package, _)| *package).collect();
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
