//! Seeds side by side: a process for each, because a panic inside a simulated host may abort it.

use std::ops::Range;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rustix::time::{ClockId, clock_gettime};

use crate::options::Options;
use crate::report::{Outcome, Report};

pub(crate) fn run(seeds: Range<u64>, options: &Options) -> ExitCode {
    let started = clock_gettime(ClockId::Monotonic);
    let plant = options.bug.map(|(name, _)| name);
    let (next, outcomes) = (AtomicU64::new(seeds.start), Mutex::new(Vec::new()));
    let found = AtomicBool::new(false);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds.end || (options.until_found && found.load(Relaxed)) {
                        return;
                    }
                    let outcome = child(seed, plant);
                    if let Some(failure) = &outcome.failure {
                        found.store(true, Relaxed);
                        eprintln!("seed {seed}: {failure}");
                        eprintln!("  again: {}", crate::report::command(seed, plant));
                    }
                    outcomes.lock().expect("nobody panics").push(outcome);
                }
            });
        }
    });
    let mut outcomes = outcomes.into_inner().expect("nobody panics");
    outcomes.sort_by_key(|outcome: &Outcome| outcome.seed);
    let mut report = Report::default();
    outcomes.into_iter().for_each(|outcome| report.add(outcome, plant));
    let ended = clock_gettime(ClockId::Monotonic);
    report.seconds =
        (ended.tv_sec - started.tv_sec) as f64 + (ended.tv_nsec - started.tv_nsec) as f64 / 1e9;
    if options.json {
        println!("{}", serde_json::to_string(&report).expect("numbers and text"));
    } else {
        println!("{report:#?}");
    }
    ExitCode::from(u8::from(!report.failures.is_empty()))
}

/// Runs one seed in a process of its own.
fn child(seed: u64, plant: Option<&str>) -> Outcome {
    let failed = |failure: String| Outcome { seed, failure: Some(failure), ..Outcome::default() };
    let mut command = match std::env::current_exe() {
        Ok(program) => Command::new(program),
        Err(error) => return failed(error.to_string()),
    };
    command.args(["--seed", &seed.to_string(), "-o", "json"]);
    if let Some(name) = plant {
        command.args(["--plant", name]);
    }
    match command.stdin(Stdio::null()).stderr(Stdio::null()).output() {
        Ok(output) => serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| failed(format!("the process ended with {}", output.status))),
        Err(error) => failed(error.to_string()),
    }
}
