//! What a job's view says of checkpoints.

use std::collections::BTreeMap;

use crate::id::{Epoch, Lsn, SessionId, ShardId};

/// What is asked of those who take part in a job: primaries, those who restore, workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// A checkpoint is being taken.
    pub checkpoint: Option<CheckpointOrder>,
    /// The job began from one.
    pub restore: Option<RestoreOrder>,
    /// Shards that were lost and begin again from one, each in its newest such epoch.
    pub set_back: Vec<SetBack>,
    /// Workers begin no further step.
    pub paused: bool,
    /// Sessions that an operator closed, the newest last: at most [`Orders::EVICTED_MAX`].
    pub evicted: Vec<SessionId>,
}

impl Orders {
    /// How many are remembered: for their workers to say why they end.
    pub const EVICTED_MAX: usize = 64;

    /// What the primary of [`RestoreOrder::epoch`] loads a shard from.
    #[must_use]
    pub fn restore_of(&self, shard: ShardId) -> Option<RestoreOrder> {
        let again = self.set_back.iter().find_map(|back| {
            let epoch = *back.shards.get(&shard)?;
            let SetBack { uri, job, checkpoint, .. } = back.clone();
            Some(RestoreOrder { uri, job, checkpoint, epoch })
        });
        again.or_else(|| self.restore.clone())
    }

    /// The epoch in which a shard was last set back to a checkpoint of its job.
    #[must_use]
    pub fn set_back_in(&self, shard: ShardId) -> Option<Epoch> {
        self.set_back.iter().find_map(|back| back.shards.get(&shard).copied())
    }

    /// Takes note that shards are set back, which they may have been before.
    pub fn set_back(&mut self, mut back: SetBack) {
        for known in &mut self.set_back {
            known.shards.retain(|shard, _| !back.shards.contains_key(shard));
            if (&known.uri, &known.checkpoint) == (&back.uri, &back.checkpoint) {
                back.shards.append(&mut known.shards);
            }
        }
        self.set_back.retain(|known| !known.shards.is_empty());
        self.set_back.push(back);
    }
}

/// Shards of a job that go on from what a checkpoint holds of them; all pushes since are rolled back (docs/protocol.md 8.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetBack {
    /// Where the checkpoint is.
    pub uri: String,
    /// Name of the job that it is of.
    pub job: String,
    /// Its name.
    pub checkpoint: String,
    /// The epoch that each begins with.
    pub shards: BTreeMap<ShardId, Epoch>,
}

/// A checkpoint that is being taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointOrder {
    /// Where.
    pub uri: String,
    /// Its name.
    pub checkpoint: String,
    /// Of each shard in order: what is newer than this; empty: everything.
    pub newer_than: Vec<Lsn>,
}

/// What a job began from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreOrder {
    /// Where it is.
    pub uri: String,
    /// Name of the job that it is of.
    pub job: String,
    /// Its name.
    pub checkpoint: String,
    /// The primary of this epoch loads its shard; later ones have it from there.
    pub epoch: Epoch,
}
