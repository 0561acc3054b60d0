//! The README's tables, from the report.

use std::fs;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{goals, line, names, policies, registries, report, scale};
use crate::tools::root;

const BEGIN: &str = "<!-- cargo xtask bench: ";
const END: &str = "<!-- end -->";

const MEASURES: [&str; 3] = ["connect tcp", "connect udp", "first datagram, unconnected"];
const ARMS: [&str; 6] =
    ["direct", "direct-again", "empty-hooks", "hooked-untouched", "without-bookkeeping", "mesh"];

/// Writes them.
pub(super) fn update(report: &Value) -> anyhow::Result<()> {
    let path = root().join("README.md");
    let text = fs::read_to_string(&path)?;
    Ok(fs::write(path, updated(&text, report)?)?)
}

/// The text with what the report says between each pair of marks.
fn updated(text: &str, report: &Value) -> anyhow::Result<String> {
    let mut parts = text.split(BEGIN);
    let mut updated = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once(" -->").context("a mark in README.md does not end")?;
        let (_, rest) = rest.split_once(END).with_context(|| format!("README.md: {name} has no end"))?;
        updated += &format!("{BEGIN}{name} -->\n{}\n{END}{rest}", block(name, report)?.trim());
    }
    Ok(updated)
}

fn block(name: &str, report: &Value) -> anyhow::Result<String> {
    let rows = report["rows"].as_array().context("a report has rows")?;
    let text = match name {
        "meta" => report::measured(&report["parts"]),
        "connect" => connect(rows),
        "hooks" => hooks(rows),
        "arms" => report::summary(rows),
        "missed" => goals::missed(rows),
        "memory" => report::memory_summary(rows),
        "policies" => policies(rows),
        "names" => names::markdown(rows),
        "registries" => registries::markdown(rows),
        "scale" => scale::markdown(rows),
        _ => String::new(),
    };
    ensure!(!text.is_empty(), "README.md: the report knows nothing of {name:?}");
    Ok(text)
}

fn find<'a>(rows: &'a [Value], measure: &str, arm: &str) -> Option<&'a Value> {
    rows.iter().find(|row| row["measure"] == measure && row["arm"] == arm)
}

fn connect(rows: &[Value]) -> String {
    let mut text = super::HEAD.to_owned();
    for measure in MEASURES {
        text.extend(ARMS.iter().filter_map(|arm| find(rows, measure, arm)).map(line));
    }
    text
}

/// One line for each kind of socket.
fn hooks(rows: &[Value]) -> String {
    let value = |measure: &str, arm: &str| {
        let row = find(rows, measure, arm);
        row.map_or_else(String::new, |row| format!("{:.0} ns", row["value"].as_f64().unwrap_or_default()))
    };
    let mesh = rows.iter().filter(|row| row["arm"] == "mesh").filter_map(|row| row["measure"].as_str());
    let sockets = mesh.filter_map(|measure| measure.strip_prefix("hooks of "));
    let line = |socket: &str| {
        let [mesh, without] =
            ["mesh", "without-bookkeeping"].map(|arm| value(&format!("hooks of {socket}"), arm));
        format!("| {socket} | {mesh} | {without} |\n")
    };
    sockets
        .map(line)
        .fold("| socket | mesh | without bookkeeping |\n|---|---|---|\n".to_owned(), |text, line| {
            text + &line
        })
}

fn policies(rows: &[Value]) -> String {
    let value = |part: &str, policy: &str| {
        let row = find(rows, &format!("{}: latency {part}, {policy}", policies::MEASURE), "mesh");
        row.map_or_else(String::new, |row| {
            format!("{:.1} ms", row["value"].as_f64().unwrap_or_default() / 1e3)
        })
    };
    let line =
        |policy: &&str| format!("| {policy} | {} | {} |\n", value("p50", policy), value("p99", policy));
    policies::POLICIES
        .iter()
        .map(line)
        .fold("| policy | p50 | p99 |\n|---|---|---|\n".to_owned(), |text, line| text + &line)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `cargo xtask bench` writes all of it.
    #[test]
    fn the_readme_and_the_report_show_the_rows_that_are_kept() {
        let text = |name: &str| fs::read_to_string(root().join(name)).unwrap();
        let (rows, readme) = (text("bench/report/report.json"), text("README.md"));
        let rows: Value = serde_json::from_str(&rows).unwrap();
        assert!(readme.contains(BEGIN));
        assert!(updated(&readme, &rows).unwrap() == readme, "README.md is not what the report says");
        let kept = text("bench/report/report.md");
        let is_words = |part: &&str| !part.starts_with("![");
        let kept: String = kept.split_inclusive("\n\n").filter(is_words).collect();
        assert!(report::markdown(&rows, &[]) == kept, "report.md is not what report.json says");
    }

    #[test]
    fn only_what_is_between_marks_changes() {
        let rows =
            serde_json::json!([{"measure": "hooks of tcp", "arm": "mesh", "value": 7.4, "unit": "ns"}]);
        let report = serde_json::json!({"parts": {}, "rows": rows});
        let text = format!("a\n{BEGIN}hooks -->\nold\n{END}\nb\n");
        let new = updated(&text, &report).unwrap();
        assert!(new.starts_with("a\n") && new.ends_with("\nb\n") && !new.contains("old"), "{new}");
        assert!(new.contains("| tcp | 7 ns |  |"), "{new}");
        assert!(updated(&text.replace("hooks", "nothing"), &report).is_err());
        assert!(updated(&text.replace(END, ""), &report).is_err());
    }
}
