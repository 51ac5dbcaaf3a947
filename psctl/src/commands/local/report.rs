//! What a run of `psctl local` ends with.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Trained;
use super::plan::Plan;
use crate::output::{self, Format, count};

/// What `downpour-worker evaluate` writes; it may say more.
#[derive(Debug, Deserialize)]
pub(super) struct Evaluation {
    auc: Option<f64>,
    logloss: Option<f64>,
}

/// The field names are the JSON of `-o json`: they are a promise.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    dataset: String,
    model: String,
    mode: &'static str,
    workers: usize,
    servers: usize,
    samples: u64,
    /// Of all workers, over the time from the start of the first to the end of the last.
    samples_per_s: f64,
    test_auc: Option<f64>,
    test_logloss: Option<f64>,
    /// Processor time of coordinators, servers and workers while training, per million samples.
    cpu_s_per_msample: f64,
    /// From the start of the first process to the end of the evaluation.
    wall_s: f64,
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        servers: usize,
        trained: &Trained,
        evaluation: Option<Evaluation>,
        wall: Duration,
    ) -> Self {
        let (test_auc, test_logloss) =
            evaluation.map_or((None, None), |found| (found.auc, found.logloss));
        let samples = trained.samples.max(1) as f64;
        Self {
            dataset: plan.dataset.clone(),
            model: plan.model.clone(),
            mode: "async",
            workers: plan.workers,
            servers,
            samples: trained.samples,
            samples_per_s: trained.samples as f64 / trained.wall.as_secs_f64().max(1e-9),
            test_auc,
            test_logloss,
            cpu_s_per_msample: trained.cpu.as_secs_f64() / samples * 1e6,
            wall_s: wall.as_secs_f64(),
        }
    }
}

pub(super) fn print(format: Format, report: &Report) -> anyhow::Result<()> {
    let number = |value: Option<f64>| {
        value.map_or_else(|| "not evaluated".to_owned(), |value| format!("{value:.5}"))
    };
    output::properties(format, report, |report| {
        vec![
            ("Data set", report.dataset.clone()),
            ("Model", report.model.clone()),
            (
                "Cluster",
                format!("{} workers ({}), {} servers", report.workers, report.mode, report.servers),
            ),
            ("Samples", count(report.samples)),
            ("Samples/s", count(report.samples_per_s as u64)),
            ("Test AUC", number(report.test_auc)),
            ("Test log loss", number(report.test_logloss)),
            ("CPU", format!("{:.1} s per million samples", report.cpu_s_per_msample)),
            ("Time", format!("{:.1} s", report.wall_s)),
        ]
    })
}
