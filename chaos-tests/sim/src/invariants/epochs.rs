//! Epochs rise, and each has one primary: in what is committed, and in what servers believe (docs/protocol.md 1.2).

use std::collections::BTreeMap;

use downpour_core::id::{Epoch, JobId, ServerRef};
use downpour_core::view::JobView;
use downpour_ps::inspect;

use crate::shared::Shared;

const PROMISE: &str = "an epoch has one primary and never comes back";

/// Of every committed view that is seen.
pub(crate) fn committed(
    primaries: &mut BTreeMap<(JobId, usize, Epoch), ServerRef>,
    old: Option<&JobView>,
    view: &JobView,
    shared: &Shared,
) {
    for (shard, route) in view.shards.iter().enumerate() {
        let before = old.and_then(|old| old.shards.get(shard));
        if let Some(before) = before
            && (before.epoch, before.set_version) > (route.epoch, route.set_version)
        {
            shared.broken(PROMISE, format!("shard {shard}: {before:?} became {route:?}"));
        }
        let Some(primary) = route.primary else {
            shared.broken(
                "a shard whose members do not all die is not lost",
                format!("shard {shard}: {before:?}"),
            );
            continue;
        };
        let known = *primaries.entry((view.job, shard, route.epoch)).or_insert(primary);
        if known != primary {
            let how = format!("shard {shard}, epoch {}: {known} and {primary}", route.epoch);
            shared.broken(PROMISE, how);
        }
    }
}

/// At any moment.
pub(crate) fn serving(seen: &mut BTreeMap<(JobId, u32, Epoch), ServerRef>, shared: &Shared) {
    for (job, shard, epoch, server) in inspect::serving() {
        let known = *seen.entry((job, shard.0, epoch)).or_insert(server);
        if known != server {
            let how = format!("shard {shard}, epoch {epoch}: {known} and {server} serve");
            shared.broken(PROMISE, how);
        }
    }
}
