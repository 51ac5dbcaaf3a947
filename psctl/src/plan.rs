//! What would move, what that costs, and how it comes along: shared by every command that moves shards.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead as _, IsTerminal as _};
use std::time::Duration;

use downpour_client::Coordinators;
use downpour_proto::v1;
use downpour_proto::v1::shard_placement::Placing;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::cli::Exit;
use crate::output::{self, Format, Row, bytes, count, table};

/// Between two looks at moves.
const LOOK: Duration = Duration::from_millis(200);
/// Between two lines of progress.
const TELL: Duration = Duration::from_secs(2);
/// What a copy is taken to go at where its server has no limit of its own.
const RATE_ASSUMED: u64 = 256 << 20;
/// Of a move besides its copy: it is begun, promoted and ended by commands that are committed one after the other.
const STEPS_S: f64 = 0.5;
/// That go on at once, by default.
const AT_ONCE: f64 = 4.0;
/// Placements that one request takes.
const REQUEST_MAX: usize = 1000;

/// What every command that moves shards takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Say what would move, how many bytes, how long it takes and why, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// How long to wait until it is done; it goes on by itself all the same
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    pub(crate) wait: Duration,
    /// Do not wait
    #[arg(long, conflicts_with = "wait")]
    pub(crate) no_wait: bool,
}

/// What is to be done.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// Of all copies, with what is logged meanwhile.
    pub(crate) bytes: u64,
    /// Expected.
    pub(crate) seconds: f64,
    /// Load by server, times the mean, where load is what the plan goes by.
    pub(crate) servers: Vec<Share>,
    #[serde(skip)]
    placements: Vec<v1::ShardPlacement>,
}

/// One shard's part.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    pub(crate) job: String,
    pub(crate) shard: u32,
    /// `move`: a copy goes elsewhere. `promote`: another member becomes the primary, nothing is copied. `undo`: a move ends.
    pub(crate) what: &'static str,
    pub(crate) from: String,
    pub(crate) to: String,
    /// Whether the primary goes, or a backup.
    pub(crate) primary: bool,
    /// Of the copy.
    pub(crate) bytes: u64,
    /// Of what is logged while it is copied, at the rate that is measured.
    pub(crate) log_bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) reason: String,
}

/// Load of a server.
#[derive(Debug, Serialize)]
pub(crate) struct Share {
    pub(crate) server: String,
    pub(crate) before: f64,
    pub(crate) after: f64,
}

impl Row for Step {
    const TITLES: &'static [&'static str] =
        &["JOB", ">SHARD", "WHAT", "FROM", "TO", "ROLE", ">BYTES", ">LOG", ">TIME", "REASON"];
    fn cells(&self) -> Vec<String> {
        vec![
            self.job.clone(),
            self.shard.to_string(),
            self.what.to_owned(),
            self.from.clone(),
            self.to.clone(),
            if self.primary { "primary" } else { "backup" }.to_owned(),
            bytes(self.bytes),
            bytes(self.log_bytes),
            format!("{:.1} s", self.seconds),
            self.reason.clone(),
        ]
    }
}

impl Plan {
    /// With what is known of the cluster. What names a job or shard that is not there is left out.
    pub(crate) fn new(
        cluster: &v1::GetClusterReply,
        placements: Vec<v1::ShardPlacement>,
        shares: &[v1::ServerShare],
    ) -> Self {
        let names: BTreeMap<u32, &str> =
            cluster.nodes.iter().map(|node| (node.node, node.name.as_str())).collect();
        let name = |server: Option<v1::ServerRef>| {
            let node = server.unwrap_or_default().node;
            names.get(&node).map_or_else(|| format!("node {node}"), ToString::to_string)
        };
        let mut busy: BTreeMap<u32, f64> = BTreeMap::new();
        let steps: Vec<Step> = placements
            .iter()
            .filter_map(|placement| {
                let status = job(cluster, placement.job)?;
                let view = status.view.as_ref()?;
                let route = view.shards.get(placement.shard as usize)?;
                let report = status.reports.iter().find(|report| report.shard == placement.shard);
                let report = report.copied().unwrap_or_default();
                let (what, from, to) = match placement.placing.as_ref()? {
                    Placing::Move(moving) => ("move", moving.from, moving.to),
                    Placing::Promote(to) => ("promote", route.primary, Some(*to)),
                    Placing::Cancel(_) => {
                        let moving = route.moving.unwrap_or_default();
                        ("undo", moving.from, moving.to)
                    }
                };
                let copies = what == "move";
                // The primary sends, whoever goes.
                let source = route.primary.unwrap_or_default();
                let copy_s = report.copy_bytes as f64 / rate(cluster, source) as f64;
                if copies {
                    *busy.entry(source.node).or_default() += copy_s;
                }
                Some(Step {
                    job: view.spec.as_ref()?.name.clone(),
                    shard: placement.shard,
                    what,
                    primary: route.primary == from,
                    from: name(from),
                    to: name(to),
                    bytes: if copies { report.copy_bytes } else { 0 },
                    log_bytes: if copies { (report.log_bytes_per_s * copy_s) as u64 } else { 0 },
                    seconds: STEPS_S + if copies { copy_s } else { 0.0 },
                    reason: placement.reason.clone(),
                })
            })
            .collect();
        let moved = steps.iter().filter(|step| step.what == "move").count() as f64;
        let sending = busy.values().copied().fold(0.0, f64::max);
        let servers = shares.iter().map(|share| Share {
            server: name(share.server),
            before: share.before,
            after: share.after,
        });
        Plan {
            bytes: steps.iter().map(|step| step.bytes + step.log_bytes).sum(),
            seconds: sending + STEPS_S * (moved / AT_ONCE).ceil().max(1.0),
            servers: servers.collect(),
            steps,
            placements,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// A plan that was asked for and not carried out.
    pub(crate) fn print(&self, format: Format) -> anyhow::Result<()> {
        match format {
            Format::Json => output::json(self),
            Format::Table => output::line(&self.text()),
        }
    }

    /// After it was carried out: people have read it before.
    pub(crate) fn tell(&self, format: Format) -> anyhow::Result<()> {
        match format {
            Format::Json => output::json(self),
            Format::Table => Ok(()),
        }
    }

    /// Before it is carried out.
    pub(crate) fn announce(&self) {
        eprintln!("{}", self.text());
    }

    pub(crate) fn text(&self) -> String {
        let steps = table(Step::TITLES, self.steps.iter().map(Row::cells));
        let moves = self.steps.iter().filter(|step| step.what == "move").count();
        let others = self.steps.len() - moves;
        let mut text = format!(
            "{steps}\n\n{moves} copies move ({}, about {:.0} s), {others} primaries change or moves end",
            bytes(self.bytes),
            self.seconds.ceil(),
        );
        if !self.servers.is_empty() {
            // The sum of nothing is -0, and adding 0 makes it 0.
            let share = |share: &Share| {
                vec![
                    share.server.clone(),
                    format!("{:.2}", share.before + 0.0),
                    format!("{:.2}", share.after + 0.0),
                ]
            };
            let titles = ["SERVER", ">LOAD NOW", ">LOAD THEN"];
            text += &format!("\n\n{}", table(&titles, self.servers.iter().map(share)));
        }
        text
    }

    /// Asks whether to go on, unless told not to.
    pub(crate) fn confirm(&self, options: &Options) -> anyhow::Result<()> {
        if options.yes { Ok(()) } else { ask("Go on?") }
    }

    /// Has the coordinators begin it, and waits until it is over.
    pub(crate) async fn carry_out(
        &self,
        coordinators: &Coordinators,
        options: &Options,
    ) -> anyhow::Result<()> {
        let mut problems = Vec::new();
        for some in self.placements.chunks(REQUEST_MAX) {
            problems.extend(coordinators.place_shards(some.to_vec()).await?);
        }
        let failed: Vec<_> = problems.iter().filter(|problem| !problem.is_empty()).collect();
        failed.iter().for_each(|problem| eprintln!("passed over: {problem}"));
        if !options.no_wait {
            let begun = self.steps.iter().zip(&problems).filter(|(_, problem)| problem.is_empty());
            wait(coordinators, begun.map(|(step, _)| step).collect(), options.wait).await?;
        }
        match failed.len() {
            0 => Ok(()),
            failed => Err(Exit::Condition(format!(
                "{failed} of {} were passed over: look again with --dry-run",
                self.steps.len()
            ))
            .into()),
        }
    }
}

/// Waits until none of these moves is under way, and says how they ended.
async fn wait(
    coordinators: &Coordinators,
    steps: Vec<&Step>,
    within: Duration,
) -> anyhow::Result<()> {
    let moves: Vec<_> = steps.into_iter().filter(|step| step.what != "promote").collect();
    let end = Instant::now() + within;
    let mut told = Instant::now();
    loop {
        let cluster: crate::model::Cluster = coordinators.cluster().await?.into();
        let find = |step: &Step| {
            let mut shards = cluster.shards.iter();
            shards.find(|shard| shard.job == step.job && shard.shard == step.shard)
        };
        let under_way = |step: &&&Step| find(step).is_some_and(|shard| shard.moving.is_some());
        let left = moves.iter().filter(under_way).count();
        if left == 0 {
            let undone = moves.iter().filter(|step| {
                let there = find(step).is_some_and(|shard| {
                    shard.in_sync.contains(&step.to) && !shard.in_sync.contains(&step.from)
                });
                step.what == "move" && !there
            });
            return match undone.count() {
                0 => {
                    eprintln!("done");
                    Ok(())
                }
                undone => Err(Exit::Condition(format!(
                    "{undone} of {} moves came to nothing: a server did not keep up or died; psctl events says more, and the move can be made again",
                    moves.len()
                ))
                .into()),
            };
        }
        if told.elapsed() >= TELL {
            told = Instant::now();
            eprintln!("{left} of {} moves are left", moves.len());
        }
        if Instant::now() >= end {
            return Err(Exit::Condition(format!(
                "{left} of {} moves are not done within {}; they go on: psctl shard list shows them",
                moves.len(),
                humantime::format_duration(within)
            ))
            .into());
        }
        sleep(LOOK).await;
    }
}

/// Waits until a server holds nothing.
pub(crate) async fn wait_drained(
    coordinators: &Coordinators,
    name: &str,
    within: Duration,
) -> anyhow::Result<()> {
    let end = Instant::now() + within;
    let mut told: Option<Instant> = None;
    let mut first = None;
    loop {
        let cluster: crate::model::Cluster = coordinators.cluster().await?.into();
        let held: Vec<_> = cluster
            .shards
            .iter()
            .filter(|shard| shard.in_sync.iter().any(|member| member == name))
            .collect();
        let copies = held.len() as u64;
        let most = *first.get_or_insert(copies);
        if held.is_empty() {
            eprintln!("{name} holds nothing");
            return Ok(());
        }
        let stuck = held.iter().filter(|shard| shard.moving.is_none());
        let stuck: BTreeSet<&str> = stuck.map(|shard| shard.job.as_str()).collect();
        if told.is_none_or(|told| told.elapsed() >= TELL) {
            told = Some(Instant::now());
            eprintln!("{} of {} copies are left on {name}", count(copies), count(most));
            if !stuck.is_empty() && Instant::now() + within > end + TELL {
                let jobs: Vec<_> = stuck.iter().copied().collect();
                eprintln!(
                    "shards of {} wait for a server that can take them: it must be open and hold none of their copies",
                    jobs.join(", ")
                );
            }
        }
        if Instant::now() >= end {
            return Err(Exit::Condition(format!(
                "{copies} copies are still on {name} after {}; the drain goes on: psctl node describe {name} shows it, psctl node uncordon {name} calls it off",
                humantime::format_duration(within)
            ))
            .into());
        }
        sleep(LOOK).await;
    }
}

/// Asks on the terminal.
pub(crate) fn ask(question: &str) -> anyhow::Result<()> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Exit::Usage("nobody can be asked here: pass --yes to go on".into()).into());
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    anyhow::ensure!(matches!(answer.trim(), "y" | "Y" | "yes"), "nothing was changed");
    Ok(())
}

fn job(cluster: &v1::GetClusterReply, job: u64) -> Option<&v1::JobStatus> {
    cluster.jobs.iter().find(|status| status.view.as_ref().is_some_and(|view| view.job == job))
}

/// Bytes a second that a server sends in copies.
fn rate(cluster: &v1::GetClusterReply, server: v1::ServerRef) -> u64 {
    let status = cluster.loads.iter().find(|status| status.server == Some(server));
    let rate = status.and_then(|status| status.load).map_or(0, |load| load.copy_bytes_per_s);
    if rate == 0 { RATE_ASSUMED } else { rate }
}
