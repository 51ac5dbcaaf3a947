//! All members of an in-sync set hold the same, bit for bit (docs/protocol.md 2.6).

use std::collections::BTreeMap;

use downpour_ps::inspect;
use prometheus::proto::MetricFamily;

use crate::shared::Shared;

const PROMISE: &str = "members of an in-sync set are equal";
const DIFFERING: &str = "downpour_ps_differing_members_total";

/// In the end, when nobody pushes.
pub(crate) fn check(shared: &Shared) {
    let seen = shared.seen.borrow();
    let Some(job) = &seen.job else { return };
    let mut of_shards = BTreeMap::<_, Vec<_>>::new();
    for replica in inspect::replicas() {
        let route = job.route(replica.shard).filter(|_| replica.job == job.job);
        if route.is_some_and(|route| route.in_sync.contains(&replica.server)) {
            of_shards.entry(replica.shard).or_default().push(replica);
        }
    }
    for (shard, members) in of_shards {
        let same = |pair: &[inspect::Replica]| {
            (pair[0].last, pair[0].digest) == (pair[1].last, pair[1].digest)
        };
        if members.len() != shared.replicas as usize || !members.windows(2).all(same) {
            shared.broken(PROMISE, format!("shard {shard}: {members:?}"));
        }
    }
}

/// Before a server dies, and in the end: what members found when they compared a sample themselves.
pub(crate) fn found_none_that_differs(shared: &Shared, server: &str) {
    let registries = shared.registries.borrow();
    let Some(registry) = registries.get(server) else { return };
    let families = registry.gather();
    let differing = families.iter().filter(|family| family.name() == DIFFERING);
    let counts =
        differing.flat_map(MetricFamily::get_metric).map(|one| one.get_counter().get_value());
    let count: f64 = counts.sum();
    if count > 0.0 {
        shared.broken(PROMISE, format!("{server} found {count} members that differ"));
    }
}
