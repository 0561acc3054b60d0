//! Paths and processes.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// Where the project keeps tools of its own.
pub(crate) fn tools() -> PathBuf {
    root().join("target/tools")
}

/// The daemon, once [`crate::build::mesh`] has built it.
pub(crate) fn mesh() -> PathBuf {
    root().join("target/release/mesh")
}

pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command to its end; anything but success is an error.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", shown(command));
    }
    Ok(())
}

/// What a command prints on stdout.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot run {}", shown(command)))?;
    if !output.status.success() {
        bail!("{} failed ({})", shown(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The commit of the tree, marked if it was changed since.
pub(crate) fn commit() -> Option<String> {
    let commit =
        output(Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(root())).ok()?;
    Some(commit.trim().to_owned())
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether a program is on the PATH, or where administrators' programs are.
pub(crate) fn find(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.into_iter().any(|dir| dir.join(program).is_file())
}

/// `program`, run as root: through sudo where we are not.
pub(crate) fn as_root(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Runs this workflow again through sudo if we are not root; none if we are.
pub(crate) fn again_as_root(args: &[&str], more: Option<&str>) -> Option<anyhow::Result<()>> {
    if is_root() {
        return None;
    }
    if !find("sudo") {
        return Some(Err(anyhow::anyhow!(
            "this loads programs into the kernel: run it as root, or install sudo"
        )));
    }
    let again = env::current_exe().map_err(anyhow::Error::from);
    Some(again.and_then(|again| run(as_root(again).args(args).args(more))))
}

/// Moves this process into a cgroup.
pub(crate) fn enter(cgroup: &Path) -> anyhow::Result<()> {
    let procs = cgroup.join("cgroup.procs");
    std::fs::write(&procs, std::process::id().to_string())
        .with_context(|| format!("cannot enter {}", procs.display()))
}
