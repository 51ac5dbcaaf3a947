//! `psctl bench floor`.

use anyhow::Context as _;
use downpour_bench::protocol::FloorServer;
use downpour_bench::workload::{Dense, Sparse};
use downpour_bench::{dense, floor, sparse, train};
use downpour_core::spec::BLOCK_FLOATS_DEFAULT;
use downpour_psctl::local::Interrupt;
use serde::Serialize;

use super::place::not_interrupted;
use crate::output::{self, Format};

/// Megabytes of D's tensor.
const DENSE_MB: u32 = 100;
/// Steps of D for each repeat of S.
pub(super) const DENSE_STEPS: usize = 5;

/// Measure the floor: the least that can be called a parameter server.
///
/// One server process with a thread for each connection, blocking sockets, a flat array. It checks, numbers and logs nothing,
/// and two workers may lose an update. What a server with all of that reaches is a share of this.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl bench floor
  psctl bench floor S-16 D --repeats 3 -o json")]
pub(crate) struct Args {
    /// Which workloads; all without it
    #[arg(value_enum, value_name = "WORKLOAD", default_values_t = Workload::ALL)]
    workloads: Vec<Workload>,
    /// How often all steps are taken; the median is reported
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

/// The standard workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Workload {
    /// Rows of 16 floats, one worker
    #[value(name = "S-16")]
    S16,
    /// Rows of 64 floats, one worker
    #[value(name = "S-64")]
    S64,
    /// Rows of 16 floats, two workers
    #[value(name = "S2-16")]
    S2x16,
    /// Rows of 64 floats, two workers
    #[value(name = "S2-64")]
    S2x64,
    /// A tensor of 100 MB
    #[value(name = "D")]
    D,
}

/// A workload with its parameters.
pub(super) enum Standard {
    Sparse(Sparse),
    Dense(Dense),
}

impl Workload {
    pub(super) const ALL: [Self; 5] = [Self::S16, Self::S64, Self::S2x16, Self::S2x64, Self::D];

    pub(super) fn standard(self) -> Standard {
        match self {
            Self::S16 => Standard::Sparse(Sparse::standard(16, 1)),
            Self::S64 => Standard::Sparse(Sparse::standard(64, 1)),
            Self::S2x16 => Standard::Sparse(Sparse::standard(16, 2)),
            Self::S2x64 => Standard::Sparse(Sparse::standard(64, 2)),
            Self::D => Standard::Dense(Dense::megabytes(DENSE_MB, BLOCK_FLOATS_DEFAULT)),
        }
    }
}

/// Starts a floor that holds what the workload needs.
pub(super) fn start(
    workload: &Standard,
    backups: usize,
    interrupt: &Interrupt,
) -> anyhow::Result<floor::Server> {
    let holds = match workload {
        Standard::Sparse(Sparse { rows, dim, .. }) => {
            FloorServer { rows: *rows, dim: *dim, ..Default::default() }
        }
        Standard::Dense(dense) => FloorServer { dense_floats: dense.floats, ..Default::default() },
    };
    let interrupt = interrupt.clone();
    floor::Server::start(holds, backups, move || not_interrupted(&interrupt))
}

/// What the kinds of workload report.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Report {
    Sparse(sparse::Report),
    Dense(dense::Report),
    Train(train::Report),
}

pub(super) fn run(args: &Args, format: Format) -> anyhow::Result<()> {
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    let mut reports = Vec::new();
    for workload in &args.workloads {
        let workload = workload.standard();
        let mut server = start(&workload, 0, &interrupt)?;
        let server = &mut server;
        reports.push(match workload {
            Standard::Sparse(workload) => {
                let mut run = sparse::Run::start("floor", workload, server)?;
                (0..args.repeats).try_for_each(|_| run.repeat(server))?;
                Report::Sparse(run.finish(server)?)
            }
            Standard::Dense(workload) => {
                let mut run = dense::Run::start("floor", workload, server)?;
                (0..args.repeats).try_for_each(|_| run.repeat(DENSE_STEPS, server))?;
                Report::Dense(run.finish(server)?)
            }
        });
    }
    if format == Format::Json {
        return output::json(&reports);
    }
    for report in &reports {
        output::properties(format, report, |report| match report {
            Report::Sparse(report) => super::sparse::properties(report),
            Report::Dense(report) => super::dense::properties(report),
            Report::Train(report) => super::train::properties(report),
        })?;
        output::line("")?;
    }
    Ok(())
}
