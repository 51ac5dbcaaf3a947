//! A worker's way to the parameters: through the client of a cluster, or over the floor's bare socket.

mod cluster;
mod floor;

pub(crate) use cluster::Cluster;
pub(crate) use floor::Floor;

use crate::protocol::{Command, Inbox};

/// What S asks. Every call returns when it is done.
pub(crate) trait SparsePeer: Worker {
    /// The key under which row `id` is kept.
    fn key(&self, id: u32) -> u64;

    /// Whether rows exist only once they were pushed.
    fn begins_empty(&self) -> bool;

    /// Replaces `keys` by the unique keys of `ids`, in the order that this peer wants.
    fn unique(&mut self, ids: &[u32], keys: &mut Vec<u64>);

    /// Reads the rows of unique keys.
    fn pull(&mut self, keys: &[u64], rows: &mut [f32]) -> anyhow::Result<()>;

    /// Applies one gradient row for each unique key, and waits for the acknowledgement.
    fn push(&mut self, keys: &[u64], gradients: &[f32]) -> anyhow::Result<()>;
}

/// What D asks. Every call returns when it is done.
pub(crate) trait DensePeer: Worker {
    /// Reads all floats; they are then in the returned slice, which may be `room`.
    fn pull<'a>(&'a mut self, room: &'a mut [f32]) -> anyhow::Result<&'a [f32]>;

    /// Applies a whole gradient, and waits for the acknowledgement.
    fn push(&mut self, gradient: &[f32]) -> anyhow::Result<()>;
}

/// What both are.
pub(crate) trait Worker {
    /// The next command; `None` at the end. What a peer does in the background goes on meanwhile.
    fn next_command(&mut self, inbox: &mut Inbox) -> anyhow::Result<Option<Command>>;

    /// Removes what this worker made outside.
    fn clean_up(&mut self) -> anyhow::Result<()>;
}
