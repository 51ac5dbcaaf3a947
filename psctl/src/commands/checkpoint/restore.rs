//! `psctl checkpoint restore`

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use downpour_proto::v1;
use indicatif::ProgressBar;
use serde::Serialize;

use super::Which;
use crate::cli::Connection;
use crate::output::{self, Format, count};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl checkpoint restore file:///var/lib/downpour/checkpoints ctr
  psctl checkpoint restore s3://models/ctr ctr --as ctr-yesterday --checkpoint 20261121T201500-123-0badcafe
  psctl checkpoint restore s3://models/ctr ctr --replace

The cluster may have another number of servers than the one that saved the job. Every server reads its own shards: a folder must be the
same one on all of them. Clients of the old job must open it anew.")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Which,
    /// Name of the new job; without it the same
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// Delete a job of that name that exists
    #[arg(long)]
    replace: bool,
    /// Copies of each shard; without it as many as before
    #[arg(long, value_name = "COUNT")]
    replicas: Option<u32>,
    /// How long it may take
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = humantime::parse_duration)]
    within: Duration,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Serialize)]
struct Restored {
    job: String,
    checkpoint: String,
    shards: u32,
    rows: u64,
    seconds: f64,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let started = Instant::now();
    let coordinators = args.connection.coordinators()?;
    // Looked at from here too: what is wrong is told before anything is replaced.
    let (catalog, manifest) = args.which.find().await?;
    let checkpoint = manifest.checkpoint.to_string();
    catalog.chain(manifest).await?;
    let named = args.name.as_ref().unwrap_or(&args.which.job);
    let views = coordinators.cluster().await?.jobs.into_iter().filter_map(|job| job.view);
    let is_it = |view: &v1::JobView| view.spec.as_ref().is_some_and(|spec| spec.name == *named);
    let replaced = { views }.find(is_it);
    let request = v1::RestoreJobRequest {
        uri: args.which.from,
        job: args.which.job.clone(),
        checkpoint,
        name: args.name.clone().unwrap_or_default(),
        replace: args.replace && replaced.is_some(),
        replicas: args.replicas.unwrap_or(0),
        // What is replaced is what was there when this began.
        if_version: replaced.map_or(0, |view| view.version),
    };
    let reply = coordinators.restore_job(&request).await?;
    let deadline = started + args.within;
    let mut bar: Option<ProgressBar> = None;
    let job = loop {
        let cluster = coordinators.cluster().await?;
        let is_it =
            |job: &v1::JobStatus| job.view.as_ref().is_some_and(|view| view.job == reply.job);
        let job = cluster.jobs.into_iter().find(is_it).context("the job was deleted meanwhile")?;
        let shards = job.view.as_ref().map_or(0, |view| view.shards.len());
        let loaded = job.reports.iter().filter(|report| report.last_lsn > 0).count();
        let bar = bar.get_or_insert_with(|| ProgressBar::new(shards as u64));
        bar.set_position(loaded as u64);
        if loaded == shards {
            bar.finish_and_clear();
            break job;
        }
        if Instant::now() > deadline {
            bail!(
                "{loaded} of {shards} shards are loaded; the servers' logs say what the others wait for"
            );
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let restored = Restored {
        job: args.name.unwrap_or(args.which.job),
        checkpoint: reply.checkpoint,
        shards: job.reports.len() as u32,
        rows: job.reports.iter().map(|report| report.rows).sum(),
        seconds: started.elapsed().as_secs_f64(),
    };
    output::properties(format, &restored, |restored| {
        vec![
            ("Job", restored.job.clone()),
            ("Checkpoint", restored.checkpoint.clone()),
            ("Rows", count(restored.rows)),
            ("Took", format!("{:.1} s", restored.seconds)),
        ]
    })
}
