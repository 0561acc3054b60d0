//! Building the daemon.

use crate::{
    setup,
    tools::{cargo, run},
};

/// `target/release/mesh`.
pub(crate) fn mesh() -> anyhow::Result<()> {
    setup::toolchain()?;
    run(cargo().args(["build", "--release", "--locked", "--package", "mesh-userspace", "--bin", "mesh"]))
}
