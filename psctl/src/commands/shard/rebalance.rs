//! `psctl shard rebalance`

use downpour_core::id::JobId;

use crate::cli::Connection;
use crate::output::Format;
use crate::plan::{Options, Plan};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl shard rebalance ctr --dry-run                       what would move, and why
  psctl shard rebalance --all --yes                         in a script
  psctl shard rebalance --all --dry-run -o json | jq .bytes

It goes by the rows/s and bytes that servers report. Exit status: 0 done or nothing to do, 1 failed, 2 wrong usage,
3 some moves came to nothing or are not done within --wait.")]
pub(crate) struct Args {
    /// Name of the job
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    job: Option<String>,
    /// The shards of all jobs
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let job = match &args.job {
        Some(name) => {
            let cluster = args.connection.cluster().await?;
            Some(JobId(super::super::job::find(&cluster, name)?.job))
        }
        None => None,
    };
    let planned = coordinators.plan_placement(job).await?;
    let cluster = coordinators.cluster().await?;
    let plan = Plan::new(&cluster, planned.placements, &planned.shares);
    if args.options.dry_run {
        return plan.print(format);
    }
    if plan.is_empty() {
        eprintln!("nothing to do: no server has much more than the others");
        return plan.tell(format);
    }
    plan.announce();
    plan.confirm(&args.options)?;
    plan.carry_out(&coordinators, &args.options).await?;
    plan.tell(format)
}
