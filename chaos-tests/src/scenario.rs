//! A cluster, clients that never pause, and one kind of fault again and again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use downpour_core::spec::JobSpec;
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::cluster::{DEADLINE, TestCluster};
use crate::probe::{Probe, Tally, job};

/// What happens to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// The leading coordinator is killed and started again, again and again; meanwhile jobs are created and workers join.
    KillCoordinator,
}

/// How a scenario runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long the clients push.
    pub duration: Duration,
    /// Time from one fault to the next.
    pub fault_every: Duration,
    /// Clients that push from the start.
    pub clients: u64,
}

/// What was seen.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Which scenario.
    pub scenario: Scenario,
    /// How long the clients pushed.
    pub seconds: f64,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Leaders that differed from the one before.
    pub leader_changes: u64,
    /// Jobs created while there was no leader.
    pub jobs_created: u64,
    /// Workers that joined while there was no leader.
    pub workers_joined: u64,
    /// What the clients saw.
    #[serde(flatten)]
    pub tally: Tally,
}

impl Report {
    /// Whether the promises were kept.
    #[must_use]
    pub fn passed(&self) -> bool {
        let Tally { lost, duplicated, client_errors, unknown, .. } = self.tally;
        lost + duplicated + client_errors + unknown == 0
    }
}

/// Runs a scenario on a cluster of three coordinators and two servers.
///
/// # Errors
/// The cluster cannot be started or asked.
pub fn run(scenario: Scenario, options: &Options) -> Result<Report> {
    let cluster = TestCluster::start(2)?;
    match scenario {
        Scenario::KillCoordinator => kill_coordinator(cluster, options),
    }
}

fn kill_coordinator(mut cluster: TestCluster, options: &Options) -> Result<Report> {
    let main_job = job("main", 64, 2);
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let mut clients = Vec::new();
    for index in 0..options.clients {
        clients.push(start_client(&cluster, &main_job, index, &stop)?);
    }
    let mut report = Report {
        scenario: Scenario::KillCoordinator,
        seconds: 0.0,
        faults: BTreeMap::new(),
        leader_changes: 0,
        jobs_created: 0,
        workers_joined: 0,
        tally: Tally::default(),
    };
    while start.elapsed() + options.fault_every < options.duration {
        std::thread::sleep(options.fault_every);
        let leader = cluster.leader()?;
        cluster.processes.coordinators[leader].kill()?;
        *report.faults.entry("kill_coordinator").or_default() += 1;
        eprintln!(
            "{:5.1} s: killed coordinator {}, the leader",
            start.elapsed().as_secs_f64(),
            leader + 1
        );

        let other = job(&format!("other-{}", report.jobs_created), 4, 2);
        cluster.runtime.block_on(cluster.coordinators.create_job(&other))?;
        report.jobs_created += 1;
        clients.push(start_client(&cluster, &main_job, clients.len() as u64, &stop)?);
        report.workers_joined += 1;
        report.leader_changes += u64::from(cluster.leader()? != leader);

        let restarted = &mut cluster.processes.coordinators[leader];
        restarted.start()?;
        restarted.wait_ready(DEADLINE)?;
    }
    std::thread::sleep(options.duration.saturating_sub(start.elapsed()));
    stop.store(true, Ordering::Relaxed);
    report.seconds = start.elapsed().as_secs_f64();
    for client in clients {
        let tally = cluster.runtime.block_on(async {
            let probe = client.await.context("a client panicked")??;
            probe.verify().await
        })?;
        report.tally = report.tally.merge(&tally);
    }
    cluster.stop()?;
    Ok(report)
}

fn start_client(
    cluster: &TestCluster,
    job: &JobSpec,
    index: u64,
    stop: &Arc<AtomicBool>,
) -> Result<JoinHandle<Result<Probe>>> {
    let mut probe = cluster.runtime.block_on(Probe::join(&cluster.coordinators, job, index))?;
    let stop = Arc::clone(stop);
    Ok(cluster.runtime.spawn(async move {
        probe.push_until(|_| stop.load(Ordering::Relaxed)).await?;
        Ok(probe)
    }))
}
