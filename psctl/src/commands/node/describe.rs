//! `psctl node describe`

use anyhow::Context as _;
use serde::Serialize;

use crate::cli::Connection;
use crate::model::{Node, Shard};
use crate::output::{self, Format, Row, bytes, table};

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
    /// Of all copies, also those of which it is no primary: what --capacity-bytes bounds.
    held_bytes: u64,
    /// Those of which it is an in-sync member.
    shards: Vec<Shard>,
}

/// 0: there is no bound.
fn within(used: u64, bound: u64) -> String {
    match bound {
        0 => format!("{} (no bound)", bytes(used)),
        bound => format!("{} of {}", bytes(used), bytes(bound)),
    }
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let cluster = args.connection.cluster().await?;
    let node = cluster.nodes.iter().find(|node| node.name == args.name);
    let node = node.with_context(|| format!("there is no node {:?}", args.name))?;
    let held = cluster.shards.iter().filter(|shard| shard.in_sync.contains(&node.name));
    let shards: Vec<Shard> = held.cloned().collect();
    let held_bytes = shards.iter().map(|shard| shard.bytes).sum();
    let description = Description { node, held_bytes, shards };
    match format {
        Format::Json => output::json(&description),
        Format::Table => {
            let head = table(Node::TITLES, std::iter::once(node.cells()));
            let shards = table(Shard::TITLES, description.shards.iter().map(Row::cells));
            let memory = within(node.load.memory_bytes, node.load.memory_limit);
            let copies = within(held_bytes, node.load.capacity_bytes);
            output::line(&format!("{head}\n\nMemory {memory}, copies {copies}\n\n{shards}"))
        }
    }
}
