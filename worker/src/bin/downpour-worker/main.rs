//! Trains and evaluates ready-made models on a cluster: a schema file, data files and flags, no code.

mod click;
mod click_data;
mod counted;
mod evaluate;
mod optimizers;
mod options;
mod setup;
mod train;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use options::Options;

#[derive(Parser)]
#[command(
    name = "downpour-worker",
    version,
    about = "Trains and evaluates models on a Downpour cluster",
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model
    #[command(after_help = "Examples:
  downpour-worker train --coordinators 127.0.0.1:7070 --job ctr --model deepfm --schema ctr.toml \\
      --train 'data/train/*.parquet' --epochs 2 --out runs/ctr
  downpour-worker train --config ctr.toml --lr-dense 0.0005

Exit status: 0 done, 1 failed, 2 wrong usage, 76 an operator evicted this worker (psctl worker evict), 143 told to stop twice;
what --stopped-status says where a signal ended it.")]
    Train {
        #[command(flatten)]
        options: Box<Options>,
    },
    /// Measure a trained model on data; changes nothing
    Evaluate {
        /// The data to measure on
        #[arg(long, value_name = "FILE", num_args = 1..)]
        data: Vec<String>,
        /// Also write the report to this file
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
        /// Write what the model gives for each row to this file instead, a line each in the order of the data (logits; for `mf-bpr` the product of user and item)
        #[arg(long, value_name = "FILE", conflicts_with = "report")]
        scores: Option<PathBuf>,
        #[command(flatten)]
        options: Box<Options>,
    },
    /// One worker of `psctl bench train`
    #[command(hide = true)]
    BenchClick {
        #[command(flatten)]
        options: click::Options,
    },
    /// One worker of `cargo xtask chaos --scenario workers`
    #[command(hide = true)]
    CountClicks {
        #[command(flatten)]
        options: counted::Options,
    },
    /// List the models
    Models,
}

fn main() -> ExitCode {
    downpour::keep_memory();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let mut stopped = ExitCode::SUCCESS;
    let outcome = match Cli::parse().command {
        Command::Train { options } => options.with_file().and_then(|options| {
            stopped = options.stopped_status.map_or(stopped, ExitCode::from);
            train::run(&options)
        }),
        Command::Evaluate { data, report, scores, options } => {
            options.with_file().and_then(|options| {
                evaluate::run(&options, &data, report.as_deref(), scores.as_deref())
            })
        }
        Command::BenchClick { options } => click::run(&options),
        Command::CountClicks { options } => counted::run(&options),
        Command::Models => models(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if was_stopped(&error) => stopped,
        Err(error) => {
            _ = writeln!(std::io::stderr(), "error: {error:#}");
            if was_evicted(&error) { ExitCode::from(EXIT_EVICTED) } else { ExitCode::FAILURE }
        }
    }
}

/// An operator closed this worker's session.
const EXIT_EVICTED: u8 = 76;

fn was_evicted(error: &anyhow::Error) -> bool {
    use downpour::Error::Cluster;
    let evicted =
        |error: &downpour::Error| matches!(error, Cluster(downpour_client::Error::Evicted(_)));
    error.downcast_ref().is_some_and(evicted)
}

fn was_stopped(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(downpour::Error::Stopped))
}

fn models() -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for (_, name, about) in downpour::models::Kind::ALL {
        writeln!(out, "{name:<10} {about}")?;
    }
    Ok(())
}
