//! Shards move between real servers while pushes go on: nothing is lost, nothing is applied twice, and no client notices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::cluster::{DEADLINE, TestCluster};
use downpour_core::id::{NodeId, ServerRef};
use downpour_core::routing::{Move, ShardRoute};
use downpour_core::view::Admission;
use downpour_proto::v1;
use downpour_proto::v1::shard_placement::Placing;
use downpour_psctl::probe::{self, Probe, wait_for};

const JOB: &str = "moved";
const SHARDS: u32 = 6;

/// Runs `change` while a client pushes, and counts afterwards.
fn under_load(
    cluster: &mut TestCluster,
    replicas: u32,
    change: impl FnOnce(&mut TestCluster) -> Result<()>,
) -> Result<()> {
    let job = probe::job(JOB, SHARDS, replicas);
    let mut probe = cluster.runtime.block_on(Probe::join(&cluster.coordinators, &job, 0))?;
    cluster.runtime.block_on(probe.push_until(|tally| tally.acknowledged >= 500))?;
    let over = AtomicBool::new(false);
    let handle = cluster.runtime.handle().clone();
    std::thread::scope(|scope| {
        let pushing = scope.spawn(|| {
            let enough =
                |tally: &probe::Tally| tally.acknowledged >= 1_000 && over.load(Ordering::Acquire);
            handle.block_on(probe.push_until(enough))
        });
        let changed = change(cluster);
        over.store(true, Ordering::Release);
        pushing.join().expect("the probe does not panic").and(changed)
    })?;
    cluster.counts_each_push_once(probe)
}

fn routes(cluster: &TestCluster) -> Result<Vec<ShardRoute>> {
    Ok(cluster.runtime.block_on(cluster.coordinators.job(JOB))?.shards)
}

/// Waits until all shards are as `condition` says.
fn until(
    cluster: &TestCluster,
    what: &str,
    condition: impl Fn(&ShardRoute) -> bool,
) -> Result<Vec<ShardRoute>> {
    let look = || async {
        let view = cluster.coordinators.job(JOB).await.ok()?;
        view.shards.iter().all(&condition).then_some(view.shards)
    };
    cluster.runtime.block_on(wait_for(what, DEADLINE, look))
}

fn servers(cluster: &TestCluster) -> Result<Vec<(ServerRef, String)>> {
    let status = cluster.runtime.block_on(cluster.coordinators.cluster())?;
    let server = |node: v1::NodeView| {
        let server = v1::ServerRef { node: node.node, incarnation: node.incarnation };
        Ok((ServerRef::try_from(server)?, node.name))
    };
    status.nodes.into_iter().map(server).collect()
}

/// Moves the primary's copy of every shard to a server that has none. Where a set changes between the look and the move, it looks again.
fn begin_moves(cluster: &TestCluster) -> Result<Vec<Move>> {
    let servers = servers(cluster)?;
    let job = cluster.runtime.block_on(cluster.coordinators.job(JOB))?.job;
    let begin = |(shard, mut route): (u32, ShardRoute)| {
        let began = Instant::now();
        loop {
            let from = route.primary.context("it is not lost")?;
            let free = servers.iter().map(|(server, _)| *server);
            let mut free = free.filter(|server| !route.in_sync.contains(server));
            let moving = Move { from, to: free.next().context("a server without a copy")? };
            let placement = v1::ShardPlacement {
                job: job.0,
                shard,
                epoch: route.epoch.0,
                set_version: route.set_version,
                reason: "a test".into(),
                placing: Some(Placing::Move(moving.into())),
            };
            let place = || {
                let placing = cluster.coordinators.place_shards(vec![placement.clone()]);
                let problems = cluster.runtime.block_on(placing)?;
                ensure!(problems.iter().all(String::is_empty), "{problems:?}");
                Ok(moving)
            };
            // Asked twice, it is the same.
            let Err(problem) = place() else { return place() };
            let now = routes(cluster)?.swap_remove(shard as usize);
            let changed = (now.epoch, now.set_version) != (route.epoch, route.set_version);
            if !changed || began.elapsed() > DEADLINE {
                return Err(problem);
            }
            route = now;
        }
    };
    (0..).zip(routes(cluster)?).map(begin).collect()
}

#[test]
fn every_primary_moves_while_pushes_go_on() -> Result<()> {
    for replicas in [1, 2] {
        let mut cluster = TestCluster::start(3)?;
        under_load(&mut cluster, replicas, |cluster| {
            let moves = begin_moves(cluster)?;
            let routes = until(cluster, "every move to end", |route| route.moving.is_none())?;
            for (Move { from, to }, route) in moves.iter().zip(routes) {
                ensure!(route.primary == Some(*to) && !route.in_sync.contains(from), "{route:?}");
                ensure!(route.in_sync.len() == replicas as usize, "{route:?}");
            }
            Ok(())
        })?;
        let events = cluster.runtime.block_on(cluster.coordinators.events())?;
        let done = events.iter().filter(|event| event.text.ends_with("done")).count();
        ensure!(done == SHARDS as usize, "{events:?}");
        cluster.stop()?;
    }
    Ok(())
}

#[test]
fn moves_end_although_the_leader_and_a_server_die_meanwhile() -> Result<()> {
    let mut cluster = TestCluster::start(4)?;
    under_load(&mut cluster, 2, |cluster| {
        begin_moves(cluster)?;
        let leader = cluster.leader()?;
        cluster.processes.coordinators[leader].kill()?;
        cluster.processes.servers[1].kill()?;
        cluster.processes.coordinators[leader].start()?;
        cluster.processes.servers[1].start()?;
        cluster.processes.servers[1].wait_ready(DEADLINE)?;
        until(cluster, "every move to end and every set to be whole", |route| {
            route.moving.is_none() && route.joining.is_none() && route.in_sync.len() == 2
        })?;
        Ok(())
    })?;
    cluster.stop()
}

#[test]
fn a_server_is_drained_removed_and_a_new_one_gets_its_part() -> Result<()> {
    let mut cluster = TestCluster::start(3)?;
    under_load(&mut cluster, 2, |cluster| {
        let drained = servers(cluster)?.into_iter().find(|(_, name)| name == "ps-1");
        let (drained, _) = drained.context("ps-1")?;
        admit(cluster, drained.node, Admission::Draining)?;
        until(cluster, "the server to hold nothing", |route| !route.in_sync.contains(&drained))?;
        let removing = |cluster: &TestCluster| {
            cluster.runtime.block_on(cluster.coordinators.remove_node(drained.node))
        };
        let alive = removing(cluster).err().context("it lives")?;
        ensure!(alive.to_string().contains("stop its process"), "{alive}");
        // Called off, it gets its part again.
        admit(cluster, drained.node, Admission::Open)?;
        let planned = cluster.runtime.block_on(cluster.coordinators.plan_placement(None))?;
        ensure!(!planned.placements.is_empty(), "it holds nothing, and the others everything");
        let placing = cluster.coordinators.place_shards(planned.placements);
        let problems = cluster.runtime.block_on(placing)?;
        ensure!(problems.iter().all(String::is_empty), "{problems:?}");
        let routes = until(cluster, "every move to end", |route| route.moving.is_none())?;
        ensure!(routes.iter().any(|route| route.in_sync.contains(&drained)), "{routes:?}");
        // And away for good.
        admit(cluster, drained.node, Admission::Draining)?;
        until(cluster, "the server to hold nothing", |route| !route.in_sync.contains(&drained))?;
        cluster.processes.servers[1].stop(DEADLINE)?;
        let gone = || async { removing_soon(cluster, drained.node).await };
        cluster.runtime.block_on(wait_for("the server to be forgotten", DEADLINE, gone))?;
        cluster.processes.servers.remove(1);
        Ok(())
    })?;
    cluster.stop()
}

fn admit(cluster: &TestCluster, node: NodeId, admission: Admission) -> Result<()> {
    Ok(cluster.runtime.block_on(cluster.coordinators.admit_node(node, admission))?)
}

async fn removing_soon(cluster: &TestCluster, node: NodeId) -> Option<()> {
    cluster.coordinators.remove_node(node).await.ok()
}
