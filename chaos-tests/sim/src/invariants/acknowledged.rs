//! Nothing acknowledged is lost, and nothing is applied twice (docs/protocol.md 10). What was rolled back with every copy of a shard is named, push by push.

use std::collections::BTreeMap;

use downpour_core::id::ShardId;

use crate::shared::{Dense, Shared};

const PROMISE: &str = "acknowledged pushes are there exactly once";

/// After everybody has read its rows back.
pub(crate) fn check(shared: &Shared) {
    let (mut acknowledged, mut unknown) = (0, 0);
    let mut rolled_back = BTreeMap::<ShardId, u64>::new();
    for (client, tally) in shared.tallies.borrow().iter().enumerate() {
        let named = if shared.setting.sets_back { tally.named } else { 0 };
        if tally.lost - named + tally.duplicated > 0 {
            shared.broken(PROMISE, format!("client {client}: {tally:?}"));
        }
        (acknowledged, unknown) = (acknowledged + tally.acknowledged, unknown + tally.unknown);
        for (shard, count) in &tally.rolled_back {
            *rolled_back.entry(*shard).or_default() += count;
        }
    }
    // Whole numbers, exact up to 2^24: each push of every client added 1 on every shard.
    for &(shard, counter) in shared.counters.borrow().iter() {
        let back = rolled_back.get(&shard).copied().unwrap_or(0);
        check_count(shared, shard, counter, (acknowledged, unknown, back));
    }
    match &*shared.dense.borrow() {
        None => shared.broken(PROMISE, "the dense variable was not read back"),
        Some(Dense { blocks, acknowledged, unknown, rolled_back }) => {
            for (shard, values) in blocks {
                let back = rolled_back.get(shard).copied().unwrap_or(0);
                for &value in values {
                    check_count(shared, *shard, value, (*acknowledged, *unknown, back));
                }
            }
        }
    }
}

/// What is rolled back and named is not there; of what has an unknown outcome nobody can say.
fn check_count(shared: &Shared, shard: ShardId, counted: f32, pushes: (u64, u64, u64)) {
    let (acknowledged, unknown, back) = pushes;
    let counted = counted as u64;
    let least = acknowledged.saturating_sub(back);
    if !(least..=(acknowledged + unknown).saturating_sub(back)).contains(&counted) {
        let pushes = format!("{acknowledged} acknowledged, {unknown} unknown, {back} rolled back");
        shared.broken(PROMISE, format!("shard {shard} counted {counted}: {pushes}"));
    }
}
