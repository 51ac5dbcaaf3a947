//! Workers that come and go in the midst of a pass, and what the model is worth afterwards (docs/protocol.md 7.7).
//!
//! `downpour-gen` makes clicks with numbered rows. Six processes of `downpour-worker count-clicks` train a factorization machine on them, and with each sample a
//! row that counts how often it was trained: once in peace, then, from each seed, while three of them are killed and two others join. Who is to be
//! killed is stopped first: what it holds then is what may be trained again.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use downpour_client::{Job, Session, SessionOptions, TableRows};
use downpour_core::mix::mix64;
use downpour_core::view::JobView;
use downpour_proto::v1;
use downpour_psctl::local::{Interrupt, Process};
use rustix::process::Signal;
use serde::Serialize;

use crate::cluster::{DEADLINE, Setup, TestCluster};
use crate::faults::Scenario;

const SERVERS: usize = 2;
const WORKERS: usize = 6;
const KILLED: u64 = 3;
const JOINED: u64 = 2;
/// Between the models of two trainings.
const AUC_TOLERANCE: f64 = 0.003;
/// Below the best possible one.
const AUC_GAP_MAX: f64 = 0.05;
/// Who is killed is soon no member any more.
const SESSION_TIMEOUT: [&str; 2] = ["--session-timeout-ms", "3000"];
/// Longest that a training may take.
const PATIENCE: Duration = Duration::from_secs(1800);
const POLL: Duration = Duration::from_millis(5);

/// How much there is to train on.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Samples of a pass.
    pub rows: u64,
    /// Samples of a task.
    pub task_rows: u64,
    /// Samples that the model is judged on.
    pub test_rows: u64,
    /// Of a step.
    pub batch: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes { rows: 400_000, task_rows: 1_000, test_rows: 100_000, batch: 128 }
    }
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Always `workers`.
    pub scenario: Scenario,
    /// Of the first disturbed training; the others have the numbers after it.
    pub seed: u64,
    /// Samples of the pass.
    pub samples: u64,
    /// Tasks of the pass.
    pub tasks: u64,
    /// The AUC of the truth itself on the same held-out rows.
    pub auc_best: f64,
    /// In peace.
    pub undisturbed: Training,
    /// With deaths and joins.
    pub disturbed: Vec<Training>,
    /// Largest, between the undisturbed training and another.
    pub auc_difference: f64,
}

/// One training.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Training {
    /// What the deaths followed from.
    pub seed: u64,
    /// On rows that nobody trained on.
    pub auc: f64,
    /// Samples that were never trained.
    pub never: u64,
    /// Samples that were trained exactly once.
    pub once: u64,
    /// Samples that were trained more often.
    pub more: u64,
    /// Tasks with such samples.
    pub tasks_again: u64,
    /// Tasks that those who were killed had then.
    pub tasks_in_flight: u64,
    /// Workers that were killed.
    pub kills: u64,
    /// Workers that joined in the midst.
    pub joins: u64,
    /// From the start of the first worker to the end of the last.
    pub seconds: f64,
}

impl Training {
    /// Every sample was trained, and none again that nobody had in flight.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.never == 0 && self.tasks_again <= self.tasks_in_flight
    }
}

impl Report {
    /// The promises that were not kept.
    #[must_use]
    pub fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        if !self.trained_all() {
            broken
                .push("a sample was never trained, or one again that nobody had in flight".into());
        }
        let gap = self.auc_best - self.undisturbed.auc;
        if gap > AUC_GAP_MAX {
            broken.push(format!("undisturbed, the model is {gap:.4} below the best AUC; at most {AUC_GAP_MAX} shows that it has learned (more --rows?)"));
        }
        if self.auc_difference > AUC_TOLERANCE {
            broken.push(format!("AUC differs by {:.4}, at most {AUC_TOLERANCE} was promised (with few --rows it differs by chance)", self.auc_difference));
        }
        broken
    }

    /// Whether the promises were kept.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.broken().is_empty()
    }

    /// Whether every training trained every sample, and none again that nobody had in flight.
    #[must_use]
    pub fn trained_all(&self) -> bool {
        self.undisturbed.is_whole() && self.disturbed.iter().all(Training::is_whole)
    }
}

/// Trains in peace, and then so many times with deaths and joins.
///
/// # Errors
/// A program is missing, a training does not end in time, or the run was interrupted.
pub fn run(sizes: Sizes, seed: u64, runs: u64, interrupt: &Interrupt) -> Result<Report> {
    let mut cluster = TestCluster::launch(&Setup {
        servers: SERVERS,
        coordinator_args: SESSION_TIMEOUT.map(String::from).into(),
        interrupt: interrupt.clone(),
        ..Setup::default()
    })?;
    let report = trainings(&cluster, sizes, (seed, runs), interrupt);
    match &report {
        Ok(report) if report.passed() => cluster.stop()?,
        _ if interrupt.is_set() => {}
        _ => cluster.keep_dir(),
    }
    report
}

fn trainings(
    cluster: &TestCluster,
    sizes: Sizes,
    (seed, runs): (u64, u64),
    interrupt: &Interrupt,
) -> Result<Report> {
    let mut field = Field { cluster, sizes, interrupt, data: PathBuf::new(), started: 0 };
    eprintln!("writing {} samples", sizes.rows);
    let auc_best = field.write_data()?;
    let undisturbed = field.training("peace", None)?;
    eprintln!("in peace: {undisturbed:?}");
    let mut disturbed = Vec::new();
    for seed in (0..runs).map(|number| seed.wrapping_add(number)) {
        let training = field.training(&format!("seed-{seed}"), Some(seed))?;
        eprintln!("disturbed: {training:?}");
        disturbed.push(training);
    }
    let differences = disturbed.iter().map(|one| (one.auc - undisturbed.auc).abs());
    Ok(Report {
        scenario: Scenario::Workers,
        seed,
        samples: sizes.rows,
        tasks: sizes.rows.div_ceil(sizes.task_rows),
        auc_best,
        undisturbed,
        auc_difference: differences.fold(0.0, f64::max),
        disturbed,
    })
}

/// Where the workers are.
struct Field<'a> {
    cluster: &'a TestCluster,
    sizes: Sizes,
    interrupt: &'a Interrupt,
    data: PathBuf,
    /// Programs so far: each has a name of its own.
    started: u64,
}

impl Field<'_> {
    /// What the best model would score.
    fn write_data(&mut self) -> Result<f64> {
        self.data = self.cluster.processes.subdir("clicks")?;
        let Sizes { rows, task_rows, test_rows, .. } = self.sizes;
        let args = format!(
            "clicks --row-numbers --rows {rows} --test-rows {test_rows} --fields 8 --dense 4 --ids-per-field 1000 \
             --row-group-rows {task_rows} -o json --out"
        );
        let mut args: Vec<String> = args.split_whitespace().map(Into::into).collect();
        args.push(self.data.display().to_string());
        let mut program = self.cluster.processes.run("gen", "downpour-gen", args)?;
        program.wait_success(PATIENCE)?;
        let best = said(&program)?["ceiling"]["auc"].as_f64();
        best.context("downpour-gen does not say what is best")
    }

    fn start(&mut self, job: &str, mode: &str) -> Result<Process> {
        let name = format!("{mode}-{}", self.started);
        self.started += 1;
        let coordinators = self.cluster.processes.coordinator_addresses();
        let (data, batch) = (self.data.display().to_string(), self.sizes.batch.to_string());
        let args = ["count-clicks", mode, "--name", &name, "--coordinators", &coordinators];
        let more = ["--job", job, "--data", &data, "--batch", &batch];
        let args = args.into_iter().chain(more).map(String::from).collect();
        Ok(self.cluster.processes.run(&name, "downpour-worker", args)?)
    }

    fn training(&mut self, job: &str, seed: Option<u64>) -> Result<Training> {
        let began = Instant::now();
        let mut training = Training { seed: seed.unwrap_or(0), ..Training::default() };
        let workers = (0..WORKERS).map(|_| self.start(job, "train"));
        let mut workers: Vec<Process> = workers.collect::<Result<_>>()?;
        if let Some(seed) = seed {
            self.disturb(job, seed, &mut workers, &mut training)?;
        }
        for worker in &mut workers {
            worker.wait_success(PATIENCE)?;
        }
        training.seconds = began.elapsed().as_secs_f64();
        let tasks = self.sizes.rows.div_ceil(self.sizes.task_rows);
        let done = self.status(job)?.map_or(0, |job| tasks_done(&job));
        ensure!(done == tasks, "{done} of {tasks} tasks are done, and all workers have ended");
        let mut evaluation = self.start(job, "evaluate")?;
        evaluation.wait_success(PATIENCE)?;
        training.auc = said(&evaluation)?["auc"].as_f64().context("no AUC")?;
        self.count(job, &mut training)?;
        let view = self.cluster.runtime.block_on(self.cluster.coordinators.job(job))?;
        self.cluster.runtime.block_on(self.cluster.coordinators.delete_job(view.job))?;
        Ok(training)
    }

    fn disturb(
        &mut self,
        job: &str,
        seed: u64,
        workers: &mut Vec<Process>,
        training: &mut Training,
    ) -> Result<()> {
        let all = self.sizes.rows.div_ceil(self.sizes.task_rows);
        let draw = |number: u64, below: u64| mix64(mix64(seed).wrapping_add(number)) % below.max(1);
        let mut killed = Killed::default();
        for death in 0..KILLED {
            // Apart from each other, and while there is something left to do.
            let when = all * (death + 1) / 5 + draw(death, all / 10);
            self.wait_for(job, |status| {
                killed.look(status);
                tasks_done(status) >= when
            })?;
            let mut victim = workers.remove(draw(KILLED + death, workers.len() as u64) as usize);
            victim.check()?;
            victim.signal(Signal::STOP)?;
            killed.0.push((victim.name().to_owned(), 0));
            killed.look(&self.status(job)?.context("the job is gone")?);
            victim.kill()?;
            training.kills += 1;
            if training.joins < JOINED {
                workers.push(self.start(job, "train")?);
                training.joins += 1;
            }
        }
        self.wait_for(job, |status| killed.look(status) == 0)?;
        training.tasks_in_flight = killed.0.iter().map(|(_, held)| held).sum();
        Ok(())
    }

    fn wait_for(&self, job: &str, mut condition: impl FnMut(&v1::JobStatus) -> bool) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            ensure!(!self.interrupt.is_set(), "interrupted");
            if self.status(job)?.is_some_and(|status| condition(&status)) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{job} does not get on");
            std::thread::sleep(POLL);
        }
    }

    fn status(&self, name: &str) -> Result<Option<v1::JobStatus>> {
        let cluster = self.cluster.runtime.block_on(self.cluster.coordinators.cluster())?;
        let is_it = |job: &v1::JobStatus| {
            let spec = job.view.as_ref().and_then(|view| view.spec.as_ref());
            spec.is_some_and(|spec| spec.name == name)
        };
        Ok(cluster.jobs.into_iter().find(is_it))
    }

    /// How often each sample was trained.
    fn count(&self, job: &str, training: &mut Training) -> Result<()> {
        let counts = self.cluster.runtime.block_on(async {
            let coordinators = &self.cluster.coordinators;
            let view: JobView = coordinators.job(job).await?;
            let counted = view.variables.iter().find(|one| one.spec.name == "samples");
            let variable = counted.context("nobody counted")?.id;
            let options = SessionOptions { deadline: DEADLINE, ..SessionOptions::worker("count") };
            let session = Session::open(coordinators, &Job::Existing(job.into()), options).await?;
            let mut counts: Vec<f32> = Vec::new();
            let keys: Vec<u64> = (0..self.sizes.rows).collect();
            for keys in keys.chunks(65_536) {
                let mut values = vec![0.0; keys.len()];
                let rows = TableRows { variable, keys, values: &mut values };
                session.pull(&mut [rows], None).await.context("read the counters")?;
                // Each time takes one off.
                counts.extend(values.iter().map(|value| -value));
            }
            session.close().await?;
            anyhow::Ok(counts)
        })?;
        tell(&counts, self.sizes.task_rows as usize, training);
        Ok(())
    }
}

/// Workers that were killed, each with the most tasks that it was seen to have since it was stopped: what it had asked for before may still come true.
#[derive(Default)]
struct Killed(Vec<(String, u64)>);

impl Killed {
    /// How many of them are still taken for members.
    fn look(&mut self, status: &v1::JobStatus) -> usize {
        let mut open = 0;
        for (name, most) in &mut self.0 {
            for session in status.sessions.iter().filter(|session| session.name == *name) {
                *most = (*most).max(session.tasks_held.into());
                open += 1;
            }
        }
        open
    }
}

/// Tasks are stretches of as many samples.
fn tell(counts: &[f32], task_rows: usize, training: &mut Training) {
    let with = |wanted: fn(&f32) -> bool| counts.iter().filter(|count| wanted(count)).count();
    training.never = with(|count| *count < 1.0) as u64;
    training.more = with(|count| *count > 1.0) as u64;
    training.once = counts.len() as u64 - training.never - training.more;
    let tasks = counts.chunks(task_rows);
    let again = tasks.filter(|task| task.iter().any(|count| *count > 1.0));
    training.tasks_again = again.count() as u64;
}

fn tasks_done(status: &v1::JobStatus) -> u64 {
    status.ledger.as_ref().map_or(0, |ledger| ledger.tasks_done)
}

/// The last line of what it said.
fn said(program: &Process) -> Result<serde_json::Value> {
    let log = program.log();
    let text = fs::read_to_string(log).with_context(|| format!("read {}", log.display()))?;
    let Some(line) = text.lines().rev().find(|line| line.starts_with('{')) else {
        bail!("{} says nothing:\n{text}", program.name())
    };
    serde_json::from_str(line).with_context(|| format!("{}: {line}", program.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_that_a_dead_worker_was_seen_to_have_counts() {
        let held = |name: &str, tasks_held| v1::SessionView {
            name: name.into(),
            tasks_held,
            ..Default::default()
        };
        let status = |sessions| v1::JobStatus { sessions, ..Default::default() };
        let mut killed = Killed(vec![("a".into(), 0), ("b".into(), 0)]);
        assert_eq!(killed.look(&status(vec![held("a", 2), held("b", 1), held("c", 9)])), 2);
        assert_eq!(killed.look(&status(vec![held("a", 3)])), 1);
        assert_eq!(killed.look(&status(Vec::new())), 0);
        assert_eq!(killed.0, [("a".into(), 3), ("b".into(), 1)]);
    }

    #[test]
    fn samples_are_counted_by_how_often_they_were_trained_and_tasks_that_were_trained_again() {
        let mut training = Training { tasks_in_flight: 1, ..Training::default() };
        tell(&[1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0], 2, &mut training);
        let Training { never, once, more, tasks_again, .. } = training;
        assert_eq!((never, once, more, tasks_again), (0, 5, 2, 1));
        assert!(training.is_whole());
        tell(&[1.0, 2.0, 2.0, 1.0], 2, &mut training);
        assert!(!training.is_whole(), "nobody had the second one");
        tell(&[1.0, 0.0], 2, &mut training);
        assert!(training.never == 1 && !training.is_whole());
    }
}
