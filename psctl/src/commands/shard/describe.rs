//! `psctl shard describe`

use anyhow::Context as _;
use downpour_core::id::Lsn;

use crate::cli::Connection;
use crate::output::{self, Format, bytes, count};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  psctl shard describe ctr 12")]
pub(crate) struct Args {
    /// Name of the job
    job: String,
    /// Number of the shard, from 0
    shard: u32,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let cluster = args.connection.cluster().await?;
    let job = super::super::job::find(&cluster, &args.job)?;
    let shard =
        cluster.shards.iter().find(|shard| shard.job == args.job && shard.shard == args.shard);
    let shard = shard.with_context(|| {
        format!("job {} has shards 0 to {}", args.job, job.shards.saturating_sub(1))
    })?;
    output::properties(format, shard, |shard| {
        vec![
            ("Job", shard.job.clone()),
            ("Shard", shard.shard.to_string()),
            ("Epoch", shard.epoch.to_string()),
            ("Primary", shard.primary.clone().unwrap_or_else(|| "lost".to_owned())),
            (
                "In sync",
                format!(
                    "{} of {} (set version {})",
                    shard.in_sync.join(", "),
                    shard.replicas,
                    shard.set_version
                ),
            ),
            ("Moving", shard.moving.as_ref().map_or_else(|| "no".into(), ToString::to_string)),
            ("Rows/s", count(shard.rows_per_s as u64)),
            ("Rows", count(shard.rows)),
            ("Bytes", bytes(shard.bytes)),
            (
                "Set back",
                shard.set_back.as_ref().map_or_else(
                    || "never".to_owned(),
                    |back| format!("in epoch {}, to checkpoint {}", back.epoch, back.checkpoint),
                ),
            ),
            ("Last LSN", format!("{} ({})", Lsn(shard.last_lsn), shard.last_lsn)),
        ]
    })
}
