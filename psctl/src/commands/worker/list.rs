//! `psctl worker list`

use crate::cli::Connection;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl worker list
  psctl worker list --job ctr -o json | jq 'map(.samples_per_s) | add'")]
pub(crate) struct Args {
    /// Only those of this job
    #[arg(long, value_name = "NAME")]
    job: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let mut workers = args.connection.cluster().await?.workers;
    workers.retain(|worker| args.job.as_ref().is_none_or(|job| worker.job == *job));
    output::list(format, &workers)
}
