//! How large the state may grow: a snapshot of it must fit into one message, with room to spare.

use downpour_core::checkpoint::SetBack;
use downpour_core::ledger::{OUT_MAX, Plan};
use prost::Message as _;

use super::checkpoints::SAVED_BYTES;
use super::events::EVENTS_BYTES;
use super::{Job, Refused, State};

/// Above this nothing new is taken.
const STATE_BYTES_MAX: usize = 48 << 20;

// Upper bounds of what one of each takes in a snapshot; the names are bounded where they enter.
pub(super) const NODE_BYTES: usize = 1080;
pub(super) const JOB_BYTES: usize = 2048;
pub(super) const SHARD_BYTES: usize = 96;
/// A shard that moves has one member more besides.
const MOVE_BYTES: usize = 72;
pub(super) const VARIABLE_BYTES: usize = 640;
pub(super) const SESSION_BYTES: usize = 320;
const REQUEST_BYTES: usize = 320;
const LABEL_BYTES: usize = 16;
/// In its order, and as one of those that were since all were.
const SET_BACK_SHARD_BYTES: usize = 30;
const LEDGER_BYTES: usize = 512;
/// A task that is out, a range of its own.
const TASK_BYTES: usize = 12;
/// What a worker has beside its tasks.
const HOLDER_BYTES: usize = 48;

/// What a label takes in a snapshot.
pub(super) fn label_bytes(key: &str, value: &str) -> usize {
    key.len() + value.len() + LABEL_BYTES
}

/// A number.
const EVICTED_BYTES: usize = 11;
/// Of the group of coordinators, with its address.
const MEMBER_BYTES: usize = 320;
/// What the tasks of a job take at most.
pub(super) fn ledger_bytes(plan: &Plan) -> usize {
    LEDGER_BYTES + OUT_MAX.min(plan.tasks as usize) * TASK_BYTES
}

fn set_back_bytes(back: &SetBack) -> usize {
    let SetBack { uri, job, checkpoint, shards } = back;
    let texts = uri.len() + job.len() + checkpoint.len();
    texts + LABEL_BYTES + shards.len() * SET_BACK_SHARD_BYTES
}

impl Job {
    fn bytes_max(&self) -> usize {
        JOB_BYTES
            + self.view.shards.len() * SHARD_BYTES
            + self.view.shards.iter().filter(|route| route.moving.is_some()).count() * MOVE_BYTES
            + self.view.variables.len() * VARIABLE_BYTES
            + (self.sessions.len() + self.view.sessions.open.len()) * SESSION_BYTES
            + self.sessions.len() * HOLDER_BYTES
            + self.checkpoints.encoded_len()
            + self.view.orders.checkpoint.as_ref().map_or(0, |open| {
                self.view.shards.len() * SAVED_BYTES + open.newer_than.len() * size_of::<u64>()
            })
            + self.view.orders.set_back.iter().map(set_back_bytes).sum::<usize>()
            + self.view.orders.evicted.len() * EVICTED_BYTES
            + self.labels.iter().map(|(key, value)| label_bytes(key, value)).sum::<usize>()
    }
}

impl State {
    /// An upper bound of the bytes of a snapshot.
    pub(super) fn bytes_max(&self) -> usize {
        NODE_BYTES
            + EVENTS_BYTES
            + self.cluster.members.list.len() * MEMBER_BYTES
            + self.cluster.nodes.len() * NODE_BYTES
            + self.cluster.jobs.values().map(|job| job.bytes_max()).sum::<usize>()
            + self.requests.len() * REQUEST_BYTES
            + self.cluster.deletions.bytes_max()
            + self.cluster.ledgers.values().map(|one| ledger_bytes(one.plan())).sum::<usize>()
    }

    /// Refuses what would make the state too large.
    pub(super) fn check_room(&self, more: usize) -> Result<(), Refused> {
        let bytes = self.bytes_max() + more;
        if bytes <= STATE_BYTES_MAX {
            return Ok(());
        }
        Err(Refused::FailedPrecondition(format!(
            "the state of the cluster would take {bytes} bytes, and it may take {STATE_BYTES_MAX}: \
             delete jobs that nobody needs"
        )))
    }
}
