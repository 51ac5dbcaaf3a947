//! `psctl worker`

use crate::output::Format;

mod evict;
mod list;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Open sessions and how far they are
    List(list::Args),
    /// Close a worker's session for good
    Evict(evict::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List(args) => list::run(args, format).await,
            Self::Evict(args) => evict::run(args, format).await,
        }
    }
}
