//! `downpour-chaos`: runs one scenario against a cluster of real processes on loopback and says what the clients saw.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use downpour_chaos_tests::scenario::{Options, Report, Scenario, run};

/// Disturbs a local cluster while clients push without pause, then counts what was lost or applied twice.
///
/// Exits 0 when nothing was lost, nothing was applied twice and no client saw an error; 1 otherwise.
#[derive(Parser)]
#[command(
    after_help = "Example:\n  downpour-chaos --scenario kill-coordinator --seconds 120 -o json"
)]
struct Args {
    /// What happens to the cluster.
    #[arg(long, value_enum)]
    scenario: Scenario,
    /// How long the clients push.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Seconds from one fault to the next.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    fault_every: u64,
    /// Clients that push from the start.
    #[arg(long, default_value_t = 2)]
    clients: u64,
    /// Form of the report on stdout.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let options = Options {
        duration: Duration::from_secs(args.seconds),
        fault_every: Duration::from_secs(args.fault_every),
        clients: args.clients,
    };
    let report = run(args.scenario, &options)?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Table => print_table(&report)?,
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_table(report: &Report) -> Result<()> {
    let serde_json::Value::Object(fields) = serde_json::to_value(report)? else {
        unreachable!("a struct is an object");
    };
    for (name, value) in fields {
        println!("{name:20} {value}");
    }
    Ok(())
}
