//! The `mesh` binary.

use std::process::ExitCode;

use clap::Parser;
use mesh_userspace::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh: {error:#}");
            ExitCode::FAILURE
        }
    }
}
