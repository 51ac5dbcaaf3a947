//! `psctl node drain`

use downpour_core::view::Admission;

use crate::cli::{Connection, Exit};
use crate::model::{Cluster, Shard};
use crate::output::{Format, count};
use crate::plan::{self, Options, Plan, Step};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl node drain ps-1 --dry-run    what would move, how many bytes, how long
  psctl node drain ps-1 --yes        in a script
  psctl node drain ps-1 --no-wait    the coordinators go on by themselves

The server is given no more copies, and each copy that it holds moves to another server, a few at a time; training goes on.
psctl node uncordon calls it off. Exit status: 0 it holds nothing, 1 failed, 2 wrong usage, 3 not done within --wait, or with --dry-run: not all of it can go anywhere.")]
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
    let stay = staying(&cluster.into(), &args.name, &plan);
    let stay = (stay > 0).then(|| {
        format!("{} copies stay until a server that is open, has room and holds none of the same shards can take them", count(stay))
    });
    if args.options.dry_run {
        plan.print(format)?;
        return stay.map_or(Ok(()), |stay| Err(Exit::Condition(stay).into()));
    }
    plan.announce();
    stay.iter().for_each(|stay| eprintln!("{stay}"));
    plan.confirm(&args.options)?;
    coordinators.admit_node(node, Admission::Draining).await?;
    if !args.options.no_wait {
        plan::wait_drained(&coordinators, &args.name, args.options.wait).await?;
    }
    plan.tell(format)
}

/// The coordinators plan so many at once, and more when those are on their way.
const PLANNED_MAX: usize = 1000;

/// Copies of the server that neither move nor are to move by the plan.
fn staying(cluster: &Cluster, name: &str, plan: &Plan) -> u64 {
    if plan.steps.len() >= PLANNED_MAX {
        return 0;
    }
    let held = cluster.shards.iter().filter(|shard| {
        shard.in_sync.iter().any(|member| member == name) && shard.moving.is_none()
    });
    let goes = |shard: &&Shard| {
        let here = |step: &Step| (&step.job, step.shard) == (&shard.job, shard.shard);
        plan.steps.iter().any(here)
    };
    held.filter(|shard| !goes(shard)).count() as u64
}
