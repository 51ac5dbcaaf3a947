//! In-sync sets and primaries (protocol 1 to 3): who leaves a set when a life of a server ends, who is promoted, and what a primary may
//! change itself.

use std::collections::BTreeMap;

use downpour_core::id::{Epoch, ServerRef};
use downpour_core::routing::ShardRoute;

use super::{Life, Outcome, Refused, Reply, State};
use crate::command::InSyncChange;

/// Makes a route agree with what is known of its members. Lives that are over leave the set. A primary that is over or judged dead is
/// replaced by a member of the set; where nobody else is heard, one that is only judged dead is waited for, and where nobody is left the
/// shard is lost. Who is joining goes on only while it and the primary are heard and the primary stays:
/// a primary that is waited for may never come back, and servers have only so many joins at once. `primaries` counts the shards of each server: the one with the fewest is promoted. Gives the new route if it differs.
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
    let goes_on = |&server: &ServerRef| copies && life(server) == Life::Alive;
    let joining = route.joining.filter(goes_on);
    if in_sync.len() == route.in_sync.len() && joining == route.joining {
        return None;
    }
    Some(ShardRoute {
        epoch: Epoch(route.epoch.0 + u64::from(promoted)),
        set_version: route.set_version + 1,
        primary: successor,
        in_sync,
        joining,
    })
}

impl State {
    /// Settles every shard after a life of a server began or ended.
    pub(super) fn settle_routes(&mut self) {
        let (cluster, version) = (self.cluster.clone(), self.cluster.version);
        for (&id, job) in &cluster.jobs {
            let mut primaries = BTreeMap::new();
            for primary in job.view.shards.iter().filter_map(|route| route.primary) {
                *primaries.entry(primary).or_default() += 1;
            }
            let settled = job.view.shards.iter().enumerate().filter_map(|(shard, route)| {
                Some((shard, settle(route, |server| cluster.life(server), &mut primaries)?))
            });
            let settled: Vec<_> = settled.collect();
            if !settled.is_empty() {
                let view = &mut self.job_mut(id).view;
                view.version = version;
                for (shard, route) in settled {
                    view.shards[shard] = route;
                }
            }
        }
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
            let version = self.cluster.version;
            (route.in_sync, route.joining) = (in_sync, joining);
            route.set_version += 1;
            let view = &mut self.job_mut(change.job).view;
            view.version = version;
            view.shards[change.shard.0 as usize] = route.clone();
        }
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
            set_version: route.set_version + 1,
            primary: Some(successor),
            in_sync: route.others(change.primary).collect(),
            joining: None,
        };
        let version = self.cluster.version;
        let view = &mut self.job_mut(change.job).view;
        view.version = version;
        view.shards[change.shard.0 as usize] = route.clone();
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
        if in_sync.len() > replicas as usize && !change.add.is_empty() {
            return refuse(format!("the job has {replicas} replicas of each shard"));
        }
        Ok(())
    }
}
