//! A cluster grows from two servers to four and shrinks again, while clients push without pause: what moved, and what they noticed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use downpour_client::{Coordinators, Error, Job, PushBatch, RowGradients, Session, SessionOptions};
use downpour_core::id::{NodeId, ShardId};
use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Sgd};
use downpour_core::spec::{JobSpec, Shape, TableSpec, VariableSpec};
use downpour_core::view::{Admission, JobView};
use downpour_proto::v1;
use downpour_proto::v1::shard_placement::Placing;
use downpour_psctl::acks::Acks;
use downpour_psctl::probe::{Tally, job, wait_for};
use tokio::runtime::Handle;

use crate::cluster::{DEADLINE, Setup, TestCluster};
use crate::faults::Scenario;
use crate::inject::Injector;
use crate::monitor::Monitor;
use crate::report::{During, Latency, Report, Scale};
use crate::scenario::{Options, count, logs, schedule, setup_for, start_client};

const JOB: &str = "probe";
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
/// Between two questions.
const POLL: Duration = Duration::from_millis(50);
/// Between two plans where faults happen.
const SOON: Duration = Duration::from_secs(1);
/// Servers have reported what they hold.
const REPORTED: Duration = Duration::from_secs(5);

/// Runs it.
///
/// # Errors
/// The cluster cannot be started, or does not grow or shrink in time.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let setup = setup_for(options.faults.unwrap_or(Scenario::Scale), options);
    let setup = Setup { servers: ALL, servers_later: ALL - FIRST, ..setup };
    let mut cluster = TestCluster::launch(&setup)?;
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
    let main = job(JOB, SHARDS, REPLICAS);
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

    let mut operator = Operator::new(cluster, options.faults.is_some());
    let disturbed = match options.faults {
        None => calmly(cluster, &mut operator).map(|()| Disturbed::default()),
        Some(faults) => disturbed(cluster, &mut operator, (&monitor, &acks), faults, options),
    }?;
    let mut scale = operator.scale;
    let during = acks.take_pushes();
    stop.store(true, Ordering::Relaxed);
    measure(&mut scale, &before, &during);

    eprintln!("reading everything back");
    let tally = cluster.runtime.block_on(count(clients))?.merge(&disturbed.newcomers);
    let report = Report::of(Scenario::Scale, options, disturbed.faults, &tally);
    Ok(Report { scale: Some(scale), during: disturbed.during, ..report }
        .with_seen(&monitor.seen())
        .with_waits(&acks)
        .with_logs(&logs(cluster)?))
}

fn calmly(cluster: &mut TestCluster, operator: &mut Operator) -> Result<()> {
    let began = Instant::now();
    for server in &mut cluster.processes.servers[FIRST..] {
        server.start()?;
    }
    for server in &mut cluster.processes.servers[FIRST..] {
        server.wait_ready(DEADLINE)?;
    }
    eprintln!("two servers more");
    operator.grow()?;
    operator.scale.grown_s = began.elapsed().as_secs_f64();
    eprintln!("grown in {:.1} s", operator.scale.grown_s);
    std::thread::sleep(REPORTED);
    let began = Instant::now();
    let leaving = operator.shrink()?;
    operator.scale.bytes_moved = copied_bytes(cluster);
    forget(cluster, operator, leaving)?;
    operator.scale.shrunk_s = began.elapsed().as_secs_f64();
    operator.scale.rounds = 1;
    eprintln!("shrunk in {:.1} s", operator.scale.shrunk_s);
    Ok(())
}

/// What happened meanwhile.
#[derive(Default)]
struct Disturbed {
    faults: BTreeMap<&'static str, u64>,
    during: During,
    newcomers: Tally,
}

/// Grows and shrinks again and again while a scenario's faults happen to all servers, also to those that are coming, and to the coordinators.
fn disturbed(
    cluster: &mut TestCluster,
    operator: &mut Operator,
    (monitor, acks): (&Monitor, &Acks),
    faults: Scenario,
    options: &Options,
) -> Result<Disturbed> {
    let schedule = schedule(cluster, faults, options.seed);
    for server in &mut cluster.processes.servers[FIRST..] {
        server.start()?;
    }
    let given_up = operator.given_up.clone();
    let over = AtomicBool::new(false);
    let mut injector = Injector::new(cluster, monitor, acks, options.interrupt.clone());
    let (injected, leaving) = std::thread::scope(|scope| {
        let operating = scope.spawn(|| {
            let end = Instant::now() + options.duration;
            let leaving = operator.again_and_again(|| Instant::now() >= end);
            over.store(true, Ordering::Relaxed);
            leaving
        });
        let injected = injector.run(schedule, |_| over.load(Ordering::Relaxed));
        // Whatever it waits for will not come, if faults could not be undone.
        given_up.store(true, Ordering::Relaxed);
        (injected, operating.join())
    });
    let leaving = leaving.map_err(|_| anyhow!("the operator panicked"));
    injected?;
    let leaving = leaving??;
    let found = Disturbed {
        faults: std::mem::take(&mut injector.faults),
        during: injector.during,
        newcomers: injector.newcomers()?,
    };
    operator.given_up.store(false, Ordering::Relaxed);
    operator.scale.bytes_moved = copied_bytes(cluster);
    forget(cluster, operator, leaving)?;
    Ok(found)
}

/// Ends the servers that hold nothing any more.
fn forget(cluster: &mut TestCluster, operator: &Operator, leaving: Vec<NodeId>) -> Result<()> {
    for server in &mut cluster.processes.servers[FIRST..] {
        server.stop(DEADLINE)?;
    }
    for node in leaving {
        let forget = || async { cluster.coordinators.remove_node(node).await.ok() };
        operator.handle.block_on(wait_for("a server to be forgotten", DEADLINE, forget))?;
    }
    Ok(())
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

/// Whoever changes the number of servers. It knows the coordinators alone, so that faults can happen to the processes meanwhile.
struct Operator {
    coordinators: Coordinators,
    handle: Handle,
    /// Servers that come and go.
    names: Vec<String>,
    /// Faults happen: what fails is asked again, and a plan may come to nothing.
    insists: bool,
    /// Nothing is waited for any more.
    given_up: Arc<AtomicBool>,
    scale: Scale,
}

impl Operator {
    fn new(cluster: &TestCluster, insists: bool) -> Self {
        let names = cluster.processes.servers[FIRST..].iter();
        Operator {
            coordinators: cluster.coordinators.clone(),
            handle: cluster.runtime.handle().clone(),
            names: names.map(|server| server.name().to_owned()).collect(),
            insists,
            given_up: Arc::default(),
            scale: Scale::default(),
        }
    }

    /// Until there is an answer.
    fn ask<T, F: Future<Output = Result<T, Error>>>(&self, call: impl Fn() -> F) -> Result<T> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.handle.block_on(call()) {
                Ok(answer) => return Ok(answer),
                Err(error) if !self.insists || Instant::now() > end => return Err(error.into()),
                Err(_) => self.rest()?,
            }
        }
    }

    fn rest(&self) -> Result<()> {
        ensure!(!self.given_up.load(Ordering::Relaxed), "the faults ended before this did");
        std::thread::sleep(POLL);
        Ok(())
    }

    fn until(&self, what: &str, condition: impl Fn(&JobView) -> bool) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !condition(&self.ask(|| self.coordinators.job(JOB))?) {
            ensure!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
            self.rest()?;
        }
        Ok(())
    }

    /// Plans and places until every server has its part.
    fn grow(&mut self) -> Result<()> {
        let began = Instant::now();
        for round in 0.. {
            ensure!(began.elapsed() < PATIENCE, "not grown within {PATIENCE:?}");
            self.rest()?;
            let planned = self.ask(|| self.coordinators.plan_placement(None))?.placements;
            let part = SHARDS * REPLICAS / ALL as u32 / 2;
            let done = match self.insists {
                true => self.least_copies()? >= part,
                false => planned.is_empty() || round == ROUNDS_MAX,
            };
            if done {
                break;
            }
            self.note(&planned)?;
            let problems = self.ask(|| self.coordinators.place_shards(planned.clone()))?;
            ensure!(self.insists || problems.iter().all(String::is_empty), "{problems:?}");
            self.until("every move to end", |view| {
                view.shards.iter().all(|one| one.moving.is_none())
            })?;
            std::thread::sleep(if self.insists { SOON } else { REPORTED });
        }
        ensure!(self.least_copies()? > 0, "a server holds nothing");
        Ok(())
    }

    /// Of the server that has fewest; none where one has not come yet.
    fn least_copies(&self) -> Result<u32> {
        let view = self.ask(|| self.coordinators.job(JOB))?;
        let mut copies: BTreeMap<NodeId, u32> = BTreeMap::new();
        for member in view.shards.iter().flat_map(|route| &route.in_sync) {
            *copies.entry(member.node).or_default() += 1;
        }
        Ok(if copies.len() < ALL { 0 } else { copies.into_values().min().unwrap_or(0) })
    }

    /// The numbers of those that come and go.
    fn leaving(&self) -> Result<Vec<NodeId>> {
        let status = self.ask(|| self.coordinators.cluster())?;
        let leaving = status.nodes.iter().filter(|node| self.names.contains(&node.name));
        Ok(leaving.map(|node| NodeId(node.node)).collect())
    }

    fn admit(&self, node: NodeId, admission: Admission) -> Result<()> {
        self.ask(|| self.coordinators.admit_node(node, admission))
    }

    fn shrink(&mut self) -> Result<Vec<NodeId>> {
        let leaving = self.leaving()?;
        for &node in &leaving {
            // Before the drain: what one of them holds must not go to the other.
            self.admit(node, Admission::Cordoned)?;
        }
        for &node in &leaving {
            let planned = self.ask(|| self.coordinators.plan_drain(node))?;
            self.note(&planned.placements)?;
            self.admit(node, Admission::Draining)?;
            self.until("a server to hold nothing", |view| {
                view.shards.iter().all(|one| one.in_sync.iter().all(|member| member.node != node))
            })?;
        }
        Ok(leaving)
    }

    /// At least once, and until it is over. The servers that were drained stay there, empty, until they are opened again.
    fn again_and_again(&mut self, over: impl Fn() -> bool) -> Result<Vec<NodeId>> {
        loop {
            let began = Instant::now();
            self.grow()?;
            self.scale.grown_s = began.elapsed().as_secs_f64();
            let began = Instant::now();
            let leaving = self.shrink()?;
            self.scale.shrunk_s = began.elapsed().as_secs_f64();
            self.scale.rounds += 1;
            let Scale { grown_s, shrunk_s, .. } = self.scale;
            eprintln!("grown in {grown_s:.1} s, shrunk in {shrunk_s:.1} s");
            if over() {
                return Ok(leaving);
            }
            leaving.into_iter().try_for_each(|node| self.admit(node, Admission::Open))?;
        }
    }

    /// Counts what a plan says.
    fn note(&mut self, placements: &[v1::ShardPlacement]) -> Result<()> {
        let status = self.ask(|| self.coordinators.cluster())?;
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
            self.scale.moves += 1;
            self.scale.bytes_planned += report.map_or(0, |report| report.copy_bytes);
        }
        Ok(())
    }
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
    let share = |&pushes: &u64| 100.0 * pushes as f64 / rate;
    let told: Vec<_> = windows.iter().map(|pushes| format!("{:.0}", share(pushes))).collect();
    eprintln!("pushes of each second, % of before: {}", told.join(" "));
    scale.worst_window_pct = windows.iter().min().map_or(0.0, share);
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
