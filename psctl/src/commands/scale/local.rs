//! `psctl scale ps --dir`: changes how many servers a `psctl local` runs.
//!
//! Follow one change: [`Ask`] connects to the owner of the processes, which shuts others out; [`Change`] says what is to be done;
//! [`shrink`] drains servers and then has their processes ended, [`grow`] has processes started and then spreads the load. What was left
//! half done by one that was interrupted is taken up by the next, or taken back.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use downpour_client::Coordinators;
use downpour_core::id::NodeId;
use downpour_core::view::Admission;
use downpour_psctl::local::control::Ask;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::Args;
use crate::cli::Exit;
use crate::model::{Cluster, Node};
use crate::output::{self, Format, bytes};
use crate::plan::{self, Options, Plan};

/// Between two looks at the cluster.
const LOOK: Duration = Duration::from_millis(200);
/// Beyond what a process may take to start and to end, which the owner sees to.
const ANSWER: Duration = Duration::from_secs(120);
/// For a process that is ready to be a member, and for one that has ended to be judged dead.
const JUDGED: Duration = Duration::from_secs(60);

/// As many as `psctl local` itself takes.
const SERVERS_MAX: u32 = 64;

/// What is to be done.
#[derive(Debug, Serialize)]
struct Change {
    servers: usize,
    wanted: usize,
    /// So many processes are started.
    start: usize,
    /// In this order.
    drain: Vec<Drain>,
    /// They stay, and the drain of an earlier command is called off.
    reopen: Vec<String>,
    /// They ended at an earlier command.
    forget: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Drain {
    server: String,
    #[serde(flatten)]
    plan: Plan,
}

/// What was done.
#[derive(Debug, Default, Serialize)]
struct Scaled {
    before: usize,
    after: usize,
    started: Vec<String>,
    stopped: Vec<String>,
    /// Copies and primaries that went elsewhere, as planned.
    moves: usize,
    /// Of these copies, as planned.
    bytes: u64,
}

pub(super) async fn run(dir: &Path, args: &Args, format: Format) -> anyhow::Result<()> {
    if args.count > SERVERS_MAX {
        return Err(Exit::Usage(format!("one machine runs at most {SERVERS_MAX} servers")).into());
    }
    // Nothing else goes on here, so that these calls may block.
    let mut owner = Ask::connect(dir, ANSWER)?;
    let shown = owner.show()?;
    let coordinators = Coordinators::parse(&shown.coordinators)
        .with_context(|| format!("the coordinators of {}", dir.display()))?
        .with_deadline(args.connection.timeout);
    let mut servers: Vec<String> = shown.servers.into_iter().map(|server| server.name).collect();
    servers.sort_by_key(|name| number(name));
    let change = Change::new(&coordinators, &servers, args.count as usize).await?;
    if args.dry_run {
        return change.print(format);
    }
    if change.is_empty() {
        eprintln!("nothing to do: {} servers run", servers.len());
    } else {
        eprintln!("{}", change.text());
        if !args.yes {
            plan::ask("Go on?")?;
        }
    }
    let mut scaled = Scaled { before: servers.len(), ..Scaled::default() };
    for name in &change.reopen {
        let node = find(&cluster(&coordinators).await?, name)?.node;
        coordinators.admit_node(NodeId(node), Admission::Open).await?;
        eprintln!("{name} stays");
    }
    shrink(&coordinators, &mut owner, &change, args.wait, &mut scaled).await?;
    if change.start > 0 {
        grow(&coordinators, &mut owner, change.start, args.wait, &mut scaled).await?;
    }
    scaled.after = owner.show()?.servers.len();
    output::properties(format, &scaled, |scaled| {
        vec![
            ("Servers", format!("{} (before: {})", scaled.after, scaled.before)),
            ("Started", scaled.started.join(", ")),
            ("Stopped", scaled.stopped.join(", ")),
            ("Moves", format!("{} ({})", scaled.moves, bytes(scaled.bytes))),
        ]
    })
}

impl Change {
    /// `servers`: of the owner, by number. Changes nothing.
    async fn new(
        coordinators: &Coordinators,
        servers: &[String],
        wanted: usize,
    ) -> anyhow::Result<Self> {
        let status = coordinators.cluster().await?;
        let cluster: Cluster = status.clone().into();
        let (stay, go) = servers.split_at(wanted.min(servers.len()));
        has_room(&cluster, go)?;
        let mut drain = Vec::new();
        // The highest first: what is left is numbered from 0 at any time.
        for server in go.iter().rev() {
            let planned = coordinators.plan_drain(NodeId(find(&cluster, server)?.node)).await?;
            let plan = Plan::new(&status, planned.placements, &[]);
            drain.push(Drain { server: server.clone(), plan });
        }
        let left = |node: &&Node| {
            !servers.contains(&node.name) && number(&node.name).is_some() && is_left(&cluster, node)
        };
        let named = |nodes: Vec<&Node>| nodes.into_iter().map(|node| node.name.clone()).collect();
        let nodes = || cluster.nodes.iter();
        let draining = |node: &&Node| node.admission == "draining" && stay.contains(&node.name);
        for node in nodes().filter(|node| node.admission == "cordoned" && stay.contains(&node.name))
        {
            eprintln!("{0} is given no copies: psctl node uncordon {0} changes that", node.name);
        }
        Ok(Self {
            servers: servers.len(),
            wanted,
            start: wanted.saturating_sub(servers.len()),
            drain,
            reopen: named(nodes().filter(draining).collect()),
            forget: named(nodes().filter(left).collect()),
        })
    }

    fn is_empty(&self) -> bool {
        self.start == 0 && self.drain.is_empty() && self.reopen.is_empty() && self.forget.is_empty()
    }

    fn print(&self, format: Format) -> anyhow::Result<()> {
        match format {
            Format::Json => output::json(self),
            Format::Table => output::line(&self.text()),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{} servers run, {} are wanted", self.servers, self.wanted);
        if self.start > 0 {
            text += &format!(
                "\n{} are started; then shards and primaries are spread over all that are open, by what is measured then",
                self.start
            );
        }
        for Drain { server, plan } in &self.drain {
            text += &match plan.is_empty() {
                true => format!("\n\n{server} holds nothing, is ended and forgotten"),
                false => format!("\n\n{server} is drained, ended and forgotten:\n{}", plan.text()),
            };
        }
        if self.drain.len() > 1 {
            text += "\nNothing goes to a server that is to be drained: where this says so it goes to another.";
        }
        for name in &self.reopen {
            text += &format!("\n{name} stays: its drain is called off");
        }
        for name in &self.forget {
            text += &format!("\n{name} has ended and is forgotten");
        }
        text
    }
}

/// Drains, ends and forgets.
async fn shrink(
    coordinators: &Coordinators,
    owner: &mut Ask,
    change: &Change,
    wait: Duration,
    scaled: &mut Scaled,
) -> anyhow::Result<()> {
    // All before the first drain: what one of them holds must not go to another.
    let known = cluster(coordinators).await?;
    for Drain { server, .. } in &change.drain {
        let node = find(&known, server)?;
        if node.admission == "open" {
            coordinators.admit_node(NodeId(node.node), Admission::Cordoned).await?;
        }
    }
    for Drain { server, plan } in &change.drain {
        let node = NodeId(find(&known, server)?.node);
        coordinators.admit_node(node, Admission::Draining).await?;
        plan::wait_drained(coordinators, server, wait).await?;
        scaled.moves += plan.steps.len();
        scaled.bytes += plan.bytes;
        owner.stop(server)?;
        scaled.stopped.push(server.clone());
        forget(coordinators, server).await?;
        eprintln!("{server} has ended and is forgotten");
    }
    for server in &change.forget {
        forget(coordinators, server).await?;
    }
    Ok(())
}

/// Starts, and spreads.
async fn grow(
    coordinators: &Coordinators,
    owner: &mut Ask,
    count: usize,
    wait: Duration,
    scaled: &mut Scaled,
) -> anyhow::Result<()> {
    for _ in 0..count {
        let server = owner.start()?.name;
        eprintln!("{server} is started");
        let node = registered(coordinators, &server).await?;
        // One of this name may have been on its way out.
        coordinators.admit_node(node, Admission::Open).await?;
        scaled.started.push(server);
    }
    let planned = coordinators.plan_placement(None).await?;
    let plan = Plan::new(&coordinators.cluster().await?, planned.placements, &planned.shares);
    if plan.is_empty() {
        eprintln!("nothing moves: no server has much more than the others");
        return Ok(());
    }
    plan.announce();
    (scaled.moves, scaled.bytes) = (plan.steps.len(), plan.bytes);
    let options = Options { dry_run: false, yes: true, wait, no_wait: false };
    plan.carry_out(coordinators, &options).await
}

/// Refuses what could never be done: each copy on a server that goes needs one that stays and has none of the shard.
fn has_room(cluster: &Cluster, go: &[String]) -> anyhow::Result<()> {
    let stays = |node: &&Node| {
        // A drain that is called off leaves a server open.
        node.alive && node.admission != "cordoned" && !go.contains(&node.name)
    };
    let stay: Vec<&str> =
        cluster.nodes.iter().filter(stays).map(|node| node.name.as_str()).collect();
    for shard in &cluster.shards {
        let copies = shard.in_sync.iter().filter(|member| go.contains(member)).count();
        let free = stay.iter().filter(|name| !shard.in_sync.iter().any(|one| one == *name)).count();
        if copies > free {
            return Err(Exit::Usage(format!(
                "job {} keeps {} copies of each shard, each on another server: {} open servers would be left, too few",
                shard.job,
                shard.in_sync.len(),
                stay.len()
            ))
            .into());
        }
    }
    Ok(())
}

/// Waits until a server that has started is a member.
async fn registered(coordinators: &Coordinators, name: &str) -> anyhow::Result<NodeId> {
    let end = Instant::now() + JUDGED;
    loop {
        let cluster = cluster(coordinators).await?;
        if let Some(node) = cluster.nodes.iter().find(|node| node.name == name && node.alive) {
            return Ok(NodeId(node.node));
        }
        anyhow::ensure!(
            Instant::now() < end,
            "{name} runs, and is not known to the coordinators: its log in the cluster's directory says why"
        );
        sleep(LOOK).await;
    }
}

/// Waits until a server that has ended is judged dead, and removes it.
async fn forget(coordinators: &Coordinators, name: &str) -> anyhow::Result<()> {
    let end = Instant::now() + JUDGED;
    loop {
        let cluster = cluster(coordinators).await?;
        let Some(node) = cluster.nodes.iter().find(|node| node.name == name) else { return Ok(()) };
        let removed = match is_left(&cluster, node) {
            true => coordinators.remove_node(NodeId(node.node)).await.map_err(Into::into),
            false => Err(anyhow::anyhow!("it is not judged dead yet")),
        };
        match removed {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= end => {
                return Err(error.context(format!(
                    "{name} has ended and is not forgotten: psctl node remove {name}"
                )));
            }
            Err(_) => sleep(LOOK).await,
        }
    }
}

/// Whether a server is gone and holds nothing.
fn is_left(cluster: &Cluster, node: &Node) -> bool {
    !node.alive && !cluster.shards.iter().any(|shard| shard.in_sync.contains(&node.name))
}

fn find<'a>(cluster: &'a Cluster, name: &str) -> anyhow::Result<&'a Node> {
    let node = cluster.nodes.iter().find(|node| node.name == name);
    node.with_context(|| {
        format!(
            "{name} runs, and the coordinators do not know it: psctl node list shows whom they do"
        )
    })
}

async fn cluster(coordinators: &Coordinators) -> anyhow::Result<Cluster> {
    Ok(coordinators.cluster().await?.into())
}

/// Of a server that `psctl local` names.
fn number(name: &str) -> Option<usize> {
    name.strip_prefix("ps-")?.parse().ok()
}
