//! `psctl bench sparse`.

use std::path::PathBuf;

use anyhow::Context as _;
use downpour_bench::sparse::{Report, Run};
use downpour_bench::workload::{Optimizer, Sparse};
use downpour_psctl::local::Interrupt;
use serde::Serialize;

use super::place::Place;
use super::require_correct;
use crate::cli::Exit;
use crate::output::{self, Format};

/// Measure pulls and pushes of rows.
///
/// A step of a worker: make the step's ids unique, pull their rows, push a gradient for each, wait until all are applied.
/// Each worker is a process of its own; all rows are compared with what they must be at the end.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status 1 if a value is not what it must be.

Examples:
  psctl bench sparse --local                                             S-16: 1 worker, 1 server
  psctl bench sparse --local --dim 64 --workers 2 -o json                S2-64
  psctl bench sparse --local --servers 2 --optimizer adagrad --repeats 3
  psctl bench sparse --coordinators 10.0.0.1:7070 --ids ids.u32          your own ids")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
    /// Rows of the table; all are created before the first step
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    rows: u32,
    /// Floats of a row
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    dim: u32,
    /// Steps of a repeat
    #[arg(long, value_name = "COUNT", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Ids of a step, before they are made unique
    #[arg(long, value_name = "COUNT", default_value_t = 26_624, value_parser = clap::value_parser!(u32).range(1..))]
    ids_per_step: u32,
    /// Worker processes, which take their steps at the same time
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    /// Of the table
    #[arg(long, value_enum, value_name = "NAME", default_value = "sgd")]
    optimizer: OptimizerName,
    /// Ids as little-endian u32 below --rows, one file for each worker; without it they are drawn
    #[arg(long, value_name = "FILE", num_args = 1..)]
    ids: Vec<PathBuf>,
    /// How often all steps are taken; the median is reported
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Steps before the first repeat; without it 20, or --steps if that is less
    #[arg(long, value_name = "COUNT")]
    warm_up: Option<u32>,
    /// Of the ids; the standard workload has 1000
    #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum OptimizerName {
    Sgd,
    Adagrad,
}

impl Args {
    fn workload(&self) -> Result<Sparse, Exit> {
        let workload = Sparse {
            rows: self.rows,
            dim: self.dim,
            steps: self.steps as usize,
            warm_up: self.warm_up.unwrap_or_else(|| 20.min(self.steps)) as usize,
            ids_per_step: self.ids_per_step as usize,
            workers: self.workers.into(),
            optimizer: match self.optimizer {
                OptimizerName::Sgd => Optimizer::Sgd,
                OptimizerName::Adagrad => Optimizer::Adagrad,
            },
            seed: self.seed,
            ids: self.ids.clone(),
        };
        workload.validate().map_err(|error| Exit::Usage(format!("{error:#}")))?;
        Ok(workload)
    }
}

/// With what only the cluster's owner knows.
#[derive(Serialize)]
struct WithServers {
    #[serde(flatten)]
    report: Report,
    servers: Option<usize>,
}

pub(super) fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let workload = args.workload()?;
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    args.place.with(&interrupt, |cluster| {
        let mut run = Run::start("ours", workload, cluster)?;
        for _ in 0..args.repeats {
            run.repeat(cluster)?;
        }
        let report = run.finish(cluster)?;
        let (what, error, correct) =
            (report.workload.clone(), report.check_err, report.is_correct());
        print(format, &WithServers { report, servers: cluster.servers() })?;
        require_correct(&what, error, correct)
    })
}

fn print(format: Format, with: &WithServers) -> anyhow::Result<()> {
    output::properties(format, with, |with| properties(&with.report))
}

pub(super) fn properties(report: &Report) -> Vec<(&str, String)> {
    let range = |min: f64, max: f64, unit: f64| format!("({:.3} to {:.3})", min / unit, max / unit);
    vec![
        ("Workload", report.workload.clone()),
        (
            "Rows",
            format!(
                "{:.3} M/s {}",
                report.rows_s / 1e6,
                range(report.rows_s_min, report.rows_s_max, 1e6)
            ),
        ),
        (
            "Steps",
            format!(
                "{:.1}/s {}",
                report.steps_s,
                range(report.steps_s_min, report.steps_s_max, 1.0)
            ),
        ),
        ("Pushes", format!("{:.3} M rows/s of the time in pushes", report.push_rows_s / 1e6)),
        ("Payload", format!("{:.0} MB/s", report.payload_mb_s)),
        (
            "Step",
            format!(
                "p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms; unique keys {:.2} ms of it",
                report.p50_ms, report.p99_ms, report.p999_ms, report.dedup_ms
            ),
        ),
        (
            "Processor",
            format!(
                "servers {}, workers {:.3} s for a million rows",
                report
                    .cpu_server_s_per_mrow
                    .map_or_else(|| "unknown".into(), |seconds| format!("{seconds:.3}")),
                report.cpu_worker_s_per_mrow
            ),
        ),
        ("Largest error", format!("{:e}", report.check_err)),
    ]
}
