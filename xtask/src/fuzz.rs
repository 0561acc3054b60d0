//! Looking for bytes that break what reads foreign ones (`mesh-userspace/src/fuzz.rs`), led by which code they reach.

use std::{fs, process::Command};

use anyhow::{Context, bail, ensure};

use crate::{
    setup,
    tools::{cargo, root, run},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Targets; all of them if none is named.
    targets: Vec<String>,
    /// How long each is looked at.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run_all(args: &Args) -> anyhow::Result<()> {
    let known = known()?;
    for name in &args.targets {
        ensure!(known.contains(name), "there is no target {name:?}; there are {}", known.join(", "));
    }
    setup::toolchain()?;
    let target = root().join("target/fuzz");
    // Stable Rust has the coverage, as a pass of LLVM's.
    run(cargo()
        .args(["build", "--profile", "fuzz", "--locked", "--package", "mesh-fuzz", "--features", "libfuzzer"])
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTC_WRAPPER", root().join("fuzz/instrument")))?;
    let mut broken = Vec::new();
    for name in if args.targets.is_empty() { &known } else { &args.targets } {
        if let Err(error) = look(name, args.seconds) {
            eprintln!("{error:#}");
            broken.push(name.as_str());
        }
    }
    ensure!(broken.is_empty(), "broken: {}", broken.join(", "));
    Ok(())
}

/// Each has a folder of bytes to begin with.
fn known() -> anyhow::Result<Vec<String>> {
    let corpus = root().join("fuzz/corpus");
    let entries = fs::read_dir(&corpus).with_context(|| corpus.display().to_string())?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<_> = names.collect::<anyhow::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn look(name: &str, seconds: u32) -> anyhow::Result<()> {
    let place = root().join("target/fuzz").join(name);
    // What earlier runs have reached is begun with, too.
    let reached = place.join("reached");
    fs::create_dir_all(&reached)?;
    let log = place.join("log");
    let status = Command::new(root().join("target/fuzz/fuzz/mesh-fuzz"))
        .env("MESH_FUZZ_TARGET", name)
        .args(["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-dict={}", root().join("fuzz/words").display()))
        .arg(format!("-artifact_prefix={}/", place.display()))
        .arg(&reached)
        .arg(root().join("fuzz/corpus").join(name))
        .stderr(fs::File::create(&log)?)
        .status()?;
    let told = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    if !status.success() {
        let end: Vec<_> = told.lines().rev().take(40).collect();
        end.iter().rev().for_each(|line| eprintln!("{line}"));
        bail!("{name} is broken: once it is mended, the bytes belong into fuzz/corpus/{name}");
    }
    let done = told.lines().rev().find(|line| line.contains("DONE")).unwrap_or_default();
    println!("{name}: {}", done.trim());
    Ok(())
}
