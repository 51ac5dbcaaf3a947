//! Commands about checkpoints that are to be deleted, and one that is not.

use downpour_checkpoint::manifest::CHAIN_MAX;
use downpour_core::spec::{check_name, check_range};
use downpour_proto::Invalid;
use prost::Message;

use super::{check_checkpoint, check_uri};
use crate::state::deletions::Filed;

/// Most checkpoints in one command.
pub const CHECKPOINTS_MAX: usize = 256;

/// Checkpoints of one job in one place.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct CheckpointList {
    #[prost(string, tag = "1")]
    pub uri: String,
    /// Name of the job that they are of.
    #[prost(string, tag = "2")]
    pub of: String,
    #[prost(message, repeated, tag = "3")]
    pub checkpoints: Vec<CheckpointEntry>,
}

/// A checkpoint, and what it builds on where that matters.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)]
pub struct CheckpointEntry {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, repeated, tag = "2")]
    pub chain: Vec<String>,
}

/// See [`CheckpointList`]: each with what it builds on.
pub type Checkpoints = Vec<(Filed, Vec<Filed>)>;

impl TryFrom<CheckpointList> for Checkpoints {
    type Error = Invalid;

    fn try_from(list: CheckpointList) -> Result<Self, Invalid> {
        let CheckpointList { uri, of, checkpoints } = list;
        check_uri(&uri)?;
        check_name("of", &of)?;
        check_range("checkpoints", checkpoints.len() as u64, 1, CHECKPOINTS_MAX as u64)?;
        let filed = |name: String| {
            check_checkpoint(&name)?;
            Ok(Filed::new(&uri, &of, name))
        };
        let entry = |CheckpointEntry { name, chain }| {
            check_range("checkpoints.chain", chain.len() as u64, 0, CHAIN_MAX as u64)?;
            Ok((filed(name)?, chain.into_iter().map(filed).collect::<Result<_, Invalid>>()?))
        };
        checkpoints.into_iter().map(entry).collect()
    }
}

impl CheckpointList {
    /// Of checkpoints whose bases do not matter.
    pub fn of(uri: &str, of: &str, names: impl IntoIterator<Item = impl ToString>) -> Self {
        let entry =
            |name: _| CheckpointEntry { name: ToString::to_string(&name), chain: Vec::new() };
        let checkpoints = names.into_iter().map(entry).collect();
        CheckpointList { uri: uri.into(), of: of.into(), checkpoints }
    }
}
