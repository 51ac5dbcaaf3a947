//! Every coordinator is replaced by another one at another address, one by one, while pushes go on; servers and clients find the new ones, though
//! they were started with the addresses of the old ones alone.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::cluster::{DEADLINE, TestCluster};
use downpour_core::id::ShardId;
use downpour_proto::v1;
use downpour_psctl::probe::{self, Probe, wait_for};

const JOB: &str = "probed";
const SHARDS: u32 = 8;

#[test]
fn all_coordinators_are_replaced_while_pushes_go_on() -> Result<()> {
    let mut cluster = TestCluster::start(3)?;
    let job = probe::job(JOB, SHARDS, 2);
    let mut probe = cluster.runtime.block_on(Probe::join(&cluster.coordinators, &job, 0))?;
    cluster.runtime.block_on(probe.push_until(|tally| tally.acknowledged >= 200))?;

    let over = AtomicBool::new(false);
    let handle = cluster.runtime.handle().clone();
    std::thread::scope(|scope| {
        let pushing = scope.spawn(|| {
            let mut after = None;
            handle.block_on(probe.push_until(|tally| {
                // Some more, of which all need what the new coordinators decided.
                let over = over.load(Ordering::Acquire);
                over && tally.acknowledged >= *after.get_or_insert(tally.acknowledged + 500)
            }))
        });
        let replaced = replace_all(&mut cluster);
        over.store(true, Ordering::Release);
        pushing.join().expect("the probe does not panic").and(replaced)
    })?;

    cluster.counts_each_push_once(probe)?;
    cluster.stop()
}

fn replace_all(cluster: &mut TestCluster) -> Result<()> {
    for _ in 0..3 {
        let address = cluster.processes.join_coordinator(None)?.address().to_owned();
        let request = v1::AddCoordinatorRequest { id: 0, address, dry_run: false };
        let added = cluster.runtime.block_on(cluster.coordinators.add_coordinator(request))?;
        let votes = || async {
            let members = cluster.coordinators.cluster().await.ok()?.members;
            members.iter().any(|one| one.id == added.id && !one.learner).then_some(())
        };
        cluster.runtime.block_on(wait_for("the new member to vote", DEADLINE, votes))?;
        remove_one(cluster)?;
    }
    // The servers must have found the new ones: a server that is dead is noticed, and another takes over.
    let (primary, epoch) = cluster.primary(JOB, ShardId(0))?;
    cluster.processes.servers[primary].kill()?;
    let replaced = || async {
        let view = cluster.coordinators.job(JOB).await.ok()?;
        let route = view.route(ShardId(0))?;
        (route.epoch.0 > epoch && route.in_sync.len() == 2).then_some(())
    };
    cluster.runtime.block_on(wait_for("another server to take over", DEADLINE, replaced))
}

/// The leader, where it is one of the first; otherwise another one of these.
fn remove_one(cluster: &mut TestCluster) -> Result<()> {
    let members = cluster.runtime.block_on(cluster.coordinators.cluster())?.members;
    let first = members.iter().filter(|member| member.id <= 3);
    let member = first.max_by_key(|member| member.leader).context("one of the first is left")?;
    let request = v1::RemoveCoordinatorRequest { id: member.id, dry_run: false };
    let removed = cluster.runtime.block_on(cluster.coordinators.remove_coordinator(request))?;
    ensure!(removed, "it was a member");
    let processes = &mut cluster.processes.coordinators;
    let at = processes.iter().position(|process| process.address() == member.address);
    let mut process = processes.remove(at.context("its process")?);
    let end = std::time::Instant::now() + DEADLINE;
    let status = loop {
        if let Some(status) = process.poll()? {
            break status;
        }
        ensure!(std::time::Instant::now() < end, "a member that was removed goes on");
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    ensure!(status.success(), "it ends cleanly: {status}");
    let log = std::fs::read_to_string(process.log())?;
    ensure!(log.contains("this member was removed from the group"), "it says so");
    Ok(())
}
