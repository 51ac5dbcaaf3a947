//! Once a shard goes on from a checkpoint, nobody acknowledges in an older epoch (docs/protocol.md 8.5): there is no fork.

use downpour_ps::inspect;

use crate::shared::Shared;

const PROMISE: &str = "who was set back acknowledges nothing more";

/// At any moment.
pub(crate) fn check(shared: &Shared) {
    if !shared.setting.sets_back {
        return;
    }
    let seen = shared.seen.borrow();
    let Some(job) = &seen.job else { return };
    let serving = inspect::acknowledging();
    for &(of, shard, epoch, server) in &serving {
        let back = job.orders.set_back_in(shard).filter(|_| of == job.job);
        let Some(back) = back.filter(|&back| epoch < back) else { continue };
        if let Some((.., newer)) =
            serving.iter().find(|one| (one.0, one.1, one.2) == (of, shard, back))
        {
            let how = format!("shard {shard}: {server} in epoch {epoch}, beside {newer} in {back}");
            shared.broken(PROMISE, how);
        }
    }
}
