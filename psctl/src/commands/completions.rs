//! `psctl completions`

use std::io;

use clap::CommandFactory as _;
use clap_complete::Shell;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  psctl completions bash > ~/.local/share/bash-completion/completions/psctl")]
pub(crate) struct Args {
    /// Whose syntax
    shell: Shell,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    clap_complete::generate(
        args.shell,
        &mut crate::cli::Cli::command(),
        "psctl",
        &mut io::stdout(),
    );
    Ok(())
}
