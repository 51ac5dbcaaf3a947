//! What a job's view says of checkpoints.

use crate::id::{Epoch, Lsn};

/// What primaries and those who restore are to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// A checkpoint is being taken.
    pub checkpoint: Option<CheckpointOrder>,
    /// The job began from one.
    pub restore: Option<RestoreOrder>,
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
