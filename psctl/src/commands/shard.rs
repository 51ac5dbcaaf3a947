//! `psctl shard`

use crate::output::Format;

mod describe;
mod list;
mod place;
mod rebalance;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All shards, or those of one job
    List(list::Args),
    /// One shard
    Describe(describe::Args),
    /// Bring a copy of a shard to another server, or make another member its primary
    Move(place::Args),
    /// Spread shards and primaries by what servers have to do
    Rebalance(rebalance::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List(args) => list::run(args, format).await,
            Self::Describe(args) => describe::run(args, format).await,
            Self::Move(args) => place::run(args, format).await,
            Self::Rebalance(args) => rebalance::run(args, format).await,
        }
    }
}
