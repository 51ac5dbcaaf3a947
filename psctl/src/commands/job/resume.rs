//! `psctl job resume`

use crate::cli::Connection;
use crate::output::Format;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl job resume ctr
  psctl job resume ctr --dry-run

Exit status: 0 done, also where it was so before; 1 failed; 2 wrong usage.")]
pub(crate) struct Args {
    /// Name of the job
    name: String,
    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    super::set_paused(&args.connection, &args.name, false, args.dry_run, format).await
}
