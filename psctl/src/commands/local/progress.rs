//! One line of progress for each worker, out of the `metrics.jsonl` that it writes.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, IsTerminal as _, Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, MultiProgress, ProgressBar, ProgressStyle};
use serde::Deserialize;

/// How often a line is written where nobody sees it change.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Longer first lines of a log are not looked at to their end.
const LINE_BYTES_MAX: u64 = 4096;

/// What a worker writes at each interval; lines without samples (of an evaluation, say) are not progress.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Metrics {
    clock: u64,
    /// Since the training began, perhaps in an earlier run, of all workers as far as this one knows.
    total_samples: u64,
    /// Of them in this run.
    #[serde(default)]
    run_samples: Option<u64>,
    /// How many all will have trained at the end, where that is known.
    #[serde(default)]
    planned_samples: Option<u64>,
    #[serde(default)]
    loss: Option<f64>,
    #[serde(default)]
    samples_per_s: f64,
}

/// Live lines on a terminal, a line for each worker every few seconds elsewhere; on stderr.
pub(super) struct Progress {
    workers: Vec<Worker>,
    bars: Option<MultiProgress>,
    last_lines: Instant,
}

struct Worker {
    name: String,
    path: PathBuf,
    log: PathBuf,
    /// Whether the first line of the log was there to be shown.
    begun: bool,
    read: u64,
    /// The beginning of a line whose end is not written yet.
    rest: Vec<u8>,
    latest: Option<Metrics>,
    bar: ProgressBar,
}

impl Progress {
    pub(super) fn new() -> Self {
        let bars = io::stderr().is_terminal().then(MultiProgress::new);
        Self { workers: Vec::new(), bars, last_lines: Instant::now() }
    }

    pub(super) fn add(&mut self, name: &str, metrics: PathBuf, log: PathBuf) {
        let bar = match &self.bars {
            Some(bars) => bars.add(ProgressBar::no_length()),
            None => ProgressBar::hidden(),
        };
        bar.set_style(
            ProgressStyle::with_template("{prefix}  {wide_msg}").expect("a template of two fields"),
        );
        bar.set_prefix(name.to_owned());
        bar.set_message("starting");
        let name = name.to_owned();
        self.workers.push(Worker {
            name,
            path: metrics,
            log,
            begun: false,
            read: 0,
            rest: Vec::new(),
            latest: None,
            bar,
        });
    }

    /// Reads what is new, and shows it.
    pub(super) fn show(&mut self) {
        let all_per_s = self.samples_per_s();
        for worker in &mut self.workers {
            if let Some(line) = worker.beginning() {
                worker.bar.suspend(|| eprintln!("{}  {line}", worker.name));
            }
            if worker.read_new() {
                worker.bar.set_message(worker.message(all_per_s));
            }
            worker.bar.tick();
        }
        if self.bars.is_none() && self.last_lines.elapsed() >= LINE_EVERY {
            self.print_lines();
        }
    }

    /// Shows what is last, for good.
    pub(super) fn finish(&mut self) {
        let all_per_s = self.samples_per_s();
        for worker in &mut self.workers {
            worker.read_new();
            worker.bar.finish_with_message(worker.message(all_per_s));
        }
        if self.bars.is_none() {
            self.print_lines();
        }
    }

    fn print_lines(&mut self) {
        for worker in &self.workers {
            eprintln!("{}  {}", worker.name, worker.message(self.samples_per_s()));
        }
        self.last_lines = Instant::now();
    }

    /// Of all workers.
    fn samples_per_s(&self) -> f64 {
        self.workers.iter().filter_map(|worker| worker.latest).map(|one| one.samples_per_s).sum()
    }

    /// Of all workers, in this run.
    pub(super) fn samples(&self) -> u64 {
        self.workers
            .iter()
            .filter_map(|worker| worker.latest)
            .map(|latest| latest.run_samples.unwrap_or(latest.total_samples))
            .sum()
    }
}

impl Worker {
    /// Where the worker goes on, if it does not begin at the start: the first line of its log, once.
    fn beginning(&mut self) -> Option<String> {
        if self.begun {
            return None;
        }
        let mut line = String::new();
        let log = BufReader::new(File::open(&self.log).ok()?);
        log.take(LINE_BYTES_MAX).read_line(&mut line).ok()?;
        self.begun = line.ends_with('\n') || line.len() as u64 == LINE_BYTES_MAX;
        let told = self.begun && (line.starts_with("resuming ") || line.starts_with("job "));
        told.then(|| line.trim_end().to_owned())
    }

    /// Whether there was anything. A file that is not there yet, or not readable, is no progress.
    fn read_new(&mut self) -> bool {
        let mut new = Vec::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.read))?;
            file.read_to_end(&mut new)
        });
        self.read += read.unwrap_or(0) as u64;
        self.take_lines(&new)
    }

    fn take_lines(&mut self, new: &[u8]) -> bool {
        self.rest.extend_from_slice(new);
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else { return false };
        let lines: Vec<u8> = self.rest.drain(..=end).collect();
        let latest = lines
            .split(|byte| *byte == b'\n')
            .rev()
            .find_map(|line| serde_json::from_slice(line).ok());
        self.latest = latest.or(self.latest);
        latest.is_some()
    }

    /// They share the data: what is left goes by the speed of all.
    fn message(&self, all_per_s: f64) -> String {
        let Some(Metrics { clock, total_samples, planned_samples, loss, samples_per_s, .. }) =
            self.latest
        else {
            return "starting".into();
        };
        let mut parts = vec![format!("step {}", HumanCount(clock))];
        match planned_samples {
            Some(planned) if planned > 0 => {
                let percent = (100.0 * total_samples as f64 / planned as f64).min(100.0).floor();
                parts.push(format!(
                    "{} of about {} samples ({percent} %)",
                    HumanCount(total_samples),
                    HumanCount(planned)
                ));
            }
            _ => parts.push(format!("{} samples", HumanCount(total_samples))),
        }
        parts.push(format!("{}/s", HumanCount(samples_per_s as u64)));
        parts.extend(loss.map(|loss| format!("loss {loss:.4}")));
        let left = planned_samples.map(|planned| planned.saturating_sub(total_samples));
        if let Some(left) = left.filter(|left| *left > 0 && all_per_s >= 1.0) {
            let eta = Duration::from_secs((left as f64 / all_per_s).round() as u64);
            parts.push(format!("ETA {}", humantime::format_duration(eta)));
        }
        parts.join("  ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(pieces: &[&str]) -> Worker {
        let mut progress = Progress::new();
        progress.add("worker-0", PathBuf::new(), PathBuf::new());
        let mut worker = progress.workers.remove(0);
        for piece in pieces {
            worker.take_lines(piece.as_bytes());
        }
        worker
    }

    #[test]
    fn the_last_whole_line_with_samples_counts() {
        let worker = worker(&[
            "{\"clock\":1,\"total_samples\":100,\"loss\":0.5,\"samples_per_s\":50}\n{\"clock\":2,\"total_sam",
            "ples\":200,\"planned_samples\":1000,\"loss\":0.25,\"samples_per_s\":80.4}\n",
            "{\"evaluation\":{\"auc\":0.9}}\nnonsense\n{\"clock\":3",
        ]);
        assert_eq!(
            worker.message(160.0),
            "step 2  200 of about 1,000 samples (20 %)  80/s  loss 0.2500  ETA 5s"
        );
    }

    #[test]
    fn samples_are_those_of_this_run_and_the_beginning_is_shown_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("worker.log");
        let mut progress = Progress::new();
        progress.add("worker-0", PathBuf::new(), log.clone());
        progress.workers[0]
            .take_lines(b"{\"clock\":9,\"total_samples\":900,\"run_samples\":200}\n");
        assert_eq!(progress.samples(), 200);
        let worker = &mut progress.workers[0];
        assert_eq!(worker.beginning(), None, "no log yet");
        std::fs::write(&log, "resuming job").expect("a file");
        assert_eq!(worker.beginning(), None, "half a line");
        std::fs::write(&log, "resuming job \"a\"\nmore\n").expect("a file");
        assert_eq!(worker.beginning().as_deref(), Some("resuming job \"a\""));
        assert_eq!(worker.beginning(), None);
    }

    #[test]
    fn nothing_is_made_up_where_nothing_is_known() {
        assert_eq!(worker(&["{\"clock\":1"]).message(9.0), "starting");
        let worker = worker(&["{\"clock\":1,\"total_samples\":100,\"loss\":null}\n"]);
        assert_eq!(worker.message(9.0), "step 1  100 samples  0/s");
    }
}
