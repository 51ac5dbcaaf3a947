//! `psctl bench train`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use downpour_bench::System as _;
use downpour_bench::click::Click;
use downpour_bench::protocol::Peer;
use downpour_bench::train::{Report, Training};
use downpour_client::{Coordinators, Error};
use downpour_psctl::local::{Interrupt, binary};

use super::place::Place;
use crate::output::{self, Format};

/// Measure training: a factorization machine with a perceptron, on made clicks, by two asynchronous workers.
///
/// Starts `downpour-worker` twice, one arithmetic thread each. The data is made first, the same on every machine.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl bench train --local
  psctl bench train --local --tables 26 --depth 8 -o json
  psctl bench train --local --data e --repeats 1           keep the data in the folder e, or use what is there")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    pub(super) model: Model,
    /// Folder of the data, made if absent; without it a temporary one
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Passes over the data, each with a new model; the median is reported
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Model {
    /// One table in which an id is the same key in every field, one in which each field has keys of its own (and the rows of 26 tables), or 26 tables
    #[arg(long, value_name = "TABLES", default_value = "fused", value_parser = ["fused", "fused-apart", "26"])]
    tables: String,
    /// Steps that a worker has under way
    #[arg(long, value_name = "STEPS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    depth: u32,
    /// Batches of 1024 samples in a pass, of both workers together
    #[arg(long, value_name = "COUNT", default_value_t = Click::STANDARD.train_batches as u32, value_parser = clap::value_parser!(u32).range(22..))]
    batches: u32,
}

impl Default for Model {
    fn default() -> Self {
        let batches = Click::STANDARD.train_batches as u32;
        Self { tables: "fused".into(), depth: 1, batches }
    }
}

/// Written last, so that a folder that has it is complete.
const COMPLETE: &str = "e_complete";

pub(super) fn run(args: &Args, format: Format) -> anyhow::Result<()> {
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    let report = measure(&args.place, &args.model, args.data.as_deref(), args.repeats, &interrupt)?;
    output::properties(format, &report, properties)
}

/// `repeats` passes, each in a cluster of its own where one is started.
pub(super) fn measure(
    place: &Place,
    model: &Model,
    data: Option<&Path>,
    repeats: u32,
    interrupt: &Interrupt,
) -> anyhow::Result<Report> {
    let program = binary("downpour-worker", place.bin_dir())?;
    let temporary = tempfile::Builder::new().prefix("downpour-bench-").tempdir();
    let temporary = temporary.context("create a temporary folder")?;
    let data = data.unwrap_or_else(|| temporary.path());
    let click = Click { train_batches: model.batches as usize, ..Click::STANDARD };
    let shape = format!("{click:?}");
    let complete = data.join(COMPLETE);
    if !std::fs::read_to_string(&complete).is_ok_and(|found| found == shape) {
        eprintln!("E: making {} batches to train on", click.train_batches);
        std::fs::create_dir_all(data).with_context(|| format!("create {}", data.display()))?;
        click.write(data)?;
        std::fs::write(&complete, shape).context("write the data")?;
    }
    let training = Training {
        program,
        data: data.to_owned(),
        click,
        tables: model.tables.clone(),
        depth: model.depth,
    };
    let passes = (0..repeats).map(|_| {
        place.with(interrupt, |cluster| {
            let pass = training.pass(cluster);
            if cluster.servers().is_none() {
                remove(&cluster.peer())?;
            }
            pass
        })
    });
    let passes = passes.collect::<anyhow::Result<Vec<_>>>()?;
    Report::new(&training, &passes).context("no pass")
}

/// Of a cluster that goes on.
fn remove(peer: &Peer) -> anyhow::Result<()> {
    let Peer::Cluster { coordinators, job, .. } = peer else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let coordinators = Coordinators::parse(coordinators)?;
        match coordinators.job(job).await {
            Ok(view) => Ok(coordinators.delete_job(view.job).await?),
            Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    })
}

pub(super) fn properties(report: &Report) -> Vec<(&str, String)> {
    vec![
        (
            "Workload",
            format!("{} ({} tables, depth {})", report.workload, report.tables, report.depth),
        ),
        (
            "Samples",
            format!(
                "{:.0}/s ({:.0} to {:.0})",
                report.samples_s, report.samples_s_min, report.samples_s_max
            ),
        ),
        ("AUC", format!("{:.4}", report.auc)),
        ("Log loss", format!("{:.4}", report.logloss)),
        ("Waiting", format!("{:.1} % of the workers' time", report.wait_share * 1e2)),
    ]
}
