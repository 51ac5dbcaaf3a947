//! `psctl scale`

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use downpour_client::Coordinators;
use downpour_core::id::NodeId;
use downpour_core::view::Admission;
use tokio::time::{Instant, sleep};

use crate::cli::{Connection, Exit};
use crate::output::{self, Change, Format};
use crate::plan::{self, Options, Plan};

mod local;
mod stateful_set;

use stateful_set::StatefulSet;

/// Between two looks at servers that come or go.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// So many parameter servers, of a `psctl local` or in a Kubernetes StatefulSet, while training goes on
    Ps(Args),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl scale ps 3 --dir /tmp/downpour-Xy                       of the `psctl local` that printed this directory
  psctl scale ps 3 --dir /tmp/downpour-Xy --yes -o json         in a script
  psctl scale ps 6 --dry-run                                    from a pod
  psctl scale ps 6 --namespace downpour --statefulset downpour-ps --yes
  psctl scale ps 4 --api-server http://127.0.0.1:8001 --yes     through kubectl proxy

A `psctl local`: more processes are started, with the settings of the others, and load is spread; or those with the highest numbers are drained,
ended and forgotten. The same command again goes on with one that was interrupted. --coordinators is not needed.

Kubernetes: more: the StatefulSet is told, its new servers are waited for, and load is spread. Fewer: the last servers are drained, then the StatefulSet is
told, and they are forgotten. Exit status: 0 done, 1 failed, 2 wrong usage, 3 not done within --wait.")]
pub(crate) struct Args {
    /// How many
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// Directory of a cluster that `psctl local` runs, as it prints it
    #[arg(long, value_name = "DIR", env = "DOWNPOUR_LOCAL", hide_env_values = true, conflicts_with_all = ["namespace", "api_server"])]
    dir: Option<PathBuf>,
    /// Of the StatefulSet; without it the namespace of this pod
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Its pods' names are the servers' names
    #[arg(long, value_name = "NAME", default_value = "downpour-ps")]
    statefulset: String,
    /// Of Kubernetes; without it the one that this pod's environment names. With http, which may go to loopback only, no token is sent
    #[arg(long, value_name = "URL")]
    api_server: Option<String>,
    /// Folder with `token`, `ca.crt` and `namespace`
    #[arg(
        long,
        value_name = "DIRECTORY",
        default_value = "/var/run/secrets/kubernetes.io/serviceaccount"
    )]
    service_account: PathBuf,
    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// How long each part may take: servers that come or go, copies that move
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    wait: Duration,
    #[command(flatten)]
    connection: Connection,
}

impl Command {
    pub(crate) async fn run(self, format: Format) -> anyhow::Result<()> {
        let Self::Ps(args) = self;
        if let Some(dir) = &args.dir {
            return local::run(dir, &args, format).await;
        }
        let set = StatefulSet::find(&args)?;
        let before = set.replicas().await?;
        let names = |ordinals: std::ops::Range<u32>| -> BTreeSet<String> {
            ordinals.map(|ordinal| format!("{}-{ordinal}", args.statefulset)).collect()
        };
        let leaving = names(args.count..before.max(args.count));
        if args.dry_run || !args.yes {
            let after = args.count;
            eprintln!("{}: {before} servers now, {after} then", args.statefulset);
            leaving.iter().for_each(|name| eprintln!("{name} would be drained and stopped"));
        }
        let change = Change {
            noun: "ps",
            name: args.statefulset.clone(),
            verb: "scale",
            changed: args.count != before,
            dry_run: args.dry_run,
        };
        if args.dry_run {
            return output::changed(format, &change);
        }
        if !args.yes {
            plan::ask("Go on?")?;
        }
        let coordinators = args.connection.coordinators()?;
        let leaving = drain(&coordinators, &leaving, args.wait).await?;
        if args.count != before {
            set.set_replicas(args.count).await?;
        }
        forget(&coordinators, leaving, args.wait).await?;
        let staying = names(0..args.count);
        until_alive(&coordinators, &staying, args.wait).await?;
        eprintln!("{} servers are there", staying.len());
        if args.count > before {
            spread(&coordinators, args.wait).await?;
        }
        output::changed(format, &change)
    }
}

/// Empties those that the cluster knows, and says which those are.
async fn drain(
    coordinators: &Coordinators,
    names: &BTreeSet<String>,
    wait: Duration,
) -> anyhow::Result<Vec<NodeId>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let cluster = coordinators.cluster().await?;
    let known: Vec<_> = cluster.nodes.iter().filter(|node| names.contains(&node.name)).collect();
    // All of them first, so that none is given what another one loses.
    for node in &known {
        coordinators.admit_node(NodeId(node.node), Admission::Draining).await?;
    }
    for node in &known {
        plan::wait_drained(coordinators, &node.name, wait).await?;
    }
    Ok(known.iter().map(|node| NodeId(node.node)).collect())
}

/// As soon as they are known to be gone.
async fn forget(
    coordinators: &Coordinators,
    nodes: Vec<NodeId>,
    wait: Duration,
) -> anyhow::Result<()> {
    let end = Instant::now() + wait;
    for node in nodes {
        loop {
            let alive = coordinators.cluster().await?.nodes;
            match alive.iter().find(|one| one.node == node.0) {
                Some(one) if one.alive && Instant::now() < end => sleep(LOOK).await,
                Some(one) if one.alive => {
                    let within = humantime::format_duration(wait);
                    let name = &one.name;
                    return Err(Exit::Condition(format!(
                        "{name} is empty, and still there after {within}"
                    ))
                    .into());
                }
                Some(_) => break coordinators.remove_node(node).await?,
                None => break,
            }
        }
    }
    Ok(())
}

async fn until_alive(
    coordinators: &Coordinators,
    names: &BTreeSet<String>,
    wait: Duration,
) -> anyhow::Result<()> {
    let end = Instant::now() + wait;
    loop {
        let cluster = coordinators.cluster().await?;
        let alive = cluster.nodes.iter().filter(|node| node.alive).map(|node| &node.name);
        let alive: BTreeSet<&String> = alive.collect();
        let missing: Vec<&str> =
            names.iter().filter(|name| !alive.contains(name)).map(String::as_str).collect();
        if missing.is_empty() {
            return Ok(());
        }
        if Instant::now() >= end {
            let within = humantime::format_duration(wait);
            let missing = missing.join(", ");
            return Err(Exit::Condition(format!(
                "{missing} did not register within {within}: kubectl describe pod says why"
            ))
            .into());
        }
        sleep(LOOK).await;
    }
}

async fn spread(coordinators: &Coordinators, wait: Duration) -> anyhow::Result<()> {
    let planned = coordinators.plan_placement(None).await?;
    let cluster = coordinators.cluster().await.context("look at the cluster")?;
    let plan = Plan::new(&cluster, planned.placements, &planned.shares);
    if plan.is_empty() {
        return Ok(());
    }
    plan.announce();
    let options = Options { dry_run: false, yes: true, wait, no_wait: false };
    plan.carry_out(coordinators, &options).await
}
