//! Printing tables, JSON and YAML.

use std::io::{self, Write};

use comfy_table::{Table, presets};
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
    Yaml,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum TableFormat {
    Table,
    Wide,
    Json,
    Yaml,
}

impl TableFormat {
    /// How it is printed, and whether with every column.
    pub(super) fn split(self) -> (Format, bool) {
        match self {
            Self::Table => (Format::Table, false),
            Self::Wide => (Format::Table, true),
            Self::Json => (Format::Json, false),
            Self::Yaml => (Format::Yaml, false),
        }
    }
}

/// Prints `value` as data, or `table` of it.
pub(super) fn print<T: Serialize>(
    format: Format,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Table => table(value),
        Format::Json => {
            serde_json::to_string_pretty(value)?
                + "
"
        }
        Format::Yaml => serde_saphyr::to_string(value)?,
    };
    // A reader that has seen enough closes its end: an error for the caller, not a panic.
    Ok(io::stdout().write_all(text.as_bytes())?)
}

/// Columns separated by blanks, as other command lines of this kind print them.
pub(super) fn table(headers: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !headers.is_empty() {
        table.set_header(headers.to_vec());
    }
    table.add_rows(rows);
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 3));
    });
    let lines = table.to_string();
    lines.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `a,b`, or `-` for nothing.
pub(super) fn list<T: ToString>(items: &[T]) -> String {
    if items.is_empty() {
        return "-".into();
    }
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The text, or `-` for none.
pub(super) fn or_dash<T: ToString>(item: Option<T>) -> String {
    item.map_or("-".into(), |item| item.to_string())
}

/// As in JSON, without the quotes.
pub(super) fn word<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(ToOwned::to_owned))
        .unwrap_or_default()
}
