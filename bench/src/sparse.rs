//! Measuring S.

use serde::Serialize;

use crate::child::Child;
use crate::protocol::{Answer, Command, Role, SparseSteps};
use crate::statistics::{Spread, quantile};
use crate::workload::{ERROR_MAX, Optimizer, Sparse};
use crate::{System, progress};

/// A table that is filled, and workers that wait to be told.
#[derive(Debug)]
pub struct Run {
    workload: Sparse,
    /// For people.
    label: String,
    workers: Vec<Child>,
    repeats: Vec<Repeat>,
}

/// All workers' steps, once.
#[derive(Debug)]
struct Repeat {
    workers: Vec<SparseSteps>,
    server_cpu_s: Option<f64>,
}

impl Repeat {
    /// From the earliest start to the latest end.
    fn seconds(&self) -> f64 {
        let start = self.workers.iter().map(|steps| steps.start_s).fold(f64::INFINITY, f64::min);
        let end = self.workers.iter().map(|steps| steps.end_s).fold(0.0, f64::max);
        end - start
    }

    fn rows(&self) -> usize {
        self.workers.iter().map(|steps| steps.rows).sum()
    }

    /// Of all workers, each by the time that its own pushes took.
    fn push_rows_s(&self) -> f64 {
        self.workers.iter().map(|steps| steps.rows as f64 / steps.push_s).sum()
    }
}

impl Run {
    /// Starts the workers, creates the rows and warms up.
    ///
    /// # Errors
    /// A worker cannot.
    pub fn start(whose: &str, workload: Sparse, system: &mut dyn System) -> anyhow::Result<Self> {
        let label = format!("{whose} {}", workload.name());
        let mut workers = Vec::new();
        for worker in 0..workload.workers {
            let (peer, workload) = (system.peer(), workload.clone());
            let role = Role::Sparse { peer, workload, worker };
            workers.push(Child::in_role(&format!("worker {worker}"), &role, system)?.0);
        }
        let mut run = Self { workload, label, workers, repeats: Vec::new() };
        progress(&run.label, format_args!("{} rows", run.workload.rows));
        run.ask_first(Command::Fill, system)?;
        progress(&run.label, format_args!("{} steps to warm up", run.workload.warm_up));
        run.steps(run.workload.warm_up, system)?;
        Ok(run)
    }

    /// One repeat of all steps.
    ///
    /// # Errors
    /// A worker cannot.
    pub fn repeat(&mut self, system: &mut dyn System) -> anyhow::Result<()> {
        let before = system.cpu_s();
        let workers = self.steps(self.workload.steps, system)?;
        let used = before.zip(system.cpu_s()).map(|(before, after)| after - before);
        let repeat = Repeat { workers, server_cpu_s: used };
        let mrows_s = repeat.rows() as f64 / repeat.seconds() / 1e6;
        self.repeats.push(repeat);
        progress(&self.label, format_args!("repeat {}: {mrows_s:.3} M rows/s", self.repeats.len()));
        Ok(())
    }

    /// Compares all rows with what they must be, removes the job, and reports.
    ///
    /// # Errors
    /// A worker cannot. Rows that differ are in the report.
    pub fn finish(mut self, system: &mut dyn System) -> anyhow::Result<Report> {
        progress(&self.label, "comparing all rows");
        let repeats = self.repeats.len() as u32;
        let error = match self.ask_first(Command::Check { repeats }, system)? {
            Answer::Checked { error } => error,
            other => return Err(self.workers[0].unexpected(&other)),
        };
        self.ask_first(Command::CleanUp, system)?;
        let report = Report::new(&self.workload, &self.repeats, error);
        self.workers.into_iter().try_for_each(Child::finish)?;
        Ok(report)
    }

    fn ask_first(&mut self, command: Command, system: &mut dyn System) -> anyhow::Result<Answer> {
        let first = &mut self.workers[0];
        first.say(&command)?;
        first.answer(system)
    }

    /// Told to all before any is waited for: their barrier.
    fn steps(&mut self, count: usize, system: &mut dyn System) -> anyhow::Result<Vec<SparseSteps>> {
        self.workers.iter_mut().try_for_each(|worker| worker.say(&Command::Steps { count }))?;
        let answers = self.workers.iter_mut().map(|worker| match worker.answer(system)? {
            Answer::Sparse(steps) => Ok(steps),
            other => Err(worker.unexpected(&other)),
        });
        answers.collect()
    }
}

/// What a measurement of S found. Rates are medians over the repeats.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// S-16 and so on.
    pub workload: String,
    /// Steps per second, of all workers together.
    pub steps_s: f64,
    /// The slowest repeat.
    pub steps_s_min: f64,
    /// The fastest repeat.
    pub steps_s_max: f64,
    /// Unique rows per second, each pulled and pushed.
    pub rows_s: f64,
    /// The slowest repeat.
    pub rows_s_min: f64,
    /// The fastest repeat.
    pub rows_s_max: f64,
    /// Rows that are pushed in a second of the time in which workers push.
    pub push_rows_s: f64,
    /// Floats of rows both ways, without keys and framing.
    pub payload_mb_s: f64,
    /// Of all steps.
    pub p50_ms: f64,
    /// Of all steps.
    pub p99_ms: f64,
    /// Of all steps.
    pub p999_ms: f64,
    /// Mean time that making keys unique takes of a step.
    pub dedup_ms: f64,
    /// Processor seconds of all servers for a million unique rows. `null` if nobody here knows.
    pub cpu_server_s_per_mrow: Option<f64>,
    /// Of all workers.
    pub cpu_worker_s_per_mrow: f64,
    /// Largest difference of any float from what it must be.
    pub check_err: f64,
    /// Rows of the table.
    pub rows: u32,
    /// Floats of a row.
    pub dim: u32,
    /// Processes that took steps.
    pub workers: usize,
    /// Of the table.
    pub optimizer: Optimizer,
    /// Of one repeat and one worker.
    pub steps: usize,
    /// How often all steps were taken.
    pub repeats: usize,
}

impl Report {
    /// At least one repeat.
    fn new(workload: &Sparse, repeats: &[Repeat], check_err: f64) -> Self {
        let spread = |rate: &dyn Fn(&Repeat) -> f64| {
            Spread::of(repeats.iter().map(|repeat| rate(repeat) / repeat.seconds()))
                .unwrap_or(Spread { median: 0.0, min: 0.0, max: 0.0 })
        };
        let steps =
            spread(&|repeat| repeat.workers.iter().map(|w| w.step_s.len()).sum::<usize>() as f64);
        let rows = spread(&|repeat| repeat.rows() as f64);
        let push_rows_s = Spread::of(repeats.iter().map(Repeat::push_rows_s));
        let all = || repeats.iter().flat_map(|repeat| &repeat.workers);
        let mut step_s: Vec<f64> = all().flat_map(|worker| &worker.step_s).copied().collect();
        let mut quantile_ms = |share| quantile(&mut step_s, share).unwrap_or(0.0) * 1e3;
        let mrows = repeats.iter().map(Repeat::rows).sum::<usize>() as f64 / 1e6;
        let server_cpu_s: Option<f64> = repeats.iter().map(|repeat| repeat.server_cpu_s).sum();
        let (p50_ms, p99_ms, p999_ms) = (quantile_ms(0.5), quantile_ms(0.99), quantile_ms(0.999));
        Self {
            workload: workload.name(),
            steps_s: steps.median,
            steps_s_min: steps.min,
            steps_s_max: steps.max,
            rows_s: rows.median,
            rows_s_min: rows.min,
            rows_s_max: rows.max,
            push_rows_s: push_rows_s.map_or(0.0, |spread| spread.median),
            payload_mb_s: rows.median * f64::from(workload.dim) * 4.0 * 2.0 / 1e6,
            p50_ms,
            p99_ms,
            p999_ms,
            dedup_ms: all().map(|worker| worker.dedup_s).sum::<f64>() / step_s.len() as f64 * 1e3,
            cpu_server_s_per_mrow: server_cpu_s.map(|seconds| seconds / mrows),
            cpu_worker_s_per_mrow: all().map(|worker| worker.cpu_s).sum::<f64>() / mrows,
            check_err,
            rows: workload.rows,
            dim: workload.dim,
            workers: workload.workers,
            optimizer: workload.optimizer,
            steps: workload.steps,
            repeats: repeats.len(),
        }
    }

    /// Whether all rows are what they must be.
    #[must_use]
    pub fn is_correct(&self) -> bool {
        self.check_err < ERROR_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeat_lasts_from_the_first_start_to_the_last_end() {
        let steps = |start_s, end_s, rows| SparseSteps {
            start_s,
            end_s,
            rows,
            step_s: vec![0.5, 0.25],
            dedup_s: 0.1,
            push_s: 0.25,
            cpu_s: 0.5,
        };
        let workers = vec![steps(10.0, 11.0, 500_000), steps(10.5, 12.0, 1_500_000)];
        let repeat = Repeat { workers, server_cpu_s: Some(1.0) };
        let report = Report::new(&Sparse::standard(16, 2), &[repeat], 0.0);
        assert_eq!(report.workload, "S2-16");
        assert_eq!((report.steps_s, report.rows_s, report.push_rows_s), (2.0, 1e6, 8e6));
        assert_eq!(report.payload_mb_s, 128.0);
        assert_eq!((report.p50_ms, report.p999_ms), (250.0, 500.0));
        assert_eq!(report.cpu_server_s_per_mrow, Some(0.5));
        assert_eq!(report.cpu_worker_s_per_mrow, 0.5);
        assert!(report.is_correct());
    }
}
