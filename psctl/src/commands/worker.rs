//! `psctl worker`

use crate::output::Format;

mod list;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Open sessions and how far they are
    List(list::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        let Self::List(args) = self;
        list::run(args, format).await
    }
}
