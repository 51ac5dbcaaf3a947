//! `psctl coordinator list`

use crate::cli::Connection;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl coordinator list
  psctl coordinator list -o json | jq '.[] | select(.leader).id'

MATCHED is how far in the log the leader knows a member to be; who does not vote yet is catching up.")]
pub(crate) struct Args {
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    output::list(format, &args.connection.cluster().await?.coordinators)
}
