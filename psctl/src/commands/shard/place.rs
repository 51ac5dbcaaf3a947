//! `psctl shard move`

use anyhow::Context as _;
use downpour_proto::v1;
use downpour_proto::v1::shard_placement::Placing;

use crate::cli::{Connection, Exit};
use crate::output::Format;
use crate::plan::{Options, Plan};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl shard move ctr 12 --to ps-3              the primary's copy; if ps-3 is a member, it only becomes the primary
  psctl shard move ctr 12 --from ps-1 --to ps-3  a backup
  psctl shard move ctr 12 --to ps-3 --dry-run    how many bytes, how long
  psctl shard move ctr 12 --cancel               before the new primary is committed

Exit status: 0 done, 1 failed, 2 wrong usage, 3 it came to nothing or is not done within --wait.")]
pub(crate) struct Args {
    /// Name of the job
    job: String,
    /// Number of the shard, from 0
    shard: u32,
    /// The server that is to hold it
    #[arg(
        long,
        value_name = "NODE",
        required_unless_present = "cancel",
        conflicts_with = "cancel"
    )]
    to: Option<String>,
    /// The server that holds it and will not; without it the primary
    #[arg(long, value_name = "NODE", conflicts_with = "cancel")]
    from: Option<String>,
    /// Undo the shard's move
    #[arg(long)]
    cancel: bool,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster = coordinators.cluster().await?;
    let placement = placement(&cluster, &args)?;
    let plan = Plan::new(&cluster, vec![placement], &[]);
    if args.options.dry_run {
        return plan.print(format);
    }
    plan.announce();
    plan.confirm(&args.options)?;
    plan.carry_out(&coordinators, &args.options).await?;
    plan.tell(format)
}

fn placement(cluster: &v1::GetClusterReply, args: &Args) -> anyhow::Result<v1::ShardPlacement> {
    let mut views = cluster.jobs.iter().filter_map(|status| status.view.as_ref());
    let view = views.find(|view| view.spec.as_ref().is_some_and(|spec| spec.name == args.job));
    let view =
        view.with_context(|| format!("there is no job {:?}: psctl job list shows them", args.job))?;
    let route = view.shards.get(args.shard as usize).with_context(|| {
        format!("job {} has shards 0 to {}", args.job, view.shards.len().saturating_sub(1))
    })?;
    let primary = route.primary.with_context(|| {
        format!("shard {} is lost: restore the job from a checkpoint", args.shard)
    })?;
    let server = |name: &str| -> anyhow::Result<v1::ServerRef> {
        let node = cluster.nodes.iter().find(|node| node.name == name);
        let node =
            node.with_context(|| format!("there is no node {name:?}: psctl node list shows them"))?;
        Ok(v1::ServerRef { node: node.node, incarnation: node.incarnation })
    };
    let placing = match &args.to {
        None if route.moving.is_none() => {
            return Err(Exit::Usage(format!("shard {} does not move", args.shard)).into());
        }
        None => Placing::Cancel(true),
        Some(to) => {
            let from = args.from.as_deref().map_or(Ok(primary), server)?;
            let to = server(to)?;
            let member = route.in_sync.contains(&to);
            if from == to {
                return Err(Exit::Usage("it is there already".into()).into());
            }
            if member && from != primary {
                return Err(Exit::Usage(
                    "both hold a copy: a shard would have one copy less. Move it to a server that has none".into(),
                )
                .into());
            }
            if member {
                Placing::Promote(to)
            } else {
                Placing::Move(v1::ShardMove { from: Some(from), to: Some(to) })
            }
        }
    };
    Ok(v1::ShardPlacement {
        job: view.job,
        shard: args.shard,
        epoch: route.epoch,
        set_version: route.set_version,
        reason: "an operator asked for it".into(),
        placing: Some(placing),
    })
}
