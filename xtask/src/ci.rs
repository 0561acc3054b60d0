//! What CI runs, on a machine that has never seen the project.

use std::time::Instant;

use crate::{
    run as example, setup, test,
    tools::{cargo, root, run as command, tools},
};

pub(crate) fn run() -> anyhow::Result<()> {
    step("set-up", setup::everything)?;
    step("format", || command(cargo().args(["fmt", "--all", "--check"])))?;
    step("example", || example::run(&example::Args::once()))?;
    step("lints", lints)?;
    step("tests", || test::run(&test::Args::default()))
}

fn lints() -> anyhow::Result<()> {
    let strict = ["--", "--deny", "warnings"];
    let all = ["clippy", "--release", "--locked", "--workspace", "--exclude", "mesh-ebpf", "--all-targets"];
    command(cargo().args(all).args(strict))?;
    // The kernel programs, for their own target.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path =
        std::env::join_paths(std::iter::once(tools().join("bin")).chain(std::env::split_paths(&path)))?;
    let kernel = ["clippy", "--release", "--locked", "--package", "mesh-ebpf", "-Z", "build-std=core"];
    command(
        cargo()
            .args(kernel)
            .args(["--target", "bpfel-unknown-none", "--target-dir"])
            .arg(root().join("target/bpf"))
            .args(strict)
            .env("PATH", path)
            .env("RUSTC_BOOTSTRAP", "1")
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                format!("--cfg=bpf_target_arch=\"{}\"\x1f-Ctarget-cpu=v3", std::env::consts::ARCH),
            ),
    )
}

fn step(name: &str, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let start = Instant::now();
    eprintln!("ci: {name}");
    work()?;
    eprintln!("ci: {name} took {} s", start.elapsed().as_secs());
    Ok(())
}
