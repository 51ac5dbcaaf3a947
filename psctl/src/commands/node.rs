//! `psctl node`

use crate::output::Format;

mod describe;
mod list;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All servers
    List(list::Args),
    /// One server and its shards
    Describe(describe::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List(args) => list::run(args, format).await,
            Self::Describe(args) => describe::run(args, format).await,
        }
    }
}
