//! Sorted keys dealt to shards in one counting pass.

use downpour_core::id::ShardId;
use downpour_core::routing::shard_of;

use crate::Error;

/// Positions of the keys, shard after shard, rising within each: what is sorted before stays sorted on its shard.
#[derive(Debug)]
pub(crate) struct Partition {
    order: Vec<u32>,
    /// `order[starts[s]..starts[s + 1]]` belongs to shard s.
    starts: Vec<u32>,
}

impl Partition {
    /// Deals strictly increasing keys.
    pub(crate) fn new(keys: &[u64], salt: u64, shards: u32) -> Result<Self, Error> {
        if u32::try_from(keys.len()).is_err() {
            return Err(Error::invalid("keys", format!("{} are too many", keys.len())));
        }
        if let Some(at) = keys.windows(2).position(|pair| pair[0] >= pair[1]) {
            let problem = format!("must strictly increase, at position {}", at + 1);
            return Err(Error::invalid("keys", problem));
        }
        let homes: Vec<u32> = keys.iter().map(|&key| shard_of(key, salt, shards).0).collect();
        // Counted one to the right, summed, then used as cursors: afterwards each start has moved to its end, which is the next start.
        let mut starts = vec![0u32; shards as usize + 2];
        for &home in &homes {
            starts[home as usize + 2] += 1;
        }
        for shard in 2..starts.len() {
            starts[shard] += starts[shard - 1];
        }
        let mut order = vec![0; keys.len()];
        for (position, &home) in (0u32..).zip(&homes) {
            let cursor = &mut starts[home as usize + 1];
            order[*cursor as usize] = position;
            *cursor += 1;
        }
        starts.pop();
        Ok(Partition { order, starts })
    }

    /// Positions of the keys of one shard.
    pub(crate) fn on(&self, shard: ShardId) -> &[u32] {
        let at = shard.0 as usize;
        &self.order[self.starts[at] as usize..self.starts[at + 1] as usize]
    }

    /// The shards that have keys, rising.
    pub(crate) fn shards(&self) -> impl Iterator<Item = (ShardId, &[u32])> {
        let shards = (0..self.starts.len() as u32 - 1).map(ShardId);
        shards.map(|shard| (shard, self.on(shard))).filter(|(_, keys)| !keys.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_key_is_on_its_shard_once_and_in_order(
            keys: std::collections::BTreeSet<u64>, salt: u64, shards in 1u32..100,
        ) {
            let keys: Vec<u64> = keys.into_iter().collect();
            let partition = Partition::new(&keys, salt, shards).unwrap();
            let mut seen = 0;
            for (shard, positions) in partition.shards() {
                prop_assert!(positions.windows(2).all(|pair| pair[0] < pair[1]));
                for &position in positions {
                    prop_assert_eq!(shard_of(keys[position as usize], salt, shards), shard);
                }
                seen += positions.len();
            }
            prop_assert_eq!(seen, keys.len());
        }
    }

    #[test]
    fn keys_that_do_not_increase_are_refused_by_position() {
        let error = Partition::new(&[1, 3, 3], 0, 4).unwrap_err();
        assert_eq!(error.to_string(), "keys: must strictly increase, at position 2");
    }
}
