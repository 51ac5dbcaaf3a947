//! Copies that go from one server to another (protocol 5): begun, promoted, undone; and servers that are to hold nothing (more).
//!
//! Follow a move: [`Placing::Move`] is committed and queues it; [`joins`](super::joins) has the new server join when there is room for one more; the primary copies the
//! shard there and adds it; if the copy that moves was the primary's, the leader then finds a [promotion](promotions) due; whoever serves has the old one
//! removed (`change_in_sync`), and the route forgets the move. Each step is found in the committed state alone, so any leader goes on with any move.

use std::collections::BTreeMap;
use std::sync::Arc;

use downpour_core::id::{Epoch, JobId, NodeId, ServerRef, ShardId};
use downpour_core::placement::replacement;
use downpour_core::routing::{Move, MoveStep, ShardRoute};
use downpour_core::view::Admission;

use super::{Cluster, Life, Node, Outcome, Refused, Reply, State};
use crate::room::Room;

/// Most changes in one command; the rest follows.
const LIST_MAX: usize = 1000;

/// A change of where a shard is, based on what is committed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Placement {
    pub job: JobId,
    pub shard: ShardId,
    pub epoch: Epoch,
    pub set_version: u64,
    pub placing: Placing,
    /// For people.
    pub reason: String,
}

/// What is to become of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// A copy goes to a server that has none.
    Move(Move),
    /// Another member becomes the primary.
    Promote(ServerRef),
    /// Its move is undone, if it still can be.
    Cancel,
}

impl Placement {
    fn of(
        (job, shard, route): (JobId, ShardId, &ShardRoute),
        placing: Placing,
        reason: &str,
    ) -> Self {
        let (epoch, set_version) = (route.epoch, route.set_version);
        Placement { job, shard, epoch, set_version, placing, reason: reason.into() }
    }
}

/// The changes of primary that moves wait for.
#[must_use]
pub fn promotions(cluster: &Cluster) -> Vec<Placement> {
    let due = cluster.routes().filter_map(|(job, shard, _, route)| {
        let moving = route.moving.filter(|_| route.step() == Some(MoveStep::Promotion))?;
        let alive = cluster.life(moving.to) == Life::Alive;
        let promote = Placing::Promote(moving.to);
        alive.then(|| Placement::of((job, shard, route), promote, "the copy has arrived"))
    });
    due.take(LIST_MAX).collect()
}

/// The moves away from servers that are being drained, as far as there is somebody to go to. `tried` is who was last to join each shard: another is better, for that
/// one may be out of the primary's reach. Nobody gets what there is no `room` for.
#[must_use]
pub fn evacuations(
    cluster: &Cluster,
    tried: &BTreeMap<(JobId, ShardId), ServerRef>,
    room: &mut Room,
) -> Vec<Placement> {
    let draining = |server: &ServerRef| {
        let node = cluster.node(*server);
        node.is_some_and(|node| node.view.alive && node.view.admission == Admission::Draining)
    };
    let mut candidates = cluster.candidates();
    let mut moves = Vec::new();
    for (job, shard, _, route) in cluster.routes() {
        if route.moving.is_some() || moves.len() == LIST_MAX {
            continue;
        }
        let Some(from) = route.in_sync.iter().copied().find(draining) else { continue };
        let held: Vec<_> = route.in_sync.iter().copied().chain(route.joining).collect();
        let stays: Vec<_> = held.iter().copied().filter(|one| *one != from).collect();
        let free = candidates.iter().filter(|one| {
            one.server.node != from.node && room.fits(one.server, job, shard).is_ok()
        });
        let free: Vec<_> = free.cloned().collect();
        let Some(to) = replacement(&free, &candidates, &stays, tried.get(&(job, shard)).copied())
        else {
            continue;
        };
        if let Some(taken) = candidates.iter_mut().find(|one| one.server == to) {
            taken.copies += 1;
            taken.primaries += u64::from(route.primary == Some(from));
        }
        room.take(to, job, shard);
        let reason = format!("{} is being drained", cluster.name(from));
        moves.push(Placement::of((job, shard, route), Placing::Move(Move { from, to }), &reason));
    }
    moves
}

impl Cluster {
    /// All shards with their numbers, and the copies that their jobs want.
    pub fn routes(&self) -> impl Iterator<Item = (JobId, ShardId, u32, &ShardRoute)> {
        self.jobs.iter().flat_map(|(&id, job)| {
            let replicas = job.view.spec.replicas;
            let shards = (0..).map(ShardId).zip(&job.view.shards);
            shards.map(move |(shard, route)| (id, shard, replicas, route))
        })
    }

    /// The node, if this is its newest life.
    pub(super) fn node(&self, server: ServerRef) -> Option<&Node> {
        self.nodes.get(&server.node).map(AsRef::as_ref).filter(|node| node.view.server == server)
    }

    /// As it would be if this server were drained from now on.
    #[must_use]
    pub fn drained(&self, node: NodeId) -> Option<Cluster> {
        let mut cluster = self.clone();
        let node = Arc::make_mut(cluster.nodes.get_mut(&node)?);
        node.view.admission = Admission::Draining;
        Some(cluster)
    }

    /// Whether `server` may be given copies.
    #[must_use]
    pub fn takes_copies(&self, server: ServerRef) -> bool {
        let takes = |node: &Node| node.view.alive && node.view.admission == Admission::Open;
        self.node(server).is_some_and(takes)
    }

    /// What people call a server.
    #[must_use]
    pub fn name(&self, server: ServerRef) -> String {
        let node = self.nodes.get(&server.node);
        node.map_or_else(|| format!("node {}", server.node), |node| node.view.name.clone())
    }
}

impl State {
    /// What is based on what is not committed any more, or cannot be, is passed over.
    pub(super) fn place(&mut self, placements: Vec<Placement>) -> Outcome {
        let mut placed = 0;
        for placement in placements {
            let Placement { job, shard, placing, .. } = placement;
            let route = self.cluster.job(job).and_then(|job| job.view.route(shard));
            let based_on = (placement.epoch, placement.set_version);
            let Some(route) = route.filter(|route| (route.epoch, route.set_version) == based_on)
            else {
                continue;
            };
            let Ok(next) = self.cluster.placed(route, placing) else { continue };
            placed += 1;
            self.tell_placing((job, shard), route.clone().primary, placing, &placement.reason);
            self.set_route(job, shard, next);
        }
        Ok(Reply::Placed(placed))
    }

    fn tell_placing(
        &mut self,
        (job, shard): (JobId, ShardId),
        primary: Option<ServerRef>,
        placing: Placing,
        reason: &str,
    ) {
        let cluster = &self.cluster;
        let what = match placing {
            Placing::Move(Move { from, to }) => {
                let role = if primary == Some(from) { "primary" } else { "backup" };
                format!("move its {role} from {} to {}", cluster.name(from), cluster.name(to))
            }
            Placing::Promote(to) => format!("primary goes to {}", cluster.name(to)),
            Placing::Cancel => "undo its move".to_owned(),
        };
        let name = cluster.job(job).map_or("", |job| job.view.spec.name.as_str());
        let text = format!("shard {shard} of job {name}: {what}: {reason}");
        self.tell("placement", text);
    }

    /// A server is opened, cordoned or drained. What was on its way there goes elsewhere, unless it is a member already.
    pub(super) fn admit(&mut self, node: NodeId, admission: Admission) -> Outcome {
        let version = self.cluster.version;
        let Some(entry) = self.cluster.nodes.get_mut(&node) else {
            return Err(Refused::NotFound(format!("there is no node {node}")));
        };
        if entry.view.admission == admission {
            return Ok(Reply::Done);
        }
        let node = Arc::make_mut(entry);
        (node.view.admission, node.version) = (admission, version);
        let (server, name) = (node.view.server, node.view.name.clone());
        let now = match admission {
            Admission::Open => "takes copies again",
            Admission::Cordoned => "is cordoned: it takes no more copies",
            Admission::Draining => "is being drained: its copies move away",
        };
        self.tell("node", format!("{name} {now}"));
        let turned_away = |route: &ShardRoute| {
            let mut next = route.clone();
            let arrived = route.in_sync.contains(&server);
            next.joining = next.joining.filter(|joining| *joining != server);
            next.moving = match admission {
                Admission::Open => {
                    // What was begun to empty it.
                    let begun = |moving: &Move| {
                        moving.from == server && next.step() == Some(MoveStep::Queued)
                    };
                    next.moving.filter(|moving| !begun(moving))
                }
                _ => next.moving.filter(|moving| moving.to != server || arrived),
            };
            (next != *route).then_some(next)
        };
        let routes = self.cluster.routes();
        let changed =
            routes.filter_map(|(job, shard, _, route)| Some((job, shard, turned_away(route)?)));
        let changed: Vec<_> = changed.collect();
        for (job, shard, route) in changed {
            self.set_route(job, shard, route);
        }
        Ok(Reply::Done)
    }

    /// A server is forgotten.
    pub(super) fn remove_node(&mut self, id: NodeId) -> Outcome {
        let Some(node) = self.cluster.nodes.get(&id) else {
            return Err(Refused::NotFound(format!("there is no node {id}")));
        };
        let (alive, name) = (node.view.alive, node.view.name.clone());
        let refuse = |problem: String| Err(Refused::FailedPrecondition(problem));
        let routes = self.cluster.routes();
        let held = routes
            .filter(|(_, _, _, route)| route.in_sync.iter().any(|one| one.node == id))
            .count();
        if held > 0 {
            return refuse(format!(
                "{name} holds {held} shards: drain it first (psctl node drain {name})"
            ));
        }
        if alive {
            return refuse(format!(
                "{name} is alive, and would register again: stop its process first"
            ));
        }
        self.cluster.nodes.remove(&id);
        self.tell("node", format!("{name} was removed"));
        Ok(Reply::Done)
    }
}

impl Cluster {
    /// What a route becomes.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn placed(&self, route: &ShardRoute, placing: Placing) -> Result<ShardRoute, String> {
        let mut next = route.clone();
        let name = |server| self.name(server);
        let Some(primary) = route.primary else { return Err("it is lost".into()) };
        match placing {
            Placing::Move(Move { from, to }) => {
                if let Some(moving) = route.moving {
                    return Err(format!(
                        "it moves from {} to {} already",
                        name(moving.from),
                        name(moving.to)
                    ));
                }
                if !route.in_sync.contains(&from) {
                    return Err(format!("{} is not in its in-sync set", name(from)));
                }
                if route.in_sync.iter().any(|member| member.node == to.node) {
                    return Err(format!("{} holds it already", name(to)));
                }
                if !self.takes_copies(to) {
                    return Err(format!("{} is dead, cordoned or being drained", name(to)));
                }
                next.moving = Some(Move { from, to });
            }
            Placing::Promote(to) => {
                if to == primary {
                    return Err(format!("{} is its primary", name(to)));
                }
                if !route.in_sync.contains(&to) {
                    return Err(format!("{} is not in its in-sync set", name(to)));
                }
                if self.life(to) != Life::Alive {
                    return Err(format!("{} is not alive", name(to)));
                }
                next.epoch = Epoch(route.epoch.0 + 1);
                next.primary = Some(to);
                next.joining = None;
            }
            Placing::Cancel => {
                let Some(Move { from, to }) = route.moving else {
                    return Err("it does not move".into());
                };
                match route.step() {
                    _ if primary == to => {
                        return Err(format!("{} is its primary already: move it back", name(to)));
                    }
                    Some(MoveStep::Queued | MoveStep::Copying) | None => {
                        next.joining = next.joining.filter(|joining| *joining != to);
                        next.moving = None;
                    }
                    // The new copy is a member, and leaves as any other that moves away.
                    Some(MoveStep::Promotion | MoveStep::Removal) => {
                        next.moving = Some(Move { from: to, to: from });
                    }
                }
            }
        }
        Ok(next)
    }
}
