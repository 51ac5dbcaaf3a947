//! `psctl node list`

use crate::cli::Connection;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl node list
  psctl node list -o json | jq '.[] | select(.alive | not) | .name'")]
pub(crate) struct Args {
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    output::list(format, &args.connection.cluster().await?.nodes)
}
