//! In-sync sets and primaries (protocol 1 to 3): who leaves a set when a life of a server ends, who is promoted, and what a primary may
//! change itself.

use std::collections::BTreeMap;

use downpour_core::id::{Epoch, JobId, ServerRef, ShardId};
use downpour_core::planted::{Bug, planted};
use downpour_core::routing::{Move, ShardRoute};

use super::{Life, Outcome, Refused, Reply, State};
use crate::command::InSyncChange;

/// Makes a route agree with what is known of its members. Lives that are over leave the set. A primary that is over or judged dead is
/// replaced by a member of the set; where nobody else is heard, one that is only judged dead is waited for, and where nobody is left the
/// shard is lost. Who is joining goes on only while it and the primary are heard and the primary stays:
/// a primary that is waited for may never come back, and servers have only so many joins at once. A move goes on as long as it can: see [`goes_on`]. `primaries` counts the shards of each server: the one with the fewest is promoted. Gives the new route if it differs.
#[must_use]
pub fn settle(
    route: &ShardRoute,
    life: impl Fn(ServerRef) -> Life,
    primaries: &mut BTreeMap<ServerRef, u32>,
) -> Option<ShardRoute> {
    let primary = route.primary?;
    let mut in_sync = route.in_sync.clone();
    in_sync.retain(|&member| life(member) != Life::Over);
    let best = |in_sync: &[ServerRef], wanted: Life| {
        let members = in_sync.iter().copied().filter(|&member| life(member) == wanted);
        members.min_by_key(|&member| (primaries.get(&member).copied().unwrap_or(0), member))
    };
    let successor = match life(primary) {
        Life::Alive => Some(primary),
        Life::Judged => best(&in_sync, Life::Alive).or(Some(primary)),
        Life::Over => best(&in_sync, Life::Alive).or_else(|| best(&in_sync, Life::Judged)),
    };
    if successor != Some(primary) {
        in_sync.retain(|&member| member != primary);
        *primaries.entry(primary).or_default() -= 1;
        if let Some(successor) = successor {
            *primaries.entry(successor).or_default() += 1;
        }
    }
    let promoted = successor.is_some() && successor != Some(primary);
    let copies = successor == Some(primary) && life(primary) == Life::Alive;
    let heard = |&server: &ServerRef| copies && life(server) == Life::Alive;
    let joining = route.joining.filter(heard);
    let moving = route.moving.filter(|moving| goes_on(*moving, &in_sync, &life));
    if in_sync.len() == route.in_sync.len() && joining == route.joining && moving == route.moving {
        return None;
    }
    Some(ShardRoute {
        epoch: Epoch(route.epoch.0 + u64::from(promoted)),
        set_version: route.set_version + 1,
        primary: successor,
        in_sync,
        joining,
        moving,
    })
}

/// Whether a move can still be done: there is a copy to move, and it has arrived or can.
fn goes_on(moving: Move, in_sync: &[ServerRef], life: impl Fn(ServerRef) -> Life) -> bool {
    let arrived = in_sync.contains(&moving.to);
    in_sync.contains(&moving.from) && (arrived || life(moving.to) == Life::Alive)
}

impl State {
    /// Settles every shard after a life of a server began or ended.
    pub(super) fn settle_routes(&mut self) {
        let cluster = self.cluster.clone();
        for (&id, job) in &cluster.jobs {
            let mut primaries = BTreeMap::new();
            for primary in job.view.shards.iter().filter_map(|route| route.primary) {
                *primaries.entry(primary).or_default() += 1;
            }
            let settled = job.view.shards.iter().enumerate().filter_map(|(shard, route)| {
                Some((shard, settle(route, |server| cluster.life(server), &mut primaries)?))
            });
            let settled: Vec<_> = settled.collect();
            for (shard, mut route) in settled {
                if planted(Bug::PromoteOutsider) && route.epoch > job.view.shards[shard].epoch {
                    let servers = cluster.nodes.values().map(|node| node.view.server);
                    let mut alive = servers.filter(|one| cluster.life(*one) == Life::Alive);
                    if let Some(outsider) = alive.find(|one| !route.in_sync.contains(one)) {
                        route.primary = Some(outsider);
                        route.in_sync.push(outsider);
                    }
                }
                self.set_route(id, ShardId(shard as u32), route);
            }
        }
    }

    /// Replaces a route by one that follows it. Keeps the promise that a move is there only while it goes on, and that every change has a version.
    pub(super) fn set_route(&mut self, id: JobId, shard: ShardId, mut route: ShardRoute) {
        let cluster = &self.cluster;
        let known = &cluster.job(id).expect("callers looked it up").view;
        let before = &known.shards[shard.0 as usize];
        let alive = |server| cluster.life(server);
        route.moving = route.moving.filter(|moving| goes_on(*moving, &route.in_sync, alive));
        route.set_version = before.set_version + 1;
        let ended = before.moving.filter(|_| route.moving.is_none()).map(|moving| {
            let done = route.in_sync.contains(&moving.to) && !route.in_sync.contains(&moving.from);
            let end = if done { "done" } else { "came to nothing" };
            let (from, to) = (cluster.name(moving.from), cluster.name(moving.to));
            format!("shard {shard} of job {}: move from {from} to {to} {end}", known.spec.name)
        });
        if let Some(text) = ended {
            self.tell("move", text);
        }
        let version = self.cluster.version;
        let view = &mut self.job_mut(id).view;
        view.version = version;
        view.shards[shard.0 as usize] = route;
    }

    /// Compare-and-swap on (epoch, set version), by the primary alone (protocol 3.1, 3.2).
    pub(super) fn change_in_sync(&mut self, change: &InSyncChange) -> Outcome {
        let job = self.job(change.job)?;
        let Some(route) = job.view.route(change.shard) else {
            let problem = format!("job {} has no shard {}", change.job, change.shard);
            return Err(Refused::NotFound(problem));
        };
        let based_on = (route.epoch, route.set_version, route.primary);
        if based_on != (change.epoch, change.set_version, Some(change.primary)) {
            return Ok(Reply::InSync { changed: false, route: route.clone() });
        }
        let mut in_sync = route.in_sync.clone();
        in_sync.retain(|member| !change.remove.contains(member));
        in_sync.extend(&change.add);
        in_sync.sort_unstable();
        in_sync.dedup();
        self.check_set(change, &in_sync, job.view.spec.replicas)?;
        let mut route = route.clone();
        let over =
            |server: &ServerRef| change.add.contains(server) || change.remove.contains(server);
        let joining = route.joining.filter(|server| !over(server));
        if in_sync != route.in_sync || joining != route.joining {
            (route.in_sync, route.joining) = (in_sync, joining);
            // Who cannot be copied to, or does not keep up, is no place to move to.
            route.moving = route.moving.filter(|moving| !change.remove.contains(&moving.to));
            self.set_route(change.job, change.shard, route);
        }
        let route = self.job(change.job)?.view.shards[change.shard.0 as usize].clone();
        Ok(Reply::InSync { changed: true, route })
    }

    /// The primary wanted to go on without all the others, which are heard: it is who is cut off (protocol 3.3). It leaves the set at once, for it would only want
    /// the same of its successor.
    pub(super) fn replace_primary(&mut self, change: &InSyncChange) -> Outcome {
        let job = self.job(change.job)?;
        let route = job.view.route(change.shard).cloned();
        let based_on = (change.epoch, change.set_version, Some(change.primary));
        let same = |route: &ShardRoute| (route.epoch, route.set_version, route.primary) == based_on;
        let Some(route) = route.filter(same) else { return self.change_in_sync(change) };
        let alive = |server: &ServerRef| self.cluster.life(*server) == Life::Alive;
        let successor = route.others(change.primary).find(alive);
        let all = route.others(change.primary).all(|member| change.remove.contains(&member));
        let Some(successor) = successor.filter(|_| all) else { return self.change_in_sync(change) };
        let route = ShardRoute {
            epoch: Epoch(route.epoch.0 + 1),
            set_version: route.set_version,
            primary: Some(successor),
            in_sync: route.others(change.primary).collect(),
            joining: None,
            moving: route.moving,
        };
        self.set_route(change.job, change.shard, route);
        let route = self.job(change.job)?.view.shards[change.shard.0 as usize].clone();
        Ok(Reply::InSync { changed: true, route })
    }

    fn check_set(
        &self,
        change: &InSyncChange,
        in_sync: &[ServerRef],
        replicas: u32,
    ) -> Result<(), Refused> {
        let refuse = |problem: String| Err(Refused::FailedPrecondition(problem));
        if !in_sync.contains(&change.primary) {
            return refuse("a primary cannot remove itself".into());
        }
        if let Some(dead) = change.add.iter().find(|&&one| self.cluster.life(one) != Life::Alive) {
            return refuse(format!("{dead} is not alive"));
        }
        let route = self.job(change.job)?.view.route(change.shard);
        let expected = |server: &ServerRef| {
            let is = |route: &ShardRoute| {
                route.joining == Some(*server) || route.in_sync.contains(server)
            };
            route.is_some_and(is)
        };
        if let Some(stranger) = change.add.iter().find(|server| !expected(server)) {
            return refuse(format!("{stranger} is not joining"));
        }
        if in_sync.windows(2).any(|pair| pair[0].node == pair[1].node) {
            return refuse("two lives of one node cannot be in a set".into());
        }
        // A move has one copy more for a while.
        let moves = route.is_some_and(|route| route.moving.is_some());
        if in_sync.len() > replicas as usize + usize::from(moves) && !change.add.is_empty() {
            return refuse(format!("the job has {replicas} replicas of each shard"));
        }
        Ok(())
    }
}
