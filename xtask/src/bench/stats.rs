//! Medians and how sure they are.

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The 95 % bootstrap interval of the median.
pub(super) fn confidence(values: &[f64]) -> (f64, f64) {
    // A fixed seed: the same measurements give the same report.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).expect("below a usize")
    };
    let mut resample = || median(values.iter().map(|_| values[random(values.len())]).collect());
    let mut medians: Vec<f64> = (0..400).map(|_| resample()).collect();
    medians.sort_by(f64::total_cmp);
    (medians[10], medians[389])
}
