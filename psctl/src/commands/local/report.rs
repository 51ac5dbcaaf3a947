//! What a run of `psctl local` ends with.

use std::time::Duration;

use serde::Serialize;

use super::Trained;
use super::plan::Plan;
use crate::output::{self, Format, count};

/// What `downpour-worker evaluate` writes: numbers by name.
pub(super) type Evaluation = serde_json::Map<String, serde_json::Value>;

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
    /// For people, who are shown every number of it.
    #[serde(skip)]
    evaluation: Evaluation,
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        servers: usize,
        trained: &Trained,
        evaluation: Option<Evaluation>,
        wall: Duration,
    ) -> Self {
        let evaluation = evaluation.unwrap_or_default();
        let number = |name: &str| evaluation.get(name).and_then(serde_json::Value::as_f64);
        let samples = trained.samples.max(1) as f64;
        Self {
            dataset: plan.dataset.clone(),
            model: plan.model.clone(),
            mode: "async",
            workers: plan.workers,
            servers,
            samples: trained.samples,
            samples_per_s: trained.samples as f64 / trained.wall.as_secs_f64().max(1e-9),
            test_auc: number("auc"),
            test_logloss: number("logloss"),
            cpu_s_per_msample: trained.cpu.as_secs_f64() / samples * 1e6,
            wall_s: wall.as_secs_f64(),
            evaluation,
        }
    }
}

pub(super) fn print(format: Format, report: &Report) -> anyhow::Result<()> {
    output::properties(format, report, |report| {
        let mut lines: Vec<(&str, String)> = vec![
            ("data set", report.dataset.clone()),
            ("model", report.model.clone()),
            (
                "cluster",
                format!("{} workers ({}), {} servers", report.workers, report.mode, report.servers),
            ),
            ("samples", count(report.samples)),
            ("samples/s", count(report.samples_per_s as u64)),
            ("cpu", format!("{:.1} s per million samples", report.cpu_s_per_msample)),
            ("time", format!("{:.1} s", report.wall_s)),
        ];
        for (name, value) in &report.evaluation {
            if let Some(value) = value.as_f64() {
                let whole = value.fract() == 0.0;
                let value = if whole { count(value as u64) } else { format!("{value:.5}") };
                lines.push((name, format!("{value} (test)")));
            }
        }
        lines
    })
}
