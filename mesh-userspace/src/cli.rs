//! The command line.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::{api::objects, config, daemon, datapath, namespaces, registry, sys};

mod bpf;
mod check;
mod instance;
mod output;
mod show;

use output::{Format, TableFormat};

/// Calls services by name through the kernel: one daemon per node, no sidecar.
#[derive(Debug, Parser)]
#[command(name = "mesh", version, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    /// The daemon's API socket [default: /run/mesh/api.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node daemon.
    Run(ConfigArg),
    /// Check the kernel, cgroups, capabilities, ports and registries.
    Check {
        #[command(flatten)]
        config: ConfigArg,
        /// Only what must hold before the daemon can start.
        #[arg(long)]
        pre: bool,
        #[arg(short, long, default_value = "text")]
        output: check::Format,
    },
    /// Show how the daemon is doing.
    Status {
        /// One line.
        #[arg(long, conflicts_with = "verbose")]
        brief: bool,
        /// Every map and program.
        #[arg(long)]
        verbose: bool,
        /// Wait until the daemon is ready, this long at most.
        #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "30s", value_parser = humantime::parse_duration)]
        wait: Option<Duration>,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Show services.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Show backends.
    #[command(subcommand)]
    Backend(BackendCommand),
    /// Show and change the instances of the embedded registry.
    #[command(subcommand)]
    Instance(instance::InstanceCommand),
    /// Show registries.
    #[command(subcommand)]
    Registry(RegistryCommand),
    /// Work with names.
    #[command(subcommand)]
    Dns(DnsCommand),
    /// Say what a connect would do now, and why.
    Explain {
        /// ADDRESS, ADDRESS:PORT, NAME or NAME:PORT.
        target: String,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
    /// Show what is in the kernel; works while no daemon runs.
    #[command(subcommand)]
    Bpf(BpfCommand),
    /// Work with configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Detach the programs and remove every pin; works while no daemon runs.
    Cleanup(ConfigArg),
    /// Print the completions for a shell.
    Completion { shell: clap_complete::Shell },
    /// Write the man pages.
    Man { dir: PathBuf },
}

#[derive(Args, Debug)]
struct ConfigArg {
    /// The configuration file [default: /etc/mesh/mesh.toml if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct ListArgs {
    #[arg(short, long, default_value = "table")]
    output: TableFormat,
    #[arg(long)]
    no_headers: bool,
    /// Show it again whenever it changes.
    #[arg(short, long)]
    watch: bool,
}

#[derive(Debug, Subcommand)]
enum ServiceCommand {
    /// All services.
    List(ListArgs),
    /// One service: NAME, NAME.NAMESPACE, or either with :PORT.
    Get {
        name: String,
        #[command(flatten)]
        list: ListArgs,
    },
}

#[derive(Debug, Subcommand)]
enum BackendCommand {
    /// All backends.
    List(ListArgs),
}

#[derive(Debug, Subcommand)]
enum RegistryCommand {
    /// All registries and how fresh they are.
    List {
        #[arg(short, long, default_value = "table")]
        output: TableFormat,
        #[arg(long)]
        no_headers: bool,
    },
}

#[derive(Debug, Subcommand)]
enum DnsCommand {
    /// Resolve a name as tasks would, and say why the answer is what it is.
    Query {
        /// Taken as it is: no search domain is appended.
        name: String,
        /// The record type [default: A and AAAA]
        r#type: Option<String>,
        #[arg(short, long, default_value = "table")]
        output: Format,
    },
}

#[derive(Debug, Subcommand)]
enum BpfCommand {
    /// The pinned maps.
    Maps(BpfArgs),
    /// The attached programs.
    Programs(BpfArgs),
    /// Every frontend and where the kernel sends it.
    Lb(BpfArgs),
}

#[derive(Args, Debug)]
struct BpfArgs {
    #[command(flatten)]
    config: ConfigArg,
    #[arg(short, long, default_value = "table")]
    output: Format,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a configuration file and the services files it names.
    Validate { file: PathBuf },
}

impl Cli {
    /// Does what was asked; errors are for the caller to print.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let given = self.socket;
        let default = config::Api::default().socket;
        let socket = given.as_deref().unwrap_or(&default);
        match self.command {
            Command::Run(arg) => {
                init_logging();
                sys::keep_heap_small();
                let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
                let end = runtime.block_on(daemon::run(arg.path(), given));
                // A file system that does not answer must not keep it from ending.
                runtime.shutdown_background();
                end?;
            }
            Command::Check { config, pre, output } => return check::run(config.path(), given, pre, output),
            Command::Status { brief, verbose, wait, output } => {
                let detail = if brief {
                    show::Detail::Brief
                } else if verbose {
                    show::Detail::Verbose
                } else {
                    show::Detail::Usual
                };
                return ask(show::status(socket, detail, wait, output));
            }
            Command::Service(ServiceCommand::List(list)) => return ask(show::services(socket, None, &list)),
            Command::Service(ServiceCommand::Get { name, list }) => {
                return ask(show::services(socket, Some(&name), &list));
            }
            Command::Backend(BackendCommand::List(list)) => return ask(show::backends(socket, &list)),
            Command::Instance(command) => return ask(instance::run(socket, command)),
            Command::Registry(RegistryCommand::List { output, no_headers }) => {
                return ask(show::registries(socket, &ListArgs { output, no_headers, watch: false }));
            }
            Command::Dns(DnsCommand::Query { name, r#type, output }) => {
                return ask(show::dns_query(socket, &name, r#type.as_deref(), output));
            }
            Command::Explain { target, output } => return ask(show::explain(socket, &target, output)),
            Command::Bpf(BpfCommand::Maps(args)) => bpf::maps(&pins(&args.config, socket)?, args.output)?,
            Command::Bpf(BpfCommand::Programs(args)) => {
                bpf::programs(&pins(&args.config, socket)?, args.output)?;
            }
            Command::Bpf(BpfCommand::Lb(args)) => bpf::lb(&pins(&args.config, socket)?, args.output)?,
            Command::Config(ConfigCommand::Validate { file }) => validate(&file)?,
            Command::Cleanup(arg) => {
                let config = config::load(arg.path())?;
                let pins = datapath::Pins::new(config.node.pin_dir);
                for path in datapath::cleanup(&pins)? {
                    eprintln!("removed {}", path.display());
                }
                namespaces::cleanup(&pins).context("cannot remove the routes for the VIP ranges")?;
            }
            Command::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "mesh", &mut script);
                io::stdout().write_all(&script)?;
            }
            Command::Man { dir } => {
                std::fs::create_dir_all(&dir)?;
                clap_mangen::generate_to(Self::command(), dir)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl ConfigArg {
    fn path(&self) -> Option<&Path> {
        self.config.as_deref()
    }
}

fn ask(question: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(question)
}

/// The pin folder: from the file that was named, else from the daemon that runs, else the usual one.
fn pins(config: &ConfigArg, socket: &Path) -> anyhow::Result<datapath::Pins> {
    if config.config.is_none() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let status = runtime.block_on(crate::api::client::get::<objects::Status>(socket, "/v1/status"));
        if let Ok(status) = status {
            return Ok(datapath::Pins::new(status.pin_dir));
        }
    }
    Ok(datapath::Pins::new(config::load(config.path())?.node.pin_dir))
}

fn validate(file: &Path) -> anyhow::Result<()> {
    let config = config::load(Some(file))?;
    let mut services = 0;
    for registry in &config.registries {
        if let config::Registry::File { path } = registry {
            services += registry::file::validate(path, &config.rules)?;
        }
    }
    let registries = config.registries.len();
    writeln!(
        io::stdout(),
        "{}: valid; {registries} registries, {services} services in files",
        file.display()
    )?;
    Ok(())
}

/// What is logged if nothing else is said. hickory warns of every packet that it does not believe, so
/// whoever can send some could fill the disk.
const LOG: &str = "info,hickory=error";

fn init_logging() {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .parse_lossy(std::env::var("MESH_LOG").as_deref().unwrap_or(LOG));
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour).with_writer(io::stderr).init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
