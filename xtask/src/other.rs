//! Another version of mesh, whose maps have another layout, for the tests of upgrades and downgrades:
//! this tree with a few words changed.

use std::{fs, io, path::Path};

use anyhow::{Context, ensure};

use crate::{
    setup,
    tools::{cargo, root, run},
};

/// The file that says what lies in the maps.
const LAYOUT: &str = "mesh-common/src/abi.rs";

/// The files that say which version this is. Cargo would take packages of the same version, wherever
/// they are, for the same.
const VERSIONS: [&str; 2] = ["Cargo.toml", "Cargo.lock"];

/// What is different there: longer connections, words that are packed in another way.
const CHANGES: [[&str; 2]; 10] = [
    ["VERSION: u32 = 5;", "VERSION: u32 = 6;"],
    ["    zero: u64,\n}", "    zero: [u64; 3],\n}"],
    ["held: held as u64, origin, flags, zero: 0 }", "held: held as u64, origin, flags, zero: [0; 3] }"],
    ["Self { held, origin, flags, zero: 0 }", "Self { held, origin, flags, zero: [0; 3] }"],
    ["size_of::<Connection>() == 64", "size_of::<Connection>() == 80"],
    ["Self(base as u64 | (count as u64) << 24 |", "Self(count as u64 | (base as u64) << 24 |"],
    [
        "pub const fn base(self) -> u32 {\n        low24(self.0)",
        "pub const fn base(self) -> u32 {\n        low24(self.0 >> 24)",
    ],
    [
        "pub const fn count(self) -> u32 {\n        low24(self.0 >> 24)",
        "pub const fn count(self) -> u32 {\n        low24(self.0)",
    ],
    [
        "Self(backend as u64 | (alias as u64) << 24 | (threshold",
        "Self(alias as u64 | (backend as u64) << 24 | (threshold",
    ],
    [
        "pub const fn backend(self) -> u32 {\n        low24(self.0)\n    }\n\n    #[inline(always)]\n    pub const fn alias(self) -> u32 {\n        low24(self.0 >> 24)",
        "pub const fn backend(self) -> u32 {\n        low24(self.0 >> 24)\n    }\n\n    #[inline(always)]\n    pub const fn alias(self) -> u32 {\n        low24(self.0)",
    ],
];

/// Builds `target/other/mesh`. The dependencies are those that are built for this version.
pub(crate) fn mesh() -> anyhow::Result<()> {
    setup::toolchain()?;
    let other = root().join("target/other");
    fs::create_dir_all(other.join("target"))?;
    for source in
        ["Cargo.toml", "Cargo.lock", "fuzz", "mesh-common", "mesh-ebpf", "mesh-userspace", "tests", "xtask"]
    {
        copy(&root().join(source), &other.join(source))?;
    }
    let tools = other.join("target/tools");
    match std::os::unix::fs::symlink(root().join("target/tools"), &tools) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    run(cargo()
        .args([
            "build",
            "--release",
            "--locked",
            "--package",
            "mesh-userspace",
            "--bin",
            "mesh",
            "--target-dir",
        ])
        .arg(root().join("target"))
        .current_dir(&other))?;
    // The next build of this version puts its own there again.
    fs::copy(root().join("target/release/mesh"), other.join("mesh"))?;
    Ok(())
}

/// Copies what is not the same there, with the changes, and removes what is only there.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
        for entry in fs::read_dir(to)? {
            let entry = entry?;
            match from.join(entry.file_name()).exists() {
                true => {}
                false if entry.file_type()?.is_dir() => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        return Ok(());
    }
    let mut text = fs::read(from).with_context(|| from.display().to_string())?;
    if from.ends_with(LAYOUT) {
        text = changed(String::from_utf8(text)?)?.into_bytes();
    } else if VERSIONS.iter().any(|file| root().join(file) == from) {
        text = renumbered(&String::from_utf8(text)?).into_bytes();
    }
    if !fs::read(to).is_ok_and(|old| old == text) {
        fs::write(to, text)?;
    }
    Ok(())
}

fn changed(mut text: String) -> anyhow::Result<String> {
    for [from, to] in CHANGES {
        ensure!(text.matches(from).count() == 1, "{LAYOUT} holds {from:?} not once: mend xtask/src/other.rs");
        text = text.replacen(from, to, 1);
    }
    Ok(text)
}

fn renumbered(text: &str) -> String {
    text.replace(concat!("version = \"", env!("CARGO_PKG_VERSION"), "\""), "version = \"99.0.0\"")
}
