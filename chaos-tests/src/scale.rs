//! A cluster grows from two servers to four and shrinks again, while clients push without pause: what moved, and what they noticed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use downpour_client::{Job, PushBatch, RowGradients, Session, SessionOptions};
use downpour_core::id::{NodeId, ShardId};
use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Sgd};
use downpour_core::spec::{JobSpec, Shape, TableSpec, VariableSpec};
use downpour_core::view::Admission;
use downpour_proto::v1;
use downpour_proto::v1::shard_placement::Placing;
use downpour_psctl::acks::Acks;
use downpour_psctl::probe::{job, wait_for};

use crate::cluster::{DEADLINE, Setup, TestCluster};
use crate::faults::Scenario;
use crate::monitor::Monitor;
use crate::report::{DetectedBy, During, Latency, Report, Scale};
use crate::scenario::{Options, count, start_client};

const FIRST: usize = 2;
const ALL: usize = 4;
const SHARDS: u32 = 64;
const REPLICAS: u32 = 2;
/// Of a row, with key and LSN.
const DIM: u32 = 60;
const ROW_BYTES: u64 = 256;
const FILL_ROWS: u64 = 16_384;
/// How long one direction may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Plans until there is nothing more to do.
const ROUNDS_MAX: usize = 8;
/// Servers have reported what they hold.
const REPORTED: Duration = Duration::from_secs(5);

/// Runs it.
///
/// # Errors
/// The cluster cannot be started, or does not grow or shrink in time.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut cluster = TestCluster::launch(&Setup {
        servers: ALL,
        servers_later: ALL - FIRST,
        interrupt: options.interrupt.clone(),
        ..Setup::default()
    })?;
    let report = grow_and_shrink(&mut cluster, options);
    match &report {
        Ok(report) if report.passed() => {
            cluster.processes.servers.truncate(FIRST);
            cluster.stop()?;
        }
        _ if options.interrupt.is_set() => {}
        _ => cluster.keep_dir(),
    }
    report
}

fn grow_and_shrink(cluster: &mut TestCluster, options: &Options) -> Result<Report> {
    let main = job("probe", SHARDS, REPLICAS);
    eprintln!("filling {} MiB", options.bytes >> 20);
    cluster.runtime.block_on(fill(cluster, &main, options.bytes / ROW_BYTES))?;
    let acks = Arc::new(Acks::recording());
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for index in 0..options.clients {
        clients.push(start_client(cluster, &main, index, &acks, &stop)?);
    }
    let monitor = {
        let _on = cluster.runtime.enter();
        Monitor::start(&cluster.coordinators, &main.name)
    };
    // Long enough for a rate, and for the servers to report.
    std::thread::sleep(REPORTED);
    drop(acks.take_pushes());
    std::thread::sleep(options.duration.min(Duration::from_secs(20)));
    let before = acks.take_pushes();

    let mut scale = Scale::default();
    let began = Instant::now();
    for server in &mut cluster.processes.servers[FIRST..] {
        server.start()?;
    }
    for server in &mut cluster.processes.servers[FIRST..] {
        server.wait_ready(DEADLINE)?;
    }
    eprintln!("two servers more");
    grow(cluster, &mut scale)?;
    scale.grown_s = began.elapsed().as_secs_f64();
    eprintln!("grown in {:.1} s", scale.grown_s);
    std::thread::sleep(REPORTED);
    let began = Instant::now();
    shrink(cluster, &mut scale)?;
    scale.shrunk_s = began.elapsed().as_secs_f64();
    eprintln!("shrunk in {:.1} s", scale.shrunk_s);
    let during = acks.take_pushes();
    stop.store(true, Ordering::Relaxed);
    measure(&mut scale, &before, &during);

    eprintln!("reading everything back");
    let tally = cluster.runtime.block_on(count(clients))?;
    let seen = monitor.seen();
    Ok(Report {
        scenario: Scenario::Scale,
        seed: options.seed,
        faults: [].into(),
        during: During::default(),
        checkpoints: 0,
        promotions: seen.promotions,
        leader_changes: seen.leader_changes(),
        pushes_acked: tally.acknowledged,
        pushes_unknown: tally.unknown,
        lost: tally.lost,
        duplicated: tally.duplicated,
        epochs_regressed: seen.epochs_regressed,
        detected_by: DetectedBy::default(),
        recovery_ms: acks.recovery(downpour_psctl::acks::Outage::Reset),
        recovery_silence_ms: acks.recovery(downpour_psctl::acks::Outage::Silence),
        longest_ack_gap_ms: tally.longest_ack_gap_ms,
        client_errors: tally.client_errors,
        scale: Some(scale),
    })
}

/// Makes rows that have to move.
async fn fill(cluster: &TestCluster, job: &JobSpec, rows: u64) -> Result<()> {
    let job = Job::Create(job.clone());
    let session = Session::open(&cluster.coordinators, &job, SessionOptions::worker("fill"));
    let session = session.await.context("open a session")?;
    let bulk = VariableSpec {
        name: "bulk".into(),
        optimizer: OptimizerSpec::Sgd(Sgd { learning_rate: 0.1 }),
        shape: Shape::Table(TableSpec::new(DIM, Init::Zeros, "bulk")),
    };
    let variable = session.define(&[bulk]).await?[0].variable.id;
    let mut waiting = std::collections::VecDeque::new();
    for first in (0..rows).step_by(FILL_ROWS as usize) {
        let keys: Vec<u64> = (first..rows.min(first + FILL_ROWS)).collect();
        let gradients = vec![1.0; keys.len() * DIM as usize];
        let rows = vec![RowGradients { variable, keys: &keys, gradients: &gradients }];
        waiting
            .push_back(session.push(&PushBatch { clock: 0, rows, ..PushBatch::default() }).await?);
        if waiting.len() > 4
            && let Some(ticket) = waiting.pop_front()
        {
            ticket.await?;
        }
    }
    for ticket in waiting {
        ticket.await?;
    }
    Ok(session.close().await?)
}

fn grow(cluster: &TestCluster, scale: &mut Scale) -> Result<()> {
    for _ in 0..ROUNDS_MAX {
        let coordinators = &cluster.coordinators;
        let planned = cluster.runtime.block_on(coordinators.plan_placement(None))?;
        if planned.placements.is_empty() {
            break;
        }
        note(cluster, &planned.placements, scale)?;
        let problems = cluster.runtime.block_on(coordinators.place_shards(planned.placements))?;
        ensure!(problems.iter().all(String::is_empty), "{problems:?}");
        until(cluster, "every move to end", |view| {
            view.shards.iter().all(|one| one.moving.is_none())
        })?;
        std::thread::sleep(REPORTED);
    }
    let cluster_view = cluster.runtime.block_on(cluster.coordinators.job("probe"))?;
    let mut holders: Vec<NodeId> = cluster_view
        .shards
        .iter()
        .flat_map(|route| route.in_sync.iter().map(|one| one.node))
        .collect();
    holders.sort_unstable();
    holders.dedup();
    ensure!(holders.len() == ALL, "only {holders:?} hold shards");
    Ok(())
}

fn shrink(cluster: &mut TestCluster, scale: &mut Scale) -> Result<()> {
    let names: Vec<String> =
        cluster.processes.servers[FIRST..].iter().map(|server| server.name().to_owned()).collect();
    let status = cluster.runtime.block_on(cluster.coordinators.cluster())?;
    let leaving = status.nodes.iter().filter(|node| names.contains(&node.name));
    let leaving: Vec<NodeId> = leaving.map(|node| NodeId(node.node)).collect();
    for &node in &leaving {
        // Before the drain: what one of them holds must not go to the other.
        cluster.runtime.block_on(cluster.coordinators.admit_node(node, Admission::Cordoned))?;
    }
    for &node in &leaving {
        let planned = cluster.runtime.block_on(cluster.coordinators.plan_drain(node))?;
        note(cluster, &planned.placements, scale)?;
        cluster.runtime.block_on(cluster.coordinators.admit_node(node, Admission::Draining))?;
        until(cluster, "a server to hold nothing", |view| {
            view.shards.iter().all(|one| one.in_sync.iter().all(|member| member.node != node))
        })?;
    }
    scale.bytes_moved = copied_bytes(cluster);
    for server in &mut cluster.processes.servers[FIRST..] {
        server.stop(DEADLINE)?;
    }
    for node in leaving {
        let forget = || async { cluster.coordinators.remove_node(node).await.ok() };
        cluster.runtime.block_on(wait_for("a server to be forgotten", DEADLINE, forget))?;
    }
    Ok(())
}

/// Counts what a plan says.
fn note(cluster: &TestCluster, placements: &[v1::ShardPlacement], scale: &mut Scale) -> Result<()> {
    let status = cluster.runtime.block_on(cluster.coordinators.cluster())?;
    for placement in placements {
        if !matches!(placement.placing, Some(Placing::Move(_))) {
            continue;
        }
        let job = status
            .jobs
            .iter()
            .find(|job| job.view.as_ref().is_some_and(|view| view.job == placement.job));
        let reports = job.map_or(&[][..], |job| &job.reports);
        let report =
            reports.iter().find(|report| ShardId(report.shard) == ShardId(placement.shard));
        scale.moves += 1;
        scale.bytes_planned += report.map_or(0, |report| report.copy_bytes);
    }
    Ok(())
}

fn until(
    cluster: &TestCluster,
    what: &str,
    condition: impl Fn(&downpour_core::view::JobView) -> bool,
) -> Result<()> {
    let look = || async {
        let view = cluster.coordinators.job("probe").await.ok()?;
        condition(&view).then_some(())
    };
    cluster.runtime.block_on(wait_for(what, PATIENCE, look))
}

/// Of all servers that run.
fn copied_bytes(cluster: &TestCluster) -> u64 {
    let running = cluster.processes.servers.iter();
    let copied = running.filter_map(|one| one.metric("downpour_ps_copied_bytes_total"));
    copied.sum::<f64>() as u64
}

fn measure(scale: &mut Scale, before: &[(Instant, Instant)], during: &[(Instant, Instant)]) {
    let latencies = |pushes: &[(Instant, Instant)]| {
        let mut all: Vec<f64> = pushes
            .iter()
            .map(|(sent, acknowledged)| (*acknowledged - *sent).as_secs_f64() * 1e3)
            .collect();
        all.sort_by(f64::total_cmp);
        all
    };
    let p99 = |all: &[f64]| all.get(all.len() * 99 / 100).copied().unwrap_or(0.0);
    let (calm, moving) = (latencies(before), latencies(during));
    scale.push_p99_ms = Latency { before: p99(&calm), during: p99(&moving) };
    scale.longest_stall_ms = moving.last().copied().unwrap_or(0.0);
    let ends = |pushes: &[(Instant, Instant)]| pushes.iter().map(|push| push.1).collect::<Vec<_>>();
    let (calm, moving) = (ends(before), ends(during));
    let (Some(first), Some(last)) = (calm.iter().min(), calm.iter().max()) else { return };
    let rate = calm.len() as f64 / (*last - *first).as_secs_f64();
    let Some(first) = moving.iter().min() else { return };
    let mut windows: Vec<u64> = Vec::new();
    for end in &moving {
        let second = (*end - *first).as_secs() as usize;
        windows.resize(windows.len().max(second + 1), 0);
        windows[second] += 1;
    }
    // The last one is not whole.
    windows.pop();
    let worst = windows.iter().copied().min().unwrap_or(0);
    scale.worst_window_pct = 100.0 * worst as f64 / rate;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_second_is_told_against_the_mean_before_and_the_last_one_is_not_whole() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let push = |sent_ms, took_ms| (at(sent_ms), at(sent_ms + took_ms));
        // 10 a second for two seconds, each in 5 ms.
        let before: Vec<_> = (0..=20).map(|number| push(number * 100, 5)).collect();
        // Then 10 in the first second, 4 in the second, one in what is left.
        let during = (0..10).map(|number| push(5_000 + number * 100, 5));
        let during: Vec<_> = during
            .chain((0..4).map(|number| push(6_100 + number * 100, 400)))
            .chain([push(7_100, 5)])
            .collect();
        let mut scale = Scale::default();
        measure(&mut scale, &before, &during);
        assert_eq!(scale.longest_stall_ms.round() as u64, 400);
        assert_eq!(scale.push_p99_ms.before.round() as u64, 5);
        assert!((37.0..=39.0).contains(&scale.worst_window_pct), "{}", scale.worst_window_pct);
    }
}
