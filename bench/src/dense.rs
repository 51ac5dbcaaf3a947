//! Measuring D.

use serde::Serialize;

use crate::child::Child;
use crate::protocol::{Answer, Command, DenseSteps, Role};
use crate::statistics::Spread;
use crate::workload::{Dense, ERROR_MAX};
use crate::{System, progress};

/// A tensor that is initialised, and a worker that waits to be told.
#[derive(Debug)]
pub struct Run {
    workload: Dense,
    /// For people.
    label: String,
    worker: Child,
    measured: DenseSteps,
    server_cpu_s: Option<f64>,
}

impl Run {
    /// Starts the worker, initialises the tensor and takes a step to warm up.
    ///
    /// # Errors
    /// The worker cannot.
    pub fn start(whose: &str, workload: Dense, system: &mut dyn System) -> anyhow::Result<Self> {
        let role = Role::Dense { peer: system.peer(), workload };
        let (worker, _) = Child::in_role("worker 0", &role, system)?;
        let label = format!("{whose} D");
        let (measured, server_cpu_s) = (DenseSteps::default(), Some(0.0));
        let mut run = Self { workload, label, worker, measured, server_cpu_s };
        progress(&run.label, format_args!("{} floats", workload.floats));
        run.ask(Command::Fill, system)?;
        run.ask(Command::Steps { count: WARM_UP }, system)?;
        Ok(run)
    }

    /// So many steps.
    ///
    /// # Errors
    /// The worker cannot.
    pub fn repeat(&mut self, count: usize, system: &mut dyn System) -> anyhow::Result<()> {
        let before = system.cpu_s();
        let steps = match self.ask(Command::Steps { count }, system)? {
            Answer::Dense(steps) => steps,
            other => return Err(self.worker.unexpected(&other)),
        };
        let used = before.zip(system.cpu_s()).map(|(before, after)| after - before);
        self.server_cpu_s = self.server_cpu_s.zip(used).map(|(sum, used)| sum + used);
        let all = &mut self.measured;
        all.pull_s.extend(steps.pull_s);
        all.push_s.extend(steps.push_s);
        all.cpu_s += steps.cpu_s;
        let (pull, push) = (self.rate(&self.measured.pull_s), self.rate(&self.measured.push_s));
        let steps = self.measured.pull_s.len();
        progress(
            &self.label,
            format_args!(
                "{steps} steps: pull {:.3} GB/s, push {:.3} GB/s",
                pull.median, push.median
            ),
        );
        Ok(())
    }

    /// Compares all floats with what they must be, removes the job, and reports.
    ///
    /// # Errors
    /// The worker cannot. Floats that differ are in the report.
    pub fn finish(mut self, system: &mut dyn System) -> anyhow::Result<Report> {
        let steps = self.measured.pull_s.len();
        let repeats = (WARM_UP + steps) as u32;
        let check_err = match self.ask(Command::Check { repeats }, system)? {
            Answer::Checked { error } => error,
            other => return Err(self.worker.unexpected(&other)),
        };
        self.ask(Command::CleanUp, system)?;
        let (pull, push) = (self.rate(&self.measured.pull_s), self.rate(&self.measured.push_s));
        let gigabytes = 2.0 * self.gigabytes() * steps as f64;
        self.worker.finish()?;
        Ok(Report {
            workload: "D".into(),
            pull_gb_s: pull.median,
            pull_gb_s_min: pull.min,
            pull_gb_s_max: pull.max,
            push_gb_s: push.median,
            push_gb_s_min: push.min,
            push_gb_s_max: push.max,
            cpu_server_s_per_gb: self.server_cpu_s.map(|seconds| seconds / gigabytes),
            cpu_worker_s_per_gb: self.measured.cpu_s / gigabytes,
            check_err,
            floats: self.workload.floats,
            steps,
        })
    }

    fn ask(&mut self, command: Command, system: &mut dyn System) -> anyhow::Result<Answer> {
        self.worker.say(&command)?;
        self.worker.answer(system)
    }

    /// Of the tensor.
    fn gigabytes(&self) -> f64 {
        self.workload.floats as f64 * 4.0 / 1e9
    }

    fn rate(&self, seconds: &[f64]) -> Spread {
        Spread::of(seconds.iter().map(|seconds| self.gigabytes() / seconds)).unwrap_or(Spread {
            median: 0.0,
            min: 0.0,
            max: 0.0,
        })
    }
}

/// Steps before the first that counts.
const WARM_UP: usize = 1;

/// What a measurement of D found. Rates are medians over the steps, in 10^9 bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// D.
    pub workload: String,
    /// From the call to the values in the worker's memory.
    pub pull_gb_s: f64,
    /// The slowest pull.
    pub pull_gb_s_min: f64,
    /// The fastest pull.
    pub pull_gb_s_max: f64,
    /// From the call to the acknowledgement that the gradient is applied.
    pub push_gb_s: f64,
    /// The slowest push.
    pub push_gb_s_min: f64,
    /// The fastest push.
    pub push_gb_s_max: f64,
    /// Processor seconds of all servers for 10^9 bytes, both ways counted. `null` if nobody here knows.
    pub cpu_server_s_per_gb: Option<f64>,
    /// Of the worker.
    pub cpu_worker_s_per_gb: f64,
    /// Largest difference of any float from what it must be.
    pub check_err: f64,
    /// Of the tensor.
    pub floats: usize,
    /// Steps that counted.
    pub steps: usize,
}

impl Report {
    /// Whether all floats are what they must be.
    #[must_use]
    pub fn is_correct(&self) -> bool {
        self.check_err < ERROR_MAX
    }
}
