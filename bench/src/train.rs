//! Measuring E: asynchronous training by two worker processes with one server.
//!
//! The model, on a sample of 26 ids and 13 numbers x, with `e_f` the first 16 floats of id f's row and `l_f` its 17th:
//!
//! ```text
//! logit = bias + Σ l_f + ½ Σ_k((Σ_f e_fk)² − Σ_f e_fk²) + MLP([e_1 … e_26, x]),  MLP 429-256-128-1 with ReLU
//! ```
//!
//! Loss: mean binary cross-entropy of a batch of 1024. Optimizer of table and dense part, on the server: Adagrad, sums from 0, ε = 1e-10,
//! learning rate 0.02 for rows and 0.005 for the dense part. A step: unique ids, pull their rows and the dense part, forward and backward,
//! push one gradient for each unique id (summed over its occurrences) and the dense gradient, wait for the acknowledgement. Worker w
//! takes batches w, w + 2, w + 4, …; one pass; its first 10 batches are trained on and not timed.
//!
//! # The worker's side of it
//!
//! ```text
//! downpour-worker bench-click --coordinators HOST:PORT,... --job NAME --data DIR --worker W --workers 2 --tables fused|fused-apart|26 --depth D --batches 500 --transport framed|grpc
//! ```
//!
//! - `DIR` holds the files of [`crate::click`]; the number of rows is that of `e_emb_init.f32`, `--batches` that of the training set.
//! - The job is created by whichever worker comes first: 64 shards, one replica. The dense part begins with the file's values. Rows do too,
//!   or are made when they are first needed, with normal values of the same deviation.
//! - One arithmetic thread. stderr is for people; stdout has these lines and nothing else:
//!   1. `{"ready":true}` when its 10 batches to warm up are trained and acknowledged;
//!   2. then it waits for the line `go` on stdin and trains; at the end, with everything acknowledged,
//!      `{"start_s":…,"end_s":…,"samples":…,"wait_s":…}`: when it saw `go` and when it ended (seconds since 1970), samples in between,
//!      and for how long in between its arithmetic had nothing to do: waiting for rows or for acknowledgements;
//!   3. worker 0 waits for a second `go`, evaluates on the test set and says `{"auc":…,"logloss":…}`.
//! - When its stdin ends it ends, at any time and soon.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::bail;
use serde::{Deserialize, Serialize};

use crate::child::Child;
use crate::click::Click;
use crate::protocol::Peer;
use crate::statistics::Spread;
use crate::{System, progress};

/// How a measurement of E is done.
#[derive(Clone, Debug)]
pub struct Training {
    /// `downpour-worker`.
    pub program: PathBuf,
    /// Where [`Click::write`] has written.
    pub data: PathBuf,
    /// What is there.
    pub click: Click,
    /// `fused`, `fused-apart` or `26`.
    pub tables: String,
    /// Batches that a worker has under way.
    pub depth: u32,
}

/// Processes.
const WORKERS: usize = 2;

/// One pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    samples_s: f64,
    wait_share: f64,
    scores: Scores,
}

#[derive(Deserialize)]
struct Ready {
    ready: bool,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Timed {
    start_s: f64,
    end_s: f64,
    samples: u64,
    wait_s: f64,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
struct Scores {
    auc: f64,
    logloss: f64,
}

impl Training {
    /// One pass over the training set, and an evaluation.
    ///
    /// # Errors
    /// A worker cannot.
    pub fn pass(&self, system: &mut dyn System) -> anyhow::Result<Pass> {
        let mut workers = Vec::new();
        for worker in 0..WORKERS {
            let args = self.args(worker, &system.peer())?;
            workers.push(Child::start(&format!("worker {worker}"), self.program.clone(), args)?);
        }
        progress("E", "warming up");
        for worker in &mut workers {
            let ready: Ready = worker.hear(system)?;
            anyhow::ensure!(ready.ready, "a worker is not ready");
        }
        progress("E", format_args!("training on {} batches", self.click.train_batches));
        workers.iter_mut().try_for_each(|worker| worker.say_text("go\n"))?;
        let mut timed: Vec<Timed> = Vec::new();
        for worker in &mut workers {
            timed.push(worker.hear(system)?);
        }
        progress("E", "evaluating");
        workers[0].say_text("go\n")?;
        let scores = workers[0].hear(system)?;
        workers.into_iter().try_for_each(Child::finish)?;
        let pass = Pass::new(&timed, scores);
        progress("E", format_args!("{:.0} samples/s, AUC {:.4}", pass.samples_s, scores.auc));
        Ok(pass)
    }

    fn args(&self, worker: usize, peer: &Peer) -> anyhow::Result<Vec<OsString>> {
        let Peer::Cluster { coordinators, job, transport, .. } = peer else {
            bail!("the floor cannot train");
        };
        let text = |name: &str, value: &str| [OsString::from(name), OsString::from(value)];
        let mut args = vec![OsString::from("bench-click")];
        args.extend(text("--coordinators", coordinators));
        args.extend(text("--job", job));
        args.extend([OsString::from("--data"), self.data.clone().into()]);
        args.extend(text("--worker", &worker.to_string()));
        args.extend(text("--workers", &WORKERS.to_string()));
        args.extend(text("--tables", &self.tables));
        args.extend(text("--depth", &self.depth.to_string()));
        args.extend(text("--batches", &self.click.train_batches.to_string()));
        args.extend(text("--transport", transport));
        Ok(args)
    }
}

impl Pass {
    /// Of at least one worker.
    fn new(workers: &[Timed], scores: Scores) -> Self {
        let start = workers.iter().map(|timed| timed.start_s).fold(f64::INFINITY, f64::min);
        let end = workers.iter().map(|timed| timed.end_s).fold(0.0, f64::max);
        let samples: u64 = workers.iter().map(|timed| timed.samples).sum();
        let busy: f64 = workers.iter().map(|timed| timed.end_s - timed.start_s).sum();
        let waited: f64 = workers.iter().map(|timed| timed.wait_s).sum();
        Self { samples_s: samples as f64 / (end - start), wait_share: waited / busy, scores }
    }
}

/// What a measurement of E found: medians over the passes.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// E.
    pub workload: String,
    /// Samples per second, of both workers together.
    pub samples_s: f64,
    /// The slowest pass.
    pub samples_s_min: f64,
    /// The fastest pass.
    pub samples_s_max: f64,
    /// On the test set, after one pass.
    pub auc: f64,
    /// On the test set, after one pass.
    pub logloss: f64,
    /// Share of the workers' time in which their arithmetic had nothing to do.
    pub wait_share: f64,
    /// `fused`, `fused-apart` or `26`.
    pub tables: String,
    /// Batches that a worker had under way.
    pub depth: u32,
    /// Passes.
    pub repeats: usize,
}

impl Report {
    /// `None` of no passes.
    #[must_use]
    pub fn new(training: &Training, passes: &[Pass]) -> Option<Self> {
        let spread = |value: fn(&Pass) -> f64| Spread::of(passes.iter().map(value));
        let samples_s = spread(|pass| pass.samples_s)?;
        Some(Self {
            workload: "E".into(),
            samples_s: samples_s.median,
            samples_s_min: samples_s.min,
            samples_s_max: samples_s.max,
            auc: spread(|pass| pass.scores.auc)?.median,
            logloss: spread(|pass| pass.scores.logloss)?.median,
            wait_share: spread(|pass| pass.wait_share)?.median,
            tables: training.tables.clone(),
            depth: training.depth,
            repeats: passes.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_lasts_from_the_first_start_to_the_last_end() {
        let timed = |start_s, end_s, wait_s| Timed { start_s, end_s, samples: 100, wait_s };
        let scores = Scores { auc: 0.75, logloss: 0.5 };
        let pass = Pass::new(&[timed(10.0, 12.0, 1.0), timed(11.0, 14.0, 0.25)], scores);
        assert_eq!(pass, Pass { samples_s: 50.0, wait_share: 0.25, scores });
    }
}
