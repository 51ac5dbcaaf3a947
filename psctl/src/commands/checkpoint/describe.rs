//! `psctl checkpoint describe`

use downpour_core::id::ShardId;
use downpour_core::spec::Shape;
use serde::Serialize;

use super::{Summary, Which};
use crate::output::{self, Format, Row, bytes, count, table};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl checkpoint describe file:///var/lib/downpour/checkpoints ctr
  psctl checkpoint describe s3://models/ctr ctr --checkpoint 20261122T201500-123-0badcafe -o json")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Which,
}

#[derive(Serialize)]
struct Description {
    #[serde(flatten)]
    summary: Summary,
    seed: u64,
    variables: Vec<Variable>,
    files: Vec<File>,
}

#[derive(Serialize)]
struct Variable {
    name: String,
    shape: String,
    optimizer_slots: Vec<&'static str>,
}

#[derive(Serialize)]
struct File {
    shard: u32,
    object: String,
    lsn: String,
    newer_than: Option<String>,
    rows: u64,
    bytes: u64,
    crc32: String,
}

impl Row for File {
    const TITLES: &'static [&'static str] = &[">SHARD", "FILE", "LSN", "AFTER", ">ROWS", ">SIZE"];

    fn cells(&self) -> Vec<String> {
        let after = self.newer_than.clone().unwrap_or_else(|| "-".into());
        let (rows, size) = (count(self.rows), bytes(self.bytes));
        vec![self.shard.to_string(), self.object.clone(), self.lsn.clone(), after, rows, size]
    }
}

impl Row for Variable {
    const TITLES: &'static [&'static str] = &["VARIABLE", "SHAPE", "OPTIMIZER SLOTS"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), self.shape.clone(), self.optimizer_slots.join(", ")]
    }
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let (_, manifest) = args.which.find().await?;
    let variables = manifest.variables.iter().map(|variable| Variable {
        name: variable.spec.name.clone(),
        shape: match &variable.spec.shape {
            Shape::Table(table) => format!("table of {}", table.dim),
            Shape::Dense(dense) => format!("dense {:?}", dense.shape),
        },
        optimizer_slots: variable.spec.optimizer.slots().iter().map(|slot| slot.name).collect(),
    });
    let files = manifest.files.iter().zip(0..).map(|(file, shard)| File {
        shard,
        object: file.object(ShardId(shard)),
        lsn: file.lsn.to_string(),
        newer_than: (file.newer_than.0 > 0).then(|| file.newer_than.to_string()),
        rows: file.rows,
        bytes: file.bytes,
        crc32: format!("{:08x}", file.crc32),
    });
    let description = Description {
        summary: Summary::of(&manifest),
        seed: manifest.job.seed,
        variables: variables.collect(),
        files: files.collect(),
    };
    match format {
        Format::Json => output::json(&description),
        Format::Table => {
            let head = table(Summary::TITLES, std::iter::once(description.summary.cells()));
            let variables = table(Variable::TITLES, description.variables.iter().map(Row::cells));
            let files = table(File::TITLES, description.files.iter().map(Row::cells));
            output::line(&format!("{head}\n\n{variables}\n\n{files}"))
        }
    }
}
