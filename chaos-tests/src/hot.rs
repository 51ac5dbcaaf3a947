//! Few shards have most of the work and are all on one server: a cluster that looks after itself spreads them while clients push, and then leaves them alone.
//!
//! Every shard has one copy, so that a change of primary is a move and the other way round. Until the load was seen, the other servers take no copies:
//! the leader looks for itself, and must not begin in the midst of the measurement.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use downpour_core::id::{NodeId, ShardId};
use downpour_core::view::{Admission, JobView};
use downpour_proto::v1;
use downpour_psctl::acks::Acks;
use downpour_psctl::probe::{Probe, job, wait_for};

use crate::cluster::{DEADLINE, Setup, TestCluster};
use crate::faults::Scenario;
use crate::monitor::Monitor;
use crate::report::{BeforeAndAfter, Hot, Report};
use crate::scenario::{Options, count};

const JOB: &str = "probe";
const SERVERS: usize = 4;
const SHARDS: u32 = 64;
const HOT: usize = 8;
const COLD: usize = SHARDS as usize - HOT;
/// Rows that each push names on a hot shard and on any other: 60 % of all are on the hot ones.
const HOT_ROWS: usize = 43;
const COLD_ROWS: usize = 4;
/// Of the load that is to be seen first.
const UNEVEN: f64 = 1.8;
/// Until the shards are spread, beside the quiet time.
const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(100);
/// Reports are smoothed over some seconds, and those of a shard begin anew where it goes.
const REPORTS: Duration = Duration::from_secs(15);

/// Runs it.
///
/// # Errors
/// The cluster cannot be started, or does not come to rest.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut cluster = TestCluster::launch(&Setup {
        servers: SERVERS,
        coordinator_args: ["--auto-rebalance", "all"].map(String::from).into(),
        interrupt: options.interrupt.clone(),
        ..Setup::default()
    })?;
    let report = spread(&cluster, options);
    match &report {
        Ok(report) if report.passed() => cluster.stop()?,
        _ if options.interrupt.is_set() => {}
        _ => cluster.keep_dir(),
    }
    report
}

fn spread(cluster: &TestCluster, options: &Options) -> Result<Report> {
    let (runtime, coordinators) = (&cluster.runtime, &cluster.coordinators);
    let main = job(JOB, SHARDS, 1);
    let acks = Arc::new(Acks::default());
    let mut probes = Vec::new();
    for index in 0..options.clients {
        let joining = Probe::join_timed(coordinators, &main, index, acks.clone());
        probes.push(runtime.block_on(joining)?);
    }
    let view = runtime.block_on(coordinators.job(JOB))?;
    let (burdened, hot) = hot_shards(&view).context("a server that leads enough shards")?;
    let others = |admission| -> Result<()> {
        let nodes = runtime.block_on(coordinators.cluster())?.nodes;
        for node in nodes.iter().map(|node| NodeId(node.node)).filter(|node| *node != burdened) {
            runtime.block_on(coordinators.admit_node(node, admission))?;
        }
        Ok(())
    };
    others(Admission::Cordoned)?;

    let stop = Arc::new(AtomicBool::new(false));
    let rows = |shard: ShardId| if hot.contains(&shard) { HOT_ROWS } else { COLD_ROWS };
    let mut clients = Vec::new();
    for mut probe in probes {
        probe.weigh(rows);
        let stop = stop.clone();
        clients.push(runtime.spawn(async move {
            probe.push_until(|_| stop.load(Ordering::Relaxed)).await?;
            Ok(probe)
        }));
    }
    let monitor = {
        let _on = runtime.enter();
        Monitor::start(coordinators, JOB)
    };
    let uneven = || async {
        let load = reported(coordinators.cluster().await.ok()?)?;
        (load >= UNEVEN).then_some(load)
    };
    let before = runtime.block_on(wait_for("the servers to report the load", DEADLINE, uneven))?;
    let pushed = |view: &JobView| busiest(view, |shard| rows(shard) as f64);
    let mut found = Hot {
        rows_share: (HOT * HOT_ROWS) as f64 / (HOT * HOT_ROWS + COLD * COLD_ROWS) as f64,
        load: BeforeAndAfter { before, after: 0.0 },
        pushed: BeforeAndAfter { before: pushed(&view), after: 0.0 },
        ..Hot::default()
    };
    eprintln!("one server has {before:.2} times the mean load; shards may move from now on");
    let began = Instant::now();
    others(Admission::Open)?;
    let moved = rest(&monitor, options, began)?;
    found.moves = monitor.seen().promotions;
    found.spread_s = (moved - began).as_secs_f64();
    found.quiet_s = moved.elapsed().as_secs_f64();
    let view = runtime.block_on(coordinators.job(JOB))?;
    found.pushed.after = pushed(&view);
    let status = runtime.block_on(coordinators.cluster())?;
    found.load.after = reported(status).context("no load is reported any more")?;
    stop.store(true, Ordering::Relaxed);

    eprintln!("reading everything back");
    let tally = runtime.block_on(count(clients))?;
    let report = Report::of(Scenario::Hot, options, BTreeMap::new(), &tally);
    Ok(Report { hot: Some(found), ..report.with_seen(&monitor.seen()).with_waits(&acks) })
}

/// Waits until nothing has moved for the quiet time; says when the last move was done.
fn rest(monitor: &Monitor, options: &Options, began: Instant) -> Result<Instant> {
    let quiet = options.quiet.max(REPORTS);
    let (mut moves, mut last) = (0, began);
    loop {
        ensure!(!options.interrupt.is_set(), "interrupted");
        let seen = monitor.seen();
        if seen.promotions > moves || seen.moving > 0 {
            (moves, last) = (seen.promotions, Instant::now());
        }
        if moves > 0 && last.elapsed() >= quiet {
            return Ok(last);
        }
        ensure!(
            began.elapsed() < PATIENCE + quiet,
            "{moves} moves within {PATIENCE:?}, {} under way: it does not come to rest",
            seen.moving
        );
        std::thread::sleep(POLL);
    }
}

/// A server, and shards that it leads.
fn hot_shards(view: &JobView) -> Option<(NodeId, BTreeSet<ShardId>)> {
    let mut led: BTreeMap<NodeId, BTreeSet<ShardId>> = BTreeMap::new();
    for (route, shard) in view.shards.iter().zip(0..) {
        let shards = led.entry(route.primary?.node).or_default();
        if shards.len() < HOT {
            shards.insert(ShardId(shard));
        }
    }
    led.into_iter().find(|(_, shards)| shards.len() == HOT)
}

/// Of the busiest server, times the mean; nothing while a shard has not been reported.
fn reported(cluster: v1::GetClusterReply) -> Option<f64> {
    let of_job = |job: &v1::JobStatus| {
        let spec = job.view.as_ref().and_then(|view| view.spec.as_ref());
        spec.is_some_and(|spec| spec.name == JOB)
    };
    let status = cluster.jobs.into_iter().find(of_job)?;
    let view = JobView::try_from(status.view?).ok()?;
    let rows: BTreeMap<ShardId, f64> =
        { status.reports }.iter().map(|one| (ShardId(one.shard), one.rows_per_s)).collect();
    let all = rows.len() == SHARDS as usize && rows.values().all(|rows| *rows > 0.0);
    all.then(|| busiest(&view, |shard| rows[&shard]))
}

fn busiest(view: &JobView, load: impl Fn(ShardId) -> f64) -> f64 {
    let mut loads: BTreeMap<Option<NodeId>, f64> = BTreeMap::new();
    for (route, shard) in view.shards.iter().zip(0..) {
        *loads.entry(route.primary.map(|primary| primary.node)).or_default() +=
            load(ShardId(shard));
    }
    let mean = loads.values().sum::<f64>() / SERVERS as f64;
    loads.into_values().fold(0.0, f64::max) / mean
}

#[cfg(test)]
mod tests {
    use downpour_core::id::{Epoch, Incarnation, JobId, ServerRef};
    use downpour_core::routing::ShardRoute;

    use super::*;

    fn view(primaries: impl Iterator<Item = u32>) -> JobView {
        let route = |node| {
            let primary = ServerRef { node: NodeId(node), incarnation: Incarnation(1) };
            ShardRoute {
                epoch: Epoch(1),
                set_version: 1,
                primary: Some(primary),
                in_sync: vec![primary],
                joining: None,
                moving: None,
            }
        };
        JobView {
            job: JobId(1),
            spec: job(JOB, SHARDS, 1),
            version: 1,
            variables: Vec::new(),
            shards: primaries.map(route).collect(),
            sessions: downpour_core::cells::ClosedSessions::default(),
            orders: downpour_core::checkpoint::Orders::default(),
            consistency: downpour_core::consistency::Consistency::default(),
        }
    }

    #[test]
    fn the_hot_shards_are_on_one_server_and_have_60_percent_of_the_rows() {
        let view = view((0..SHARDS).map(|shard| shard % 4 + 1));
        let (node, hot) = hot_shards(&view).expect("each leads 16");
        assert_eq!((node, hot.len()), (NodeId(1), HOT));
        let rows = |shard: ShardId| if hot.contains(&shard) { HOT_ROWS } else { COLD_ROWS } as f64;
        let all: f64 = (0..SHARDS).map(|shard| rows(ShardId(shard))).sum();
        let share = (HOT * HOT_ROWS) as f64 / all;
        assert!((0.60..0.61).contains(&share), "{share}");
        assert!((2.6..2.7).contains(&busiest(&view, rows)), "{}", busiest(&view, rows));
        assert_eq!(busiest(&view, |_| 1.0), 1.0);
    }

    #[test]
    fn a_load_is_told_once_every_shard_was_reported() {
        let mut cluster = v1::GetClusterReply::default();
        let report = |shard| v1::ShardReport { shard, rows_per_s: 2.0, ..Default::default() };
        let mut status = v1::JobStatus {
            view: Some((&view((0..SHARDS).map(|shard| shard % 4 + 1))).into()),
            reports: (1..SHARDS).map(report).collect(),
            ..Default::default()
        };
        cluster.jobs = vec![status.clone()];
        assert_eq!(reported(cluster.clone()), None);
        status.reports.push(report(0));
        cluster.jobs = vec![status];
        assert_eq!(reported(cluster), Some(1.0));
    }
}
