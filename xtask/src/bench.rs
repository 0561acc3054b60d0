//! What mesh costs, against direct connects.

use std::fs;

use serde_json::{Value, json};

use crate::{
    build, setup,
    tools::{again_as_root, commit, root},
};

mod arms;
mod connect;
mod names;
mod policies;
mod readme;
mod scale;
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
    /// One part alone; what the report says of the others stays in it.
    #[arg(long)]
    only: Option<Part>,
    #[arg(long, hide = true)]
    built: bool,
}

#[derive(Clone, Copy, clap::ValueEnum, PartialEq, Eq)]
enum Part {
    Connect,
    Policies,
    Names,
    Scale,
}

impl Part {
    const ALL: [Self; 4] = [Self::Connect, Self::Policies, Self::Names, Self::Scale];

    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).expect("every part has a name").get_name().to_owned()
    }

    fn measure(self, batches: usize) -> anyhow::Result<Vec<Value>> {
        match self {
            Self::Connect => {
                let mut bench = arms::Bench::start()?;
                let mut rows = connect::measure(&mut bench, batches)?;
                rows.extend(connect::hook_times(&mut bench, batches)?);
                Ok(rows)
            }
            Self::Policies => policies::measure(batches),
            Self::Names => names::measure(batches),
            Self::Scale => scale::measure(),
        }
    }

    /// Whether a row of the report is one of this part's.
    fn has(self, row: &Value) -> bool {
        let measure = row["measure"].as_str().unwrap_or_default();
        let of = if scale::is_ours(row) {
            Self::Scale
        } else if names::is_ours(row) {
            Self::Names
        } else if measure.starts_with(policies::MEASURE) {
            Self::Policies
        } else {
            Self::Connect
        };
        self == of
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !args.built {
        build::mesh()?;
        if args.only.is_none_or(|only| only == Part::Names) {
            setup::name_servers()?;
        }
    }
    let mode = if args.quick { Some("--quick") } else { args.full.then_some("--full") };
    let only = args.only.map(|part| format!("--only={}", part.name()));
    let mut again = vec!["bench", "--built"];
    again.extend(only.as_deref());
    if let Some(result) = again_as_root(&again, mode) {
        return result;
    }
    let batches = if args.quick {
        2
    } else if args.full {
        50
    } else {
        10
    };
    let mut rows = match args.only {
        Some(_) => earlier()?,
        None => Vec::new(),
    };
    for part in Part::ALL.into_iter().filter(|part| args.only.is_none_or(|only| only == *part)) {
        let at = rows.iter().position(|row| part.has(row)).unwrap_or(rows.len());
        rows.retain(|row| !part.has(row));
        rows.splice(at..at, part.measure(batches)?);
    }
    report(&rows, batches)
}

/// The rows of the last report, if there is one.
fn earlier() -> anyhow::Result<Vec<Value>> {
    match fs::read(root().join("bench/report/report.json")) {
        Ok(report) => {
            Ok(serde_json::from_slice::<Value>(&report)?["rows"].as_array().cloned().unwrap_or_default())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
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
        "name_servers": names::versions(),
        "note": "direct sockets are outside the managed cgroup, but on the same kernel: the static key that any \
                 attached connect program turns on is in every arm",
    });
    let dir = root().join("bench/report");
    fs::create_dir_all(&dir)?;
    let markdown = markdown(rows);
    let report = json!({"meta": meta, "rows": rows});
    fs::write(dir.join("report.json"), serde_json::to_string_pretty(&report)? + "\n")?;
    fs::write(dir.join("report.md"), &markdown)?;
    readme::update(&report)?;
    println!("{markdown}\nwritten to {}", dir.display());
    Ok(())
}

const HEAD: &str = "| measure | arm | median | vs direct (95 % interval) |\n|---|---|---|---|\n";

fn markdown(rows: &[Value]) -> String {
    let of_connects = rows.iter().filter(|row| !scale::is_ours(row) && !names::is_ours(row));
    let lines: String = of_connects.map(line).collect();
    format!("{HEAD}{lines}{}{}", names::markdown(rows), scale::markdown(rows))
}

fn line(row: &Value) -> String {
    let word = |key: &str| row[key].as_str().unwrap_or_default();
    let ratio = &row["vs_direct"];
    let number = |key: &str| ratio[key].as_f64().unwrap_or_default();
    let versus = match ratio {
        Value::Null => "-".into(),
        _ => format!("{:.3} ({:.3} to {:.3})", number("ratio"), number("low"), number("high")),
    };
    let value = row["value"].as_f64().unwrap_or_default();
    format!("| {} | {} | {value:.0} {} | {versus} |\n", word("measure"), word("arm"), word("unit"))
}
