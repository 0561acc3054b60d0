//! Medians and how sure they are.

use serde_json::{Value, json};

/// Of fewer groups the bootstrap cannot say how sure their median is.
const GROUPS: usize = 6;

/// The middle one, or the mean of the two in the middle.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match (values.get(half), values.len() % 2) {
        (None, _) => f64::NAN,
        (Some(upper), 0) => f64::midpoint(values[half - 1], *upper),
        (Some(middle), _) => *middle,
    }
}

/// The 95 % bootstrap interval of the median of all values. What was measured in one set-up has that in common, so
/// whole groups are drawn.
fn confidence(groups: &[Vec<f64>]) -> Option<(f64, f64)> {
    if groups.len() < GROUPS {
        return None;
    }
    // A fixed seed: the same measurements give the same report.
    let mut random = Random::new(0);
    let mut resample =
        || median(groups.iter().flat_map(|_| groups[random.below(groups.len())].clone()).collect());
    let mut medians: Vec<f64> = (0..400).map(|_| resample()).collect();
    medians.sort_by(f64::total_cmp);
    Some((medians[10], medians[389]))
}

/// The median of what was measured or compared in each group, and its interval where there are enough groups; none of
/// nothing.
pub(super) fn comparison(mut groups: Vec<Vec<f64>>) -> Option<Value> {
    groups.retain(|group| !group.is_empty());
    let interval = confidence(&groups).unzip();
    (!groups.is_empty())
        .then(|| json!({"ratio": median(groups.concat()), "low": interval.0, "high": interval.1}))
}

/// Numbers that are the same in every run.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(2 * seed + 1))
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).expect("below a usize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_count_has_its_median_in_between() {
        assert_eq!(median(vec![3.0, 1.0]), 2.0);
        assert_eq!(median(vec![5.0, 1.0, 3.0]), 3.0);
        assert!(median(Vec::new()).is_nan());
    }

    /// Slices of one set-up are no more than one witness.
    #[test]
    fn an_interval_covers_how_set_ups_differ() {
        let set_ups = |count: u8| (0..count).map(|n| vec![f64::from(n); 100]).collect::<Vec<_>>();
        assert_eq!(comparison(set_ups(5)), Some(json!({"ratio": 2.0, "low": null, "high": null})));
        let compared = comparison(set_ups(6)).unwrap();
        assert!(
            compared["low"].as_f64() <= Some(1.0) && compared["high"].as_f64() >= Some(4.0),
            "{compared}"
        );
        assert_eq!(comparison(vec![Vec::new()]), None);
    }
}
