//! The unique keys of a step. Neither set relies on the range of the ids.

use downpour_core::mix::mix64;

/// Unique keys in rising order, as the client wants them: `mix64` of each id.
///
/// A hash table whose hash is the key's upper bits and whose chains are kept sorted, so that reading the table from one end to the other
/// gives the keys in order and nothing is sorted afterwards. The price: keys that are not spread evenly make long chains; `mix64` spreads.
#[derive(Debug, Default)]
pub struct SortedSet {
    /// All 0 between calls, which means free: the key 0 is kept apart.
    slots: Vec<u64>,
    /// Room for the keys while they are read out; what is in it means nothing between calls.
    found: Vec<u64>,
}

impl SortedSet {
    /// Replaces `keys` by the unique keys of `ids`.
    pub fn keys_of(&mut self, ids: &[u32], keys: &mut Vec<u64>) {
        self.collect(ids.iter().map(|&id| mix64(id.into())), keys);
    }

    fn collect(&mut self, all: impl ExactSizeIterator<Item = u64>, keys: &mut Vec<u64>) {
        let homes = all.len().next_power_of_two().max(2);
        let shift = u64::BITS - homes.trailing_zeros();
        // The chain of the last home may need a slot for each key, and ends with a free one.
        let needed = homes + all.len() + 1;
        if self.slots.len() < needed {
            self.slots.resize(needed, 0);
        }
        if self.found.len() < all.len() + 2 {
            self.found.resize(all.len() + 2, 0);
        }
        let (mut zero, mut end) = (false, homes);
        for key in all {
            if key == 0 {
                zero = true;
            } else {
                let home = (key >> shift) as usize;
                end = end.max(home + 1 + insert(&mut self.slots[home..], key));
            }
        }
        let mut count = usize::from(zero);
        for slot in &mut self.slots[..end] {
            // Written in any case, so that there is no branch to mispredict; the next one overwrites a free slot's.
            self.found[count] = *slot;
            count += usize::from(*slot != 0);
            *slot = 0;
        }
        if zero {
            self.found[0] = 0;
        }
        keys.clear();
        keys.extend_from_slice(&self.found[..count]);
    }
}

/// Keeps: a key lies at or after its home, the first of `slots`, no slot between is free, and keys rise with their slots. Returns the last slot that it
/// looked at.
#[inline]
fn insert(slots: &mut [u64], mut key: u64) -> usize {
    for (at, slot) in slots.iter_mut().enumerate() {
        if *slot == key {
            return at;
        }
        if *slot == 0 {
            *slot = key;
            return at;
        }
        if *slot > key {
            // From here on everything moves by one; the next free slot ends it. A larger key is never equal to a later one.
            std::mem::swap(slot, &mut key);
        }
    }
    unreachable!("the table has a free slot behind every key")
}

/// Unique ids in the order of their first appearance, which is enough for the floor.
#[derive(Debug)]
pub struct HashSet {
    slots: Vec<(u64, u32)>,
    /// Slots of another generation are free.
    generation: u32,
}

const HASH_BITS: u32 = 16;

impl HashSet {
    /// Room for the ids of a step: half of 65,536 slots.
    pub const IDS_MAX: usize = 1 << (HASH_BITS - 1);

    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self { slots: vec![(0, 0); 1 << HASH_BITS], generation: 0 }
    }

    /// Replaces `unique` by the unique ids among `ids`, of which there are at most [`Self::IDS_MAX`].
    pub fn ids_of(&mut self, ids: &[u32], unique: &mut Vec<u64>) {
        assert!(ids.len() <= Self::IDS_MAX, "ids of one step");
        self.generation = self.generation.wrapping_add(1);
        if self.generation == 0 {
            self.slots.fill((0, 0));
            self.generation = 1;
        }
        unique.clear();
        for &id in ids {
            let id = u64::from(id);
            let mut at =
                (id.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (u64::BITS - HASH_BITS)) as usize;
            while self.slots[at].1 == self.generation && self.slots[at].0 != id {
                at = (at + 1) % (1 << HASH_BITS);
            }
            if self.slots[at].1 != self.generation {
                self.slots[at] = (id, self.generation);
                unique.push(id);
            }
        }
    }
}

impl Default for HashSet {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_are_unique_and_rise(batches in vec(vec(0u32..300, 0..400), 1..4)) {
            let mut set = SortedSet::default();
            let mut keys = vec![7];
            for ids in batches {
                set.keys_of(&ids, &mut keys);
                let wanted: BTreeSet<u64> = ids.iter().map(|&id| mix64(id.into())).collect();
                prop_assert!(keys.iter().copied().eq(wanted));
            }
        }

        /// Keys that share their upper bits, the largest and zero: one chain holds them all.
        #[test]
        fn a_bad_spread_costs_time_and_nothing_else(
            near in vec(0u64..50, 0..60), far in vec(any::<u64>(), 0..60), high: bool,
        ) {
            let near = near.into_iter().map(|key| if high { u64::MAX - key } else { key });
            let all: Vec<u64> = near.chain(far).collect();
            let mut keys = Vec::new();
            SortedSet::default().collect(all.iter().copied(), &mut keys);
            prop_assert!(keys.into_iter().eq(all.into_iter().collect::<BTreeSet<u64>>()));
        }

        #[test]
        fn a_hash_set_keeps_the_first_of_each(batches in vec(vec(0u32..300, 0..400), 1..4)) {
            let mut set = HashSet::new();
            let mut unique = Vec::new();
            for ids in batches {
                set.ids_of(&ids, &mut unique);
                let mut seen = BTreeSet::new();
                let wanted = ids.iter().map(|&id| u64::from(id)).filter(|&id| seen.insert(id));
                prop_assert!(unique.iter().copied().eq(wanted));
            }
        }
    }
}
