//! Every test, in its tiers.

use anyhow::{Context, bail};

use crate::{
    build, setup,
    tools::{self, cargo, find, is_root},
};

pub(crate) fn run() -> anyhow::Result<()> {
    setup::everything()?;
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
    tools::run(&mut live).context("a test failed")
}
