//! Passive ejection: what failed connects say of a backend.
//!
//! After [`Eject::failures`](crate::abi::Eject::failures) failed connects in a row a backend is
//! ejected for a penalty. When that is over, one connect at a time tries it: if it fails, the
//! penalty doubles; a connect that succeeds ends it.

use crate::abi::Penalty;

/// Value of `HEALTH`: zero for a backend that nothing is said against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct HealthWord(pub u64);

/// Whether a backend may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fitness {
    Fit,
    Ejected,
    /// Ejected, but it is time to try.
    Due,
}

impl HealthWord {
    const FAILURES: u64 = 0xffff;
    const PENALTIES: u32 = 16;
    const UNTIL: u32 = 24;

    const fn new(failures: u64, penalties: u64, until_ms: u64) -> Self {
        Self(failures | penalties << Self::PENALTIES | until_ms << Self::UNTIL)
    }

    /// Failed connects in a row.
    #[inline(always)]
    pub const fn failures(self) -> u64 {
        self.0 & Self::FAILURES
    }

    /// How often in a row it was ejected.
    #[inline(always)]
    pub const fn penalties(self) -> u64 {
        (self.0 >> Self::PENALTIES) & 0xff
    }

    /// When the penalty ends, in milliseconds since the machine started.
    #[inline(always)]
    pub const fn until_ms(self) -> u64 {
        self.0 >> Self::UNTIL
    }

    #[inline(always)]
    pub const fn is_ejected(self) -> bool {
        self.penalties() > 0
    }

    #[inline(always)]
    pub const fn fitness(self, now_ms: u64) -> Fitness {
        if !self.is_ejected() {
            Fitness::Fit
        } else if now_ms < self.until_ms() {
            Fitness::Ejected
        } else {
            Fitness::Due
        }
    }

    /// After one more failed connect.
    #[inline(always)]
    #[must_use]
    pub const fn failed(self) -> Self {
        if self.failures() == Self::FAILURES { self } else { Self(self.0 + 1) }
    }

    /// Ejected, or once more after a try that failed.
    #[inline(always)]
    #[must_use]
    pub const fn ejected(self, now_ms: u64, penalty: Penalty) -> Self {
        let penalties = if self.penalties() == 0xff { 0xff } else { self.penalties() + 1 };
        Self::new(self.failures(), penalties, now_ms + length_ms(penalties, penalty))
    }

    /// While one connect tries it: nobody else does for another penalty.
    #[inline(always)]
    #[must_use]
    pub const fn tried(self, now_ms: u64, penalty: Penalty) -> Self {
        Self::new(self.failures(), self.penalties(), now_ms + length_ms(self.penalties(), penalty))
    }
}

/// The base, doubled for every further penalty in a row, but no more than the maximum.
#[inline(always)]
const fn length_ms(penalties: u64, penalty: Penalty) -> u64 {
    let doublings = if penalties > 24 { 24 } else { penalties.saturating_sub(1) };
    let length = (penalty.base_ms as u64) << doublings;
    if length > penalty.max_ms as u64 { penalty.max_ms as u64 } else { length }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PENALTY: Penalty = Penalty { base_ms: 100, max_ms: 350 };

    #[test]
    fn a_backend_is_fit_until_it_is_ejected_and_due_when_the_penalty_is_over() {
        let word = HealthWord::default().failed().failed();
        assert_eq!((word.failures(), word.fitness(5)), (2, Fitness::Fit));
        let word = word.ejected(1000, PENALTY);
        assert_eq!(
            [1000, 1099, 1100].map(|now| word.fitness(now)),
            [Fitness::Ejected, Fitness::Ejected, Fitness::Due]
        );
    }

    #[test]
    fn one_connect_at_a_time_tries_it() {
        let word = HealthWord::default().ejected(0, PENALTY).tried(100, PENALTY);
        assert_eq!(
            (word.fitness(199), word.fitness(200), word.penalties()),
            (Fitness::Ejected, Fitness::Due, 1)
        );
    }

    #[test]
    fn penalties_double_up_to_the_maximum() {
        let mut word = HealthWord::default();
        for length in [100, 200, 350, 350] {
            word = word.ejected(7000, PENALTY);
            assert_eq!(word.until_ms(), 7000 + length);
        }
        for _ in 0..300 {
            word = word.ejected(7000, PENALTY);
        }
        assert_eq!((word.penalties(), word.until_ms()), (255, 7350));
    }

    #[test]
    fn failures_do_not_wrap() {
        let word = HealthWord(0xffff).failed();
        assert_eq!((word.failures(), word.is_ejected()), (0xffff, false));
    }
}
