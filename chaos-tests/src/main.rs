//! `downpour-chaos`: runs one scenario against a cluster of real processes on loopback and says what the clients saw.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use downpour_chaos_tests::faults::Scenario;
use downpour_chaos_tests::scenario::{Options, run};
use downpour_chaos_tests::workers;
use downpour_psctl::local::Interrupt;
use serde::Serialize;

/// Disturbs a local cluster of 3 coordinators and 3 servers (every shard twice) while clients push without pause, then counts what was lost or applied twice.
///
/// Exits 0 when nothing was lost, nothing was applied twice and no epoch went back (hot: and the load is spread as promised; workers: every sample was trained, none again that
/// was not in flight, and the model is as good); 1 otherwise, and when the cluster did not recover in time.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  downpour-chaos --scenario kill-coordinator --seconds 120 -o json
  downpour-chaos --scenario mixed --seconds 600 --seed 7
  downpour-chaos --scenario scale --faults mixed --mib 256 --seconds 300 -o json
  downpour-chaos --scenario hot -o json            8 of 64 shards, on one of 4 servers, with 60 % of the rows
  downpour-chaos --scenario workers -o json        3 of 6 workers are killed in the midst of a pass, 2 join

The same seed gives the same faults in the same order. Progress goes to stderr. A full disk needs the right to mount and is left out
without it. The logs are kept when something went wrong.")]
struct Args {
    /// What happens to the cluster
    #[arg(long, value_enum)]
    scenario: Scenario,
    /// How long the clients push
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What the faults follow from; without it one is drawn, and told
    #[arg(long)]
    seed: Option<u64>,
    /// Mebibytes of rows that the job of `scale` has before
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// The faults of which scenario happen while `scale` grows and shrinks, again and again until --seconds are over
    #[arg(long, value_enum, value_name = "SCENARIO")]
    faults: Option<Scenario>,
    /// Seconds for which nothing may move once `hot` is over
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    quiet: u64,
    /// Samples that `workers` trains on
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(10_000..=100_000_000))]
    rows: u64,
    /// Disturbed trainings of `workers`, each with another seed, after an undisturbed one
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    runs: u64,
    /// Clients that push from the start
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    clients: u64,
    /// Form of the report on stdout
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> ExitCode {
    disturb(&Args::parse()).unwrap_or_else(|error| {
        eprintln!("downpour-chaos: {error:#}");
        ExitCode::FAILURE
    })
}

fn disturb(args: &Args) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(0, |since| u64::from(since.subsec_nanos()))
    });
    eprintln!("seed {seed}");
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    if args.scenario == Scenario::Workers {
        let sizes = workers::Sizes { rows: args.rows, ..workers::Sizes::default() };
        let report = workers::run(sizes, seed, args.runs, &interrupt)?;
        report.broken().iter().for_each(|broken| eprintln!("{broken}"));
        return print(args.output, &report, report.passed());
    }
    ensure!(
        args.faults.is_none() || args.scenario == Scenario::Scale,
        "--faults is for the scenario scale"
    );
    let harmless = [Scenario::Scale, Scenario::Hot, Scenario::Workers];
    ensure!(
        args.faults.is_none_or(|faults| !harmless.contains(&faults)),
        "--faults: scale, hot and workers have no faults of their own"
    );
    let options = Options {
        duration: Duration::from_secs(args.seconds),
        seed,
        clients: args.clients,
        bytes: args.mib << 20,
        faults: args.faults,
        quiet: Duration::from_secs(args.quiet),
        interrupt,
    };
    let report = run(args.scenario, &options)?;
    let broken = match report.scale.as_ref().filter(|_| args.faults.is_none()) {
        Some(scale) => scale.broken(),
        None => Vec::new(),
    };
    broken.iter().for_each(|broken| eprintln!("{broken}"));
    print(args.output, &report, report.passed() && broken.is_empty())
}

fn print(output: Output, report: &impl Serialize, passed: bool) -> Result<ExitCode> {
    match output {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Table => print_table(report)?,
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_table(report: &impl Serialize) -> Result<()> {
    let serde_json::Value::Object(fields) = serde_json::to_value(report)? else {
        unreachable!("a struct is an object");
    };
    for (name, value) in fields {
        println!("{name:20} {value}");
    }
    Ok(())
}
