//! `psctl node cordon`

use downpour_core::view::Admission;

use crate::cli::Connection;
use crate::output::Format;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl node cordon ps-1             it is given no more copies; what it holds stays
  psctl node cordon ps-1 --dry-run

Exit status: 0 done, also where it was so before; 1 failed; 2 wrong usage.")]
pub(crate) struct Args {
    /// Name of the server
    name: String,
    /// Look whether there is such a server, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let node = super::find(&args.connection.cluster().await?, &args.name)?;
    if args.dry_run {
        eprintln!("{} would be cordoned", args.name);
        return super::changed(format, args.name, "cordon", true);
    }
    coordinators.admit_node(node, Admission::Cordoned).await?;
    eprintln!("{} is given no more copies; what it holds stays", args.name);
    super::changed(format, args.name, "cordon", false)
}
