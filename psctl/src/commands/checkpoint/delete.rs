//! `psctl checkpoint delete`

use super::{name_of, open};
use crate::cli::Exit;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl checkpoint delete s3://models/ctr ctr --checkpoint 20261122T201500-123-0badcafe --yes
  psctl checkpoint delete s3://models/ctr ctr --keep 3 --yes

One that another builds on stays until that is deleted.")]
pub(crate) struct Args {
    /// file:///folder or s3://bucket/prefix (credentials, region and endpoint: AWS_* of the environment)
    #[arg(value_name = "URI")]
    from: String,
    /// Name of the job that it is of
    job: String,
    /// The one to be deleted, whole or broken off
    #[arg(long, value_name = "NAME", required_unless_present = "keep")]
    checkpoint: Option<String>,
    /// Delete all but the newest
    #[arg(long, value_name = "COUNT", conflicts_with = "checkpoint")]
    keep: Option<usize>,
    /// Really
    #[arg(long, short)]
    yes: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let catalog = open(&args.from)?;
    if !args.yes {
        return Err(Exit::Usage("deleted is deleted: pass --yes".into()).into());
    }
    let deleted = match (&args.checkpoint, args.keep) {
        (Some(name), _) => {
            let name = name_of(name)?;
            catalog.delete(&args.job, &name).await?;
            vec![name]
        }
        (None, keep) => catalog.keep(&args.job, keep.unwrap_or(usize::MAX), &[]).await?.deleted,
    };
    deleted.iter().for_each(|name| eprintln!("deleted {name}"));
    Ok(())
}
