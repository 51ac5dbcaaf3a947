//! Looks after the shards that this server leads: members that stall or whose copy has moved are removed, commit positions reach idle backups, gauges are set.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour_core::id::{Lsn, ServerRef};
use tracing::warn;

use crate::hosted::ShardKey;
use crate::life::Life;
use crate::metrics::ServerMetrics;
use crate::shard::{Member, Role, Shard};

const ROUND: Duration = Duration::from_millis(100);
/// Rounds between two countings of rows and bytes.
const GAUGE_ROUNDS: u32 = 10;

/// Since when a member is at a position although there is more.
type Stalls = HashMap<(ShardKey, ServerRef), (Lsn, Instant)>;

/// Runs until the incarnation ends.
pub(crate) async fn run(life: Arc<Life>) {
    let mut stalls = Stalls::new();
    let check_interval = Duration::from_millis(life.process.config.check_interval_ms);
    let mut checked = Instant::now();
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for round in 0u32.. {
        rounds.tick().await;
        look(&life, &mut stalls);
        if !check_interval.is_zero() && checked.elapsed() >= check_interval {
            checked = Instant::now();
            life.all().iter().for_each(|hosted| hosted.shard.lock().check_soon());
        }
        if round.is_multiple_of(GAUGE_ROUNDS) {
            Gauges::of(&life).set(&life.process.metrics);
        }
    }
}

fn look(life: &Arc<Life>, stalls: &mut Stalls) {
    let timeout = Duration::from_millis(life.process.config.backup_timeout_ms);
    let now = Instant::now();
    let mut seen = Stalls::new();
    let crowded = life.log_is_half_full();
    for hosted in life.all() {
        let (lagging, behind, retiring) = {
            let shard = hosted.shard.lock();
            let lagging = lagging(&shard, |member| life.judged(member));
            (lagging, members_to_tell(&shard), shard.retiring())
        };
        if let Some(member) = retiring {
            life.remove_member(&hosted, member);
        }
        if crowded {
            // Before the members have to wait for memory.
            life.with(&hosted, |shard| shard.drop_learner(|learner| !learner.waited_for()));
        }
        for member in behind {
            life.link(member, hosted.key).mark(hosted.key);
        }
        for (member, acked, waits) in lagging {
            let gone = life.link(member, hosted.key).gone();
            let name = (hosted.key, member);
            let since = match stalls.get(&name) {
                Some((position, since)) if *position == acked => *since,
                _ => now,
            };
            if waits {
                seen.insert(name, (acked, since));
            }
            if gone || (waits && now.duration_since(since) > timeout) {
                warn!(job = %hosted.key.job, shard = %hosted.key.shard, %member, %acked, gone,
                    "a member does not acknowledge and is to be removed");
                // A copy that was not proposed can be dropped at once.
                life.with(&hosted, |shard| shard.drop_learner(|one| one.server() == member));
                life.remove_member(&hosted, member);
            }
        }
    }
    *stalls = seen;
}

/// The fenced members and who has a copy, how far they are, and whether they are waited for: they lack something, or the coordinator does not hear them.
/// Where nothing is pushed, a machine that is gone would stay a member for ever otherwise.
fn lagging(shard: &Shard, judged: impl Fn(ServerRef) -> bool) -> Vec<(ServerRef, Lsn, bool)> {
    let last = shard.last();
    let position = |(server, member): (ServerRef, &Member)| {
        member.acked.map(|acked| (server, acked, acked < last || judged(server)))
    };
    shard.peers().filter_map(position).collect()
}

/// Members that were not told the commit position, which lets them forget records.
fn members_to_tell(shard: &Shard) -> Vec<ServerRef> {
    let untold = shard.peers().filter(|(_, member)| member.told() < shard.commit());
    untold.map(|(server, _)| server).collect()
}

/// What is counted over all shards.
#[derive(Debug, Default)]
struct Gauges {
    primaries: i64,
    backups: i64,
    joining: i64,
    in_sync_min: Option<i64>,
    records: i64,
    bytes: i64,
    rows: i64,
    parameter_bytes: i64,
    contributed_bytes: i64,
}

impl Gauges {
    fn of(life: &Life) -> Self {
        let mut gauges = Gauges::default();
        for hosted in life.all() {
            let shard = hosted.shard.lock();
            match shard.role() {
                Role::Primary(set) => {
                    gauges.primaries += 1;
                    let members = set.len() as i64 + 1;
                    let smallest = gauges.in_sync_min.map_or(members, |min| min.min(members));
                    gauges.in_sync_min = Some(smallest);
                    let (records, bytes) = shard.log_size();
                    gauges.records += records as i64;
                    gauges.bytes += bytes as i64;
                }
                Role::Backup => gauges.backups += 1,
                Role::Joining => gauges.joining += 1,
                Role::Promoting(_) | Role::Removed => {}
            }
            gauges.rows += shard.state().rows() as i64;
            gauges.parameter_bytes += shard.state().bytes() as i64;
        }
        gauges.contributed_bytes = life.contributed(None) as i64;
        gauges
    }

    fn set(&self, metrics: &ServerMetrics) {
        metrics.primaries.set(self.primaries);
        metrics.backups.set(self.backups);
        metrics.joining.set(self.joining);
        metrics.in_sync_min.set(self.in_sync_min.unwrap_or(0));
        metrics.unacknowledged_records.set(self.records);
        metrics.unacknowledged_bytes.set(self.bytes);
        metrics.rows.set(self.rows);
        metrics.parameter_bytes.set(self.parameter_bytes);
        metrics.contributed_bytes.set(self.contributed_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::tests::fixture::{cluster, counting, push, replicate, server};

    #[test]
    fn a_member_that_the_coordinator_does_not_hear_is_waited_for_also_where_nothing_is_pushed() {
        let [mut primary, mut second, mut third] = cluster();
        let waits = |primary: &Shard, judged: &[ServerRef]| {
            let lagging = lagging(primary, |one| judged.contains(&one));
            lagging
                .into_iter()
                .filter_map(|(one, _, waits)| waits.then_some(one))
                .collect::<Vec<_>>()
        };
        assert_eq!(waits(&primary, &[]), []);
        assert_eq!(waits(&primary, &[server(3)]), [server(3)]);
        push(&mut primary, counting(1, &[5]));
        replicate(&mut primary, &mut third);
        assert_eq!(waits(&primary, &[]), [server(2)]);
        replicate(&mut primary, &mut second);
        assert_eq!(waits(&primary, &[]), []);
    }
}
