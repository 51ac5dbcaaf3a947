//! `psctl job`

use anyhow::Context as _;

use crate::cli::Named;
use crate::model::{Cluster, Job};
use crate::output::Format;

mod delete;
mod describe;
mod list;
mod pause;
mod set_consistency;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All jobs
    List(list::Args),
    /// One job and its variables
    Describe(describe::Args),
    /// Have a job's workers hold before their next step
    #[command(after_help = pause::PAUSE_HELP)]
    Pause(Named),
    /// Have them go on
    #[command(after_help = pause::RESUME_HELP)]
    Resume(Named),
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
            Self::Pause(args) => pause::run(args, true, format).await,
            Self::Resume(args) => pause::run(args, false, format).await,
            Self::Delete(args) => delete::run(args, format).await,
            Self::SetConsistency(args) => set_consistency::run(args, format).await,
        }
    }
}

/// The job of this name.
pub(crate) fn find<'a>(cluster: &'a Cluster, name: &str) -> anyhow::Result<&'a Job> {
    cluster
        .jobs
        .iter()
        .find(|job| job.name == name)
        .with_context(|| format!("there is no job {name:?}"))
}
