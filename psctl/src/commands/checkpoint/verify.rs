//! `psctl checkpoint verify`

use downpour_checkpoint::write::Scratch;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Summary, Which};
use crate::output::{self, Format, Row, table};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl checkpoint verify file:///var/lib/downpour/checkpoints ctr
  psctl checkpoint verify s3://models/ctr ctr --checkpoint 20261122T201500-123-0badcafe

Reads it with all that it builds on: sizes, checksums, and every tensor, key, LSN and number in the files.")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Which,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let (catalog, manifest) = args.which.find().await?;
    let summary = Summary::of(&manifest);
    let mut bytes = manifest.bytes();
    for name in &manifest.chain {
        bytes += catalog.manifest(&manifest.job.name, name).await?.bytes();
    }
    let style = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta} left");
    let bar = ProgressBar::new(bytes);
    if let Ok(style) = style {
        bar.set_style(style);
    }
    let verified = catalog.verify(manifest, &Scratch::default(), |bytes| bar.inc(bytes)).await;
    bar.finish_and_clear();
    verified?;
    match format {
        Format::Json => output::json(&summary),
        Format::Table => {
            eprintln!("every byte is as it was written");
            output::line(&table(Summary::TITLES, std::iter::once(summary.cells())))
        }
    }
}
