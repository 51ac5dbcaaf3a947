//! `psctl bench table`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;
use downpour_psctl::local::binary;

use crate::output::Format;

/// Measure the table of a server alone, without a network: lookups and updates for each core.
///
/// Becomes `downpour-ps bench-table`, so the options after `--` are those of that command.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl bench table
  psctl bench table -o json -- --rows 50000000 --dim 16
  psctl bench table -- --help                              its options")]
pub(crate) struct Args {
    /// Where the server's binary is; without it beside psctl
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// What `downpour-ps bench-table` takes
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

pub(super) fn run(args: &Args, format: Format) -> anyhow::Result<()> {
    let program = binary("downpour-ps", args.bin_dir.as_deref())?;
    let mut command = Command::new(&program);
    command.arg("bench-table").args(&args.options);
    if format == Format::Json {
        command.args(["-o", "json"]);
    }
    // Signals and the exit status are then its own.
    Err(command.exec()).with_context(|| format!("start {}", program.display()))
}
