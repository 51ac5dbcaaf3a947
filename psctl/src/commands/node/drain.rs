//! `psctl node drain`

use downpour_core::view::Admission;

use crate::cli::Connection;
use crate::output::Format;
use crate::plan::{self, Options, Plan};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl node drain ps-1 --dry-run    what would move, how many bytes, how long
  psctl node drain ps-1 --yes        in a script
  psctl node drain ps-1 --no-wait    the coordinators go on by themselves

The server is given no more copies, and each copy that it holds moves to another server, a few at a time; training goes on.
psctl node uncordon calls it off. Exit status: 0 it holds nothing, 1 failed, 2 wrong usage, 3 not done within --wait.")]
pub(crate) struct Args {
    /// Name of the server
    name: String,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let node = super::find(&args.connection.cluster().await?, &args.name)?;
    let planned = coordinators.plan_drain(node).await?;
    let cluster = coordinators.cluster().await?;
    let plan = Plan::new(&cluster, planned.placements, &[]);
    if args.options.dry_run {
        return plan.print(format);
    }
    plan.announce();
    plan.confirm(&args.options)?;
    coordinators.admit_node(node, Admission::Draining).await?;
    if args.options.no_wait {
        return Ok(());
    }
    plan::wait_drained(&coordinators, &args.name, args.options.wait).await
}
