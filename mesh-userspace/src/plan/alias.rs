//! The alias method (Walker 1974, Vose 1991): a weighted pick with one look-up.

use std::collections::BTreeMap;

use mesh_common::abi::SlotWord;

use super::Endpoint;

const ONE: u128 = 1 << 16;

/// One slot per backend, such that a uniformly drawn slot and fraction yield each backend in
/// proportion to its weight, to within 1/65,536 of a slot. The same input gives the same table.
///
/// `backends` are (backend id, weight above zero, endpoint).
pub fn table(backends: &[(u32, u32, Endpoint)]) -> Vec<SlotWord> {
    let mut weights: Vec<_> = backends.iter().map(|(id, weight, _)| (*id, *weight)).collect();
    weights.sort_unstable();
    let weights = &weights;
    let count = weights.len() as u128;
    // A slot's share is the total weight: then backend i brings weight × count.
    let full: u128 = weights.iter().map(|(_, weight)| u128::from(*weight)).sum();
    let mut left: Vec<u128> = weights.iter().map(|(_, weight)| u128::from(*weight) * count).collect();
    let mut words: Vec<_> = weights.iter().map(|(id, _)| SlotWord::new(*id, *id, u16::MAX)).collect();

    let (mut small, mut large): (Vec<_>, Vec<_>) = (0..weights.len()).partition(|i| left[*i] < full);
    while let (Some(i), Some(&j)) = (small.pop(), large.last()) {
        let threshold = (left[i] * ONE + full / 2) / full;
        if let Ok(threshold) = u16::try_from(threshold) {
            words[i] = SlotWord::new(weights[i].0, weights[j].0, threshold);
        }
        left[j] -= full - left[i];
        if left[j] < full {
            large.pop();
            small.push(j);
        }
    }
    words
}

/// The share of new connections that each backend id of a table gets; they add up to 1.
pub fn shares(words: &[SlotWord]) -> BTreeMap<u32, f64> {
    let mut shares = BTreeMap::new();
    for word in words {
        // A slot whose alias is its backend always yields that backend.
        let own = if word.backend() == word.alias() { 1.0 } else { f64::from(word.threshold()) / 65_536.0 };
        *shares.entry(word.backend()).or_default() += own / words.len() as f64;
        *shares.entry(word.alias()).or_default() += (1.0 - own) / words.len() as f64;
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Endpoint, SlotWord, shares};

    fn table(weights: &[(u32, u32)]) -> Vec<SlotWord> {
        let at = Endpoint {
            address: mesh_common::address::Address::default(),
            port: mesh_common::abi::Port::default(),
        };
        super::table(&weights.iter().map(|(id, weight)| (*id, *weight, at)).collect::<Vec<_>>())
    }

    #[test]
    fn no_backends_no_slots() {
        assert!(table(&[]).is_empty());
    }

    #[test]
    fn equal_weights_need_no_alias() {
        for word in table(&[(7, 100), (8, 100), (9, 100)]) {
            assert_eq!(word.backend(), word.alias());
        }
    }

    proptest! {
        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(1u32..=65_535, 1..200)) {
            let weights: Vec<_> = (1..).zip(weights).collect();
            let words = table(&weights);
            prop_assert_eq!(words.len(), weights.len());
            let total: f64 = weights.iter().map(|(_, weight)| f64::from(*weight)).sum();
            let shares = shares(&words);
            for (id, weight) in &weights {
                let error = (shares[id] - f64::from(*weight) / total).abs();
                prop_assert!(error <= 1.0 / 65_536.0, "backend {id}: off by {error}");
            }
        }
    }
}
