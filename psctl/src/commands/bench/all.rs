//! `psctl bench all`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;
use downpour_bench::{System, dense, sparse};
use downpour_psctl::local::Interrupt;
use serde::Serialize;

use super::floor::{self, DENSE_STEPS, Report, Standard, Workload};
use super::place::Place;
use super::{require_correct, train};
use crate::cli::Exit;
use crate::output::{self, Format};

/// Measure the standard workloads beside the floor.
///
/// Floor and cluster take their repeats in turns, so that whatever else the machine does meets both.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status 1 if a value of ours is not what it must be.

Examples:
  psctl bench all --local
  psctl bench all --local --quick -o json
  psctl bench all --local --workload S-16 D --repeats 9
  psctl bench all --local --workload S-16 S2-16 --replicas 2      beside a raw relay")]
pub(crate) struct Args {
    /// Start a cluster on this machine for each workload: one coordinator, 64 shards, a server for each copy
    #[arg(long, required = true)]
    local: bool,
    /// Where the binaries are; without it beside psctl
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Which workloads
    #[arg(long, value_enum, value_name = "NAME", num_args = 1.., default_values_t = Workload::ALL)]
    workload: Vec<Workload>,
    /// Train too: workload E, which needs downpour-worker and has no floor
    #[arg(long)]
    train: bool,
    /// Copies of each shard, each on a server of its own; beside two or three of them the floor is a raw relay, which passes every push on to as many
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=3))]
    replicas: u16,
    /// How pulls and pushes of ours travel
    #[arg(long, value_name = "NAME", default_value = "framed", value_parser = ["framed", "grpc"])]
    transport: String,
    /// How often all steps are taken; the medians are reported
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Three repeats instead, and one training, for a first impression
    #[arg(long, conflicts_with = "repeats")]
    quick: bool,
}

const QUICK_REPEATS: u32 = 3;
/// Of trainings.
const PASSES: u32 = 3;

/// By workload.
#[derive(Default, Serialize)]
struct Comparison {
    floor: BTreeMap<String, Report>,
    ours: BTreeMap<String, Report>,
    /// Ours over the floor's: rows per second, bytes per second.
    share: BTreeMap<String, f64>,
    /// The floor passes pushes on: what they alone reach is told too.
    #[serde(skip)]
    relay: bool,
}

impl Comparison {
    fn add(&mut self, floor: Report, ours: Report) {
        let name = match (&floor, &ours) {
            (Report::Sparse(floor), Report::Sparse(ours)) => {
                self.share.insert(ours.workload.clone(), ours.rows_s / floor.rows_s);
                if self.relay {
                    let share = ours.push_rows_s / floor.push_rows_s;
                    self.share.insert(format!("{}-push", ours.workload), share);
                }
                &ours.workload
            }
            (Report::Dense(floor), Report::Dense(ours)) => {
                self.share.insert("D-pull".into(), ours.pull_gb_s / floor.pull_gb_s);
                self.share.insert("D-push".into(), ours.push_gb_s / floor.push_gb_s);
                &ours.workload
            }
            _ => return,
        };
        let name = name.clone();
        self.floor.insert(name.clone(), floor);
        self.ours.insert(name, ours);
    }

    fn table(&self) -> String {
        let pairs =
            self.floor.iter().filter_map(|(name, floor)| Some((name, floor, self.ours.get(name)?)));
        let rows = pairs.flat_map(|(name, floor, ours)| {
            let row = |name: String, floor: f64, ours: f64, unit: &str| {
                let rates = [floor, ours].map(|rate| format!("{rate:.3} {unit}"));
                let share = self.share.get(&name).map(|share| format!("{:.1} %", share * 1e2));
                let [floor, ours] = rates;
                vec![name, floor, ours, share.unwrap_or_default()]
            };
            match (floor, ours) {
                (Report::Sparse(floor), Report::Sparse(ours)) => {
                    let rate = |name: String, rate: fn(&sparse::Report) -> f64| {
                        row(name, rate(floor) / 1e6, rate(ours) / 1e6, "M rows/s")
                    };
                    let mut rows = vec![rate(name.clone(), |report| report.rows_s)];
                    if self.relay {
                        rows.push(rate(format!("{name}-push"), |report| report.push_rows_s));
                    }
                    rows
                }
                (Report::Dense(floor), Report::Dense(ours)) => vec![
                    row(format!("{name}-pull"), floor.pull_gb_s, ours.pull_gb_s, "GB/s"),
                    row(format!("{name}-push"), floor.push_gb_s, ours.push_gb_s, "GB/s"),
                ],
                _ => Vec::new(),
            }
        });
        output::table(&["WORKLOAD", ">FLOOR", ">OURS", ">SHARE"], rows)
    }
}

pub(super) fn run(args: &Args, format: Format) -> anyhow::Result<()> {
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    let repeats = if args.quick { QUICK_REPEATS } else { args.repeats };
    if args.replicas > 1 && args.workload.contains(&Workload::D) {
        let problem = "--replicas: the relay passes on rows only; name the workloads that are wanted, without D";
        return Err(Exit::Usage(problem.into()).into());
    }
    let place = Place::local(args.bin_dir.clone(), args.transport.clone(), args.replicas);
    let mut comparison = Comparison { relay: args.replicas > 1, ..Comparison::default() };
    for workload in &args.workload {
        let (floor, ours) = place.with(&interrupt, |cluster| {
            let workload = workload.standard();
            let mut floor = floor::start(&workload, usize::from(args.replicas) - 1, &interrupt)?;
            compare(&workload, repeats, &mut floor, cluster)
        })?;
        comparison.add(floor, ours);
    }
    if args.train {
        let passes = if args.quick { 1 } else { PASSES };
        let report = train::measure(&place, &train::Model::default(), None, passes, &interrupt)?;
        comparison.ours.insert(report.workload.clone(), Report::Train(report));
    }
    match format {
        Format::Json => output::json(&comparison)?,
        Format::Table => {
            output::line(&comparison.table())?;
            if let Some(Report::Train(report)) = comparison.ours.get("E") {
                output::line("")?;
                output::properties(format, report, train::properties)?;
            }
        }
    }
    comparison.ours.iter().try_for_each(|(name, report)| match report {
        Report::Sparse(report) => require_correct(name, report.check_err, report.is_correct()),
        Report::Dense(report) => require_correct(name, report.check_err, report.is_correct()),
        Report::Train(_) => Ok(()),
    })
}

/// In turns. Floor first.
fn compare(
    workload: &Standard,
    repeats: u32,
    floor: &mut dyn System,
    cluster: &mut dyn System,
) -> anyhow::Result<(Report, Report)> {
    match workload {
        Standard::Sparse(workload) => {
            let mut floor_run = sparse::Run::start("floor", workload.clone(), floor)?;
            let mut our_run = sparse::Run::start("ours", workload.clone(), cluster)?;
            for _ in 0..repeats {
                floor_run.repeat(floor)?;
                our_run.repeat(cluster)?;
            }
            let floor_report = floor_run.finish(floor)?;
            Ok((Report::Sparse(floor_report), Report::Sparse(our_run.finish(cluster)?)))
        }
        Standard::Dense(workload) => {
            let mut floor_run = dense::Run::start("floor", *workload, floor)?;
            let mut our_run = dense::Run::start("ours", *workload, cluster)?;
            for _ in 0..repeats {
                floor_run.repeat(DENSE_STEPS, floor)?;
                our_run.repeat(DENSE_STEPS, cluster)?;
            }
            let floor_report = floor_run.finish(floor)?;
            Ok((Report::Dense(floor_report), Report::Dense(our_run.finish(cluster)?)))
        }
    }
}
