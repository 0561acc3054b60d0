//! What mesh costs, against direct connects.

use std::{fmt::Write as _, fs};

use serde_json::{Value, json};

use crate::{
    build,
    tools::{again_as_root, commit, root},
};

mod arms;
mod connect;
mod policies;
mod stats;

pub(crate) use connect::{ClientArgs, client};
pub(crate) use policies::{ClientArgs as LoadClientArgs, client as load_client};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A fifth of the rounds.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Five times the rounds.
    #[arg(long)]
    full: bool,
    #[arg(long, hide = true)]
    built: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !args.built {
        build::mesh()?;
    }
    let mode = if args.quick { Some("--quick") } else { args.full.then_some("--full") };
    if let Some(result) = again_as_root(&["bench", "--built"], mode) {
        return result;
    }
    let batches = if args.quick {
        2
    } else if args.full {
        50
    } else {
        10
    };
    let mut bench = arms::Bench::start()?;
    let mut rows = connect::measure(&mut bench, batches)?;
    rows.extend(connect::hook_times(&mut bench, batches)?);
    drop(bench);
    rows.extend(policies::measure(batches)?);
    report(&rows, batches)
}

fn report(rows: &[Value], batches: usize) -> anyhow::Result<()> {
    let meta = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": commit(),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "cpus": std::thread::available_parallelism()?.get(),
        "load": fs::read_to_string("/proc/loadavg")?.trim(),
        "slices_per_arm": batches * connect::ROUNDS,
        "calls_per_slice": connect::SLICE,
        "note": "direct sockets are outside the managed cgroup, but on the same kernel: the static key that any \
                 attached connect program turns on is in every arm",
    });
    let dir = root().join("bench/report");
    fs::create_dir_all(&dir)?;
    let markdown = markdown(rows)?;
    fs::write(
        dir.join("report.json"),
        serde_json::to_string_pretty(&json!({"meta": meta, "rows": rows}))? + "\n",
    )?;
    fs::write(dir.join("report.md"), &markdown)?;
    println!("{markdown}\nwritten to {}", dir.display());
    Ok(())
}

fn markdown(rows: &[Value]) -> anyhow::Result<String> {
    let mut text =
        String::from("| measure | arm | median | vs direct (95 % interval) |\n|---|---|---|---|\n");
    for row in rows {
        let word = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let ratio = &row["vs_direct"];
        let number = |key: &str| ratio[key].as_f64().unwrap_or_default();
        let versus = match ratio {
            Value::Null => "-".into(),
            _ => format!("{:.3} ({:.3} to {:.3})", number("ratio"), number("low"), number("high")),
        };
        let value = row["value"].as_f64().unwrap_or_default();
        writeln!(text, "| {} | {} | {value:.0} {} | {versus} |", word("measure"), word("arm"), word("unit"))?;
    }
    Ok(text)
}
