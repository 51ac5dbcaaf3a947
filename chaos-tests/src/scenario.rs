//! One run: a cluster, clients that never pause, and the faults of a scenario.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use downpour_core::spec::JobSpec;
use downpour_psctl::local::{Interrupt, Process};
use tokio::task::JoinHandle;

use crate::cluster::{Setup, TestCluster};
use crate::disk;
use crate::faults::{Fault, Kind, Scenario, Schedule};
use crate::hot;
use crate::inject::Injector;
use crate::monitor::Monitor;
use crate::report::Report;
use crate::saved::Saved;
use crate::scale;
use downpour_psctl::acks::Acks;
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
    /// Whose faults happen while it does.
    pub faults: Option<Scenario>,
    /// For how long nothing may move once hot shards are spread.
    pub quiet: Duration,
    /// Ends the run early.
    pub interrupt: Interrupt,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            duration: Duration::from_secs(60),
            seed: 1,
            clients: 2,
            bytes: 2 << 30,
            faults: None,
            quiet: Duration::from_secs(300),
            interrupt: Interrupt::default(),
        }
    }
}

/// Runs a scenario: on a cluster of three coordinators and three servers, where it does not want others.
///
/// # Errors
/// The cluster cannot be started, does not recover from a fault in time, or the run was interrupted.
pub fn run(scenario: Scenario, options: &Options) -> Result<Report> {
    match scenario {
        Scenario::Scale => return scale::run(options),
        Scenario::Hot => return hot::run(options),
        Scenario::Workers => bail!("what happens to workers has a report of its own"),
        _ => {}
    }
    let setup = Setup { servers: SERVERS, ..setup_for(scenario, options) };
    let mut cluster = TestCluster::launch(&setup)?;
    let report = disturb(&mut cluster, scenario, options);
    match &report {
        Ok(report) if report.passed() => cluster.stop()?,
        _ if options.interrupt.is_set() => {}
        _ => cluster.keep_dir(),
    }
    report
}

/// What a cluster needs so that the faults of a scenario can happen to it.
pub(crate) fn setup_for(scenario: Scenario, options: &Options) -> Setup {
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
    Setup {
        proxied: scenario.has(&network),
        small_disks: scenario.has(&[Kind::DiskFull]) && may_mount,
        interrupt: options.interrupt.clone(),
        ..Setup::default()
    }
}

/// The faults of a scenario, without those that this cluster cannot have.
pub(crate) fn schedule(
    cluster: &TestCluster,
    scenario: Scenario,
    seed: u64,
) -> impl Iterator<Item = Fault> + use<> {
    let no_disk = cluster.disks.is_empty();
    Schedule::new(scenario, seed).filter(move |fault| !(no_disk && fault.kind == Kind::DiskFull))
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
    let schedule = schedule(cluster, scenario, options.seed);
    let mut injector = Injector::new(cluster, &monitor, &acks, options.interrupt.clone());
    let end = Instant::now() + options.duration;
    injector.run(schedule, |moment| moment >= end)?;
    let (faults, during) = (std::mem::take(&mut injector.faults), injector.during);
    let mut tally = injector.newcomers()?;

    stop.store(true, Ordering::Relaxed);
    eprintln!("reading everything back");
    let counted = cluster.runtime.block_on(count(clients))?;
    tally = tally.merge(&counted);
    let checkpoints = saved.map_or(Ok(0), |saved| saved.verify(cluster))?;
    Ok(Report { during, checkpoints, ..Report::of(scenario, options, faults, &tally) }
        .with_seen(&monitor.seen())
        .with_waits(&acks)
        .with_logs(&logs(cluster)?))
}

/// What the coordinators said.
pub(crate) fn logs(cluster: &TestCluster) -> Result<Vec<String>> {
    let logs = cluster.processes.coordinators.iter().map(Process::log);
    let logs = logs
        .chain(cluster.old_logs.iter().map(PathBuf::as_path))
        .map(|log| fs::read_to_string(log).with_context(|| format!("read {}", log.display())));
    logs.collect()
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
