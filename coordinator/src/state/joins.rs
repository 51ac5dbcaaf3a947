//! Back to the wished number of replicas: which shards lack a member, and who is to become it (protocol 3.2).
//!
//! A join is a wish: the primary copies the shard, and adds the server to the set by itself. Where that comes to nothing, the wish is dropped and
//! another is made. A move whose turn has come begins with one.

use std::collections::BTreeMap;

use downpour_core::id::{Epoch, JobId, ServerRef, ShardId};
use downpour_core::placement::replacement;
use downpour_core::routing::{MoveStep, ShardRoute};

use super::{Cluster, Life, Outcome, Reply, State};
use crate::room::Room;

/// What goes on at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Joins that one server has, as the primary that copies and as the one that is copied to.
    pub joins_per_server: u32,
    /// Moves in the cluster that are no longer queued.
    pub moves: usize,
}

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

/// The joins to be made now: first where members are missing, then for moves. `tried` is who was last to join each shard: another is better, for that one may
/// be out of the primary's reach. Nobody gets what there is no `room` for.
#[must_use]
pub fn plan(
    cluster: &Cluster,
    tried: &BTreeMap<(JobId, ShardId), ServerRef>,
    limits: Limits,
    room: &mut Room,
) -> Vec<Join> {
    let mut busy = Busy { joins: BTreeMap::new(), limit: limits.joins_per_server };
    cluster.routes().for_each(|(_, _, _, route)| busy.count(route));
    let under_way = |route: &ShardRoute| route.step().is_some_and(|step| step != MoveStep::Queued);
    let moves = cluster.routes().filter(|(_, _, _, route)| under_way(route)).count();
    let mut moves_left = limits.moves.saturating_sub(moves);
    let mut candidates = cluster.candidates();
    let mut joins = Vec::new();
    for short_ones in [true, false] {
        for (id, shard, replicas, route) in cluster.routes() {
            let Some(primary) = route.primary else { continue };
            let short = is_short(route, replicas);
            let free = route.joining.is_none() && cluster.life(primary) == Life::Alive;
            if short != short_ones || !free || !busy.has_room(primary) {
                continue;
            }
            let queued = route.moving.filter(|_| route.step() == Some(MoveStep::Queued));
            let queued = queued.map(|moving| moving.to).filter(|&to| busy.has_room(to));
            let server = if !short {
                queued.filter(|_| moves_left > 0)
            } else if queued.is_some() {
                queued
            } else {
                let free = candidates.iter().filter(|one| {
                    busy.has_room(one.server) && room.fits(one.server, id, shard).is_ok()
                });
                let free: Vec<_> = free.cloned().collect();
                replacement(&free, &candidates, &route.in_sync, tried.get(&(id, shard)).copied())
            };
            let Some(server) = server else { continue };
            if queued == Some(server) {
                moves_left = moves_left.saturating_sub(1);
            } else if let Some(taken) = candidates.iter_mut().find(|one| one.server == server) {
                taken.copies += 1;
                room.take(server, id, shard);
            }
            let (epoch, set_version) = (route.epoch, route.set_version);
            joins.push(Join { job: id, shard, epoch, set_version, server });
            busy.count(&ShardRoute { joining: Some(server), ..route.clone() });
            if joins.len() == LIST_MAX {
                return joins;
            }
        }
    }
    joins
}

/// Whether members are missing, also once who is about to leave has left.
fn is_short(route: &ShardRoute, replicas: u32) -> bool {
    route.staying().count() < replicas as usize
}

/// How many joins each server has.
struct Busy {
    joins: BTreeMap<ServerRef, u32>,
    limit: u32,
}

impl Busy {
    fn count(&mut self, route: &ShardRoute) {
        if let (Some(joining), Some(primary)) = (route.joining, route.primary) {
            *self.joins.entry(joining).or_default() += 1;
            *self.joins.entry(primary).or_default() += 1;
        }
    }

    fn has_room(&self, server: ServerRef) -> bool {
        self.joins.get(&server).is_none_or(|&joins| joins < self.limit)
    }
}

impl State {
    /// A join whose shard has changed, or whose server or primary is not heard any more, is passed over.
    pub(super) fn plan_joins(&mut self, joins: &[Join]) -> Outcome {
        for join in joins {
            let Some(job) = self.cluster.job(join.job) else { continue };
            let Some(route) = job.view.route(join.shard) else { continue };
            let same = (route.epoch, route.set_version) == (join.epoch, join.set_version);
            let member = route.in_sync.iter().any(|member| member.node == join.server.node);
            let moves = route.moving.is_some_and(|moving| moving.to == join.server);
            let wanted = moves || is_short(route, job.view.spec.replicas);
            let alive = |server| self.cluster.life(server) == Life::Alive;
            let free = route.primary.is_some_and(alive) && route.joining.is_none();
            if !(same && wanted && free && self.cluster.takes_copies(join.server)) || member {
                continue;
            }
            let mut route = route.clone();
            route.joining = Some(join.server);
            self.set_route(join.job, join.shard, route);
        }
        Ok(Reply::Done)
    }
}
