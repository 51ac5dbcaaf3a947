//! Where shards should go, by what the servers report: the committed state and the reports, as the pure planner wants them, and its plan as commands.

use downpour_core::id::{JobId, ServerRef, ShardId};
use downpour_core::rebalance::{self, Change, Options, Plan, Server, Shard, Step};
use downpour_core::routing::ShardRoute;

use crate::liveness::Liveness;
use crate::state::moves::{Placement, Placing};
use crate::state::{Cluster, Life};

/// When an operator asks.
pub const BY_HAND: Options =
    Options { start: 1.08, goal: 1.05, steps_max: 4096, promotions_only: false };
/// When the leader looks by itself: only what is worth it, and a part at a time, for what is measured changes with each.
pub const BY_ITSELF: Options =
    Options { start: 1.15, goal: 1.07, steps_max: 16, promotions_only: false };

/// A plan with its reasons.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Planned {
    /// What is to be committed.
    pub placements: Vec<Placement>,
    /// Of each server its work, times the mean: before and after.
    pub shares: Vec<(ServerRef, f64, f64)>,
}

/// What should be done: for one job, or for all.
#[must_use]
pub fn plan(
    cluster: &Cluster,
    liveness: &Liveness,
    only: Option<JobId>,
    options: Options,
) -> Planned {
    let nodes = cluster.nodes.values().map(|node| &node.view).filter(|view| view.alive);
    let servers: Vec<Server> = nodes
        .map(|view| {
            let load = liveness.load(view.server).unwrap_or_default();
            Server {
                server: view.server,
                zone: view.zone.clone(),
                open: cluster.takes_copies(view.server),
                memory: load.memory_bytes,
                memory_limit: load.memory_limit,
                capacity: load.capacity_bytes,
            }
        })
        .collect();
    let routes: Vec<_> = cluster.routes().filter(|(_, _, _, route)| !route.lost()).collect();
    let shards: Vec<Shard> = routes
        .iter()
        .filter_map(|&(job, shard, replicas, route)| {
            let wanted = only.is_none_or(|only| only == job);
            let report = liveness.last_report(job, shard).unwrap_or_default();
            let after_moves = |member: &ServerRef| match route.moving {
                Some(moving) if moving.from == *member => moving.to,
                _ => *member,
            };
            let mut members: Vec<ServerRef> = route.in_sync.iter().map(after_moves).collect();
            members.sort_unstable();
            members.dedup();
            Some(Shard {
                job,
                shard,
                primary: after_moves(&route.primary?),
                members,
                bytes: report.copy_bytes,
                rows_per_s: report.rows_per_s,
                settled: wanted && is_settled(cluster, route, replicas),
            })
        })
        .collect();
    let Plan { steps, before, after } = rebalance::plan(&servers, &shards, options);
    let shares = servers.iter().zip(before).zip(after);
    Planned {
        placements: steps.iter().filter_map(|step| placement(cluster, &shards, step)).collect(),
        shares: shares.map(|((server, before), after)| (server.server, before, after)).collect(),
    }
}

/// Whether there is nothing else to be done with it first.
fn is_settled(cluster: &Cluster, route: &ShardRoute, replicas: u32) -> bool {
    let alive = route.in_sync.iter().all(|member| cluster.life(*member) == Life::Alive);
    let whole = route.in_sync.len() == replicas as usize;
    alive && whole && route.joining.is_none() && route.moving.is_none()
}

fn placement(cluster: &Cluster, shards: &[Shard], step: &Step) -> Option<Placement> {
    let Shard { job, shard, primary, .. } = shards.get(step.shard)?;
    let (job, shard): (JobId, ShardId) = (*job, *shard);
    let route = cluster.job(job)?.view.route(shard)?;
    let (placing, from) = match step.change {
        Change::Promote(to) => (Placing::Promote(to), *primary),
        Change::Move(moving) => (Placing::Move(moving), moving.from),
    };
    let reason = format!(
        "{} has {:.2} times the mean work and {:.2} times the mean memory, this shard {:.1} % of all rows/s",
        cluster.name(from),
        step.load,
        step.memory,
        100.0 * step.rows_share,
    );
    let (epoch, set_version) = (route.epoch, route.set_version);
    Some(Placement { job, shard, epoch, set_version, placing, reason })
}
