//! `psctl completions`

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  psctl completions bash > ~/.local/share/bash-completion/completions/psctl")]
pub(crate) struct Args {
    /// Whose syntax
    shell: Shell,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    // Written at once: the generator panics where a reader has enough.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut crate::cli::Cli::command(), "psctl", &mut text);
    output::line(String::from_utf8_lossy(&text).trim_end())
}
