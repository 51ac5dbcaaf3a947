//! `psctl shard list`

use crate::cli::Connection;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl shard list --job ctr
  psctl shard list --job ctr -o json | jq 'map(.rows) | add'   rows of the whole job
  psctl shard list --lost")]
pub(crate) struct Args {
    /// Only the shards of this job
    #[arg(long, value_name = "NAME")]
    job: Option<String>,
    /// Only shards of which every replica is gone
    #[arg(long)]
    lost: bool,
    /// Only shards with fewer in-sync members than the job wants
    #[arg(long)]
    short: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let cluster = args.connection.cluster().await?;
    if let Some(name) = &args.job {
        super::super::job::find(&cluster, name)?;
    }
    let mut shards = cluster.shards;
    shards.retain(|shard| {
        args.job.as_ref().is_none_or(|job| shard.job == *job)
            && (!args.lost || shard.lost)
            && (!args.short || shard.is_short())
    });
    output::list(format, &shards)
}
