//! Medians and how sure they are.

use serde_json::{Value, json};

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The 95 % bootstrap interval of the median.
pub(super) fn confidence(values: &[f64]) -> (f64, f64) {
    // A fixed seed: the same measurements give the same report.
    let mut random = Random::new(0);
    let mut resample = || median(values.iter().map(|_| values[random.below(values.len())]).collect());
    let mut medians: Vec<f64> = (0..400).map(|_| resample()).collect();
    medians.sort_by(f64::total_cmp);
    (medians[10], medians[389])
}

/// The median of what was compared pair by pair, and its interval; none of nothing.
pub(super) fn comparison(compared: Vec<f64>) -> Option<Value> {
    (!compared.is_empty()).then(|| {
        let (low, high) = confidence(&compared);
        json!({"ratio": median(compared), "low": low, "high": high})
    })
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
