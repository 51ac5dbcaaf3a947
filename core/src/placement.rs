//! Which servers hold which shards.
//!
//! A pure planner: the same servers and wish give the same plan on every member of the coordinator, so a plan is computed when its command
//! is applied and never travels. The plan of a job is balanced to within one shard, for primaries and for all copies; what cannot be
//! divided goes to the servers that hold least of other jobs. Backups never stand beside their primary, stand in other zones as far as
//! balance allows, and those of one primary are spread, so that its death is not one server's load.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::id::ServerRef;

/// A live server that may be given shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The server.
    pub server: ServerRef,
    /// Where it stands.
    pub zone: String,
    /// Copies of shards of other jobs that it holds.
    pub copies: u64,
    /// Of how many of these it is the primary.
    pub primaries: u64,
}

/// Fewer servers live than a shard needs copies.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{replicas} replicas need as many live servers, and there are {servers}")]
pub struct TooFewServers {
    /// Copies that each shard needs.
    pub replicas: u32,
    /// Live servers.
    pub servers: usize,
}

/// Places a new job: for each shard its servers, the primary first.
///
/// # Errors
/// There are fewer servers than replicas.
pub fn place(
    candidates: &[Candidate],
    shards: u32,
    replicas: u32,
) -> Result<Vec<Vec<ServerRef>>, TooFewServers> {
    if candidates.len() < replicas as usize || candidates.is_empty() {
        return Err(TooFewServers { replicas, servers: candidates.len() });
    }
    let order = in_turn(candidates);
    let mut plan = Plan::new(&order, shards as usize, replicas as usize);
    for shard in 0..shards as usize {
        for _ in 1..replicas {
            plan.add_backup(shard);
        }
    }
    if order.iter().any(|candidate| candidate.zone != order[0].zone) {
        for shard in 0..shards as usize {
            plan.leave_shared_zones(shard);
        }
    }
    let servers = |held: Vec<usize>| held.into_iter().map(|at| order[at].server).collect();
    Ok(plan.held.into_iter().map(servers).collect())
}

/// Who of `free` is to become one more holder of a shard that `held` hold: in a zone of its own if there is one, not `tried` if there is another, then
/// the one with the fewest copies. `live` are all live servers. None if all hold it already.
#[must_use]
pub fn replacement(
    free: &[Candidate],
    live: &[Candidate],
    held: &[ServerRef],
    tried: Option<ServerRef>,
) -> Option<ServerRef> {
    let holds = |candidate: &&Candidate| held.iter().any(|one| one.node == candidate.server.node);
    let zones: Vec<&str> = live.iter().filter(holds).map(|one| one.zone.as_str()).collect();
    let others = free.iter().filter(|candidate| !holds(candidate));
    let best = others.min_by_key(|candidate| {
        let beside = zones.contains(&candidate.zone.as_str());
        let again = tried == Some(candidate.server);
        (again, beside, candidate.copies, candidate.primaries, candidate.server)
    });
    best.map(|candidate| candidate.server)
}

/// The candidates in the order in which they are dealt shards: least loaded first, zones taking turns. A primary works more than
/// a backup does: among servers with as many copies, those with fewer primaries come first.
fn in_turn(candidates: &[Candidate]) -> Vec<&Candidate> {
    let mut order: Vec<&Candidate> = candidates.iter().collect();
    let load = |candidate: &Candidate| (candidate.copies, candidate.primaries);
    order.sort_unstable_by_key(|candidate| (load(candidate), candidate.server));
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut ranked: Vec<_> = (order.into_iter())
        .map(|candidate| {
            let rank = seen.entry(&candidate.zone).or_default();
            *rank += 1;
            (load(candidate), *rank, candidate)
        })
        .collect();
    ranked.sort_by_key(|(load, rank, candidate)| (*load, *rank, candidate.server));
    ranked.into_iter().map(|(_, _, candidate)| candidate).collect()
}

/// Servers are positions in `order`.
struct Plan<'a> {
    order: &'a [&'a Candidate],
    held: Vec<Vec<usize>>,
    /// Backups that each server has yet to be given.
    quota: Vec<usize>,
    /// How often (primary, backup) stand together.
    pairs: Vec<Vec<usize>>,
}

impl<'a> Plan<'a> {
    /// Deals all copies round robin, which balances them: the first `shards` deals are the primaries, the rest are quotas of backups.
    fn new(order: &'a [&'a Candidate], shards: usize, replicas: usize) -> Self {
        let count = order.len();
        let dealt = |deals: usize, at: usize| deals / count + usize::from(at < deals % count);
        Plan {
            order,
            held: (0..shards).map(|shard| vec![shard % count]).collect(),
            quota: (0..count).map(|at| dealt(shards * replicas, at) - dealt(shards, at)).collect(),
            pairs: vec![vec![0; count]; count],
        }
    }

    fn add_backup(&mut self, shard: usize) {
        let (held, count) = (&self.held[shard], self.order.len());
        let primary = held[0];
        let free = (0..count).filter(|at| self.quota[*at] > 0 && !held.contains(at));
        let best = free.min_by_key(|&at| {
            let beside = held.iter().any(|&other| self.same_zone(other, at));
            let distance = (count + at - primary) % count;
            (beside, self.pairs[primary][at], usize::MAX - self.quota[at], distance)
        });
        let at = best.unwrap_or_else(|| self.make_room(shard));
        self.quota[at] -= usize::from(best.is_some());
        self.pairs[primary][at] += 1;
        self.held[shard].push(at);
    }

    fn same_zone(&self, one: usize, other: usize) -> bool {
        self.order[one].zone == self.order[other].zone
    }

    /// Only servers that hold `shard` already have quota left: one of them takes a backup of another shard, whose server is then free
    /// for this shard.
    fn make_room(&mut self, shard: usize) -> usize {
        let left = (0..self.quota.len()).find(|&at| self.quota[at] > 0);
        let left = left.expect("quotas sum to the backups that are yet to be placed");
        self.quota[left] -= 1;
        for other in (0..self.held.len()).rev() {
            if self.held[other].contains(&left) {
                continue;
            }
            let movable = (1..self.held[other].len())
                .find(|&copy| !self.held[shard].contains(&self.held[other][copy]));
            if let Some(copy) = movable {
                return self.replace(other, copy, left);
            }
        }
        unreachable!("no server has more copies than there are shards, so one can move");
    }

    fn replace(&mut self, shard: usize, copy: usize, at: usize) -> usize {
        let left = std::mem::replace(&mut self.held[shard][copy], at);
        let primary = self.held[shard][0];
        self.pairs[primary][left] -= 1;
        self.pairs[primary][at] += 1;
        left
    }

    /// Exchanges backups with shards nearby where that parts servers of one zone.
    fn leave_shared_zones(&mut self, shard: usize) {
        let window = 4 * self.order.len();
        let near = shard.saturating_sub(window)..self.held.len().min(shard + window);
        for copy in 1..self.held[shard].len() {
            if self.fits(shard, copy, self.held[shard][copy]) {
                continue;
            }
            let exchange = near.clone().find_map(|other| {
                let copies = 1..self.held[other].len();
                copies.map(|other_copy| (other, other_copy)).find(|&(other, other_copy)| {
                    other != shard
                        && self.fits(shard, copy, self.held[other][other_copy])
                        && self.fits(other, other_copy, self.held[shard][copy])
                })
            });
            if let Some((other, other_copy)) = exchange {
                let at = self.replace(other, other_copy, self.held[shard][copy]);
                self.replace(shard, copy, at);
            }
        }
    }

    /// Whether server `at` as `copy` of `shard` would stand alone in its zone.
    fn fits(&self, shard: usize, copy: usize, at: usize) -> bool {
        let mut held = self.held[shard].iter().enumerate();
        !held.any(|(other_copy, &other)| other_copy != copy && self.same_zone(other, at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Incarnation, NodeId};
    use proptest::prelude::*;

    fn candidate(node: u32, zone: u8, copies: u64) -> Candidate {
        let server =
            ServerRef { node: NodeId(node), incarnation: Incarnation(u64::from(node) + 100) };
        Candidate { server, zone: format!("zone-{zone}"), copies, primaries: 0 }
    }

    fn spread(counts: &BTreeMap<ServerRef, u32>) -> u32 {
        counts.values().max().unwrap() - counts.values().min().unwrap()
    }

    fn count<'a>(
        servers: &[Candidate],
        placed: impl Iterator<Item = &'a ServerRef>,
    ) -> BTreeMap<ServerRef, u32> {
        let mut counts: BTreeMap<_, _> = servers.iter().map(|one| (one.server, 0)).collect();
        for server in placed {
            *counts.get_mut(server).unwrap() += 1;
        }
        counts
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        prop::collection::vec((0u8..4, 0u64..3), 1..9).prop_map(|servers| {
            (1..).zip(servers).map(|(node, (zone, copies))| candidate(node, zone, copies)).collect()
        })
    }

    proptest! {
        #[test]
        fn primaries_and_copies_are_balanced_and_no_server_holds_a_shard_twice(
            servers in candidates(),
            shards in 1u32..70,
            replicas in 1u32..=3,
        ) {
            let plan = place(&servers, shards, replicas);
            if servers.len() < replicas as usize {
                let wanted = TooFewServers { replicas, servers: servers.len() };
                prop_assert_eq!(plan, Err(wanted));
                return Ok(());
            }
            let plan = plan.unwrap();
            prop_assert_eq!(plan.len(), shards as usize);
            for held in &plan {
                let mut distinct: Vec<_> = held.iter().map(|server| server.node).collect();
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert_eq!(distinct.len(), replicas as usize);
            }
            prop_assert!(spread(&count(&servers, plan.iter().map(|held| &held[0]))) <= 1);
            prop_assert!(spread(&count(&servers, plan.iter().flatten())) <= 1);
        }

        #[test]
        fn the_order_in_which_servers_are_listed_does_not_matter(servers in candidates(), shards in 1u32..20) {
            let mut reversed = servers.clone();
            reversed.reverse();
            prop_assert_eq!(place(&servers, shards, 1), place(&reversed, shards, 1));
        }

        #[test]
        fn with_zones_of_one_size_backups_stand_in_other_zones(
            zones in 2u8..5, each in 1u32..4, shards in 1u32..70,
        ) {
            let zone_of = |node: u32| (node % u32::from(zones)) as u8;
            let servers: Vec<_> =
                (0..u32::from(zones) * each).map(|node| candidate(node + 1, zone_of(node), 0)).collect();
            for held in place(&servers, shards, 2).unwrap() {
                let zone = |at: usize| zone_of(held[at].node.0 - 1);
                prop_assert_ne!(zone(0), zone(1));
            }
        }
    }

    #[test]
    fn what_cannot_be_divided_goes_to_the_least_loaded() {
        let servers = [candidate(1, 0, 9), candidate(2, 0, 3), candidate(3, 0, 5)];
        let plan = place(&servers, 4, 1).unwrap();
        let counts = count(&servers, plan.iter().flatten());
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [1, 2, 1]);
    }

    #[test]
    fn the_primaries_of_many_jobs_of_one_shard_are_balanced() {
        let mut servers: Vec<_> =
            (1..=4).map(|node| candidate(node, (node % 2) as u8, 0)).collect();
        for _ in 0..200 {
            let plan = place(&servers, 1, 2).unwrap();
            for server in &mut servers {
                server.primaries += u64::from(plan[0][0] == server.server);
                server.copies += u64::from(plan[0].contains(&server.server));
            }
        }
        let primaries: Vec<_> = servers.iter().map(|one| one.primaries).collect();
        assert!(primaries.iter().all(|held| (49..=51).contains(held)), "{primaries:?}");
    }

    #[test]
    fn a_replacement_stands_in_a_zone_of_its_own_and_holds_least_and_was_not_tried_before() {
        let live: Vec<_> = [(1, 0, 5), (2, 0, 0), (3, 1, 4), (4, 1, 3), (5, 2, 9)]
            .map(|(n, z, c)| candidate(n, z, c))
            .into();
        let of = |held: &[u32], tried: Option<u32>| {
            let server = |node: u32| live[node as usize - 1].server;
            let held: Vec<_> = held.iter().map(|&node| server(node)).collect();
            replacement(&live, &live, &held, tried.map(server)).map(|server| server.node.0)
        };
        assert_eq!(of(&[1], None), Some(4), "in zone 1 or 2");
        assert_eq!(of(&[1], Some(4)), Some(3));
        assert_eq!(of(&[1, 3], None), Some(5));
        assert_eq!(of(&[1, 3, 5], None), Some(2), "no zone is left");
        assert_eq!(of(&[1, 2, 3, 4, 5], None), None);
        assert_eq!(of(&[1, 2, 3, 4], Some(5)), Some(5), "rather than nobody");
    }

    #[test]
    fn the_backups_of_one_primary_are_spread_over_the_other_servers() {
        let servers: Vec<_> = (1..=4).map(|node| candidate(node, 0, 0)).collect();
        let plan = place(&servers, 48, 2).unwrap();
        for primary in &servers {
            let backups = plan.iter().filter(|held| held[0] == primary.server).map(|held| &held[1]);
            let mut counts = count(&servers, backups);
            counts.remove(&primary.server);
            assert!(spread(&counts) <= 1, "{counts:?}");
        }
    }

    #[test]
    fn the_largest_job_is_placed() {
        let servers: Vec<_> = (1..=7).map(|node| candidate(node, (node % 2) as u8, 0)).collect();
        assert_eq!(place(&servers, 65_536, 3).unwrap().len(), 65_536);
    }
}
