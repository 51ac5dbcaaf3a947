//! `psctl node describe`

use anyhow::Context as _;
use serde::Serialize;

use crate::cli::Connection;
use crate::model::{Node, Shard};
use crate::output::{self, Format, Row, table};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  psctl node describe ps-0")]
pub(crate) struct Args {
    /// Name of the server
    name: String,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Serialize)]
struct Description<'a> {
    #[serde(flatten)]
    node: &'a Node,
    /// Those of which it is an in-sync member.
    shards: Vec<Shard>,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let cluster = args.connection.cluster().await?;
    let node = cluster.nodes.iter().find(|node| node.name == args.name);
    let node = node.with_context(|| format!("there is no node {:?}", args.name))?;
    let shards =
        cluster.shards.iter().filter(|shard| shard.in_sync.contains(&node.name)).cloned().collect();
    let description = Description { node, shards };
    match format {
        Format::Json => output::json(&description),
        Format::Table => {
            let head = table(Node::TITLES, std::iter::once(node.cells()));
            let shards = table(Shard::TITLES, description.shards.iter().map(Row::cells));
            output::line(&format!("{head}\n\n{shards}"))
        }
    }
}
