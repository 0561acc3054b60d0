//! `cargo xtask`: the workflows of mesh, one file each.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod build;
mod ci;
mod example;
mod fuzz;
mod node;
mod other;
mod run;
mod setup;
mod test;
mod tools;

/// The workflows of mesh. Each does the set-up it needs by itself.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need: rust-src, bpf-linker (below target/tools), and
    /// Debian packages for the tests. Does nothing where everything is there.
    Setup,
    /// Build target/release/mesh, with the kernel programs embedded.
    Build,
    /// Run the daemon on an example registry with three backends and call them through the
    /// kernel. Needs root or sudo. Arguments behind `--` go to `mesh run` instead.
    Run(run::Args),
    /// Run every test, including those that need root.
    Test(test::Args),
    /// Measure what a connect costs, against direct connects; writes bench/report/. Needs root or sudo.
    Bench(bench::Args),
    /// Look for bytes that break what reads foreign ones, a minute for each target. What was found lies in
    /// target/fuzz/TARGET.
    Fuzz(fuzz::Args),
    /// What CI runs: format, lints, the example, every test.
    Ci,
    /// Build another version, with another layout of the maps, which the tests need.
    #[command(hide = true)]
    BuildOther,
    /// The client of the benchmark: times connects of sockets made inside and outside a cgroup.
    #[command(hide = true)]
    BenchClient(bench::ClientArgs),
    /// The client of the benchmark's load: requests at a fixed rate from inside a cgroup.
    #[command(hide = true)]
    BenchLoadClient(bench::LoadClientArgs),
    /// What runs inside a task of the benchmark.
    #[command(hide = true)]
    BenchPart(bench::PartArgs),
    /// A backend of the example: prints its port, answers HTTP with its name.
    #[command(hide = true)]
    ExampleBackend { name: String },
    /// A client of the example: calls an address and prints who answered.
    #[command(hide = true)]
    ExampleClient(example::ClientArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup => setup::everything(),
        Command::Build => build::mesh(),
        Command::BuildOther => other::mesh(),
        Command::Run(args) => run::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::BenchClient(args) => bench::client(&args),
        Command::BenchPart(args) => bench::part(&args),
        Command::Ci => ci::run(),
        Command::Fuzz(args) => fuzz::run_all(&args),
        Command::BenchLoadClient(args) => bench::load_client(&args),
        Command::ExampleBackend { name } => example::backend(&name),
        Command::ExampleClient(args) => example::client(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
