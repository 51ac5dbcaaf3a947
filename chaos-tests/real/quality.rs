//! A model that is trained while servers and coordinators die is as good as one that is trained in peace.
//!
//! The model is a logistic regression over categorical features, its weights a table of single floats: what every worker does, without LibTorch. The truth that the
//! clicks were drawn from is known, so the best possible loss is too, and both models must come near it: equally bad ones would be equal as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::cluster::{DEADLINE, TestCluster};
use downpour_client::{
    Coordinators, Job, PushBatch, RowGradients, Session, SessionOptions, TableRows,
};
use downpour_core::id::{ShardId, VariableId};
use downpour_core::init::Init;
use downpour_core::mix::mix64;
use downpour_core::optimizer::{Adagrad, OptimizerSpec};
use downpour_core::spec::{Shape, TableSpec, VariableSpec};
use downpour_psctl::probe::{job, wait_for};
use rustix::process::Signal;

const WORKERS: u64 = 2;
const STEPS: u64 = 500;
const BATCH: u64 = 64;
/// Features of a sample, each with so many values.
const FEATURES: u64 = 4;
const VALUES: u64 = 100;
const HELD_OUT: u64 = 8_000;
const SHARDS: u32 = 8;
/// Between the losses of the two trainings, which are asynchronous and so differ by themselves (by 0.00002 here).
const LOSS_TOLERANCE: f64 = 0.0005;
const AUC_TOLERANCE: f64 = 0.001;
/// Above the loss of the truth itself: what so many samples can teach.
const LOSS_MAX: f64 = 0.03;

/// From 0 up to 1.
fn uniform(purpose: u64, number: u64) -> f64 {
    (mix64(mix64(purpose).wrapping_add(number)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Keys of the values that a sample has.
fn keys(sample: u64) -> [u64; FEATURES as usize] {
    std::array::from_fn(|feature| {
        let feature = feature as u64;
        // Some values are frequent and some rare.
        let value = (uniform(1 + feature, sample).powi(2) * VALUES as f64) as u64;
        feature * VALUES + value
    })
}

fn true_logit(sample: u64) -> f64 {
    keys(sample).iter().map(|&key| 2.0 * uniform(90, key) - 1.0).sum()
}

fn probability(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

fn clicked(sample: u64) -> bool {
    uniform(91, sample) < probability(true_logit(sample))
}

/// Mean loss, and the area under the curve, on samples that nobody trained on.
fn score(logit: impl Fn(u64) -> f64) -> (f64, f64) {
    let mut scored: Vec<(f64, bool)> =
        ((1 << 40)..(1 << 40) + HELD_OUT).map(|sample| (logit(sample), clicked(sample))).collect();
    let loss = |&(logit, clicked): &(f64, bool)| {
        -(if clicked { probability(logit) } else { 1.0 - probability(logit) }).ln()
    };
    let mean = scored.iter().map(loss).sum::<f64>() / HELD_OUT as f64;
    scored.sort_by(|a, b| a.0.total_cmp(&b.0));
    let ranks =
        (1u32..).zip(&scored).filter(|(_, (_, clicked))| *clicked).map(|(rank, _)| f64::from(rank));
    let clicks = scored.iter().filter(|(_, clicked)| *clicked).count() as f64;
    let above = ranks.sum::<f64>() - clicks * (clicks + 1.0) / 2.0;
    (mean, above / (clicks * (HELD_OUT as f64 - clicks)))
}

fn weights() -> VariableSpec {
    let adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-8, initial_accumulator: 0.1 };
    VariableSpec {
        name: "weights".into(),
        optimizer: OptimizerSpec::Adagrad(adagrad),
        shape: Shape::Table(TableSpec::new(1, Init::Zeros, "weights")),
    }
}

/// How far the workers are, together, and how far they may go: faults shall meet a training that goes on.
struct Course {
    steps: AtomicU64,
    gate: AtomicU64,
}

async fn open(coordinators: &Coordinators, name: &str) -> Result<(Session, VariableId)> {
    let options = SessionOptions { deadline: DEADLINE, ..SessionOptions::worker("worker") };
    let session = Session::open(coordinators, &Job::Create(job(name, SHARDS, 2)), options).await?;
    let table = session.define(&[weights()]).await?[0].variable.id;
    Ok((session, table))
}

/// Trains on every sample of one worker once.
async fn train(
    coordinators: &Coordinators,
    name: &str,
    worker: u64,
    course: &Course,
) -> Result<()> {
    let (session, table) = open(coordinators, name).await?;
    for clock in 0..STEPS {
        let goes_on = || async {
            let gate = course.gate.load(Ordering::Relaxed);
            (course.steps.load(Ordering::Relaxed) < gate).then_some(())
        };
        wait_for("the gate", DEADLINE, goes_on).await?;
        let samples = (0..BATCH).map(|at| (clock * BATCH + at) * WORKERS + worker);
        let mut unique: Vec<u64> = samples.clone().flat_map(keys).collect();
        unique.sort_unstable();
        unique.dedup();
        let mut values = vec![0.0; unique.len()];
        let rows = TableRows { variable: table, keys: &unique, values: &mut values };
        session.pull(&mut [rows], None).await?;
        let row = |key: u64| unique.binary_search(&key).expect("it is among them");
        let mut gradients = vec![0.0; unique.len()];
        for sample in samples {
            let logit: f64 = keys(sample).iter().map(|&key| f64::from(values[row(key)])).sum();
            let error = probability(logit) - f64::from(u8::from(clicked(sample)));
            keys(sample).iter().for_each(|&key| gradients[row(key)] += error as f32);
        }
        let rows = vec![RowGradients { variable: table, keys: &unique, gradients: &gradients }];
        session.push(&PushBatch { clock, rows, ..PushBatch::default() }).await?.await?;
        course.steps.fetch_add(1, Ordering::Relaxed);
    }
    session.close().await?;
    Ok(())
}

/// What the cluster learned, while `disturb` is done to it.
fn learned(
    cluster: &mut TestCluster,
    name: &str,
    gate: u64,
    disturb: impl FnOnce(&mut TestCluster, &Course) -> Result<()>,
) -> Result<(f64, f64)> {
    let course = Arc::new(Course { steps: AtomicU64::new(0), gate: AtomicU64::new(gate) });
    let (coordinators, mut workers) = (cluster.coordinators.clone(), Vec::new());
    for worker in 0..WORKERS {
        let (coordinators, course) = (coordinators.clone(), Arc::clone(&course));
        let name = name.to_owned();
        workers.push(
            cluster
                .runtime
                .spawn(async move { train(&coordinators, &name, worker, &course).await }),
        );
    }
    let disturbed = disturb(cluster, &course);
    course.gate.store(u64::MAX, Ordering::Relaxed);
    for worker in workers {
        cluster.runtime.block_on(worker).context("a worker panicked")?.context("train")?;
    }
    disturbed?;
    cluster.runtime.block_on(async {
        let (session, table) = open(&coordinators, name).await?;
        let every: Vec<u64> = (0..FEATURES * VALUES).collect();
        let mut values = vec![0.0; every.len()];
        let rows = TableRows { variable: table, keys: &every, values: &mut values };
        session.pull(&mut [rows], None).await?;
        session.close().await?;
        let logit = |sample| keys(sample).iter().map(|&key| f64::from(values[key as usize])).sum();
        Ok(score(logit))
    })
}

impl Course {
    /// Waits until the workers have done so many steps.
    fn reach(&self, cluster: &TestCluster, count: u64) -> Result<()> {
        let reached = || async { (self.steps.load(Ordering::Relaxed) >= count).then_some(()) };
        cluster.runtime.block_on(wait_for("steps", DEADLINE, reached))
    }

    /// Lets them go on for a quarter, and returns in the midst of it.
    fn next_quarter(&self, cluster: &TestCluster) -> Result<()> {
        let quarter = WORKERS * STEPS / 4;
        let gate = self.gate.fetch_add(quarter, Ordering::Relaxed);
        self.reach(cluster, gate + quarter / 2)
    }

    /// Waits until they have done what they may.
    fn quarter_is_done(&self, cluster: &TestCluster) -> Result<()> {
        self.reach(cluster, self.gate.load(Ordering::Relaxed))
    }
}

/// A primary is killed, the leading coordinator is, a primary is stopped until another takes over and goes on then: each while workers train.
fn disturb(cluster: &mut TestCluster, name: &str, course: &Course) -> Result<()> {
    course.next_quarter(cluster)?;
    let (victim, _) = cluster.primary(name, ShardId(0))?;
    cluster.processes.servers[victim].kill()?;
    course.quarter_is_done(cluster)?;
    cluster.processes.servers[victim].start()?;
    cluster.processes.servers[victim].wait_ready(DEADLINE)?;
    let full = || async {
        let view = cluster.coordinators.job(name).await.ok()?;
        view.shards.iter().all(|route| route.in_sync.len() == 2).then_some(())
    };
    cluster.runtime.block_on(wait_for("full in-sync sets", DEADLINE, full))?;
    let leader = cluster.leader()?;
    course.next_quarter(cluster)?;
    cluster.processes.coordinators[leader].kill()?;
    course.quarter_is_done(cluster)?;
    cluster.processes.coordinators[leader].start()?;
    cluster.processes.coordinators[leader].wait_ready(DEADLINE)?;
    let (paused, _) = cluster.primary(name, ShardId(0))?;
    course.next_quarter(cluster)?;
    cluster.processes.servers[paused].signal(Signal::STOP)?;
    course.quarter_is_done(cluster)?;
    cluster.processes.servers[paused].signal(Signal::CONT)?;
    course.next_quarter(cluster)
}

#[test]
fn a_model_that_is_trained_through_faults_is_as_good_as_one_that_is_trained_in_peace() -> Result<()>
{
    let mut cluster = TestCluster::start(3)?;
    let (loss, auc) = learned(&mut cluster, "peace", u64::MAX, |_, _| Ok(()))?;
    let name = "faults";
    let disturbed =
        learned(&mut cluster, name, 0, |cluster, course| disturb(cluster, name, course))?;
    let (best, best_auc) = score(true_logit);
    let seen = format!(
        "{disturbed:?} with faults, {:?} without; the truth {:?}",
        (loss, auc),
        (best, best_auc)
    );
    eprintln!("loss and AUC: {seen}");
    ensure!(loss - best < LOSS_MAX, "it learned nothing: {seen}");
    ensure!((disturbed.0 - loss).abs() < LOSS_TOLERANCE, "loss: {seen}");
    ensure!((disturbed.1 - auc).abs() < AUC_TOLERANCE, "AUC: {seen}");
    cluster.stop()
}
