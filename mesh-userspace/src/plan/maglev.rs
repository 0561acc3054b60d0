//! Look-up tables for consistent hashing: a client always looks at the same slot, and a slot keeps
//! its backend when others come and go.
//!
//! The table is Maglev's, its filling is rendezvous hashing with weights: a slot belongs to the
//! backend with the highest score there. So a backend that leaves moves its own slots and no other
//! ([decision 6](../../../docs/decisions/0006-maglev-filled-by-rendezvous.md)).

use mesh_common::abi::SlotWord;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Endpoint;

/// Slots of every table, a prime. With 100 backends each has about 80.
const LENGTH: u64 = 8191;

/// Which backend has a slot depends on the endpoints and weights alone, so that every node and
/// every start comes to the same table.
///
/// `backends` are (backend id, weight above zero, endpoint).
pub fn table(backends: &[(u32, u32, Endpoint)]) -> Vec<SlotWord> {
    if backends.is_empty() {
        return Vec::new();
    }
    let keys: Vec<_> = backends.iter().map(|(_, _, endpoint)| key(endpoint)).collect();
    let word = |slot| {
        let scores = keys.iter().zip(backends).map(|(key, (id, weight, _))| (score(key, slot, *weight), *id));
        let id = scores.max_by(|a, b| a.0.total_cmp(&b.0)).map_or(0, |(_, id)| id);
        SlotWord::new(id, id, u16::MAX)
    };
    (0..LENGTH).map(word).collect()
}

/// With u even between 0 and 1, -weight / ln(u) is the largest as often as the weight says.
fn score(key: &[u8; 18], slot: u64, weight: u32) -> f64 {
    let even = (xxh3_64_with_seed(key, slot) >> 11) as f64 + 0.5;
    -f64::from(weight) / (even / (1u64 << 53) as f64).ln()
}

fn key(endpoint: &Endpoint) -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..16].copy_from_slice(&endpoint.address.octets());
    bytes[16..].copy_from_slice(&endpoint.port.get().to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use mesh_common::abi::Port;

    use super::*;
    use crate::plan::alias;

    fn backends(count: u32) -> Vec<(u32, u32, Endpoint)> {
        let endpoint =
            |n| Endpoint { address: Ipv4Addr::from(0x0a00_0000 + n).into(), port: Port::new(8080) };
        (1..=count).map(|n| (n, 100, endpoint(n))).collect()
    }

    #[test]
    fn shares_follow_the_weights() {
        let mut backends = backends(10);
        backends[3].1 = 300;
        backends[7].1 = 10;
        let shares = alias::shares(&table(&backends));
        let total: f64 = backends.iter().map(|(_, weight, _)| f64::from(*weight)).sum();
        for (id, weight, _) in &backends {
            let error = (shares[id] - f64::from(*weight) / total).abs();
            assert!(error < 0.01, "backend {id}: off by {error}");
        }
    }

    #[test]
    fn a_backend_more_or_less_moves_its_share_and_at_most_one_percent_more() {
        for count in [2u32, 3, 5, 10, 20, 50, 100] {
            let full = backends(count);
            let before = table(&full);
            for gone in [0, count as usize / 2, count as usize - 1] {
                let mut less = full.clone();
                let (id, ..) = less.remove(gone);
                let after = table(&less);
                let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
                let own = before.iter().filter(|word| word.backend() == id).count();
                assert_eq!(moved, own, "nothing moves but what it had");
                let part = moved as f64 / before.len() as f64;
                assert!(part <= 1.0 / f64::from(count) + 0.01, "{gone} of {count} gone moves {part}");
            }
        }
    }

    #[test]
    fn no_backends_no_slots() {
        assert!(table(&[]).is_empty());
    }

    #[test]
    fn other_ids_and_another_order_are_the_same_table() {
        let mut shifted: Vec<_> =
            backends(5).into_iter().map(|(id, weight, at)| (id + 10, weight, at)).collect();
        shifted.reverse();
        let same = |(a, b): (&SlotWord, &SlotWord)| a.backend() + 10 == b.backend();
        assert!(table(&backends(5)).iter().zip(&table(&shifted)).all(same));
    }
}
