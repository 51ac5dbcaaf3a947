//! `psctl job`

use anyhow::Context as _;

use crate::model::{Cluster, Job};
use crate::output::Format;

mod delete;
mod describe;
mod list;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All jobs
    List(list::Args),
    /// One job and its variables
    Describe(describe::Args),
    /// Delete a job and everything it has learnt
    Delete(delete::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List(args) => list::run(args, format).await,
            Self::Describe(args) => describe::run(args, format).await,
            Self::Delete(args) => delete::run(args, format).await,
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
