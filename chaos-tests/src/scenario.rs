//! One run: a cluster, clients that never pause, and the faults of a scenario.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use downpour_core::spec::JobSpec;
use downpour_psctl::local::Interrupt;
use tokio::task::JoinHandle;

use crate::cluster::{Setup, TestCluster};
use crate::disk;
use crate::faults::{Kind, Scenario, Schedule};
use crate::inject::Injector;
use crate::monitor::Monitor;
use crate::report::{DetectedBy, Report};
use crate::saved::Saved;
use crate::scale;
use downpour_psctl::acks::{Acks, Outage};
use downpour_psctl::probe::{self, Probe, Tally, job};

const SERVERS: usize = 3;
const SHARDS: u32 = 24;
const REPLICAS: u32 = 2;

/// How a scenario runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long the clients push.
    pub duration: Duration,
    /// What the faults follow from.
    pub seed: u64,
    /// Clients that push from the start.
    pub clients: u64,
    /// Bytes of rows that are there before a cluster grows and shrinks.
    pub bytes: u64,
    /// Ends the run early.
    pub interrupt: Interrupt,
}

/// Runs a scenario on a cluster of three coordinators and three servers.
///
/// # Errors
/// The cluster cannot be started, does not recover from a fault in time, or the run was interrupted.
pub fn run(scenario: Scenario, options: &Options) -> Result<Report> {
    if scenario == Scenario::Scale {
        return scale::run(options);
    }
    let may_mount = disk::may_mount();
    if scenario.has(&[Kind::DiskFull]) && !may_mount {
        eprintln!("disk_full is left out: it needs the right to mount (run as root)");
    }
    let network = [
        Kind::PartitionServer,
        Kind::PartitionServerOneWay,
        Kind::PartitionCoordinator,
        Kind::Delay,
    ];
    let mut cluster = TestCluster::launch(&Setup {
        servers: SERVERS,
        servers_later: 0,
        proxied: scenario.has(&network),
        small_disks: scenario.has(&[Kind::DiskFull]) && may_mount,
        interrupt: options.interrupt.clone(),
        ..Setup::default()
    })?;
    let report = disturb(&mut cluster, scenario, options);
    match &report {
        Ok(report) if report.passed() => cluster.stop()?,
        _ if options.interrupt.is_set() => {}
        _ => cluster.keep_dir(),
    }
    report
}

fn disturb(cluster: &mut TestCluster, scenario: Scenario, options: &Options) -> Result<Report> {
    let main = job("probe", SHARDS, REPLICAS);
    let acks = Arc::new(Acks::default());
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for index in 0..options.clients {
        clients.push(start_client(cluster, &main, index, &acks, &stop)?);
    }
    let saved =
        (scenario == Scenario::Mixed).then(|| Saved::schedule(cluster, &main.name)).transpose()?;
    let monitor = {
        let _on = cluster.runtime.enter();
        Monitor::start(&cluster.coordinators, &main.name)
    };
    let schedule = Schedule::new(scenario, options.seed);
    let no_disk = cluster.disks.is_empty();
    let schedule = schedule.filter(|fault| !(no_disk && fault.kind == Kind::DiskFull));
    let mut injector = Injector::new(cluster, &monitor, &acks, options.interrupt.clone());
    injector.run(schedule, Instant::now() + options.duration)?;
    let (faults, during) = (std::mem::take(&mut injector.faults), injector.during);
    let mut tally = injector.newcomers()?;

    stop.store(true, Ordering::Relaxed);
    eprintln!("reading everything back");
    let counted = cluster.runtime.block_on(count(clients))?;
    tally = tally.merge(&counted);
    let checkpoints = saved.map_or(Ok(0), |saved| saved.verify(cluster))?;
    let seen = monitor.seen();
    let logs = cluster.processes.coordinators.iter().map(|coordinator| {
        let log = coordinator.log();
        fs::read_to_string(log).with_context(|| format!("read {}", log.display()))
    });
    let logs = logs.collect::<Result<Vec<String>>>()?;
    Ok(Report {
        scenario,
        seed: options.seed,
        faults,
        during,
        checkpoints,
        promotions: seen.promotions,
        leader_changes: seen.leader_changes(),
        pushes_acked: tally.acknowledged,
        pushes_unknown: tally.unknown,
        lost: tally.lost,
        duplicated: tally.duplicated,
        epochs_regressed: seen.epochs_regressed,
        detected_by: DetectedBy::from_logs(logs.iter().map(String::as_str)),
        recovery_ms: acks.recovery(Outage::Reset),
        recovery_silence_ms: acks.recovery(Outage::Silence),
        longest_ack_gap_ms: tally.longest_ack_gap_ms,
        client_errors: tally.client_errors,
        scale: None,
    })
}

pub(crate) async fn count(clients: Vec<JoinHandle<Result<Probe>>>) -> Result<Tally> {
    let mut probes = Vec::new();
    for client in clients {
        probes.push(client.await.context("a client panicked")??);
    }
    probe::verify_all(probes).await
}

pub(crate) fn start_client(
    cluster: &TestCluster,
    job: &JobSpec,
    index: u64,
    acks: &Arc<Acks>,
    stop: &Arc<AtomicBool>,
) -> Result<JoinHandle<Result<Probe>>> {
    let joining = Probe::join_timed(&cluster.coordinators, job, index, acks.clone());
    let mut probe = cluster.runtime.block_on(joining)?;
    let stop = Arc::clone(stop);
    Ok(cluster.runtime.spawn(async move {
        probe.push_until(|_| stop.load(Ordering::Relaxed)).await?;
        Ok(probe)
    }))
}
