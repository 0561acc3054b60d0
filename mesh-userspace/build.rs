//! Builds the BPF object that the binary embeds.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

const MEND: &str = "run `cargo xtask setup`";

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("set by cargo"))
        .parent()
        .expect("the crate lies in the workspace")
        .to_path_buf();
    for input in ["mesh-ebpf", "mesh-common/src", "mesh-common/Cargo.toml", "Cargo.lock", "target/tools/bin"]
    {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }

    let tools = root.join("target/tools/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(std::iter::once(tools).chain(env::split_paths(&path)))
        .expect("PATH entries hold no separator");
    if !env::split_paths(&path).any(|dir| dir.join("bpf-linker").is_file()) {
        fail(&format!("bpf-linker, which links the kernel programs, is missing: {MEND}"));
    }
    if !rust_src().is_dir() {
        fail(&format!("rust-src, from which `core` is built for the kernel, is missing: {MEND}"));
    }

    // One target folder for every profile of the daemon: the kernel programs are built once.
    let target = root.join("target/bpf");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("set by cargo");
    // v3: atomics that return what was there before; in every kernel since 5.12.
    let cfg = format!("--cfg=bpf_target_arch=\"{arch}\"");
    let flags = [&*cfg, "-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"];
    let output = Command::new(env::var_os("CARGO").expect("set by cargo"))
        .args(["build", "--package", "mesh-ebpf", "--release", "--locked"])
        .args(["-Z", "build-std=core", "--target", "bpfel-unknown-none", "--target-dir"])
        .arg(&target)
        .current_dir(&root)
        .env("PATH", path)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env_remove("RUSTC")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .output()
        .expect("cargo runs");
    if !output.status.success() {
        fail(&format!("the kernel programs do not build:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    let object = target.join("bpfel-unknown-none/release/mesh-ebpf");
    println!("cargo::rustc-env=MESH_BPF_OBJECT={}", object.display());
}

fn rust_src() -> PathBuf {
    let rustc = env::var_os("RUSTC").expect("set by cargo");
    let sysroot = Command::new(rustc).args(["--print", "sysroot"]).output().expect("rustc runs");
    Path::new(String::from_utf8_lossy(&sysroot.stdout).trim()).join("lib/rustlib/src/rust/library")
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(1);
}
