//! `psctl job`

use anyhow::Context as _;
use downpour_core::id::JobId;

use crate::cli::Connection;
use crate::model::{Cluster, Job};
use crate::output::{self, Change, Format};

mod delete;
mod describe;
mod list;
mod pause;
mod resume;
mod set_consistency;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All jobs
    List(list::Args),
    /// One job and its variables
    Describe(describe::Args),
    /// Have a job's workers hold before their next step
    Pause(pause::Args),
    /// Have them go on
    Resume(resume::Args),
    /// Delete a job and everything it has learnt
    Delete(delete::Args),
    /// Say how far the workers of a job may drift apart
    SetConsistency(set_consistency::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List(args) => list::run(args, format).await,
            Self::Describe(args) => describe::run(args, format).await,
            Self::Pause(args) => pause::run(args, format).await,
            Self::Resume(args) => resume::run(args, format).await,
            Self::Delete(args) => delete::run(args, format).await,
            Self::SetConsistency(args) => set_consistency::run(args, format).await,
        }
    }
}

async fn set_paused(
    connection: &Connection,
    name: &str,
    paused: bool,
    dry_run: bool,
    format: Format,
) -> anyhow::Result<()> {
    let coordinators = connection.coordinators()?;
    let cluster = coordinators.cluster().await?.into();
    let job = find(&cluster, name)?;
    let changed = match dry_run {
        true => job.paused != paused,
        false => coordinators.pause_job(JobId(job.job), paused).await?,
    };
    let workers = cluster.workers.iter().filter(|one| one.job == name && one.kind == "worker");
    let workers = workers.count();
    eprintln!(
        "job {name} {}",
        match (changed, dry_run, paused) {
            (false, _, true) => "is paused already".to_owned(),
            (false, _, false) => "is not paused".to_owned(),
            (true, true, true) => format!("would be paused: {workers} workers would hold"),
            (true, true, false) => format!("would be resumed: {workers} workers would go on"),
            (true, false, true) => {
                format!(
                    "is paused: {workers} workers hold when they have ended the steps that they have begun"
                )
            }
            (true, false, false) => format!("is resumed: {workers} workers go on"),
        }
    );
    let verb = if paused { "pause" } else { "resume" };
    output::changed(format, &Change { noun: "job", name: name.to_owned(), verb, changed, dry_run })
}

/// The job of this name.
pub(crate) fn find<'a>(cluster: &'a Cluster, name: &str) -> anyhow::Result<&'a Job> {
    cluster
        .jobs
        .iter()
        .find(|job| job.name == name)
        .with_context(|| format!("there is no job {name:?}"))
}
