//! Drawing a backend from a service's slots.

use crate::abi::SlotWord;

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

    proptest! {
        #[test]
        fn a_draw_stays_below_the_count(random: u32, count in 1..=crate::abi::MAX_INDEX) {
            prop_assert!(draw(random, count).slot < count);
        }
    }
}
