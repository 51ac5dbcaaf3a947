//! Nothing acknowledged is lost, and nothing is applied twice (docs/protocol.md 10).

use crate::shared::Shared;

const PROMISE: &str = "acknowledged pushes are there exactly once";

/// After everybody has read its rows back.
pub(crate) fn check(shared: &Shared) {
    let (mut acknowledged, mut unknown) = (0, 0);
    for (client, tally) in shared.tallies.borrow().iter().enumerate() {
        if tally.lost + tally.duplicated > 0 {
            shared.broken(PROMISE, format!("client {client}: {tally:?}"));
        }
        (acknowledged, unknown) = (acknowledged + tally.acknowledged, unknown + tally.unknown);
    }
    // Whole numbers, exact up to 2^24: each push of every client added 1 on every shard.
    for (shard, counter) in shared.counters.borrow().iter().enumerate() {
        let counter = *counter as u64;
        if !(acknowledged..=acknowledged + unknown).contains(&counter) {
            let pushes = format!("{acknowledged} acknowledged, {unknown} unknown");
            shared.broken(PROMISE, format!("shard {shard} counted {counter}: {pushes}"));
        }
    }
}
