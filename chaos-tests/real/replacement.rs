//! Back to the wished number of replicas by itself: a lost backup is replaced by a cut and the log after it, while pushes go on.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::cluster::{DEADLINE, TestCluster};
use downpour_core::id::ShardId;
use downpour_psctl::probe::{self, Probe, wait_for};

const JOB: &str = "replaced";
const SHARDS: u32 = 8;

#[test]
fn a_lost_backup_is_replaced_while_pushes_go_on() -> Result<()> {
    let mut cluster = TestCluster::start(3)?;
    let job = probe::job(JOB, SHARDS, 2);
    let mut probe = cluster.runtime.block_on(Probe::join(&cluster.coordinators, &job, 0))?;
    cluster.runtime.block_on(probe.push_until(|tally| tally.acknowledged >= 500))?;

    let over = AtomicBool::new(false);
    let handle = cluster.runtime.handle().clone();
    std::thread::scope(|scope| {
        let pushing = scope.spawn(|| {
            let enough =
                |tally: &probe::Tally| tally.acknowledged >= 2_000 && over.load(Ordering::Acquire);
            handle.block_on(probe.push_until(enough))
        });
        let lost = lose_and_replace(&mut cluster);
        over.store(true, Ordering::Release);
        pushing.join().expect("the probe does not panic").and(lost)
    })?;

    cluster.counts_each_push_once(probe)?;
    cluster.stop()
}

/// Each server is lost in turn; between two losses every shard gets back what it had.
fn lose_and_replace(cluster: &mut TestCluster) -> Result<()> {
    // Two servers are left, and all must be on both. Then one alone holds what no other life ever had.
    let (first, _) = cluster.primary(JOB, ShardId(0))?;
    cluster.processes.servers[first].kill().context("kill the first")?;
    all_in_sync(cluster).context("after the first loss")?;
    let (second, _) = cluster.primary(JOB, ShardId(0))?;
    cluster.processes.servers[second].kill().context("kill the second")?;
    // It returns with nothing, and is made a member again.
    cluster.processes.servers[first].start()?;
    cluster.processes.servers[first].wait_ready(DEADLINE)?;
    all_in_sync(cluster).context("after the return of the first")?;
    let third = (0..3).find(|index| ![first, second].contains(index)).context("three servers")?;
    cluster.processes.servers[third].kill().context("kill the third")?;
    let (last, _) = cluster.primary(JOB, ShardId(0))?;
    ensure!(last != second, "the second is dead");
    Ok(())
}

fn all_in_sync(cluster: &TestCluster) -> Result<()> {
    let whole = || async {
        let status = cluster.coordinators.cluster().await.ok()?;
        let view = cluster.coordinators.job(JOB).await.ok()?;
        let alive = |server: downpour_core::id::ServerRef| {
            status.nodes.iter().any(|node| {
                node.alive && node.node == server.node.0 && node.incarnation == server.incarnation.0
            })
        };
        let two = |route: &downpour_core::routing::ShardRoute| {
            route.in_sync.len() == 2 && route.in_sync.iter().all(|&member| alive(member))
        };
        view.shards.iter().all(two).then_some(())
    };
    cluster.runtime.block_on(wait_for("every shard to have two members", DEADLINE, whole))
}
