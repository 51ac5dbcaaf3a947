//! Back to the wished number of replicas: which shards lack a member, and who is to become it (protocol 3.2).
//!
//! A join is a wish: the primary copies the shard, and adds the server to the set by itself. Where that comes to nothing, the wish is dropped and
//! another is made.

use std::collections::BTreeMap;

use downpour_core::id::{Epoch, JobId, ServerRef, ShardId};
use downpour_core::placement::replacement;
use downpour_core::routing::ShardRoute;

use super::{Cluster, Life, Outcome, Reply, State};

/// Joins that one server has at once, as the primary that copies and as the one that is copied to.
const JOINS_MAX: u32 = 2;
/// Most joins in one command; the rest follows.
const LIST_MAX: usize = 1000;

/// Who is to become a member of which shard, based on what is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Join {
    pub job: JobId,
    pub shard: ShardId,
    pub epoch: Epoch,
    pub set_version: u64,
    pub server: ServerRef,
}

/// The joins to be made now. `tried` is who was last to join each shard: another is better, for that one may be out of the primary's reach.
#[must_use]
pub fn plan(cluster: &Cluster, tried: &BTreeMap<(JobId, ShardId), ServerRef>) -> Vec<Join> {
    let mut busy = Busy::default();
    let routes = || cluster.jobs.values().flat_map(|job| &job.view.shards);
    routes().for_each(|route| busy.count(route));
    let mut candidates = cluster.candidates();
    let mut joins = Vec::new();
    for (&id, job) in &cluster.jobs {
        let wanted = job.view.spec.replicas as usize;
        for (shard, route) in (0..).map(ShardId).zip(&job.view.shards) {
            let Some(primary) = route.primary else { continue };
            let short = route.in_sync.len() < wanted && route.joining.is_none();
            if !short || cluster.life(primary) != Life::Alive || !busy.has_room(primary) {
                continue;
            }
            let free: Vec<_> =
                candidates.iter().filter(|one| busy.has_room(one.server)).cloned().collect();
            let tried = tried.get(&(id, shard)).copied();
            let Some(server) = replacement(&free, &candidates, &route.in_sync, tried) else {
                continue;
            };
            let (epoch, set_version) = (route.epoch, route.set_version);
            joins.push(Join { job: id, shard, epoch, set_version, server });
            busy.count(&ShardRoute { joining: Some(server), ..route.clone() });
            if let Some(candidate) = candidates.iter_mut().find(|one| one.server == server) {
                candidate.copies += 1;
            }
            if joins.len() == LIST_MAX {
                return joins;
            }
        }
    }
    joins
}

/// How many joins each server has.
#[derive(Default)]
struct Busy(BTreeMap<ServerRef, u32>);

impl Busy {
    fn count(&mut self, route: &ShardRoute) {
        if let (Some(joining), Some(primary)) = (route.joining, route.primary) {
            *self.0.entry(joining).or_default() += 1;
            *self.0.entry(primary).or_default() += 1;
        }
    }

    fn has_room(&self, server: ServerRef) -> bool {
        self.0.get(&server).is_none_or(|&joins| joins < JOINS_MAX)
    }
}

impl State {
    /// A join whose shard has changed, or whose server or primary is not heard any more, is passed over.
    pub(super) fn plan_joins(&mut self, joins: &[Join]) -> Outcome {
        let version = self.cluster.version;
        for join in joins {
            let Some(job) = self.cluster.job(join.job) else { continue };
            let Some(route) = job.view.route(join.shard) else { continue };
            let same = (route.epoch, route.set_version) == (join.epoch, join.set_version);
            let member = route.in_sync.iter().any(|member| member.node == join.server.node);
            let short = route.in_sync.len() < job.view.spec.replicas as usize;
            let alive = |server| self.cluster.life(server) == Life::Alive;
            let free = route.primary.is_some_and(alive) && route.joining.is_none();
            if !(same && short && free && alive(join.server)) || member {
                continue;
            }
            let view = &mut self.job_mut(join.job).view;
            view.version = version;
            let route = &mut view.shards[join.shard.0 as usize];
            route.joining = Some(join.server);
            route.set_version += 1;
        }
        Ok(Reply::Done)
    }
}
