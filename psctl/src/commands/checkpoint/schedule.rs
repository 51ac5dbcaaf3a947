//! `psctl checkpoint schedule`

use std::time::Duration;

use downpour_core::id::JobId;
use downpour_proto::v1;

use crate::cli::{Connection, Exit};
use crate::commands::job;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl checkpoint schedule ctr --to s3://models/ctr --every 10m --keep 3
  psctl checkpoint schedule ctr --to s3://models/ctr --every 1m --keep 3 --full-every 60
  psctl checkpoint schedule ctr --off")]
pub(crate) struct Args {
    /// Name of the job
    job: String,
    /// file:///folder or s3://bucket/prefix
    #[arg(long, value_name = "URI", required_unless_present = "off")]
    to: Option<String>,
    /// From the beginning of one to the beginning of the next
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, required_unless_present = "off")]
    every: Option<Duration>,
    /// Delete all but the newest; 0 keeps all
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    keep: u32,
    /// Each so-manieth is full, the others hold what changed since the one before
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    full_every: u32,
    /// No more
    #[arg(long, conflicts_with_all = ["to", "every"])]
    off: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster = coordinators.cluster().await?.into();
    let id = JobId(job::find(&cluster, &args.job)?.job);
    let every = args.every.unwrap_or_default();
    if !args.off && every < Duration::from_secs(1) {
        return Err(Exit::Usage("--every must be at least 1s".into()).into());
    }
    let schedule = v1::CheckpointSchedule {
        uri: args.to.unwrap_or_default(),
        every_ms: every.as_millis() as u64,
        keep: args.keep,
        full_every: args.full_every,
    };
    coordinators.schedule_checkpoints(id, schedule).await?;
    let what = if args.off {
        "is no longer saved by itself".into()
    } else {
        format!("is saved every {every:?}")
    };
    eprintln!("job {} {what}", args.job);
    Ok(())
}
