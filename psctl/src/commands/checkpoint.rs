//! `psctl checkpoint`

use anyhow::Context as _;
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::{Access, Store};
use serde::Serialize;

use crate::cli::Exit;
use crate::output::{Format, Row, bytes, count};

mod create;
mod delete;
mod describe;
mod list;
mod restore;
mod schedule;
mod verify;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Save a job while it trains
    Create(create::Args),
    /// Save a job again and again
    Schedule(schedule::Args),
    /// The checkpoints in a folder or bucket
    List(list::Args),
    /// One checkpoint and its files
    Describe(describe::Args),
    /// Read every byte of a checkpoint and check it
    Verify(verify::Args),
    /// Begin a job with what a checkpoint holds
    Restore(restore::Args),
    /// Delete a checkpoint
    Delete(delete::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::Create(args) => create::run(args, format).await,
            Self::Schedule(args) => schedule::run(args).await,
            Self::List(args) => list::run(args, format).await,
            Self::Describe(args) => describe::run(args, format).await,
            Self::Verify(args) => verify::run(args, format).await,
            Self::Restore(args) => restore::run(args, format).await,
            Self::Delete(args) => delete::run(args).await,
        }
    }
}

/// Which checkpoint, for the commands that read one.
#[derive(Debug, clap::Args)]
struct Which {
    /// Where it is: file:///folder or s3://bucket/prefix (credentials, region and endpoint: AWS_* of the environment)
    #[arg(value_name = "URI")]
    from: String,
    /// Name of the job that it is of
    job: String,
    /// Its name; without it the newest whole one
    #[arg(long, value_name = "NAME")]
    checkpoint: Option<String>,
}

impl Which {
    async fn find(&self) -> anyhow::Result<(Catalog, Manifest)> {
        let catalog = open(&self.from)?;
        let manifest = match &self.checkpoint {
            Some(name) => catalog.manifest(&self.job, &name_of(name)?).await,
            None => catalog.latest(&self.job).await,
        };
        let advice = || format!("`psctl checkpoint list {}` shows what is there", self.from);
        Ok((catalog, manifest.with_context(advice)?))
    }
}

pub(super) fn open(uri: &str) -> anyhow::Result<Catalog> {
    let opened = Store::open(uri, Access::Read);
    Ok(Catalog::new(opened.map_err(|error| match error {
        downpour_checkpoint::Error::Uri { .. } => Exit::Usage(error.to_string()).into(),
        error => anyhow::Error::from(error),
    })?))
}

pub(super) fn name_of(name: &str) -> anyhow::Result<CheckpointName> {
    CheckpointName::new(name).map_err(|bad| Exit::Usage(bad.to_string()).into())
}

/// A checkpoint, as lists show it.
#[derive(Debug, Serialize)]
struct Summary {
    job: String,
    checkpoint: String,
    created_ms: u64,
    shards: u32,
    rows: u64,
    bytes: u64,
    /// What it builds on, the full one first.
    chain: Vec<String>,
    /// Why it cannot be used.
    problem: Option<String>,
}

impl Summary {
    fn of(manifest: &Manifest) -> Self {
        Summary {
            job: manifest.job.name.clone(),
            checkpoint: manifest.checkpoint.to_string(),
            created_ms: manifest.created_ms,
            shards: manifest.job.shards,
            rows: manifest.rows(),
            bytes: manifest.bytes(),
            chain: manifest.chain.iter().map(ToString::to_string).collect(),
            problem: None,
        }
    }
}

impl Row for Summary {
    const TITLES: &'static [&'static str] =
        &["JOB", "CHECKPOINT", "KIND", ">SHARDS", ">ROWS", ">SIZE", "PROBLEM"];

    fn cells(&self) -> Vec<String> {
        let kind = match self.chain.last() {
            Some(base) => format!("on {base}"),
            None => "full".into(),
        };
        vec![
            self.job.clone(),
            self.checkpoint.clone(),
            kind,
            self.shards.to_string(),
            count(self.rows),
            bytes(self.bytes),
            self.problem.clone().unwrap_or_default(),
        ]
    }
}
