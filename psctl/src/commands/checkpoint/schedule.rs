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
  psctl checkpoint schedule ctr --to s3://models/ctr --every-steps 10000
  psctl checkpoint schedule ctr --off

With --every and --every-steps one begins when either has passed.")]
pub(crate) struct Args {
    /// Name of the job
    job: String,
    /// file:///folder or s3://bucket/prefix
    #[arg(long, value_name = "URI", required_unless_present = "off")]
    to: Option<String>,
    /// From the beginning of one to the beginning of the next
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, required_unless_present_any = ["off", "every_steps"])]
    every: Option<Duration>,
    /// Steps from the beginning of one to the beginning of the next, as the furthest worker counts them; servers tell every two seconds
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    every_steps: Option<u64>,
    /// Delete all but the newest; 0 keeps all
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    keep: u32,
    /// Each so-manieth is full, the others hold what changed since the one before
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    full_every: u32,
    /// No more
    #[arg(long, conflicts_with_all = ["to", "every", "every_steps"])]
    off: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster = coordinators.cluster().await?.into();
    let id = JobId(job::find(&cluster, &args.job)?.job);
    if args.every.is_some_and(|every| every < Duration::from_secs(1)) {
        return Err(Exit::Usage("--every must be at least 1s".into()).into());
    }
    let schedule = v1::CheckpointSchedule {
        uri: args.to.unwrap_or_default(),
        every_ms: args.every.map_or(0, |every| every.as_millis() as u64),
        every_steps: args.every_steps.unwrap_or(0),
        keep: args.keep,
        full_every: args.full_every,
    };
    coordinators.schedule_checkpoints(id, schedule).await?;
    let what = if args.off {
        "is no longer saved by itself".into()
    } else {
        let time = args.every.map(|every| format!("{every:?}"));
        let steps = args.every_steps.map(|steps| format!("{steps} steps"));
        let every: Vec<String> = time.into_iter().chain(steps).collect();
        format!("is saved every {}", every.join(" or "))
    };
    eprintln!("job {} {what}", args.job);
    Ok(())
}
