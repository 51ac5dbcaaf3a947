//! `psctl bench dense`.

use anyhow::Context as _;
use downpour_bench::dense::{Report, Run};
use downpour_bench::workload::Dense;
use downpour_core::spec::{BLOCK_FLOATS_DEFAULT, BLOCK_FLOATS_MAX};
use downpour_psctl::local::Interrupt;

use super::place::Place;
use super::require_correct;
use crate::output::{self, Format};

/// Measure pulls and pushes of one large tensor.
///
/// A step: pull all of it, push a gradient for all of it, wait until it is applied. Every push changes every block, so that
/// every pull brings all of them.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status 1 if a value is not what it must be.

Examples:
  psctl bench dense --local
  psctl bench dense --local --mb 400 --servers 2 -o json
  psctl bench dense --coordinators 10.0.0.1:7070 --block-floats 65536")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
    /// Size of the tensor in megabytes of 10^6 bytes
    #[arg(long, value_name = "MEGABYTES", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    mb: u32,
    /// Floats of a block
    #[arg(long, value_name = "COUNT", default_value_t = BLOCK_FLOATS_DEFAULT, value_parser = clap::value_parser!(u32).range(1..=i64::from(BLOCK_FLOATS_MAX)))]
    block_floats: u32,
    /// Steps, after one to warm up; the medians are reported
    #[arg(long, value_name = "COUNT", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
}

pub(super) fn run(args: &Args, format: Format) -> anyhow::Result<()> {
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    args.place.with(&interrupt, |cluster| {
        let mut run = Run::start("ours", Dense::megabytes(args.mb, args.block_floats), cluster)?;
        run.repeat(args.steps as usize, cluster)?;
        let report = run.finish(cluster)?;
        output::properties(format, &report, properties)?;
        require_correct(&report.workload, report.check_err, report.is_correct())
    })
}

pub(super) fn properties(report: &Report) -> Vec<(&str, String)> {
    let rate = |median: f64, min: f64, max: f64| format!("{median:.3} GB/s ({min:.3} to {max:.3})");
    vec![
        ("Workload", report.workload.clone()),
        ("Pull", rate(report.pull_gb_s, report.pull_gb_s_min, report.pull_gb_s_max)),
        ("Push", rate(report.push_gb_s, report.push_gb_s_min, report.push_gb_s_max)),
        (
            "Processor",
            format!(
                "servers {}, worker {:.3} s for a gigabyte",
                report
                    .cpu_server_s_per_gb
                    .map_or_else(|| "unknown".into(), |seconds| format!("{seconds:.3}")),
                report.cpu_worker_s_per_gb
            ),
        ),
        ("Largest error", format!("{:e}", report.check_err)),
    ]
}
