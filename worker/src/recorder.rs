//! What a worker says of itself: one JSON object per interval, and progress for the coordinators.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use downpour_client::{Progress, Session};
use serde::Serialize;

use crate::every::Every;
use crate::metrics::Mean;
use crate::optimizer::Optimizers;
use crate::pipeline::Finished;
use crate::{Error, NonFinite, Result};

/// Gradients of one kind (tables or dense) as they were pushed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GradientStats {
    squares: f64,
    zeros: u64,
    not_finite: u64,
    count: u64,
}

impl GradientStats {
    /// Returns how many are not finite.
    pub(crate) fn add(&mut self, gradient: &[f32]) -> u64 {
        let mut not_finite = 0;
        // In the cache for both passes.
        for block in gradient.chunks(4096) {
            // Sums that do not wait for each other.
            let (parts, rest) = block.as_chunks::<8>();
            let mut sums = [0f64; 8];
            for part in parts {
                for (sum, &g) in sums.iter_mut().zip(part) {
                    *sum += f64::from(g) * f64::from(g);
                }
            }
            let rest = rest.iter().map(|&g| f64::from(g) * f64::from(g));
            let squares = sums.into_iter().chain(rest).sum::<f64>();
            self.squares += squares;
            self.zeros += u64::from(block.iter().map(|&g| u32::from(g == 0.0)).sum::<u32>());
            // The squares of finite floats do not overflow a double.
            if !squares.is_finite() {
                not_finite += block.iter().filter(|g| !g.is_finite()).count() as u64;
            }
        }
        self.not_finite += not_finite;
        self.count += gradient.len() as u64;
        not_finite
    }

    pub(crate) fn squares(&self) -> f64 {
        self.squares
    }
}

/// What a step left behind.
#[derive(Debug)]
pub(crate) struct StepRecord {
    pub(crate) clock: u64,
    pub(crate) samples: u64,
    pub(crate) loss: f64,
    pub(crate) tables: GradientStats,
    pub(crate) dense: GradientStats,
}

/// One line of `metrics.jsonl`. All but `wall_s` and `samples_per_s` are the same in every run of one worker with one seed.
#[derive(Debug, Serialize)]
struct Line {
    clock: u64,
    samples: u64,
    total_samples: u64,
    /// Of them in this run: others were trained before it began.
    run_samples: u64,
    planned_samples: Option<u64>,
    loss: Option<f64>,
    lr_table: f32,
    lr_dense: f32,
    gradient_norm_tables: Option<f64>,
    gradient_norm_dense: Option<f64>,
    zero_share: f64,
    not_finite_share: f64,
    skipped_steps: u64,
    partly_refused_pushes: u64,
    staleness: Option<f64>,
    stale_clocks: Option<f64>,
    stale_clocks_max: Option<u64>,
    ahead: Option<f64>,
    samples_per_s: f64,
    wall_s: f64,
}

/// Collects steps and writes a line for every interval.
#[derive(Debug)]
pub(crate) struct Recorder {
    file: Option<(PathBuf, File)>,
    every: Every,
    optimizers: Optimizers,
    started: Instant,
    window: Window,
    clock: u64,
    total_samples: u64,
    /// Trained before this run.
    start_samples: u64,
    /// Of all workers, as the coordinators noted.
    job_samples: u64,
    planned_samples: Option<u64>,
    /// Batches saved because of a number that is not finite.
    saved: u64,
    /// Steps left out since the last good one.
    skipped_in_a_row: u64,
    /// Of all steps.
    staleness: StalenessMeans,
}

/// Most batches that are saved: the first ones tell what is wrong, and more would fill the disk.
const SAVED_MAX: u64 = 10;

/// How stale the steps of a training were: what happened between the pull and the push of each.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Staleness {
    /// Records that a shard applied, the mean.
    pub records: f64,
    /// Steps that the furthest worker went on, the mean.
    pub clocks: f64,
    /// The most of them.
    pub clocks_max: u64,
}

/// How stale steps were.
#[derive(Clone, Copy, Debug, Default)]
struct StalenessMeans {
    records: Mean,
    clocks: Mean,
    clocks_max: Option<u64>,
    ahead: Mean,
}

impl StalenessMeans {
    fn add(&mut self, step: &Finished) {
        self.records.add(step.staleness, 1.0);
        self.ahead.add(step.ahead as f64, 1.0);
        if let Some(clocks) = step.stale_clocks {
            self.clocks.add(clocks as f64, 1.0);
            self.clocks_max = self.clocks_max.max(Some(clocks));
        }
    }
}

#[derive(Debug)]
struct Window {
    started: Instant,
    first_clock: u64,
    samples: u64,
    loss: Mean,
    norms: [Mean; 2],
    gradients: GradientStats,
    staleness: StalenessMeans,
    skipped: u64,
    partly_refused: u64,
}

impl Window {
    fn new(first_clock: u64) -> Self {
        Self {
            started: Instant::now(),
            first_clock,
            samples: 0,
            loss: Mean::default(),
            norms: <[Mean; 2]>::default(),
            gradients: GradientStats::default(),
            staleness: StalenessMeans::default(),
            skipped: 0,
            partly_refused: 0,
        }
    }
}

impl Recorder {
    /// Writes to `metrics.jsonl` in `folder`, or nowhere; what is there stays where training goes on: from this clock, after so many samples. Learning rates are those of `optimizers`.
    pub(crate) fn new(
        folder: Option<&Path>,
        every: Every,
        optimizers: Optimizers,
        (clock, samples): (u64, u64),
        planned_samples: Option<u64>,
    ) -> Result<Self> {
        let goes_on = clock > 0;
        let file = folder.map(|folder| {
            let path = folder.join("metrics.jsonl");
            std::fs::create_dir_all(folder)
                .and_then(|()| {
                    let mut file = File::options();
                    file.create(true).append(goes_on).write(true).truncate(!goes_on).open(&path)
                })
                .map_err(|error| Error::write(&path, error))
                .map(|file| (path, file))
        });
        Ok(Self {
            file: file.transpose()?,
            every,
            optimizers,
            planned_samples,
            window: Window::new(clock),
            clock,
            total_samples: samples,
            start_samples: samples,
            job_samples: samples,
            ..Self::silent()
        })
    }

    /// Writes nothing.
    pub(crate) fn silent() -> Self {
        Self {
            file: None,
            every: Every::Steps(u64::MAX),
            optimizers: Optimizers::default(),
            started: Instant::now(),
            window: Window::new(0),
            clock: 0,
            total_samples: 0,
            start_samples: 0,
            job_samples: 0,
            planned_samples: None,
            saved: 0,
            skipped_in_a_row: 0,
            staleness: StalenessMeans::default(),
        }
    }

    /// So many rows all workers of the job have trained.
    pub(crate) fn job_trained(&mut self, samples: u64) {
        self.job_samples = samples;
    }

    /// A step whose gradients are on their way.
    pub(crate) fn step(&mut self, step: &StepRecord) {
        self.clock = step.clock + 1;
        self.skipped_in_a_row = 0;
        self.total_samples += step.samples;
        let window = &mut self.window;
        window.samples += step.samples;
        window.loss.add(step.loss, step.samples as f64);
        for (mean, kind) in window.norms.iter_mut().zip([&step.tables, &step.dense]) {
            if kind.count > 0 {
                mean.add(kind.squares.sqrt(), 1.0);
            }
            window.gradients.zeros += kind.zeros;
            window.gradients.not_finite += kind.not_finite;
            window.gradients.count += kind.count;
        }
    }

    /// Pushes that were acknowledged.
    pub(crate) fn finished(&mut self, finished: &[Finished]) {
        for push in finished {
            self.window.staleness.add(push);
            self.staleness.add(push);
            let Some(refusal) = push.refused else { continue };
            // Once in every line, not once in every step.
            if self.window.partly_refused == 0 {
                tracing::warn!(clock = self.clock, variable = %refusal.variable, "{}", refusal.reason);
            }
            self.window.partly_refused += 1;
        }
    }

    /// Of all steps so far.
    pub(crate) fn staleness(&self) -> Staleness {
        let StalenessMeans { records, clocks, clocks_max, .. } = self.staleness;
        let mean = |mean: Mean| mean.value().unwrap_or_default();
        let clocks_max = clocks_max.unwrap_or_default();
        Staleness { records: mean(records), clocks: mean(clocks), clocks_max }
    }

    /// A step that was left out because of a number that is not finite.
    /// Returns how many there were since the last good step.
    pub(crate) fn skipped(&mut self, fault: &NonFinite) -> u64 {
        self.clock = fault.clock + 1;
        self.window.skipped += 1;
        self.skipped_in_a_row += 1;
        self.skipped_in_a_row
    }

    /// Between two steps: writes a line when one is due, or when `last` and anything is left, and tells the session.
    pub(crate) fn write_due(&mut self, session: &Session, last: bool) -> Result<()> {
        let window = &self.window;
        let passed = window.started.elapsed();
        let steps = self.clock - window.first_clock;
        if steps == 0 || !(last || self.every.due(steps, passed)) {
            return Ok(());
        }
        let samples_per_s = window.samples as f64 / passed.as_secs_f64().max(1e-9);
        let share = |count: u64| count as f64 / window.gradients.count.max(1) as f64;
        let [lr_table, lr_dense] = self.optimizers.learning_rates(self.clock.saturating_sub(1));
        let line = Line {
            clock: self.clock,
            samples: window.samples,
            total_samples: self.total_samples.max(self.job_samples),
            run_samples: self.total_samples - self.start_samples,
            planned_samples: self.planned_samples,
            loss: window.loss.value(),
            lr_table,
            lr_dense,
            gradient_norm_tables: window.norms[0].value(),
            gradient_norm_dense: window.norms[1].value(),
            zero_share: share(window.gradients.zeros),
            not_finite_share: share(window.gradients.not_finite),
            skipped_steps: window.skipped,
            partly_refused_pushes: window.partly_refused,
            staleness: window.staleness.records.value(),
            stale_clocks: window.staleness.clocks.value(),
            stale_clocks_max: window.staleness.clocks_max,
            ahead: window.staleness.ahead.value(),
            samples_per_s,
            wall_s: self.started.elapsed().as_secs_f64(),
        };
        session.set_progress(Progress {
            clock: self.clock,
            samples: self.total_samples - self.start_samples,
            samples_per_s,
            loss: line.loss.unwrap_or(f64::NAN),
        });
        if let Some((path, file)) = &mut self.file {
            let mut text = serde_json::to_string(&line).unwrap_or_default();
            text.push('\n');
            file.write_all(text.as_bytes()).map_err(|error| Error::write(path, error))?;
        }
        self.window = Window::new(self.clock);
        Ok(())
    }

    /// Saves the batch of a step that is not finite, if it is one of the first; returns where.
    pub(crate) fn save(&mut self, fault: &NonFinite) -> Result<Option<PathBuf>> {
        let Some(folder) = self.file.as_ref().and_then(|(path, _)| path.parent()) else {
            return Ok(None);
        };
        if self.saved == SAVED_MAX {
            return Ok(None);
        }
        let path = folder.join(format!("nonfinite-{}.json", fault.clock));
        let batch = &fault.batch;
        let features: Vec<_> = batch
            .features
            .iter()
            .map(
                |f| serde_json::json!({"offsets": f.offsets, "keys": f.keys, "weights": f.weights}),
            )
            .collect();
        let saved = serde_json::json!({
            "what": fault.what, "loss": fault.loss.to_string(), "clock": fault.clock,
            "rows": batch.describe_rows(), "features": features, "numbers": batch.numbers,
            "labels": batch.labels, "weights": batch.weights,
        });
        std::fs::write(&path, saved.to_string()).map_err(|error| Error::write(&path, error))?;
        self.saved += 1;
        Ok(Some(path))
    }
}
