//! libFuzzer with one of [`TARGETS`], which the environment names.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_userspace::fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("MESH_FUZZ_TARGET").expect("MESH_FUZZ_TARGET names a target");
    TARGETS.into_iter().find(|(known, _)| *known == name).expect("a target of that name").1
});

fuzz_target!(|bytes: &[u8]| TARGET(bytes));
