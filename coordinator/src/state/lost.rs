//! Shards whose last copy is gone, and that go on from a checkpoint of their job (protocol 4.4, 8.5): which, on whom, and the step that does it.

use std::collections::{BTreeMap, BTreeSet};

use downpour_core::checkpoint::SetBack;
use downpour_core::id::{Epoch, JobId, ServerRef, ShardId, VariableId};
use downpour_core::ledger::Ledger;
use downpour_core::placement::replacement;
use downpour_core::routing::ShardRoute;

use super::{Cluster, Life, Outcome, Reply, State};

/// Most shards in one command; the rest follows.
const LIST_MAX: usize = 1000;

/// A shard without a copy that can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub struct Lost {
    pub job: JobId,
    pub shard: ShardId,
    /// Of the tenure in which it was lost.
    pub epoch: Epoch,
    /// Who has the last copy, if it may only be unreachable. None: every copy is known to be gone.
    pub last: Option<Last>,
}

/// A member of a lost shard's set that is not heard, without which no former primary can acknowledge anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub struct Last {
    pub server: ServerRef,
    /// Position in the log at which it was judged. One that was heard in between is waited for anew.
    pub judged: u64,
    /// Cut off for so long, it acknowledges nothing; 0: no bound.
    pub isolation_ms: u64,
}

/// A shard that is to begin again on `server`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Again {
    pub shard: ShardId,
    /// Of the tenure in which it was lost: another one, and it is not lost (so) any more.
    pub epoch: Epoch,
    pub server: ServerRef,
    /// See [`Last::judged`]; 0: nobody was waited for.
    pub judged: u64,
}

/// See [`State::set_back`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingBack {
    /// Whose shards.
    pub job: JobId,
    /// The checkpoint; its epochs are given where it is applied.
    pub from: SetBack,
    /// Epochs below this one are in the checkpoint.
    pub epoch_min: Epoch,
    /// Which shards, by rising number.
    pub shards: Vec<Again>,
    /// What the job's labels were when the checkpoint began.
    pub labels: BTreeMap<String, String>,
    /// Dense variables that had their first values then.
    pub initialized: Vec<VariableId>,
    /// What the job's tasks were then.
    pub ledger: Option<Ledger>,
}

/// Which shards of a job were set back to one checkpoint since all of them last were: a shard that is lost after that takes no tasks back that were trained meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Back {
    pub(super) checkpoint: String,
    pub(super) shards: BTreeSet<ShardId>,
}

impl Back {
    /// Whether all `count` are at the checkpoint with these.
    fn takes(
        &mut self,
        checkpoint: &str,
        shards: impl Iterator<Item = ShardId>,
        count: usize,
    ) -> bool {
        if self.checkpoint != checkpoint {
            *self = Back { checkpoint: checkpoint.into(), shards: BTreeSet::new() };
        }
        self.shards.extend(shards);
        let all = self.shards.len() == count;
        if all {
            *self = Back::default();
        }
        all
    }
}

/// What is lost, in order.
#[must_use]
pub fn lost(cluster: &Cluster) -> Vec<Lost> {
    let mut found = Vec::new();
    for (&job, entry) in &cluster.jobs {
        for (shard, route) in (0..).map(ShardId).zip(&entry.view.shards) {
            if is_lost(cluster, route) {
                let last = route.primary.and_then(|server| {
                    let node = cluster.nodes.get(&server.node)?;
                    Some(Last { server, judged: node.version, isolation_ms: node.isolation_ms })
                });
                found.push(Lost { job, shard, epoch: route.epoch, last });
            }
        }
    }
    found
}

/// A primary that was judged dead and that nobody could succeed is the last copy.
fn is_lost(cluster: &Cluster, route: &ShardRoute) -> bool {
    route.primary.is_none_or(|primary| cluster.life(primary) != Life::Alive)
}

/// Servers for lost shards of one job: none of those that held them.
#[must_use]
pub fn place(cluster: &Cluster, lost: &[Lost]) -> Vec<Again> {
    let mut candidates = cluster.candidates();
    let mut placed = Vec::new();
    for lost in lost.iter().take(LIST_MAX) {
        let job = cluster.job(lost.job);
        let Some(route) = job.and_then(|job| job.view.route(lost.shard)) else { continue };
        let server = replacement(&candidates, &candidates, &route.in_sync, None);
        let Some(server) = server else { continue };
        if let Some(candidate) = candidates.iter_mut().find(|one| one.server == server) {
            candidate.copies += 1;
        }
        let judged = lost.last.map_or(0, |last| last.judged);
        placed.push(Again { shard: lost.shard, epoch: lost.epoch, server, judged });
    }
    placed
}

impl State {
    /// Shards get a primary that loads them from a checkpoint, alone in its set, in an epoch above all that the shard and the checkpoint have seen. What is not lost (so)
    /// any more is passed over, and so is what is based on a checkpoint that is not the newest any more (it may be deleted), or on a dense variable that has got its
    /// first values meanwhile. Who was giving a variable its first values is not to say that they are there: some may be gone. A checkpoint that is being taken is given up: it may hold what is rolled back here. Where with these every shard was set back to the checkpoint, one after the other or
    /// at once, so are the labels and the tasks: workers go on from what was done then.
    pub(super) fn set_back(&mut self, setting: SettingBack) -> Outcome {
        let SettingBack { job: id, from, epoch_min, shards, labels, initialized, ledger } = setting;
        let job = self.job(id)?;
        let newest = job.newest_checkpoint() == Some((&*from.uri, &*from.job, &*from.checkpoint));
        if !newest || job.initialized_since(&initialized).is_some() {
            return Ok(Reply::Done);
        }
        let mut routes = BTreeMap::new();
        for again in shards {
            let Some(route) = job.view.route(again.shard) else { continue };
            let last = route.primary.and_then(|last| self.cluster.nodes.get(&last.node));
            let judged = last.map_or(0, |last| last.version);
            let same = route.epoch == again.epoch
                && is_lost(&self.cluster, route)
                && (judged == again.judged || judged == 0);
            let held = route.in_sync.iter().any(|member| member.node == again.server.node);
            // It may have been cordoned since, to end.
            if !same || held || !self.cluster.takes_copies(again.server) {
                continue;
            }
            let new = ShardRoute {
                epoch: Epoch(route.epoch.0 + 1).max(epoch_min),
                set_version: route.set_version + 1,
                primary: Some(again.server),
                in_sync: vec![again.server],
                joining: None,
                moving: None,
            };
            routes.insert(again.shard, new);
        }
        if routes.is_empty() {
            return Ok(Reply::Done);
        }
        let version = self.cluster.version;
        let (count, name) = (routes.len(), job.view.spec.name.clone());
        let text =
            format!("{count} lost shards of job {name} go on from checkpoint {}", from.checkpoint);
        self.tell("failover", text);
        let job = self.job_mut(id);
        let all = job.back.takes(&from.checkpoint, routes.keys().copied(), job.view.shards.len());
        let epochs = routes.iter().map(|(shard, route)| (*shard, route.epoch)).collect();
        job.view.orders.set_back(SetBack { shards: epochs, ..from });
        if all {
            job.labels = labels;
        }
        for (shard, route) in routes {
            job.view.shards[shard.0 as usize] = route;
        }
        job.view.version = version;
        job.forget_initializers();
        self.give_up_checkpoint(id, "a shard was set back to an older one", None);
        if all {
            self.set_ledger(id, ledger);
        }
        Ok(Reply::Done)
    }
}
