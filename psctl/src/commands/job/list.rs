//! `psctl job list`

use crate::cli::Connection;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl job list
  psctl job list -o json | jq '.[].name'")]
pub(crate) struct Args {
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    output::list(format, &args.connection.cluster().await?.jobs)
}
