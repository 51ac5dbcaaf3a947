//! Every knob, as a flag or in a TOML file; a flag wins.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use downpour::{Checkpoints, Every, RowFormat};
use serde::{Deserialize, Serialize};

use crate::optimizers::{LrSchedule, Optimizer};

/// What is left out has the default that the help names.
#[derive(Args, Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Options {
    /// TOML file with any of these options, written with underscores: `lr_dense = 0.001`
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,

    /// host:port of the coordinators, with commas between
    #[arg(long, value_name = "LIST", help_heading = "Cluster")]
    pub(crate) coordinators: Option<String>,
    /// Name of the job
    #[arg(long, help_heading = "Cluster")]
    pub(crate) job: Option<String>,
    /// Shards of a new job [default: 64]
    #[arg(long, help_heading = "Cluster")]
    pub(crate) shards: Option<u32>,
    /// Copies of each shard of a new job [default: 1]
    #[arg(long, help_heading = "Cluster")]
    pub(crate) replicas: Option<u32>,
    /// Copies that must be in sync for pushes of a new job to be accepted [default: 1]
    #[arg(long, help_heading = "Cluster")]
    pub(crate) min_in_sync: Option<u32>,
    /// Seconds that a pull or a push may take, failovers included [default: 60]
    #[arg(long, value_name = "SECONDS", help_heading = "Cluster")]
    pub(crate) deadline_s: Option<u64>,

    /// Save the job there while it trains: file:///folder or s3://bucket/prefix, as coordinators and servers reach it. Where the cluster does not have the
    /// job any more, go on from the newest checkpoint in it [default: none]
    #[arg(long, value_name = "URI", help_heading = "Checkpoints")]
    pub(crate) checkpoint_to: Option<String>,
    /// From the beginning of one checkpoint to the beginning of the next [default: 60s]
    #[arg(long, value_name = "INTERVAL", help_heading = "Checkpoints")]
    pub(crate) checkpoint_every: Option<String>,
    /// Delete all checkpoints of the job but the newest; 0 keeps all [default: 3]
    #[arg(long, value_name = "COUNT", help_heading = "Checkpoints")]
    pub(crate) checkpoint_keep: Option<u32>,
    /// Delete what the cluster has of the job and begin from nothing. Checkpoints stay and are not read
    #[arg(long, help_heading = "Checkpoints")]
    #[serde(skip)]
    pub(crate) fresh: bool,

    /// Which model: see `downpour-worker models`
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub(crate) model: Option<String>,
    /// TorchScript module with `forward(features: List[Tensor], dense: Tensor)`; implies `--model script`
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    pub(crate) model_file: Option<PathBuf>,
    /// Which columns are what (TOML)
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    pub(crate) schema: Option<PathBuf>,
    /// Widths of the hidden layers [default: 256,128]
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Model")]
    pub(crate) hidden: Option<Vec<i64>>,
    /// Share of a hidden layer that is left out in training [default: 0]
    #[arg(long, value_name = "SHARE", help_heading = "Model")]
    pub(crate) dropout: Option<f64>,
    /// What is minimised [default: binary]
    #[arg(long, help_heading = "Model")]
    pub(crate) objective: Option<Objective>,
    /// Penalty on the squared rows of each step [default: 0]
    #[arg(long, value_name = "FACTOR", help_heading = "Model")]
    pub(crate) l2: Option<f64>,
    /// Deviation of the rows' first values [default: 0.01]
    #[arg(long, value_name = "STD", help_heading = "Model")]
    pub(crate) init_std: Option<f32>,
    /// How rows and their gradients travel [default: f32]. Servers compute and keep f32
    #[arg(long, value_name = "FORMAT", help_heading = "Model")]
    pub(crate) row_format: Option<TravelAs>,

    /// Optimizer of the tables [default: adagrad]
    #[arg(long, value_name = "NAME", help_heading = "Optimizers")]
    pub(crate) optimizer_table: Option<Optimizer>,
    /// Learning rate of the tables [default: 0.05]
    #[arg(long, value_name = "RATE", help_heading = "Optimizers")]
    pub(crate) lr_table: Option<f32>,
    /// Optimizer of the dense weights [default: adam]
    #[arg(long, value_name = "NAME", help_heading = "Optimizers")]
    pub(crate) optimizer_dense: Option<Optimizer>,
    /// Learning rate of the dense weights [default: 0.001]
    #[arg(long, value_name = "RATE", help_heading = "Optimizers")]
    pub(crate) lr_dense: Option<f32>,
    /// Sum of squares that Adagrad starts with [default: 0]
    #[arg(long, value_name = "SUM", help_heading = "Optimizers")]
    pub(crate) initial_accumulator: Option<f32>,
    /// Of momentum and nesterov [default: 0.9], of rms-prop [default: 0]
    #[arg(long, value_name = "SHARE", help_heading = "Optimizers")]
    pub(crate) momentum: Option<f32>,
    /// Decay of the rows that a step pushes [default: 0.01 for adam-w, else 0]. Decoupled with adam-w, λ2 of ftrl, else added to
    /// the gradient
    #[arg(long, value_name = "DECAY", help_heading = "Optimizers")]
    pub(crate) decay_table: Option<f32>,
    /// The same of the dense weights
    #[arg(long, value_name = "DECAY", help_heading = "Optimizers")]
    pub(crate) decay_dense: Option<f32>,
    /// β of ftrl [default: 1]
    #[arg(long, value_name = "BETA", help_heading = "Optimizers")]
    pub(crate) ftrl_beta: Option<f32>,
    /// λ1 of ftrl: the evidence below which a weight is 0 [default: 0]
    #[arg(long, value_name = "EVIDENCE", help_heading = "Optimizers")]
    pub(crate) ftrl_l1: Option<f32>,
    /// Steps over which learning rates rise to theirs [default: 0]
    #[arg(long, value_name = "STEPS", help_heading = "Optimizers")]
    pub(crate) warm_up: Option<u64>,
    /// What learning rates do after the warm-up [default: constant]
    #[arg(long, value_name = "NAME", help_heading = "Optimizers")]
    pub(crate) lr_schedule: Option<LrSchedule>,
    /// Steps between two changes (step), or until the floor (cosine)
    #[arg(long, value_name = "STEPS", help_heading = "Optimizers")]
    pub(crate) lr_steps: Option<u64>,
    /// What `step` multiplies learning rates by [default: 0.1]
    #[arg(long, value_name = "FACTOR", help_heading = "Optimizers")]
    pub(crate) lr_factor: Option<f64>,
    /// Share of the learning rates that `cosine` ends at [default: 0]
    #[arg(long, value_name = "SHARE", help_heading = "Optimizers")]
    pub(crate) lr_floor: Option<f64>,
    /// Divide the learning rate of each push by 1 + its staleness in steps of the furthest worker (clocks) or in records of the shard's log (records);
    /// clocks:4 divides by 1 + staleness / 4 [default: none]
    #[arg(long, value_name = "UNIT[:PER]", help_heading = "Optimizers")]
    pub(crate) lr_staleness: Option<String>,
    /// Servers scale the gradient of a table's row down to this norm [default: none]
    #[arg(long, value_name = "NORM", help_heading = "Optimizers")]
    pub(crate) clip_row_norm: Option<f32>,
    /// Scale the gradients of a step down to this norm, all of them together [default: none]
    #[arg(long, value_name = "NORM", help_heading = "Optimizers")]
    pub(crate) clip_norm: Option<f64>,

    /// Files, directories or patterns to train on
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Data")]
    pub(crate) train: Option<Vec<String>>,
    /// Evaluate on these at the end; the report goes to stdout
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Data")]
    pub(crate) test: Option<Vec<String>>,
    /// Rows of a step [default: 1024]
    #[arg(long, value_name = "ROWS", help_heading = "Data")]
    pub(crate) batch: Option<usize>,
    /// Passes over the training data [default: 1]
    #[arg(long, help_heading = "Data")]
    pub(crate) epochs: Option<u64>,
    /// Rows in memory from which the next is drawn; 0 keeps the order of the files [default: 65536]
    #[arg(long, value_name = "ROWS", help_heading = "Data")]
    pub(crate) shuffle_rows: Option<usize>,
    /// Seed of first values, of the order of rows and of drawn negatives [default: 0]
    #[arg(long, help_heading = "Data")]
    pub(crate) seed: Option<u64>,

    /// Number of this worker, from 0, for its name in lists; worker 0 evaluates beside the training, and starts the job over with --fresh. Workers of a job share its
    /// data, however many they are [default: 0]
    #[arg(long, value_name = "INDEX", help_heading = "Run")]
    pub(crate) worker_index: Option<usize>,
    /// Steps in the pipeline; 1 reads its own writes, 2 computes while the network works [default: 1]
    #[arg(long, help_heading = "Run")]
    pub(crate) depth: Option<usize>,
    /// Pulls and pushes one after the other: slower, and one worker with a seed is repeatable at any depth [default: only depth 1 is]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Run")]
    pub(crate) in_order: Option<bool>,
    /// cpu, cuda, cuda:1 or auto [default: cpu]
    #[arg(long, help_heading = "Run")]
    pub(crate) device: Option<String>,
    /// Threads of LibTorch [default: 1]
    #[arg(long, help_heading = "Run")]
    pub(crate) threads: Option<i32>,
    /// Folder for metrics.jsonl, evaluations.jsonl and batches with numbers that are not finite [default: none]
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    pub(crate) out: Option<PathBuf>,
    /// Interval of metrics.jsonl: 100steps or 10s [default: 100steps]
    #[arg(long, value_name = "INTERVAL", help_heading = "Run")]
    pub(crate) log_every: Option<String>,
    /// What follows a loss or gradient that is not finite [default: stop]
    #[arg(long, help_heading = "Run")]
    pub(crate) on_nonfinite: Option<OnNonFinite>,

    /// Exit status of a training that SIGTERM or Ctrl-C ended [default: 0]; another one lets a Kubernetes Job tell that there is more to do
    #[arg(long, value_name = "STATUS", help_heading = "Run")]
    pub(crate) stopped_status: Option<u8>,

    /// Evaluate beside the training: 2000steps or 60s. Worker 0 does it
    #[arg(long, value_name = "INTERVAL", help_heading = "Evaluation")]
    pub(crate) eval_every: Option<String>,
    /// The data for --eval-every
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Evaluation")]
    pub(crate) eval_data: Option<Vec<String>>,
    /// Stop this worker when so many evaluations in a row brought nothing better [default: never]
    #[arg(long, value_name = "COUNT", help_heading = "Evaluation")]
    pub(crate) patience: Option<NonZeroU32>,
}

/// A [`RowFormat`] by name.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TravelAs {
    /// All 32 bits
    F32,
    /// The upper half, rounded: half the bytes
    Bf16,
}

impl From<TravelAs> for RowFormat {
    fn from(name: TravelAs) -> Self {
        match name {
            TravelAs::F32 => RowFormat::F32,
            TravelAs::Bf16 => RowFormat::Bf16,
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Objective {
    Binary,
    Regression,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OnNonFinite {
    Stop,
    Skip,
}

impl Options {
    /// What the file says where no flag does.
    pub(crate) fn with_file(self) -> anyhow::Result<Self> {
        let Some(path) = &self.config else { return Ok(self) };
        let read = || format!("--config {}", path.display());
        let text = std::fs::read_to_string(path).with_context(read)?;
        let file: Options = toml::from_str(&text).with_context(read)?;
        let mut merged = serde_json::to_value(file)?;
        let flags = serde_json::to_value(&self)?;
        for (name, value) in flags.as_object().into_iter().flatten() {
            if !value.is_null() {
                merged[name] = value.clone();
            }
        }
        Ok(Self { fresh: self.fresh, ..serde_json::from_value(merged)? })
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }
}

/// A flag that the command cannot do without.
pub(crate) fn needed<'a, T>(value: &'a Option<T>, flag: &str) -> anyhow::Result<&'a T> {
    value
        .as_ref()
        .ok_or_else(|| anyhow!("{flag} is needed: give the flag, or the option in --config"))
}

/// The value of a flag that has a syntax of its own.
pub(crate) fn parsed<T: FromStr<Err = String>>(
    value: &Option<String>,
    flag: &str,
    default: T,
) -> anyhow::Result<T> {
    match value {
        Some(text) => text.parse().map_err(|error| anyhow!("{flag}: {error}")),
        None => Ok(default),
    }
}

impl Options {
    /// Where checkpoints go, and when.
    pub(crate) fn checkpoints(&self) -> anyhow::Result<Option<Checkpoints>> {
        let every = Every::Time(Duration::from_secs(60));
        let every = parsed(&self.checkpoint_every, "--checkpoint-every", every)?;
        let Every::Time(every) = every else {
            anyhow::bail!("--checkpoint-every: {every} is not a time: write 60s, 5m or 250ms");
        };
        if self.checkpoint_to.is_none()
            && (self.checkpoint_every.is_some() || self.checkpoint_keep.is_some())
        {
            anyhow::bail!("--checkpoint-to is needed: where checkpoints go");
        }
        let keep = self.checkpoint_keep.unwrap_or(3);
        Ok(self.checkpoint_to.clone().map(|to| Checkpoints { to, every, keep }))
    }
}

impl From<Objective> for downpour::models::Objective {
    fn from(objective: Objective) -> Self {
        match objective {
            Objective::Binary => Self::Binary,
            Objective::Regression => Self::Regression,
        }
    }
}

impl From<OnNonFinite> for downpour::OnNonFinite {
    fn from(on_nonfinite: OnNonFinite) -> Self {
        match on_nonfinite {
            OnNonFinite::Stop => Self::Stop,
            OnNonFinite::Skip => Self::Skip,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_wins_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, "batch = 64\nlr_table = 0.5\nhidden = [8, 4]\n").unwrap();
        let flags = Options { config: Some(path), batch: Some(32), ..Options::default() };
        let merged = flags.with_file().unwrap();
        assert_eq!((merged.batch, merged.lr_table), (Some(32), Some(0.5)));
        assert_eq!(merged.hidden, Some(vec![8, 4]));
    }

    #[test]
    fn an_unknown_option_of_the_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, "batches = 64\n").unwrap();
        let error = Options { config: Some(path), ..Options::default() }.with_file().unwrap_err();
        assert!(format!("{error:#}").contains("batches"), "{error:#}");
    }
}
