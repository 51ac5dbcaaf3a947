//! `psctl checkpoint create`

use std::time::Duration;

use anyhow::ensure;
use downpour_core::id::JobId;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::cli::Connection;
use crate::commands::job;
use crate::output::{self, Format, bytes};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl checkpoint create ctr --to file:///var/lib/downpour/checkpoints
  psctl checkpoint create ctr --to s3://models/ctr --incremental
  psctl checkpoint create ctr --to s3://models/ctr --no-wait -o json

Every server writes its own shards: a folder must be the same one on all of them.")]
pub(crate) struct Args {
    /// Name of the job
    job: String,
    /// file:///folder or s3://bucket/prefix; without it the place of the job's schedule
    #[arg(long, value_name = "URI", default_value = "", hide_default_value = true)]
    to: String,
    /// Only what changed since the job's last checkpoint there
    #[arg(long)]
    incremental: bool,
    /// Do not wait until it is whole
    #[arg(long)]
    no_wait: bool,
    /// How long it may take
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = humantime::parse_duration)]
    within: Duration,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Serialize)]
struct Created {
    job: String,
    uri: String,
    checkpoint: String,
    /// Checkpoints that it builds on.
    builds_on: u32,
    /// Not known before it is whole.
    bytes: Option<u64>,
    seconds: Option<f64>,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster = coordinators.cluster().await?.into();
    let job = job::find(&cluster, &args.job)?;
    let id = JobId(job.job);
    let reply = coordinators.create_checkpoint(id, &args.to, args.incremental).await?;
    let mut created = Created {
        job: args.job,
        uri: args.to,
        checkpoint: reply.checkpoint,
        builds_on: reply.chain,
        bytes: None,
        seconds: None,
    };
    if !args.no_wait {
        let bar = ProgressBar::new(job.shards.into()).with_message("shards");
        let progress = |saved: u32| bar.set_position(saved.into());
        let name = created.checkpoint.clone();
        let ended = coordinators.checkpoint_ended(id, &name, args.within, progress).await;
        bar.finish_and_clear();
        let ended = ended?;
        ensure!(ended.error.is_empty(), "checkpoint {name} failed: {}", ended.error);
        created.checkpoint = ended.checkpoint;
        created.builds_on = ended.chain;
        created.uri = ended.uri;
        created.bytes = Some(ended.bytes);
        created.seconds = Some(ended.ended_ms.saturating_sub(ended.created_ms) as f64 / 1000.0);
    }
    output::properties(format, &created, |created| {
        let mut lines = vec![("Checkpoint", created.checkpoint.clone())];
        if created.builds_on > 0 {
            lines.push(("Builds on", format!("{} checkpoints", created.builds_on)));
        }
        if let (Some(size), Some(seconds)) = (created.bytes, created.seconds) {
            lines.push(("Size", bytes(size)));
            lines.push(("Took", format!("{seconds:.1} s")));
        }
        lines
    })
}
