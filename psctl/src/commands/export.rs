//! `psctl export`

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use downpour_checkpoint::export;
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::write::Scratch;
use downpour_core::init::Init;
use downpour_core::mix::salt;
use downpour_core::row_format::RowFormat;
use downpour_core::spec::{Shape, TableSpec};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::{Value, json};

use super::checkpoint::{name_of, open};
use crate::cli::{Connection, Exit};
use crate::output::{self, Format, count};

/// What a table's rows are sorted in; beyond it is on the disk.
const MEMORY_BYTES_MAX: usize = 256 << 20;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl export ctr --from file:///var/lib/downpour/checkpoints --to models/ctr
  psctl export ctr --take --to models/ctr          save the job as it is now, where its schedule says, and export that
  psctl export ctr --from s3://models/ctr --checkpoint 20261122T201500-123-0badcafe --to models/ctr

Writes dense.safetensors, one safetensors file of each table (`keys`, rising, and `rows`), and features.json: how a raw row becomes keys and numbers, and
what keys have that were never trained. `docs/export.md` says how to score with them.")]
pub(crate) struct Args {
    /// Name of the job
    job: String,
    /// Where its checkpoints are: file:///folder or s3://bucket/prefix
    #[arg(long, value_name = "URI", required_unless_present = "take")]
    from: Option<String>,
    /// Which one; without it the newest whole one
    #[arg(long, value_name = "NAME", conflicts_with = "take")]
    checkpoint: Option<String>,
    /// Take a checkpoint first; without --from where the job's schedule says
    #[arg(long)]
    take: bool,
    /// How long that may take
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = humantime::parse_duration)]
    within: Duration,
    /// The folder to write; must be empty or absent
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Serialize)]
struct Exported {
    job: String,
    checkpoint: String,
    folder: PathBuf,
    tables: Vec<export::ExportedTable>,
    rows: u64,
    /// Whether the job says how raw rows are read.
    features: bool,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let to = || format!("--to {}", args.to.display());
    fs::create_dir_all(&args.to).with_context(to)?;
    if fs::read_dir(&args.to).with_context(to)?.next().is_some() {
        return Err(Exit::Usage(format!("{}: is not empty", to())).into());
    }
    let (uri, checkpoint) = match args.take {
        true => take(&args).await?,
        false => (args.from.clone().unwrap_or_default(), args.checkpoint.clone()),
    };
    let catalog = open(&uri)?;
    let manifest = match &checkpoint {
        Some(name) => catalog.manifest(&args.job, &name_of(name)?).await?,
        None => catalog.latest(&args.job).await?,
    };
    let chain = catalog.chain(manifest.clone()).await?;
    let bar = ProgressBar::new(manifest.job.shards.into());
    let scratch = Scratch { folder: args.to.clone(), memory_bytes_max: MEMORY_BYTES_MAX };
    let written = export::export(&catalog, &chain, &args.to, &scratch, |_| bar.inc(1)).await;
    bar.finish_and_clear();
    let tables = written?;
    let (features, complete) = features(&manifest, &tables)?;
    let text = serde_json::to_string_pretty(&features)?;
    fs::write(args.to.join("features.json"), text + "\n").with_context(to)?;
    if !complete {
        eprintln!(
            "the job does not say how raw rows are read (`Job::describe`): features.json has the tables alone"
        );
    }
    let exported = Exported {
        job: args.job,
        checkpoint: manifest.checkpoint.to_string(),
        folder: args.to,
        rows: tables.iter().map(|table| table.rows).sum(),
        tables,
        features: complete,
    };
    output::properties(format, &exported, |exported| {
        vec![
            ("Job", exported.job.clone()),
            ("Checkpoint", exported.checkpoint.clone()),
            ("Folder", exported.folder.display().to_string()),
            ("Tables", exported.tables.len().to_string()),
            ("Rows", count(exported.rows)),
        ]
    })
}

/// Saves the job as it is now: where, and the name.
async fn take(args: &Args) -> anyhow::Result<(String, Option<String>)> {
    let coordinators = args.connection.coordinators()?;
    let job = coordinators.job(&args.job).await?.job;
    let uri = match &args.from {
        Some(uri) => uri.clone(),
        None => match coordinators.checkpoints(job).await?.0.schedule {
            Some(schedule) => schedule.uri,
            None => bail!(
                "job {:?} has no schedule that says where checkpoints go: give --from",
                args.job
            ),
        },
    };
    let ended = coordinators.take_checkpoint(job, &uri, true, args.within).await?;
    match ended.error.as_str() {
        "" => Ok((uri, Some(ended.checkpoint))),
        error => bail!("checkpoint {} failed: {error}", ended.checkpoint),
    }
}

/// What the job says of its features, and what its tables are. The flag: whether it says anything.
fn features(
    manifest: &Manifest,
    written: &[export::ExportedTable],
) -> anyhow::Result<(Value, bool)> {
    let parts = (0..).map_while(|n| manifest.labels.get(&format!("features/{n}")));
    let text: String = parts.map(String::as_str).collect();
    let complete = !text.is_empty();
    let mut features: Value = match complete {
        true => serde_json::from_str(&text).context("the job's labels features/… are not JSON")?,
        false => json!({}),
    };
    let mut tables = BTreeMap::new();
    for variable in &manifest.variables {
        let (Shape::Table(table), Some(written)) = (
            &variable.spec.shape,
            written.iter().find(|written| written.name == variable.spec.name),
        ) else {
            continue;
        };
        tables.insert(&variable.spec.name, self::table(&variable.spec.name, table, written));
    }
    features["tables"] = json!(tables);
    features["seed"] = manifest.job.seed.into();
    features["checkpoint"] = manifest.checkpoint.to_string().into();
    Ok((features, complete))
}

/// `core/src/init.rs` says what a row is that was never trained.
fn table(name: &str, table: &TableSpec, written: &export::ExportedTable) -> Value {
    let init = match table.init {
        Init::Zeros => json!({"constant": 0.0}),
        Init::Constant(value) => json!({"constant": f64::from(value)}),
        Init::Uniform { low, high } => json!({"low": f64::from(low), "high": f64::from(high)}),
        Init::Normal { mean, std } => json!({"mean": f64::from(mean), "std": f64::from(std)}),
    };
    json!({
        "file": written.file, "rows": written.rows, "dim": table.dim, "salt": salt(name), "init": init,
        "bf16": table.row_format == RowFormat::Bf16,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_its_untrained_rows_are() {
        let spec =
            |init| TableSpec { dim: 3, init, group: "g".into(), row_format: RowFormat::Bf16 };
        let written =
            export::ExportedTable { name: "t".into(), file: "table-1.safetensors".into(), rows: 7 };
        let described = table("t", &spec(Init::Normal { mean: 0.0, std: 0.5 }), &written);
        assert_eq!(described["init"], json!({"mean": 0.0, "std": 0.5}));
        assert_eq!((&described["salt"], &described["bf16"]), (&json!(salt("t")), &json!(true)));
        assert_eq!(table("t", &spec(Init::Zeros), &written)["init"], json!({"constant": 0.0}));
    }
}
