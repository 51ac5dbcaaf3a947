//! Keys dealt to shards.

use downpour_core::id::ShardId;
use downpour_core::routing::shard_of;
use downpour_proto::tensor::Places;

use crate::Error;

/// The order of a table's keys in which those of one shard are neighbours. Keys of a pull or a push may come in any order; in this one rows are copied shard by shard as they lie.
/// In another they are gathered from all over memory, which for large batches costs more than all else that a client does; keys that do not even rise are sorted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrangement {
    /// Of the table's group ([`downpour_core::spec::VariableSpec::routing_salt`]).
    pub salt: u64,
    /// Of the job.
    pub shards: u32,
}

impl Arrangement {
    /// Arranges keys that are there once each. (Others stay as they are: a pull or a push says what is wrong with them.)
    pub fn arrange(self, keys: &mut Vec<u64>) {
        if let Ok(Partition { order: Some(order), .. }) = Partition::new(keys, self) {
            *keys = order.iter().map(|&at| keys[at as usize]).collect();
        }
    }

    fn home(self, key: u64) -> u32 {
        shard_of(key, self.salt, self.shards).0
    }

    /// Where the keys of each shard begin, and where those of the last one end; nothing unless they are arranged.
    fn starts(self, keys: &[u64]) -> Option<Vec<u32>> {
        let mut starts = vec![0; self.shards as usize + 1];
        let mut last = (0, None);
        for (at, &key) in (0u32..).zip(keys) {
            let home = self.home(key) as usize;
            if home < last.0 || home == last.0 && Some(key) <= last.1 {
                return None;
            }
            // Not counted: with neighbours on one shard each count would wait for the one before it.
            if home > last.0 {
                starts[last.0 + 1..=home].fill(at);
            }
            last = (home, Some(key));
        }
        starts[last.0 + 1..].fill(keys.len() as u32);
        Some(starts)
    }
}

/// Where the keys of each shard are, rising within each.
#[derive(Debug)]
pub(crate) struct Partition {
    /// Positions, shard after shard; nothing where the keys are arranged.
    order: Option<Vec<u32>>,
    /// Those from `starts[s]` to `starts[s + 1]` belong to shard s.
    starts: Vec<u32>,
}

impl Partition {
    /// Deals keys.
    ///
    /// # Errors
    /// One is there twice.
    pub(crate) fn new(keys: &[u64], arrangement: Arrangement) -> Result<Self, Error> {
        if u32::try_from(keys.len()).is_err() {
            return Err(Error::invalid("keys", format!("{} are too many", keys.len())));
        }
        if let Some(starts) = arrangement.starts(keys) {
            return Ok(Partition { order: None, starts });
        }
        let homes: Vec<u32> = keys.iter().map(|&key| arrangement.home(key)).collect();
        // Counted two to the right and summed: `starts[s + 1]` is where shard s begins.
        let mut starts = vec![0u32; arrangement.shards as usize + 2];
        for &home in &homes {
            starts[home as usize + 2] += 1;
        }
        for shard in 2..starts.len() {
            starts[shard] += starts[shard - 1];
        }
        let rising = || keys.windows(2).all(|pair| pair[0] < pair[1]);
        let order = if rising() {
            // What is sorted before stays sorted on its shard.
            let (mut order, mut cursors) = (vec![0; keys.len()], starts[1..].to_vec());
            for (position, &home) in (0u32..).zip(&homes) {
                let cursor = &mut cursors[home as usize];
                order[*cursor as usize] = position;
                *cursor += 1;
            }
            order
        } else {
            let key = |at: u32| keys[at as usize];
            let mut order: Vec<u32> = (0..keys.len() as u32).collect();
            order.sort_unstable_by_key(|&at| (homes[at as usize], key(at)));
            if let Some(pair) = order.windows(2).find(|pair| key(pair[0]) == key(pair[1])) {
                return Err(Error::invalid("keys", format!("{} is there twice", key(pair[0]))));
            }
            order
        };
        starts.remove(0);
        Ok(Partition { order: Some(order), starts })
    }

    /// Where the keys of one shard are.
    pub(crate) fn on(&self, shard: ShardId) -> Places<'_> {
        let at = shard.0 as usize;
        let range = self.starts[at] as usize..self.starts[at + 1] as usize;
        match &self.order {
            Some(order) => Places::At(&order[range]),
            None => Places::Range(range),
        }
    }

    /// The shards that have keys, rising.
    pub(crate) fn shards(&self) -> impl Iterator<Item = (ShardId, Places<'_>)> {
        let shards = (0..self.starts.len() as u32 - 1).map(ShardId);
        shards.map(|shard| (shard, self.on(shard))).filter(|(_, places)| !places.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_key_is_on_its_shard_once_and_in_order_however_they_come(
            keys: std::collections::BTreeSet<u64>, salt: u64, shards in 1u32..100,
        ) {
            let arrangement = Arrangement { salt, shards };
            let rising: Vec<u64> = keys.into_iter().collect();
            let mut arranged = rising.clone();
            arrangement.arrange(&mut arranged);
            let mut expected = rising.clone();
            expected.sort_by_key(|&key| (shard_of(key, salt, shards), key));
            prop_assert_eq!(&arranged, &expected);
            let falling: Vec<u64> = rising.iter().rev().copied().collect();
            for keys in [rising, falling, arranged] {
                let partition = Partition::new(&keys, arrangement).unwrap();
                let mut dealt = Vec::new();
                for (shard, places) in partition.shards() {
                    let here: Vec<u64> = match places {
                        Places::Range(range) => keys[range].to_vec(),
                        Places::At(positions) => positions.iter().map(|&at| keys[at as usize]).collect(),
                    };
                    prop_assert!(here.windows(2).all(|pair| pair[0] < pair[1]));
                    prop_assert!(here.iter().all(|&key| shard_of(key, salt, shards) == shard));
                    dealt.extend(here);
                }
                prop_assert_eq!(&dealt, &expected);
            }
        }
    }

    #[test]
    fn a_key_that_is_there_twice_is_named() {
        for keys in [[1, 3, 3], [3, 1, 3]] {
            let error = Partition::new(&keys, Arrangement { salt: 0, shards: 4 }).unwrap_err();
            assert_eq!(error.to_string(), "keys: 3 is there twice");
        }
    }
}
