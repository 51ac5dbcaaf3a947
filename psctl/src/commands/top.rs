//! `psctl top`

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

use crate::cli::{Connection, Exit};
use crate::model::{Cluster, Load, Node, Shard, Staleness, Worker, total};
use crate::output::{self, Format, Row, bytes, count, table};

/// Lines of a terminal that does not say how many it has.
const LINES: u16 = 24;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl top
  psctl top --every 5s --shards 20
  psctl top --once                              one look, without clearing the screen
  psctl top --once -o json | jq '.servers[].push_p99_s'
  psctl top -o json                             an object a line, for as long as it is let

Servers report every 2 seconds, and rates are smoothed over some reports. Latency is of a server, from the arrival of a request to its reply. STALE says how far a shard goes on between the pull and the push of a gradient, in steps of the furthest worker and in records of its log, the mean of the last seconds. Ctrl-C ends it.
Exit status: 0 ended by a signal or --once, 1 failed, 2 wrong usage.")]
pub(crate) struct Args {
    /// Between two looks
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration)]
    every: Duration,
    /// Look once
    #[arg(long)]
    once: bool,
    /// Only shards and workers of this job
    #[arg(long, value_name = "NAME")]
    job: Option<String>,
    /// Of the hottest shards
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    shards: usize,
    #[command(flatten)]
    connection: Connection,
}

/// What is looked at.
#[derive(Debug, Serialize)]
struct Top {
    version: u64,
    /// Number of the coordinator that leads.
    leader: Option<u64>,
    /// That pushes and pulls name, over all servers.
    push_rows_per_s: f64,
    pull_rows_per_s: f64,
    pushed_bytes_per_s: f64,
    pulled_bytes_per_s: f64,
    samples_per_s: f64,
    /// The busiest first.
    servers: Vec<Server>,
    /// The hottest first.
    shards: Vec<Hot>,
    workers: Vec<Worker>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Server {
    name: String,
    alive: bool,
    primaries: u64,
    backups: u64,
    push_rows_per_s: f64,
    pull_rows_per_s: f64,
    /// Of all rows that are pushed or pulled, times the number of servers that live: 1 is an even share.
    load: f64,
    log_bytes_per_s: f64,
    #[serde(flatten)]
    process: Load,
}

#[derive(Debug, Serialize)]
struct Hot {
    job: String,
    shard: u32,
    primary: Option<String>,
    push_rows_per_s: f64,
    pull_rows_per_s: f64,
    /// Of the rows of all shards that are shown or not.
    share: f64,
    log_bytes_per_s: f64,
    rows: u64,
    bytes: u64,
    #[serde(flatten)]
    staleness: Staleness,
}

impl Top {
    fn new(cluster: Cluster, job: Option<&str>, shards: usize) -> Self {
        let problems = cluster.problems();
        let leader = cluster.coordinators.iter().find(|member| member.leader);
        let leader = leader.map(|member| member.id);
        let Cluster { version, nodes, shards: all, mut workers, .. } = cluster;
        let rows = |shard: &Shard| shard.rows_per_s + shard.pull_rows_per_s;
        let every: f64 = total(all.iter().map(rows));
        let sum = |of: fn(&Node) -> f64| total(nodes.iter().map(of));
        let alive = nodes.iter().filter(|node| node.alive).count();
        let (push_rows_per_s, pull_rows_per_s) =
            (sum(|node| node.rows_per_s), sum(|node| node.pull_rows_per_s));
        let (pushed_bytes_per_s, pulled_bytes_per_s) =
            (sum(|node| node.load.pushed_bytes_per_s), sum(|node| node.load.pulled_bytes_per_s));
        let share = |part: f64| if every > 0.0 { part / every } else { 0.0 };
        let mut servers: Vec<Server> = nodes
            .into_iter()
            .map(|node| Server {
                load: share(node.rows_per_s + node.pull_rows_per_s) * alive as f64,
                name: node.name,
                alive: node.alive,
                primaries: node.primaries,
                backups: node.backups,
                push_rows_per_s: node.rows_per_s,
                pull_rows_per_s: node.pull_rows_per_s,
                log_bytes_per_s: node.log_bytes_per_s,
                process: node.load,
            })
            .collect();
        servers.sort_by(|a, b| b.load.total_cmp(&a.load).then_with(|| a.name.cmp(&b.name)));
        let of_job = |name: &str| job.is_none_or(|job| job == name);
        let mut hot: Vec<Shard> = all.into_iter().filter(|shard| of_job(&shard.job)).collect();
        hot.sort_by(|a, b| {
            rows(b).total_cmp(&rows(a)).then_with(|| (&a.job, a.shard).cmp(&(&b.job, b.shard)))
        });
        hot.truncate(shards);
        workers.retain(|worker| of_job(&worker.job));
        let hot = hot.into_iter().map(|shard| Hot {
            share: share(rows(&shard)),
            job: shard.job,
            shard: shard.shard,
            primary: shard.primary,
            push_rows_per_s: shard.rows_per_s,
            pull_rows_per_s: shard.pull_rows_per_s,
            log_bytes_per_s: shard.log_bytes_per_s,
            rows: shard.rows,
            bytes: shard.bytes,
            staleness: shard.staleness,
        });
        Top {
            version,
            leader,
            push_rows_per_s,
            pull_rows_per_s,
            pushed_bytes_per_s,
            pulled_bytes_per_s,
            samples_per_s: total(workers.iter().map(|worker| worker.samples_per_s)),
            servers,
            shards: hot.collect(),
            workers,
            problems,
        }
    }

    fn text(&self) -> String {
        let leader = self
            .leader
            .map_or_else(|| "nobody leads".to_owned(), |id| format!("coordinator {id} leads"));
        let mut text = format!(
            "push {} rows/s, {}/s   pull {} rows/s, {}/s   {} samples/s   {leader}\n",
            count(self.push_rows_per_s as u64),
            bytes(self.pushed_bytes_per_s as u64),
            count(self.pull_rows_per_s as u64),
            bytes(self.pulled_bytes_per_s as u64),
            count(self.samples_per_s as u64),
        );
        for problem in &self.problems {
            text += &format!("! {problem}\n");
        }
        text += &format!("\n{}\n", rows(&self.servers));
        if !self.shards.is_empty() {
            text += &format!("\n{}\n", rows(&self.shards));
        }
        if !self.workers.is_empty() {
            text += &format!("\n{}\n", rows(&self.workers));
        }
        text
    }
}

fn rows<R: Row>(rows: &[R]) -> String {
    table(R::TITLES, rows.iter().map(Row::cells))
}

/// 1.2 ms.
fn latency(seconds: Option<f64>) -> String {
    match seconds {
        None => "-".to_owned(),
        Some(seconds) if seconds < 1e-3 => format!("{:.0} us", seconds * 1e6),
        Some(seconds) if seconds < 1.0 => format!("{:.1} ms", seconds * 1e3),
        Some(seconds) => format!("{seconds:.1} s"),
    }
}

impl Row for Server {
    const TITLES: &'static [&'static str] = &[
        "SERVER",
        "ALIVE",
        ">LED",
        ">BACKUPS",
        ">LOAD",
        ">PUSH ROWS/S",
        ">PULL ROWS/S",
        ">IN/S",
        ">OUT/S",
        ">LOG/S",
        ">PUSH P50",
        ">P99",
        ">PULL P50",
        ">P99",
        ">MEMORY",
    ];
    fn cells(&self) -> Vec<String> {
        let Load { memory_bytes, memory_limit, .. } = self.process;
        vec![
            self.name.clone(),
            if self.alive { "yes" } else { "no" }.to_owned(),
            self.primaries.to_string(),
            self.backups.to_string(),
            format!("{:.2}", self.load),
            count(self.push_rows_per_s as u64),
            count(self.pull_rows_per_s as u64),
            bytes(self.process.pushed_bytes_per_s as u64),
            bytes(self.process.pulled_bytes_per_s as u64),
            bytes(self.log_bytes_per_s as u64),
            latency(self.process.push_p50_s),
            latency(self.process.push_p99_s),
            latency(self.process.pull_p50_s),
            latency(self.process.pull_p99_s),
            match memory_limit {
                0 => bytes(memory_bytes),
                limit => format!("{} of {}", bytes(memory_bytes), bytes(limit)),
            },
        ]
    }
}

impl Row for Hot {
    const TITLES: &'static [&'static str] = &[
        "JOB",
        ">SHARD",
        "PRIMARY",
        ">PUSH ROWS/S",
        ">PULL ROWS/S",
        ">SHARE",
        ">LOG/S",
        ">ROWS",
        ">BYTES",
        ">STALE",
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.job.clone(),
            self.shard.to_string(),
            self.primary.clone().unwrap_or_else(|| "lost".to_owned()),
            count(self.push_rows_per_s as u64),
            count(self.pull_rows_per_s as u64),
            format!("{:.1} %", 100.0 * self.share),
            bytes(self.log_bytes_per_s as u64),
            count(self.rows),
            bytes(self.bytes),
            self.staleness.to_string(),
        ]
    }
}

pub(crate) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    if args.every.is_zero() {
        return Err(Exit::Usage("--every must be longer than nothing".into()).into());
    }
    let coordinators = args.connection.coordinators()?;
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut screen = None;
    let mut looks = tokio::time::interval(args.every);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let look = async {
            looks.tick().await;
            coordinators.cluster().await
        };
        let cluster = tokio::select! {
            cluster = look => cluster?,
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        };
        let top = Top::new(cluster.into(), args.job.as_deref(), args.shards);
        match format {
            Format::Json if args.once => output::json(&top)?,
            Format::Json => output::line(&serde_json::to_string(&top)?)?,
            Format::Table if args.once || !io::stdout().is_terminal() => output::line(&top.text())?,
            Format::Table => {
                let screen = match &mut screen {
                    Some(screen) => screen,
                    none => none.insert(Screen::open()?),
                };
                screen.show(&top.text())?;
            }
        }
        if args.once {
            return Ok(());
        }
    }
}

/// The terminal's other screen: what was there before comes back when this is dropped.
struct Screen;

impl Screen {
    fn open() -> anyhow::Result<Self> {
        let screen = Screen;
        // Without a cursor.
        screen.write("\x1b[?1049h\x1b[?25l")?;
        Ok(screen)
    }

    fn show(&mut self, text: &str) -> anyhow::Result<()> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
        let (lines, columns) = size.map_or((0, 0), |size| (size.ws_row, size.ws_col));
        let lines = if lines == 0 { LINES } else { lines };
        self.write(&frame(text, lines.into(), columns.into()))
    }

    fn write(&self, text: &str) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("write to stdout")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = self.write("\x1b[?25h\x1b[?1049l");
    }
}

/// What is drawn over the frame before: no more lines and columns than there are (0: as many as it takes), each cleared to its end.
fn frame(text: &str, lines: usize, columns: usize) -> String {
    let cut = |line: &str| match columns {
        0 => line.to_owned(),
        columns => line.chars().take(columns).collect(),
    };
    let shown: Vec<String> = text.lines().take(lines).map(cut).collect();
    format!("\x1b[H{}\x1b[K\x1b[J", shown.join("\x1b[K\r\n"))
}

#[cfg(test)]
mod tests {
    use downpour_proto::v1;

    use super::*;

    fn cluster() -> Cluster {
        let server = |node| v1::ServerRef { node, incarnation: 7 };
        let node = |number: u32, alive| v1::NodeView {
            name: format!("ps-{number}"),
            node: number,
            incarnation: 7,
            alive,
            ..v1::NodeView::default()
        };
        let route = |shard, primary| v1::ShardRoute {
            shard,
            primary: Some(server(primary)),
            in_sync: vec![server(primary)],
            ..v1::ShardRoute::default()
        };
        let report = |shard, rows_per_s| v1::ShardReport {
            shard,
            rows_per_s,
            pull_rows_per_s: 2.0 * rows_per_s,
            stale_clocks: Some(1.0),
            stale_records: Some(rows_per_s),
            ..v1::ShardReport::default()
        };
        let spec =
            v1::JobSpec { name: "ctr".into(), shards: 3, replicas: 1, ..v1::JobSpec::default() };
        let load = v1::NodeLoad {
            memory_bytes: 3 << 20,
            push_p99_s: Some(0.0012),
            pushed_bytes_per_s: 1e6,
            ..v1::NodeLoad::default()
        };
        v1::GetClusterReply {
            nodes: vec![node(1, true), node(2, true), node(3, false)],
            jobs: vec![v1::JobStatus {
                view: Some(v1::JobView {
                    job: 1,
                    spec: Some(spec),
                    shards: vec![route(0, 1), route(1, 2), route(2, 2)],
                    ..v1::JobView::default()
                }),
                reports: vec![report(0, 10.0), report(1, 60.0), report(2, 30.0)],
                ..v1::JobStatus::default()
            }],
            loads: vec![v1::NodeStatus { server: Some(server(2)), load: Some(load) }],
            ..v1::GetClusterReply::default()
        }
        .into()
    }

    #[test]
    fn the_busiest_come_first_with_their_shares_of_all_rows() {
        let top = Top::new(cluster(), None, 2);
        assert_eq!((top.push_rows_per_s, top.pull_rows_per_s), (100.0, 200.0));
        let loads: Vec<_> = top.servers.iter().map(|one| (one.name.as_str(), one.load)).collect();
        assert_eq!(loads, [("ps-2", 1.8), ("ps-1", 0.2), ("ps-3", 0.0)]);
        let hot: Vec<_> = top.shards.iter().map(|one| (one.shard, one.share)).collect();
        assert_eq!(hot, [(1, 0.6), (2, 0.3)]);
        let text = top.text();
        assert!(text.contains("1.2 ms") && text.contains("3.00 MiB"), "{text}");
        assert!(text.contains("1.0 clocks, 60.0 records"), "{text}");
        assert!(text.contains("! nobody") || text.contains("! no coordinator leads"), "{text}");
        let none = Top::new(cluster(), Some("another"), 2);
        assert!(none.shards.is_empty() && none.servers.len() == 3);
    }

    #[test]
    fn a_cluster_without_load_is_shown_with_zeros() {
        let top = Top::new(v1::GetClusterReply::default().into(), None, 10);
        assert_eq!((top.push_rows_per_s, top.servers.len()), (0.0, 0));
        assert!(top.text().starts_with("push 0 rows/s"));
    }

    #[test]
    fn a_frame_is_no_larger_than_the_terminal_and_leaves_nothing_of_the_one_before() {
        assert_eq!(frame("abc\nde\nf\n", 2, 2), "\x1b[Hab\x1b[K\r\nde\x1b[K\x1b[J");
        assert_eq!(frame("abc", 24, 0), "\x1b[Habc\x1b[K\x1b[J");
    }
}
