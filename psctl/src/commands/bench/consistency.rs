//! `psctl bench consistency`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use downpour_bench::System as _;
use downpour_bench::consistency::{self, Problem, Report, Setting, Stalls};
use downpour_bench::plot::{Line, Plot};
use downpour_bench::protocol::Peer;
use downpour_core::consistency::Consistency;
use downpour_core::optimizer::Scaling;
use downpour_psctl::local::Interrupt;
use serde::Serialize;

use super::place::{Place, not_interrupted};
use crate::cli::Exit;
use crate::output::{self, Format, Row};

/// Train with workers of different speed under each consistency mode.
///
/// A step of a worker takes a fixed time, or some times more while it is slow: what is measured is who waits for whom. Each training has a job of its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  psctl bench consistency --local                                     the modes, undisturbed
  psctl bench consistency --local --stalls rotating --duration 16s    each worker slow in its turn
  psctl bench consistency --local --stalls rotating --step 200ms --duration 24s \
      --modes 'async,ssp(0),ssp(1),ssp(2),ssp(4),ssp(8),ssp(16),sync' --idle-svg docs/consistency/idle.svg
  psctl bench consistency --local --problem clicks --svg docs/consistency")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
    /// Trained with, one after the other
    #[arg(
        long,
        value_name = "MODE,...",
        value_delimiter = ',',
        default_value = "async,ssp(4),sync,sync(1)"
    )]
    modes: Vec<String>,
    /// What is learnt
    #[arg(long, value_enum, value_name = "NAME", default_value = "squares")]
    problem: ProblemName,
    /// Who is slow: nobody, each in its turn, or one all the time
    #[arg(long, value_enum, value_name = "WHO", default_value = "none")]
    stalls: Who,
    /// How many times longer a step of a slow worker takes
    #[arg(long, value_name = "TIMES", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    factor: u32,
    /// How long a worker is slow in its turn
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration)]
    stall: Duration,
    /// From one worker's turn to the next one's
    #[arg(long, value_name = "TIME", default_value = "4s", value_parser = humantime::parse_duration)]
    every: Duration,
    /// Workers that train together
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// Samples of a step
    #[arg(long, value_name = "COUNT", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// How long a step computes
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = humantime::parse_duration)]
    step: Duration,
    /// How long each training takes
    #[arg(long, value_name = "TIME", default_value = "8s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Times the problem's own learning rate
    #[arg(long, value_name = "TIMES", default_value_t = 1.0)]
    lr_times: f32,
    /// Divide the learning rate of each push by 1 + its staleness / PER, in clocks or records of the log
    #[arg(long, value_name = "UNIT[:PER]", default_value = "none")]
    lr_staleness: Scaling,
    /// Draw the losses into this folder
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Draw the share of the time that workers wait over the bound s, of the modes ssp(s), into this file; the other modes are lines across
    #[arg(long, value_name = "FILE")]
    idle_svg: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ProblemName {
    Squares,
    Clicks,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Who {
    None,
    Rotating,
    One,
}

#[derive(Debug, Serialize)]
struct Mode(Report);

impl Row for Mode {
    const TITLES: &'static [&'static str] =
        &["MODE", "STEPS/S", "OF SPEEDS", "IDLE", "AHEAD", "STALE", "DROPPED", "LOSS", "OPTIMUM"];

    fn cells(&self) -> Vec<String> {
        let report = &self.0;
        let loss = report.looks.last().map_or(f64::NAN, |look| look.loss);
        vec![
            report.mode.clone(),
            format!("{:.1}", report.steps_s),
            format!("{:.1} %", 100.0 * report.steps_s / report.steps_s_max),
            format!("{:.1} %", 100.0 * report.idle),
            format!("{:.1} (max {})", report.ahead_mean, report.ahead_max),
            format!("{:.1}", report.stale_clocks),
            report.dropped.iter().sum::<u64>().to_string(),
            format!("{loss:.4}"),
            format!("{:.4}", report.optimum),
        ]
    }
}

pub(super) fn run(args: &Args, format: Format) -> anyhow::Result<()> {
    for mode in &args.modes {
        mode.parse::<Consistency>().map_err(|error| Exit::Usage(error.to_string()))?;
    }
    let interrupt = Interrupt::on_signals().context("handle signals")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let reports = args.place.with(&interrupt, |cluster| {
        let mut reports = Vec::new();
        for (index, mode) in args.modes.iter().enumerate() {
            cluster.check()?;
            eprintln!("{mode}: {:?}", args.duration);
            let training = runtime.block_on(async {
                let Peer::Cluster { job, .. } = cluster.peer() else {
                    anyhow::bail!("not a cluster");
                };
                let (peer, setting) = (cluster.peer(), args.setting(mode));
                let name = format!("{job}-{index}");
                tokio::select! {
                    report = consistency::train(&peer, &name, &setting) => report,
                    error = interrupted(&interrupt) => Err(error),
                }
            });
            reports.push(Mode(training.with_context(|| format!("train with {mode}"))?));
        }
        Ok(reports)
    })?;
    if let Some(dir) = &args.svg {
        draw(dir, args, &reports)?;
    }
    if let Some(path) = &args.idle_svg {
        let who = format!("{:?}", args.stalls).to_lowercase();
        save(path, &idle(&who, &reports))?;
    }
    output::list(format, &reports)
}

async fn interrupted(interrupt: &Interrupt) -> anyhow::Error {
    loop {
        if let Err(error) = not_interrupted(interrupt) {
            return error;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Args {
    fn setting(&self, mode: &str) -> Setting {
        Setting {
            problem: match self.problem {
                ProblemName::Squares => Problem::Squares,
                ProblemName::Clicks => Problem::Clicks,
            },
            mode: mode.to_owned(),
            stalls: match self.stalls {
                Who::None => Stalls::None,
                Who::Rotating => Stalls::Rotating {
                    stall_ms: self.stall.as_millis() as u64,
                    every_ms: self.every.as_millis() as u64,
                    factor: self.factor,
                },
                Who::One => Stalls::One { factor: self.factor },
            },
            workers: self.workers.into(),
            batch: self.batch as usize,
            step: self.step,
            duration: self.duration,
            lr_times: self.lr_times,
            scaling: self.lr_staleness,
        }
    }
}

/// The loss over time and over samples.
fn draw(dir: &Path, args: &Args, modes: &[Mode]) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let who = format!("{:?}", args.stalls).to_lowercase();
    let what = format!("{:?}", args.problem).to_lowercase();
    let lines = |x: fn(&consistency::Look) -> f64| {
        let line = |mode: &Mode| Line {
            name: mode.0.mode.clone(),
            points: mode.0.looks.iter().map(|look| (x(look), look.loss)).collect(),
        };
        modes.iter().map(line).collect()
    };
    let plot = |x: &str, lines| Plot {
        title: format!("{what}, stalls: {who}"),
        x: x.into(),
        y: "loss".into(),
        lines,
    };
    let plots = [
        ("time", plot("seconds", lines(|look| look.seconds))),
        ("samples", plot("samples", lines(|look| look.samples as f64))),
    ];
    for (over, plot) in plots {
        save(&dir.join(format!("{what}-{who}-{over}.svg")), &plot)?;
    }
    Ok(())
}

fn save(path: &Path, plot: &Plot) -> anyhow::Result<()> {
    fs::write(path, plot.svg()).with_context(|| format!("write {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

/// The share of idle time over the bound.
fn idle(who: &str, modes: &[Mode]) -> Plot {
    let bound = |mode: &Mode| {
        let consistency: Consistency = mode.0.mode.parse().ok()?;
        Some((f64::from(consistency.bound()?), 100.0 * mode.0.idle))
    };
    let mut bounded: Vec<(f64, f64)> = modes.iter().filter_map(bound).collect();
    bounded.sort_by(|a, b| a.0.total_cmp(&b.0));
    let widest = bounded.last().map_or(1.0, |(bound, _)| *bound);
    let others = modes.iter().filter(|mode| bound(mode).is_none()).map(|mode| {
        let idle = 100.0 * mode.0.idle;
        Line { name: mode.0.mode.clone(), points: vec![(0.0, idle), (widest, idle)] }
    });
    let lines = std::iter::once(Line { name: "ssp(s)".into(), points: bounded.clone() });
    Plot {
        title: format!("time that workers wait for others, stalls: {who}"),
        x: "s, in steps".into(),
        y: "percent".into(),
        lines: lines.chain(others).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_drawn_over_the_bound_and_modes_without_one_across() {
        let mode = |mode: &str, idle| {
            Mode(Report {
                problem: Problem::Squares,
                mode: mode.into(),
                stalls: Stalls::None,
                steps: Vec::new(),
                dropped: Vec::new(),
                steps_s: 1.0,
                steps_s_max: 1.0,
                idle,
                ahead_mean: 0.0,
                ahead_max: 0,
                stale_clocks: 0.0,
                optimum: 0.0,
                looks: Vec::new(),
            })
        };
        let modes = [mode("ssp(16)", 0.25), mode("async", 0.0), mode("ssp(0)", 0.5)];
        let plot = idle("rotating", &modes);
        let lines: Vec<_> = plot.lines.into_iter().map(|line| (line.name, line.points)).collect();
        assert_eq!(
            lines,
            [
                ("ssp(s)".to_owned(), vec![(0.0, 50.0), (16.0, 25.0)]),
                ("async".to_owned(), vec![(0.0, 0.0), (16.0, 0.0)]),
            ]
        );
    }
}
