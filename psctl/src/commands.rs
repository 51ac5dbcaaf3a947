//! One module for each noun, one file for each verb.

pub(crate) mod bench;
pub(crate) mod checkpoint;
pub(crate) mod completions;
pub(crate) mod coordinator;
pub(crate) mod events;
pub(crate) mod export;
pub(crate) mod job;
pub(crate) mod local;
pub(crate) mod node;
pub(crate) mod scale;
pub(crate) mod shard;
pub(crate) mod status;
pub(crate) mod top;
pub(crate) mod verify;
pub(crate) mod worker;
