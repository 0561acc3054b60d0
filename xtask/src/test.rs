//! Every test, in its tiers.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, bail};

use crate::{
    build, other, setup,
    tools::{self, cargo, commit, find, is_root, root},
};

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// The same tests with the full counts; their figures go to docs/long-run.md.
    #[arg(long)]
    long: bool,
}

/// Where a test prints what it measured, each line after this word.
const FIGURE: &str = "figure: ";

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    setup::everything()?;
    other::mesh()?;
    build::mesh()?;
    eprintln!("test: rules, plan and registries");
    tools::run(cargo().args(["test", "--release", "--locked"])).context("a test failed")?;

    eprintln!("test: the kernel, on real sockets and real servers");
    let mut live = cargo();
    live.args(["test", "--release", "--locked", "--package", "mesh-tests"]);
    if !is_root() {
        if !find("sudo") {
            bail!("the tests of the datapath need root: run this as root, or install sudo");
        }
        live.args(["--config", "target.'cfg(unix)'.runner = ['sudo', '--preserve-env']"]);
    }
    if args.long {
        return long(live);
    }
    tools::run(&mut live).context("a test failed")
}

/// Runs the tests with MESH_TEST_LONG set, and keeps what they print as figures.
fn long(mut tests: Command) -> anyhow::Result<()> {
    let start = Instant::now();
    tests.args(["--", "--show-output"]).env("MESH_TEST_LONG", "1").stdout(Stdio::piped());
    let mut tests = tests.spawn()?;
    let mut figures = Vec::new();
    let mut results = String::new();
    for line in BufReader::new(tests.stdout.take().context("a pipe")?).lines() {
        let line = line?;
        println!("{line}");
        if let Some(figure) = line.strip_prefix(FIGURE) {
            figures.push(format!("- {figure}"));
        }
        if let Some(name) = line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED")) {
            figures.push(format!("- **failed: {name}**"));
        }
        if line.starts_with("test result: ") && !line.contains(" 0 passed") {
            results = line;
        }
    }
    let passed = tests.wait()?.success();
    let report = format!(
        "# The last long run\n\n`cargo xtask test --long`, {}, commit {}, {} minutes on {} CPUs, Linux {}.\n\n{results}\n\n{}\n",
        tools::output(Command::new("date").args(["-u", "+%Y-%m-%d"]))?.trim(),
        commit().unwrap_or_default(),
        start.elapsed().as_secs() / 60,
        std::thread::available_parallelism()?,
        fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        figures.join("\n"),
    );
    fs::write(root().join("docs/long-run.md"), report)?;
    if !passed {
        bail!("a test failed");
    }
    Ok(())
}
