//! What arms gave in slices that took turns, and its row in the report.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::stats::{comparison, median};

/// Of what is done at a rate: how much of that was done.
pub(super) const REACHED: &str = "reached of the rate";

/// One kind of slice.
pub(super) struct Measured {
    pub(super) name: String,
    /// What each slice gives, and its unit.
    pub(super) values: Vec<(String, &'static str)>,
    /// Requests a second, where that is set.
    rate: Option<f64>,
    pub(super) set_ups: Vec<BTreeMap<&'static str, Slices>>,
}

/// Those of an arm in one set-up.
#[derive(Default)]
pub(super) struct Slices {
    /// Of each round; none where it failed or was disturbed.
    taken: Vec<Option<Vec<f64>>>,
    disturbed: usize,
    failed: usize,
    error: Option<String>,
}

impl Slices {
    pub(super) fn take(&mut self, taken: anyhow::Result<Vec<f64>>, disturbed: bool) {
        self.disturbed += usize::from(disturbed);
        self.taken.push(match taken {
            Ok(values) => (!disturbed).then_some(values),
            Err(error) => {
                self.failed += 1;
                self.error = Some(format!("{error:#}"));
                None
            }
        });
    }
}

impl Measured {
    pub(super) fn new(name: &str, values: Vec<(String, &'static str)>, rate: Option<f64>) -> Self {
        Self { name: name.into(), values, rate, set_ups: Vec::new() }
    }

    fn of<'a>(&'a self, arm: &'a str) -> impl Iterator<Item = &'a Slices> {
        self.set_ups.iter().filter_map(move |set_up| set_up.get(arm))
    }

    pub(super) fn has(&self, arm: &str) -> bool {
        self.of(arm).next().is_some()
    }

    /// One value of an arm.
    fn median(&self, number: usize, arm: &str) -> Option<f64> {
        let taken = self.of(arm).flat_map(|slices| slices.taken.iter().flatten());
        let values: Vec<f64> = taken.map(|values| values[number]).collect();
        (!values.is_empty()).then(|| median(values))
    }

    /// Two arms in the same rounds.
    fn compare(&self, number: usize, above: &str, below: &str, by: fn(f64, f64) -> f64) -> Option<Value> {
        let groups = self.set_ups.iter().filter_map(|set_up| {
            let pairs = set_up.get(above)?.taken.iter().zip(&set_up.get(below)?.taken);
            let pairs = pairs.filter_map(|(a, b)| Some(by(a.as_ref()?[number], b.as_ref()?[number])));
            Some(pairs.collect())
        });
        comparison(groups.collect())
    }

    /// The row of one value of an arm, compared with direct, and mesh with each.
    pub(super) fn fill(&self, row: &mut Value, number: usize, arm: &str, differs: bool) {
        let value = self.median(number, arm);
        let error = self.of(arm).find_map(|slices| slices.error.clone());
        row["value"] = json!(value);
        row["vs_direct"] = json!(self.compare(number, arm, "direct", |above, below| above / below));
        row["mesh_vs"] = json!(self.compare(number, "mesh", arm, |above, below| above / below));
        if differs {
            row["over_direct"] = json!(self.compare(number, arm, "direct", |above, below| above - below));
        }
        if value.is_none() {
            row["missing"] = error.clone().unwrap_or_else(|| "every slice was disturbed".into()).into();
        }
        if let Some(rate) = self.rate {
            let reached = self.values.iter().position(|(value, _)| value == REACHED);
            row["rate"] = rate.into();
            row["reached"] = json!(reached.and_then(|number| self.median(number, arm)));
        }
        // All values are of the same slices.
        if number == 0 {
            row["set_ups"] = self.of(arm).count().into();
            row["slices"] = self.of(arm).map(|slices| slices.taken.len()).sum::<usize>().into();
            row["disturbed"] = self.of(arm).map(|slices| slices.disturbed).sum::<usize>().into();
            row["failed"] = self.of(arm).map(|slices| slices.failed).sum::<usize>().into();
            row["error"] = json!(error);
        }
    }
}
