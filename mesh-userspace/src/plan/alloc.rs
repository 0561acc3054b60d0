//! Which ids and slots are free.

use std::collections::{BTreeMap, BTreeSet};

/// The allocators of one set of maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alloc {
    pub services: Ids,
    pub backends: Ids,
    pub slots: Ranges,
}

/// Ids from 1 up: a zeroed slot or frontend then never names an entry that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    entries: u32,
    /// No id from here on has been handed out.
    fresh: u32,
    returned: BTreeSet<u32>,
}

impl Ids {
    /// For a map of `entries`, of which those in `used` are taken.
    pub fn new(entries: u32, used: &BTreeSet<u32>) -> Self {
        let fresh = used.last().map_or(1, |last| last + 1);
        let returned = (1..fresh).filter(|id| !used.contains(id)).collect();
        Self { entries, fresh, returned }
    }

    pub fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.returned.pop_first() {
            return Some(id);
        }
        (self.fresh < self.entries).then(|| {
            self.fresh += 1;
            self.fresh - 1
        })
    }

    /// Marks an id as used that [`take`](Self::take) of a clone handed out.
    pub fn claim(&mut self, id: u32) {
        if id >= self.fresh {
            self.returned.extend(self.fresh..id);
            self.fresh = id + 1;
        }
        self.returned.remove(&id);
    }

    pub fn give_back(&mut self, id: u32) {
        self.returned.insert(id);
    }

    /// How many ids there are in all.
    pub fn max(&self) -> u32 {
        self.entries.saturating_sub(1)
    }

    pub fn used(&self) -> u32 {
        self.fresh - 1 - u32::try_from(self.returned.len()).expect("ids are 32-bit")
    }

    pub fn free(&self) -> u32 {
        self.max().saturating_sub(self.used())
    }
}

/// Contiguous ranges: first fit over the free ones, neighbours joined when given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges {
    entries: u32,
    /// Free ranges: first index → length.
    free: BTreeMap<u32, u32>,
}

impl Ranges {
    /// For a map of `entries`, all free.
    pub fn new(entries: u32) -> Self {
        Self { entries, free: BTreeMap::from([(0, entries)]) }
    }

    /// A range of `len`; an empty one is always to be had, at 0.
    pub fn take(&mut self, len: u32) -> Option<u32> {
        if len == 0 {
            return Some(0);
        }
        let base = *self.free.iter().find(|(_, free)| **free >= len)?.0;
        self.claim(base, len);
        Some(base)
    }

    /// Marks a range as used; false if part of it already is.
    pub fn claim(&mut self, base: u32, len: u32) -> bool {
        if len == 0 {
            return true;
        }
        let Some((&start, &free)) = self.free.range(..=base).next_back() else {
            return false;
        };
        let (end, free_end) = (base + len, start + free);
        if end > free_end {
            return false;
        }
        self.free.remove(&start);
        if start < base {
            self.free.insert(start, base - start);
        }
        if end < free_end {
            self.free.insert(end, free_end - end);
        }
        true
    }

    pub fn give_back(&mut self, mut base: u32, mut len: u32) {
        if len == 0 {
            return;
        }
        if let Some((&before, &free)) = self.free.range(..base).next_back()
            && before + free == base
        {
            self.free.remove(&before);
            (base, len) = (before, len + free);
        }
        if let Some(after) = self.free.remove(&(base + len)) {
            len += after;
        }
        self.free.insert(base, len);
    }

    pub fn max(&self) -> u32 {
        self.entries
    }

    pub fn used(&self) -> u32 {
        self.entries - self.free.values().sum::<u32>()
    }

    /// The longest free range.
    pub fn longest(&self) -> u32 {
        self.free.values().copied().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_start_at_one_and_end_with_the_map() {
        let mut ids = Ids::new(4, &BTreeSet::new());
        assert_eq!((ids.max(), ids.free()), (3, 3));
        assert_eq!([(); 4].map(|()| ids.take()), [Some(1), Some(2), Some(3), None]);
        ids.give_back(2);
        assert_eq!((ids.used(), ids.take()), (2, Some(2)));
    }

    #[test]
    fn ids_in_use_are_not_handed_out() {
        let mut ids = Ids::new(6, &BTreeSet::from([2, 4]));
        assert_eq!([(); 4].map(|()| ids.take()), [Some(1), Some(3), Some(5), None]);
    }

    proptest! {
        /// No two ranges overlap, and when all are back there is one free range again.
        #[test]
        fn ranges_never_overlap(steps in prop::collection::vec((any::<bool>(), 0u32..9, any::<prop::sample::Index>()), 1..200)) {
            let mut ranges = Ranges::new(64);
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, len, which) in steps {
                if take {
                    if let Some(base) = ranges.take(len) {
                        prop_assert!(base + len <= 64);
                        for (other, size) in &taken {
                            prop_assert!(base + len <= *other || other + size <= base || len == 0 || *size == 0);
                        }
                        taken.push((base, len));
                    }
                } else if !taken.is_empty() {
                    let (base, len) = taken.swap_remove(which.index(taken.len()));
                    ranges.give_back(base, len);
                }
                prop_assert_eq!(ranges.used(), taken.iter().map(|(_, len)| len).sum::<u32>());
            }
            for (base, len) in taken {
                ranges.give_back(base, len);
            }
            prop_assert_eq!(ranges, Ranges::new(64));
        }
    }
}
