//! `psctl bench`: how fast it is. What is measured, and how, is in `downpour_bench`; here are the clusters and the options.

use crate::output::Format;

mod all;
mod consistency;
mod dense;
mod floor;
mod place;
mod sparse;
mod table;
mod train;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Rows: dedup, pull, push, wait, one step after the other
    Sparse(sparse::Args),
    /// One large tensor: pull all, push all
    Dense(dense::Args),
    /// The table of a server alone, without a network
    Table(table::Args),
    /// A training of a click model by two workers
    Train(train::Args),
    /// Workers of different speed under each consistency mode
    Consistency(consistency::Args),
    /// Bare sockets and a flat array: the ceiling
    Floor(floor::Args),
    /// The standard workloads beside the floor, in turns
    All(all::Args),
    /// What the other commands start
    #[command(
        hide = true,
        after_help = "\
Speaks JSON over stdin and stdout.

Examples:
  psctl bench child < role.json"
    )]
    Child,
}

impl Command {
    pub(crate) fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::Sparse(args) => sparse::run(args, format),
            Self::Dense(args) => dense::run(&args, format),
            Self::Table(args) => table::run(&args, format),
            Self::Train(args) => train::run(&args, format),
            Self::Consistency(args) => consistency::run(&args, format),
            Self::Floor(args) => floor::run(&args, format),
            Self::All(args) => all::run(&args, format),
            Self::Child => match downpour_bench::child_main() {
                Ok(()) => Ok(()),
                // The parent has heard why.
                Err(_) => std::process::exit(1),
            },
        }
    }
}

/// What is printed is complete, and the exit status says that it is wrong.
fn require_correct(what: &str, check_err: f64, is_correct: bool) -> anyhow::Result<()> {
    anyhow::ensure!(is_correct, "{what}: values differ from what they must be by {check_err}");
    Ok(())
}
