//! Key → shard, and where each shard is.

use crate::id::{Epoch, ServerRef, ShardId};
use crate::mix::mix64;

/// The shard of a key (or of a block number of a dense variable). `salt` is [`crate::mix::salt`] of the name of the table's group, or of
/// the dense variable's name: one hot key in many tables does not land on one shard each time.
#[must_use]
pub fn shard_of(key: u64, salt: u64, shards: u32) -> ShardId {
    let scaled = u128::from(mix64(key ^ salt)) * u128::from(shards);
    ShardId((scaled >> 64) as u32)
}

/// Where a shard is: committed state of the coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRoute {
    /// Tenure of the primary.
    pub epoch: Epoch,
    /// Rises with every change of `in_sync`, of `joining` and of `moving`.
    pub set_version: u64,
    /// None when the shard is lost.
    pub primary: Option<ServerRef>,
    /// Members that must have a push before it is acknowledged, sorted; the primary is among them. Empty when the shard is lost.
    pub in_sync: Vec<ServerRef>,
    /// Who is to become a member: the primary copies the shard to it and then adds it. It is in no set, and counts for nothing until then.
    pub joining: Option<ServerRef>,
    /// A copy that is to move. How far that is follows from the rest: see [`ShardRoute::step`].
    pub moving: Option<Move>,
}

/// A copy of a shard that is to go from one server to another: the new one joins, becomes the primary if the old one was it, and then the old one leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Who holds it, and will not.
    pub from: ServerRef,
    /// Who will hold it.
    pub to: ServerRef,
}

/// What a move waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MoveStep {
    /// Its turn.
    Queued,
    /// The copy, and its addition to the in-sync set.
    Copying,
    /// The committed change of primary: up to here it can be undone.
    Promotion,
    /// The primary, which has the old one removed when it serves.
    Removal,
}

impl ShardRoute {
    /// What the move of this shard waits for; none if there is no move.
    #[must_use]
    pub fn step(&self) -> Option<MoveStep> {
        let Move { from, to } = self.moving?;
        Some(if !self.in_sync.contains(&to) {
            if self.joining == Some(to) { MoveStep::Copying } else { MoveStep::Queued }
        } else if self.primary == Some(from) {
            MoveStep::Promotion
        } else {
            MoveStep::Removal
        })
    }

    /// The member that the primary is to have removed, of a job that wants `replicas` copies. One that is still needed stays until another has joined.
    #[must_use]
    pub fn leaving(&self, replicas: u32) -> Option<ServerRef> {
        let spare = self.in_sync.len() > replicas as usize;
        let moving = self.moving.filter(|_| spare && self.step() == Some(MoveStep::Removal))?;
        self.in_sync.contains(&moving.from).then_some(moving.from)
    }

    /// The members without who is about to leave.
    pub fn staying(&self) -> impl Iterator<Item = ServerRef> + '_ {
        let arrived = self.moving.filter(|moving| self.in_sync.contains(&moving.to));
        let leaving = arrived.map(|moving| moving.from);
        self.in_sync.iter().copied().filter(move |member| Some(*member) != leaving)
    }

    /// Every member of the last in-sync set is known dead.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.primary.is_none()
    }

    /// The in-sync members but `server`.
    pub fn others(&self, server: ServerRef) -> impl Iterator<Item = ServerRef> + '_ {
        self.in_sync.iter().copied().filter(move |member| *member != server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_key_has_a_shard_below_the_count(key: u64, salt: u64, shards in 1u32..=65_536) {
            prop_assert!(shard_of(key, salt, shards).0 < shards);
        }
    }

    #[test]
    fn consecutive_keys_spread_over_all_shards_evenly() {
        let mut counts = [0u32; 64];
        for key in 0..64_000 {
            counts[shard_of(key, 7, 64).0 as usize] += 1;
        }
        assert!(counts.iter().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }
}
