//! What a primary decides about a push, so that its record is closed (docs/protocol.md 2.3).

use bytes::Bytes;
use downpour_core::cells::{Refusal, RefusalReason};
use downpour_core::id::VariableId;
use downpour_core::optimizer::Staleness;
use downpour_proto::tensor::{KEY_BYTES, Keys};

use super::{Finite, ShardState, WithoutRoom};
use crate::record::{Change, Push, Read, Update};

/// One push takes the shard's clock at most so much further than it is. A shard of which no worker needs anything for longer catches up push by push; one that
/// names a clock that cannot be does not end the learning rates of all.
const CLOCK_JUMP_MAX: u64 = 1 << 16;

impl ShardState {
    /// How stale gradients are that were computed with what a pull had answered.
    #[must_use]
    pub fn staleness(&self, read: Read) -> Staleness {
        Staleness {
            clocks: self.clock.saturating_sub(read.clock),
            records: self.lineage.since(read.lsn),
        }
    }

    /// Decides everything about a push that is so stale: refused as a whole (its server may have said so), or which learning rate, step count and powers each
    /// update has, and which new keys fit into `room`, the bytes that new rows may take. Reads only.
    #[must_use]
    pub fn resolve(
        &self,
        mut push: Push,
        staleness: Staleness,
        room: u64,
    ) -> (Push, Option<WithoutRoom>) {
        if let Some(Refusal { reason, variable }) = push.refusal {
            return refused(push, reason, variable);
        }
        push.clock = push.clock.min(self.clock.saturating_add(CLOCK_JUMP_MAX));
        let clock = self.clock.max(push.clock);
        for update in &mut push.updates {
            let variable = update.variable;
            if let Err(reason) = self.check(variable, &update.change, Finite::Required) {
                return refused(push, reason, variable);
            }
            // What is contributed takes its step when the round is over.
            if let Some(variable) = self.variable(update.variable)
                && !matches!(update.change, Change::Contribution { .. })
            {
                update.step = variable.steps + 1;
                let optimizer = &variable.variable.spec.optimizer;
                update.scalars = optimizer.scalars_of_stale(update.step, clock, staleness);
            }
        }
        let late = self.drop_late(&mut push);
        if let Some(variable) = self.contributes_too_much(&push) {
            return refused(push, RefusalReason::RoundTooLarge, variable);
        }
        let without_room = self.admit(&mut push, room);
        push.refusal = late.or(push.refusal);
        (push, without_room)
    }

    /// Takes the new keys that do not fit into `room` out of a push, and has it say so.
    fn admit(&self, push: &mut Push, mut room: u64) -> Option<WithoutRoom> {
        let most = |update: &Update| match (self.table(update.variable), update.change.rows()) {
            (Some(table), Some((keys, _))) => Keys::trusted(keys).len() as u64 * table.row_cost(),
            _ => 0,
        };
        if push.updates.iter().map(most).sum::<u64>() <= room {
            return None;
        }
        let mut without_room: Option<WithoutRoom> = None;
        push.updates.retain_mut(|update| {
            let variable = update.variable;
            let (Some(table), Some((keys, gradients))) =
                (self.table(variable), update.change.rows_mut())
            else {
                return true;
            };
            let refused = table.without_room(Keys::trusted(keys), &mut room);
            let Some(&first) = refused.first() else { return true };
            let first = Keys::trusted(keys).iter().nth(first).unwrap_or_default();
            let sum = without_room.get_or_insert(WithoutRoom { keys: 0, first: (variable, first) });
            sum.keys += refused.len() as u64;
            // As many as there are keys: their bytes were checked against the table's row format.
            let row_bytes = gradients.len() / (keys.len() / KEY_BYTES);
            *keys = without(keys, KEY_BYTES, &refused);
            *gradients = without(gradients, row_bytes, &refused);
            !keys.is_empty()
        });
        push.refusal = without_room.map(|WithoutRoom { first: (variable, _), .. }| Refusal {
            reason: RefusalReason::MemoryLimit,
            variable,
        });
        without_room
    }
}

/// Consumed, and nothing of it applied.
fn refused(push: Push, reason: RefusalReason, variable: VariableId) -> (Push, Option<WithoutRoom>) {
    let refusal = Some(Refusal { reason, variable });
    (Push { refusal, updates: Vec::new(), ..push }, None)
}

/// Items of `width` bytes without those at `places`, which rise.
fn without(items: &[u8], width: usize, places: &[usize]) -> Bytes {
    let mut rest = Vec::with_capacity(items.len() - places.len() * width);
    let mut start = 0;
    for place in places {
        rest.extend_from_slice(&items[start..place * width]);
        start = (place + 1) * width;
    }
    rest.extend_from_slice(&items[start..]);
    rest.into()
}
