//! `psctl coordinator`

use crate::output::Format;

mod add;
mod list;
mod remove;
mod transfer_leader;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// The members of the group
    List(list::Args),
    /// Let another member in, while everything goes on
    Add(add::Args),
    /// Have a member leave for good
    Remove(remove::Args),
    /// Have another member lead
    TransferLeader(transfer_leader::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List(args) => list::run(args, format).await,
            Self::Add(args) => add::run(args, format).await,
            Self::Remove(args) => remove::run(args, format).await,
            Self::TransferLeader(args) => transfer_leader::run(args, format).await,
        }
    }
}
