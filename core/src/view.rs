//! What the coordinator tells clients and servers.

use crate::cells::ClosedSessions;
use crate::checkpoint::Orders;
use crate::consistency::Consistency;
use crate::id::{JobId, ServerRef, ShardId, VariableId};
use crate::routing::ShardRoute;
use crate::spec::{JobSpec, Variable};

/// A job as clients and servers see it.
#[derive(Clone, Debug, PartialEq)]
pub struct JobView {
    /// Its number.
    pub job: JobId,
    /// What it was created with.
    pub spec: JobSpec,
    /// Rises with every change of this view.
    pub version: u64,
    /// In order of definition: variable `id` is at `id - 1`.
    pub variables: Vec<Variable>,
    /// One for each shard, in order.
    pub shards: Vec<ShardRoute>,
    /// Sessions that have ended.
    pub sessions: ClosedSessions,
    /// Of checkpoints.
    pub orders: Orders,
    /// How far its workers may drift apart.
    pub consistency: Consistency,
}

impl JobView {
    /// The variable of this number.
    #[must_use]
    pub fn variable(&self, id: VariableId) -> Option<&Variable> {
        self.variables.get((id.0 as usize).checked_sub(1)?)
    }

    /// Where `shard` is.
    #[must_use]
    pub fn route(&self, shard: ShardId) -> Option<&ShardRoute> {
        self.shards.get(shard.0 as usize)
    }
}

/// A server as clients and other servers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Its stable name.
    pub name: String,
    /// Its stable number and its newest life.
    pub server: ServerRef,
    /// host:port of its data plane.
    pub address: String,
    /// Where it stands: backups spread over zones.
    pub zone: String,
    /// False once this life was judged dead.
    pub alive: bool,
    /// Whether it is given copies.
    pub admission: Admission,
}

/// What an operator wants a server to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    /// What there is to hold.
    #[default]
    Open,
    /// What it holds, and nothing new.
    Cordoned,
    /// Nothing: what it holds moves away.
    Draining,
}
