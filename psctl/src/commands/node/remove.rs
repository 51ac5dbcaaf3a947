//! `psctl node remove`

use crate::cli::Connection;
use crate::output::Format;
use crate::plan;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl node drain ps-1 --yes && kill $PID && psctl node remove ps-1 --yes
  psctl node remove ps-1 --dry-run    whether it could be

A server that holds shards is refused: drain it first. One that lives is refused: stop its process, and it is judged dead soon.
Exit status: 0 done, 1 refused or failed, 2 wrong usage.")]
pub(crate) struct Args {
    /// Name of the server
    name: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Say whether it could be removed, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let coordinators = args.connection.coordinators()?;
    let cluster = args.connection.cluster().await?;
    let id = super::find(&cluster, &args.name)?;
    if args.dry_run {
        let held = cluster.shards.iter().filter(|shard| shard.in_sync.contains(&args.name)).count();
        let alive = cluster.nodes.iter().any(|node| node.name == args.name && node.alive);
        anyhow::ensure!(held == 0, "{} holds {held} shards: drain it first", args.name);
        anyhow::ensure!(!alive, "{} is alive: stop its process first", args.name);
        eprintln!("{} would be removed", args.name);
        return super::changed(format, args.name, "remove", true);
    }
    if !args.yes {
        plan::ask(&format!("Forget {}?", args.name))?;
    }
    coordinators.remove_node(id).await?;
    eprintln!("removed");
    super::changed(format, args.name, "remove", false)
}
