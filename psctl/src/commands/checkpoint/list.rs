//! `psctl checkpoint list`

use super::{Summary, open};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl checkpoint list file:///var/lib/downpour/checkpoints
  psctl checkpoint list s3://models/ctr --job ctr -o json | jq '.[-1].checkpoint'")]
pub(crate) struct Args {
    /// file:///folder or s3://bucket/prefix (credentials, region and endpoint: AWS_* of the environment)
    #[arg(value_name = "URI")]
    from: String,
    /// Only of this job
    #[arg(long)]
    job: Option<String>,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let catalog = open(&args.from)?;
    let jobs = match args.job {
        Some(job) => vec![job],
        None => catalog.jobs().await?,
    };
    let mut rows = Vec::new();
    for job in jobs {
        for (name, manifest) in catalog.list(&job).await? {
            rows.push(match manifest {
                Ok(manifest) => Summary::of(&manifest),
                Err(error) => Summary {
                    job: job.clone(),
                    checkpoint: name.to_string(),
                    created_ms: 0,
                    shards: 0,
                    rows: 0,
                    bytes: 0,
                    chain: Vec::new(),
                    problem: Some(error.to_string()),
                },
            });
        }
    }
    output::list(format, &rows)
}
