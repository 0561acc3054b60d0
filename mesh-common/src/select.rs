//! Drawing a backend from a service's slots.

use crate::abi::SlotWord;

/// How a backend is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Policy {
    /// By weight.
    #[default]
    Random = 0,
    /// Of two drawn by weight, the one with fewer connections for its weight.
    LeastConnections = 1,
    /// One after the other, as often as their weights say.
    RoundRobin = 2,
    /// Always the same for the same client, while the backends stay.
    Maglev = 3,
}

/// One random draw: which slot, and a fraction that decides between its backend and its alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Slot within the service, below the count given.
    pub slot: u32,
    /// In units of 1/65,536.
    pub fraction: u16,
}

/// Splits 32 random bits into a slot below `count` and a fraction, by one multiplication:
/// the high half of `random × count` is the slot, what remains below it the fraction.
///
/// `count` must not be zero. The fraction has 32 - log2(count) random bits: all 16 up to 65,536
/// slots, 12 at a million.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "halves of a 64-bit product")]
pub const fn draw(random: u32, count: u32) -> Draw {
    let product = random as u64 * count as u64;
    Draw { slot: (product >> 32) as u32, fraction: ((product as u32) >> 16) as u16 }
}

/// The `turn`-th draw of a round: slot after slot, and a fraction that moves on by the golden
/// ratio from one round to the next. So slots are used equally often, and the fractions seen at
/// each are spread evenly, which makes shares follow the weights without chance.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a remainder of a u32, and a wrapped fraction")]
pub const fn turn(turn: u64, count: u32) -> Draw {
    const GOLDEN: u64 = 40_503;
    // Never zero; but a division that could panic cannot be loaded into the kernel.
    let count = if count == 0 { 1 } else { count as u64 };
    let round = turn / count;
    Draw { slot: (turn % count) as u32, fraction: (round.wrapping_mul(GOLDEN) + (1 << 15)) as u16 }
}

/// The draw of a client: always the same, and another one at each further attempt. Only the slot
/// matters in a Maglev table.
#[inline(always)]
pub const fn hashed(client: u64, attempt: u32, count: u32) -> Draw {
    // The finisher of MurmurHash3.
    let mut hash = client ^ (attempt as u64) << 56;
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    draw((hash >> 32) as u32, count)
}

/// Whether a backend with `load` connections and `weight` is the better choice, or as good.
///
/// The connection to come counts too, because without it one that is idle would be better than a
/// large one with little to do. Two that are idle are equal: both were drawn by weight.
#[inline(always)]
pub const fn is_lighter(load: u64, weight: u16, other_load: u64, other_weight: u16) -> bool {
    load | other_load == 0 || (load + 1) * other_weight as u64 <= (other_load + 1) * weight as u64
}

/// The backend a slot yields for `fraction`.
#[inline(always)]
pub const fn pick(slot: SlotWord, fraction: u16) -> u32 {
    if fraction < slot.threshold() { slot.backend() } else { slot.alias() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_slot_is_drawn_equally_often() {
        for count in [1u32, 2, 3, 7, 1000] {
            let mut hits = vec![0u32; count as usize];
            for random in (0..=u32::MAX).step_by(65_521) {
                hits[draw(random, count).slot as usize] += 1;
            }
            let (least, most) = (hits.iter().min().unwrap(), hits.iter().max().unwrap());
            assert!(most - least <= 2, "{count}: {least}..{most}");
        }
    }

    #[test]
    fn a_fraction_is_uniform_within_its_slot() {
        let mut below = 0u32;
        let mut all = 0u32;
        for random in (0..=u32::MAX).step_by(4099) {
            let draw = draw(random, 5);
            if draw.slot == 3 {
                all += 1;
                below += u32::from(draw.fraction < 16_384);
            }
        }
        let share = f64::from(below) / f64::from(all);
        assert!((share - 0.25).abs() < 0.001, "{share}");
    }

    #[test]
    fn turns_use_every_slot_equally_and_spread_their_fractions() {
        let mut below = [0; 3];
        for n in 0..3000 {
            let draw = turn(n, 3);
            below[draw.slot as usize] += u32::from(draw.fraction < 16_384);
        }
        // 1,000 rounds, a quarter each; chance alone would be off by 14 on average.
        assert!(below.iter().all(|below| (248..=252).contains(below)), "{below:?}");
    }

    #[test]
    fn clients_are_spread_evenly_and_keep_their_slot() {
        let mut hits = [0u32; 16];
        for client in 0..16_000 {
            let draw = hashed(client, 0, 16);
            assert_eq!(draw, hashed(client, 0, 16));
            hits[draw.slot as usize] += 1;
        }
        // 15 degrees of freedom: above 37.7 once in 1,000.
        let chi_square: f64 = hits.iter().map(|hits| (f64::from(*hits) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi_square < 37.7, "{hits:?}");
        assert!((0..100).any(|client| hashed(client, 0, 16).slot != hashed(client, 1, 16).slot));
    }

    #[test]
    fn fewer_connections_for_the_weight_are_lighter() {
        assert!(is_lighter(0, 100, 1, 100) && !is_lighter(1, 100, 0, 100));
        assert!(is_lighter(3, 200, 2, 100), "4 of 200 against 3 of 100");
        assert!(!is_lighter(2, 100, 3, 200));
        assert!(is_lighter(5, 100, 5, 100), "a tie keeps the first");
        assert!(is_lighter(0, 1, 0, 100), "idle ones are equal: the draw has followed the weights");
        assert!(!is_lighter(0, 1, 1, 100), "1 of 1 against 2 of 100");
    }

    proptest! {
        #[test]
        fn a_turn_stays_below_the_count(n: u64, count in 1..=crate::abi::MAX_INDEX) {
            prop_assert!(turn(n, count).slot < count);
        }

        #[test]
        fn a_draw_stays_below_the_count(random: u32, count in 1..=crate::abi::MAX_INDEX) {
            prop_assert!(draw(random, count).slot < count);
        }
    }
}
