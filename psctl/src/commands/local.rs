//! `psctl local`: a cluster on this machine, and a training on it.
//!
//! Follow one run: [`plan`] reads what the worker is to do; [`LocalCluster::start`] brings the servers up; [`train`] starts
//! the workers and shows their [`progress`] until all have ended; one more process evaluates; [`report`] prints.
//! Whatever ends it early (a crash, Ctrl-C) ends everything. Meanwhile `psctl scale ps` may ask for more or fewer servers ([`Control`]).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use downpour_client::Coordinators;
use downpour_psctl::local::control::Control;
use downpour_psctl::local::{Error, Interrupt, LocalCluster, Options, Process, stop_all};
use serde::Serialize;

use crate::output::{self, Format};

mod plan;
mod progress;
mod report;

use plan::Plan;
use progress::Progress;
use report::{Evaluation, Report};

/// How often processes and their progress are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// For the coordinators that are left to say who is of their group.
const SAY_WITHIN: Duration = Duration::from_secs(5);
/// How long a process may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
What follows `--` goes to `downpour-worker`; psctl adds where the cluster is, the worker's number
and its directory. A --test FILE among it is evaluated once, when all workers have ended.

Examples:
  psctl local -- train --model deepfm --schema s.toml --train t.parquet --test e.parquet
  psctl local --servers 4 --workers 4 --dir run1 -- train --config run.toml
  psctl local                      keep a cluster until Ctrl-C, and print where it is
  psctl local -o json > cluster.json

Another terminal changes the number of servers while it runs: psctl scale ps COUNT --dir DIR.")]
pub(crate) struct Args {
    /// Members of the coordinator group
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=5))]
    pub(crate) coordinators: u16,
    /// Parameter servers
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) servers: u16,
    /// Workers
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) workers: u16,
    /// Copies of each shard, the primary included
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=3))]
    pub(crate) replicas: u16,
    /// Directory for logs, metrics and data, which stays; must be empty or absent. Without it a temporary one
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Keep the temporary directory at the end
    #[arg(long)]
    pub(crate) keep: bool,
    /// Where the binaries are; without it beside psctl
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Name of the data set in the report; without it the folder of the training data
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: Option<String>,
    /// How long a process may take to become ready
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub(crate) ready_within: Duration,
    /// What the workers do: `train` and its arguments
    #[arg(last = true, value_name = "train ARGS")]
    pub(crate) command: Vec<String>,
}

pub(crate) fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let plan = (!args.command.is_empty()).then(|| Plan::new(&args)).transpose()?;
    let started = Instant::now();
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    let options = Options {
        coordinators: args.coordinators.into(),
        servers: args.servers.into(),
        bin_dir: args.bin_dir.clone(),
        dir: args.dir.clone(),
        ready_within: args.ready_within,
        interrupt: interrupt.clone(),
        ..Options::default()
    };
    eprintln!("starting {} coordinators and {} servers", args.coordinators, args.servers);
    let mut cluster = LocalCluster::start(options)?;
    let mut control = Control::open(&cluster, args.ready_within)?;
    let ended = match &plan {
        Some(plan) => work(&mut cluster, &mut control, plan, started, &interrupt, format),
        None => idle(&mut cluster, &mut control, &interrupt, format),
    };
    // From now on nothing more is started.
    drop(control);
    // Who interrupts has seen enough; who meets an error needs the logs.
    let failed = ended
        .as_ref()
        .is_err_and(|error| !matches!(error.downcast_ref(), Some(Error::Interrupted)));
    if args.keep || args.dir.is_some() || failed {
        cluster.keep_dir();
        eprintln!("logs and metrics are in {}", cluster.dir().display());
    }
    for error in cluster.stop(STOP_DEADLINE) {
        eprintln!("psctl: {error}");
    }
    ended
}

/// Trains, evaluates, reports.
fn work(
    cluster: &mut LocalCluster,
    control: &mut Control,
    plan: &Plan,
    started: Instant,
    interrupt: &Interrupt,
    format: Format,
) -> anyhow::Result<()> {
    eprintln!("the cluster is in {}", cluster.dir().display());
    let trained = train(cluster, control, plan, interrupt)?;
    let evaluation = plan.evaluation.as_ref();
    let evaluation =
        evaluation.map(|args| evaluate(cluster, control, args, interrupt)).transpose()?;
    report::print(
        format,
        &Report::new(plan, cluster.servers.len(), &trained, evaluation, started.elapsed()),
    )
}

/// What a training cost.
struct Trained {
    samples: u64,
    wall: Duration,
    /// Of all processes.
    cpu: Duration,
}

fn train(
    cluster: &mut LocalCluster,
    control: &mut Control,
    plan: &Plan,
    interrupt: &Interrupt,
) -> anyhow::Result<Trained> {
    let started = Instant::now();
    let cpu_before = cluster.cpu();
    let mut workers = Vec::new();
    let mut progress = Progress::new();
    for index in 0..plan.workers {
        let out = cluster.subdir(&format!("workers/{index}"))?;
        let args = plan.worker_args(&cluster.coordinator_addresses(), index, &out);
        let name = format!("worker-{index}");
        let worker = cluster.run(&name, plan::BINARY, args)?;
        progress.add(&name, out.join("metrics.jsonl"), worker.log().to_owned());
        workers.push(worker);
    }
    let ended = watch(cluster, control, &mut workers, interrupt, |_| progress.show());
    progress.finish();
    if let Err(error) = ended {
        // Workers go first: without servers they would only wait.
        for late in stop_all(workers.iter_mut(), STOP_DEADLINE) {
            eprintln!("psctl: {late}");
        }
        return Err(error.into());
    }
    let cpu = cluster.cpu() - cpu_before + workers.iter().map(Process::cpu).sum::<Duration>();
    Ok(Trained { samples: progress.samples(), wall: started.elapsed(), cpu })
}

fn evaluate(
    cluster: &mut LocalCluster,
    control: &mut Control,
    args: &[String],
    interrupt: &Interrupt,
) -> anyhow::Result<Evaluation> {
    eprintln!("evaluating");
    let path = cluster.dir().join("report.json");
    let args = plan::evaluate_args(args, &cluster.coordinator_addresses(), &path);
    let mut process = [cluster.run("evaluate", plan::BINARY, args)?];
    watch(cluster, control, &mut process, interrupt, |_| ())?;
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))
}

/// Until every one of `processes` has ended with status 0; an error as soon as one of them, or of the cluster, has not.
fn watch(
    cluster: &mut LocalCluster,
    control: &mut Control,
    processes: &mut [Process],
    interrupt: &Interrupt,
    mut look: impl FnMut(&[Process]),
) -> Result<(), Error> {
    while !processes.is_empty() {
        look_after(cluster, control)?;
        processes.iter_mut().try_for_each(Process::check)?;
        look(processes);
        if !processes.iter().any(Process::is_running) {
            break;
        }
        if interrupt.is_set() {
            return Err(Error::Interrupted);
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// What other psctls have asked for, of this one or of the coordinators; an error if a process has ended that nobody told to.
fn look_after(cluster: &mut LocalCluster, control: &mut Control) -> Result<(), Error> {
    control.serve(cluster).iter().for_each(|done| eprintln!("{done}"));
    for name in cluster.forget_removed(is_member)? {
        eprintln!("{name} was removed, and has ended");
    }
    cluster.check()
}

/// Whether the coordinators at `others` have the one at `address` in their group. Where they do not say so, it is one that they miss.
fn is_member(others: &str, address: &str) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return true;
    };
    let cluster = runtime
        .block_on(async { Coordinators::parse(others)?.with_deadline(SAY_WITHIN).cluster().await });
    cluster.map_or(true, |cluster| cluster.members.iter().any(|member| member.address == address))
}

/// Where an idle cluster is: what `-o json` prints.
#[derive(Serialize)]
struct Addresses {
    dir: PathBuf,
    coordinators: Vec<Address>,
    servers: Vec<Address>,
}

#[derive(Serialize)]
struct Address {
    name: String,
    address: String,
    http: String,
    pid: Option<u32>,
    log: PathBuf,
}

impl From<&Process> for Address {
    fn from(process: &Process) -> Self {
        Self {
            name: process.name().to_owned(),
            address: process.address().to_owned(),
            http: process.http().to_owned(),
            pid: process.pid(),
            log: process.log().to_owned(),
        }
    }
}

/// Keeps the cluster until somebody interrupts.
fn idle(
    cluster: &mut LocalCluster,
    control: &mut Control,
    interrupt: &Interrupt,
    format: Format,
) -> anyhow::Result<()> {
    let addresses = Addresses {
        dir: cluster.dir().to_owned(),
        coordinators: cluster.coordinators.iter().map(Address::from).collect(),
        servers: cluster.servers.iter().map(Address::from).collect(),
    };
    match format {
        Format::Json => output::json(&addresses)?,
        Format::Table => {
            let processes = addresses.coordinators.iter().chain(&addresses.servers);
            let rows = processes.map(|process| {
                let Address { name, address, http, pid, log } = process;
                let pid = pid.map(|pid| pid.to_string()).unwrap_or_default();
                vec![name.clone(), address.clone(), http.clone(), pid, log.display().to_string()]
            });
            output::line(&output::table(&["NAME", "ADDRESS", "HTTP", ">PID", "LOG"], rows))?;
            output::line(&format!(
                "\nexport DOWNPOUR_COORDINATORS={} DOWNPOUR_LOCAL={}",
                cluster.coordinator_addresses(),
                cluster.dir().display()
            ))?;
        }
    }
    eprintln!("running until Ctrl-C");
    while !interrupt.is_set() {
        look_after(cluster, control)?;
        std::thread::sleep(LOOK);
    }
    Ok(())
}
