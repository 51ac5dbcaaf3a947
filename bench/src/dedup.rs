//! The unique keys of a step. Neither set relies on the range of the ids.

use downpour_core::mix::mix64;

/// Unique keys in rising order, as the client wants them: `mix64` of each id.
///
/// Two passes of a radix sort order the keys by their upper [`SORTED_BITS`]; of evenly spread keys that leaves nearly none out of place, and they are put
/// right while equal ones are dropped. Before that, most of the ids that come often are dropped by a look at what was last in their slot. No step has a branch
/// that data decides (a hash set mispredicts one for every other key). The price: keys that are not spread evenly are put right one by one; `mix64` spreads.
#[derive(Debug, Default)]
pub struct SortedSet {
    recent: Vec<u32>,
    /// Keys in the order of the first pass, then of the second.
    passes: [Vec<u64>; 2],
}

/// Of the slots where ids are looked for that came just before: 32 KiB of them.
const RECENT_BITS: u32 = 13;

fn recent_slot(id: u32) -> usize {
    (id.wrapping_mul(0x9E37_79B1) >> (u32::BITS - RECENT_BITS)) as usize
}

/// Bits that one pass sorts by.
const PASS_BITS: u32 = 11;
/// Bits that are sorted by.
const SORTED_BITS: u32 = 2 * PASS_BITS;

type Counts = [u32; 1 << PASS_BITS];

impl SortedSet {
    /// Replaces `keys` by the unique keys of `ids`.
    pub fn keys_of(&mut self, ids: &[u32], keys: &mut Vec<u64>) {
        self.recent.clear();
        self.recent.resize(1 << RECENT_BITS, u32::MAX);
        // Else that id would look as if it had been there. The slot of 0 is another one.
        self.recent[recent_slot(u32::MAX)] = 0;
        let [_, all] = &mut self.passes;
        all.resize(ids.len(), 0);
        let mut count = 0;
        for &id in ids {
            let last = std::mem::replace(&mut self.recent[recent_slot(id)], id);
            // Written in any case, as below.
            all[count] = mix64(id.into());
            count += usize::from(last != id);
        }
        all.truncate(count);
        self.sort(keys);
    }

    /// Replaces `keys` by what is unique among those that are ready for the first pass.
    fn sort(&mut self, keys: &mut Vec<u64>) {
        let [first, second] = &mut self.passes;
        first.resize(second.len(), 0);
        let (lower, upper) = (u64::BITS - SORTED_BITS, u64::BITS - PASS_BITS);
        let mut counts: [Counts; 2] = [[0; 1 << PASS_BITS]; 2];
        for &key in &*second {
            counts[0][digit(key, lower)] += 1;
            counts[1][digit(key, upper)] += 1;
        }
        scatter(second, first, &mut counts[0], lower);
        scatter(first, second, &mut counts[1], upper);
        // Unique keys are gathered where the first pass was.
        let mut count = 0;
        let mut last = None;
        for &key in &*second {
            if last > Some(key) {
                if let Err(at) = first[..count].binary_search(&key) {
                    first[at..=count].rotate_right(1);
                    first[at] = key;
                    count += 1;
                }
                continue;
            }
            // Written in any case, so that there is no branch to mispredict; the next one overwrites one that is not new.
            first[count] = key;
            count += usize::from(last != Some(key));
            last = Some(key);
        }
        keys.clear();
        keys.extend_from_slice(&first[..count]);
    }
}

#[inline]
fn digit(key: u64, shift: u32) -> usize {
    (key >> shift) as usize % (1 << PASS_BITS)
}

/// Orders `from` by a digit into `to`; equal digits keep their order. `counts` holds how often each digit occurs.
fn scatter(from: &[u64], to: &mut [u64], counts: &mut Counts, shift: u32) {
    let mut start = 0;
    for count in counts.iter_mut() {
        start += std::mem::replace(count, start);
    }
    for &key in from {
        let cursor = &mut counts[digit(key, shift)];
        to[*cursor as usize] = key;
        *cursor += 1;
    }
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

        #[test]
        fn ids_at_both_ends_are_as_good_as_others(ids in vec(prop_oneof![0u32..3, u32::MAX - 3..=u32::MAX], 0..20)) {
            let mut keys = Vec::new();
            SortedSet::default().keys_of(&ids, &mut keys);
            let wanted: BTreeSet<u64> = ids.iter().map(|&id| mix64(id.into())).collect();
            prop_assert!(keys.into_iter().eq(wanted));
        }

        /// Keys that share their upper bits, the largest and zero: one chain holds them all.
        #[test]
        fn a_bad_spread_costs_time_and_nothing_else(
            near in vec(0u64..50, 0..60), far in vec(any::<u64>(), 0..60), high: bool,
        ) {
            let near = near.into_iter().map(|key| if high { u64::MAX - key } else { key });
            let all: Vec<u64> = near.chain(far).collect();
            let mut keys = Vec::new();
            let passes = [Vec::new(), all.clone()];
            SortedSet { passes, ..Default::default() }.sort(&mut keys);
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
