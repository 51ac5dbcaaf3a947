//! `psctl node`

use anyhow::Context as _;
use downpour_core::id::NodeId;

use crate::cli::Named;
use crate::model::Cluster;
use crate::output::{self, Change, Format};

mod cordon;
mod describe;
mod drain;
mod list;
mod remove;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All servers
    List(list::Args),
    /// One server and its shards
    Describe(describe::Args),
    /// Give a server no more copies
    #[command(after_help = cordon::CORDON_HELP)]
    Cordon(Named),
    /// Give a server copies again
    #[command(after_help = cordon::UNCORDON_HELP)]
    Uncordon(Named),
    /// Move everything away from a server, while training goes on
    Drain(drain::Args),
    /// Forget a server that is gone and holds nothing
    Remove(remove::Args),
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List(args) => list::run(args, format).await,
            Self::Describe(args) => describe::run(args, format).await,
            Self::Cordon(args) => cordon::run(args, true, format).await,
            Self::Uncordon(args) => cordon::run(args, false, format).await,
            Self::Drain(args) => drain::run(args, format).await,
            Self::Remove(args) => remove::run(args, format).await,
        }
    }
}

/// What was done, or would be, for scripts.
fn changed(format: Format, name: String, verb: &'static str, dry_run: bool) -> anyhow::Result<()> {
    output::changed(format, &Change { noun: "node", name, verb, changed: true, dry_run })
}

/// The server of this name.
fn find(cluster: &Cluster, name: &str) -> anyhow::Result<NodeId> {
    let node = cluster.nodes.iter().find(|node| node.name == name);
    let node =
        node.with_context(|| format!("there is no node {name:?}: psctl node list shows them"))?;
    Ok(NodeId(node.node))
}
