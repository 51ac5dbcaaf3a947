//! `downpour-ps bench-table`: the table alone, without a network.
//!
//! Follow one run: for each variant this program starts itself once more, so that what one leaves behind is not counted for the next. The child
//! [fills](workload::fill) a store of 64 shards and watches memory and pauses, then pulls and pushes the same batches from the store and from a
//! [flat array](floor::Floor) in turn, and prints its numbers as JSON; the parent prints them all.
//!
//! Rates are per second of *CPU time of the thread*: other processes on the machine disturb them less.

mod floor;
mod report;
mod stores;
mod workload;

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail};
use clap::{CommandFactory as _, FromArgMatches as _, Parser, ValueEnum};
use downpour_core::optimizer::{Adagrad, OptimizerSpec, Sgd};

use report::{Measured, Report};

/// Measure the table of a parameter server alone, without a network
#[derive(Clone, Debug, Parser)]
#[command(
    name = "downpour-ps bench-table",
    after_long_help = "\
Examples:
  downpour-ps bench-table                                   the table that servers use, beside the floor
  downpour-ps bench-table --dim 64 --variant all            every store that was tried
  downpour-ps bench-table --rows 50000000 --repeats 1       memory and pauses of a large table
  downpour-ps bench-table -o json | jq .variants[0].lookup_share

Fields of the JSON:
  gather_rows_s, scatter_rows_s   the floor, per core: rows of a flat array, places known, prefetched, copied out; or updated in place
  lookups_s, updates_s            the store, per core; each rate is {median, min, max} over the repeats
  lookup_share, update_share      of the floor in the same run (medians)
  row_overhead_bytes              resident memory of the filled store per row, without the floats of the row
  pause_max_ms, pause_p999_ms     of pushing 256 new keys to one shard while the store grew from nothing to --rows: wall clock
  pause_max_cpu_ms                the longest of them in CPU time: without the time that other processes had the core
  insert_ns                       CPU time to create a row, mean"
)]
pub(crate) struct Args {
    /// Rows in the store
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1000..))]
    rows: u32,
    /// Floats of a row
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    dim: u32,
    /// What a push applies
    #[arg(long, value_enum, default_value_t = Optimizer::Sgd)]
    optimizer: Optimizer,
    /// Different keys of a batch, split over 64 shards
    #[arg(long, default_value_t = 10_256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    batch: u32,
    /// Batches of a repeat
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batches: u32,
    /// Which keys are hot
    #[arg(long, value_enum, default_value_t = Ids::Uniform)]
    ids: Ids,
    /// Threads that share the store
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// Measurements that the median is taken of
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Of the batches
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Which store
    #[arg(long, value_enum, default_value_t = Variant::Winner)]
    variant: Variant,
    /// Format of what is printed
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Measure here and print one variant as JSON: what the program calls itself with
    #[arg(long, hide = true)]
    child: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Optimizer {
    Sgd,
    Adagrad,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ids {
    /// All alike: the hardest for caches
    Uniform,
    /// The id of rank r about as often as 1/r
    Zipf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Json,
    Table,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Variant {
    /// Every one below
    All,
    /// `DashMap<u64, Box<[f32]>>`
    Dashmap,
    /// hashbrown over an arena of rows with their header inline, in slabs of the allocator
    Hashbrown,
    /// The same, with prefetch in batches
    HashbrownPrefetch,
    /// hashbrown over the arena that servers use, with prefetch in batches
    HashbrownPool,
    /// The table that servers use, without huge pages
    WinnerSmallPages,
    /// The table that servers use
    Winner,
}

impl Variant {
    fn each(self) -> Vec<Variant> {
        let all = Variant::value_variants().iter().copied();
        if self == Variant::All { all.skip(1).collect() } else { vec![self] }
    }

    fn name(self) -> String {
        let value = self.to_possible_value().expect("no variant is hidden");
        value.get_name().to_owned()
    }
}

impl Args {
    fn optimizer(&self) -> OptimizerSpec {
        match self.optimizer {
            Optimizer::Sgd => Sgd { learning_rate: 0.1 }.into(),
            Optimizer::Adagrad => {
                let (learning_rate, epsilon, initial_accumulator) = (0.1, 1e-10, 0.0);
                Adagrad { learning_rate, epsilon, initial_accumulator }.into()
            }
        }
    }
}

/// Runs the subcommand with the arguments of the process after its name.
#[must_use]
pub fn main(arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let name = std::ffi::OsString::from("downpour-ps bench-table");
    let matches = Args::command().get_matches_from(std::iter::once(name).chain(arguments));
    let run =
        Args::from_arg_matches(&matches).map_err(anyhow::Error::from).and_then(|args| run(&args));
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("downpour-ps bench-table: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    if args.batch > args.rows / 2 {
        bail!("a batch of {} different keys needs twice as many rows", args.batch);
    }
    if args.child {
        println!("{}", serde_json::to_string(&workload::measure(args)?)?);
        return Ok(());
    }
    let variants = args.variant.each().into_iter().map(|variant| measure_in_child(args, variant));
    let report = Report::new(args, variants.collect::<Result<_, _>>()?);
    match args.output {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Table => print!("{report}"),
    }
    Ok(())
}

fn measure_in_child(args: &Args, variant: Variant) -> anyhow::Result<Measured> {
    eprintln!("bench-table: {} ...", variant.name());
    let own = std::env::current_exe().context("find this program")?;
    let numbers = [
        ("--rows", u64::from(args.rows)),
        ("--dim", args.dim.into()),
        ("--batch", args.batch.into()),
        ("--batches", args.batches.into()),
        ("--threads", args.threads.into()),
        ("--repeats", args.repeats.into()),
        ("--seed", args.seed),
    ];
    let mut child = Command::new(own);
    child.args(["bench-table", "--child", "--variant", &variant.name()]);
    child.args(["--optimizer", if args.optimizer == Optimizer::Sgd { "sgd" } else { "adagrad" }]);
    child.args(["--ids", if args.ids == Ids::Uniform { "uniform" } else { "zipf" }]);
    for (flag, number) in numbers {
        child.arg(flag).arg(number.to_string());
    }
    let output = child.stderr(Stdio::inherit()).output().context("start this program again")?;
    if !output.status.success() {
        bail!("{}: {}", variant.name(), output.status);
    }
    serde_json::from_slice(&output.stdout).context("read what the child printed")
}
