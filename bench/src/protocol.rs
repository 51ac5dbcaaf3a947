//! What the measuring process and its children say to each other: one JSON value for each line, over the child's stdin and stdout.
//!
//! A child is told its [`Role`] and answers [`Answer::Ready`]; then each [`Command`] has one [`Answer`]. A command that is sent to several
//! workers at once is their barrier. The end of its stdin ends a child, so none outlives its parent, however that dies.

use std::io::{BufRead as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::workload::{Dense, Sparse};

/// Who holds the parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Peer {
    /// A Downpour cluster.
    Cluster {
        /// `host:port,host:port`.
        coordinators: String,
        /// Name of the job, which is created.
        job: String,
        /// Of the job.
        shards: u32,
        /// Of the job.
        replicas: u32,
        /// How pulls and pushes travel: `framed` or `grpc`.
        transport: String,
    },
    /// A server of [`crate::floor`].
    Floor {
        /// `host:port`.
        address: String,
    },
}

/// What a child is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Role {
    /// The server of the floor.
    Floor(FloorServer),
    /// One worker of S.
    Sparse {
        /// Where.
        peer: Peer,
        /// What.
        workload: Sparse,
        /// Which worker, from 0.
        worker: usize,
    },
    /// The worker of D.
    Dense {
        /// Where.
        peer: Peer,
        /// What.
        workload: Dense,
    },
}

/// What a server of the floor holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FloorServer {
    /// Rows of the table.
    pub rows: u32,
    /// Floats of a row: a multiple of 4.
    pub dim: u32,
    /// Of the dense tensor.
    pub dense_floats: usize,
    /// `host:port` of another floor that gets every push too; a push is acknowledged when that one has acknowledged it.
    pub backup: Option<String>,
}

/// What a worker is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Creates every row with its first value.
    Fill,
    /// Takes the steps `0..count`.
    Steps {
        /// Number of steps.
        count: usize,
    },
    /// Compares all values with what they must be after the warm-up and this many repeats.
    Check {
        /// Complete repeats.
        repeats: u32,
    },
    /// Removes what it made in the cluster.
    CleanUp,
}

/// What a child says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// It can be told what to do.
    Ready {
        /// Where the floor's server listens.
        address: Option<String>,
    },
    /// Filled, cleaned up.
    Done,
    /// Steps of S.
    Sparse(SparseSteps),
    /// Steps of D.
    Dense(DenseSteps),
    /// Compared.
    Checked {
        /// The largest difference of any float.
        error: f64,
    },
    /// It cannot go on, and has ended.
    Failed {
        /// For people.
        error: String,
    },
}

/// What steps of S took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SparseSteps {
    /// By [`crate::clock::now_s`].
    pub start_s: f64,
    /// By [`crate::clock::now_s`].
    pub end_s: f64,
    /// Unique rows, each pulled and pushed.
    pub rows: usize,
    /// Each step.
    pub step_s: Vec<f64>,
    /// Share of all steps that went into making keys unique.
    pub dedup_s: f64,
    /// Share of all steps from before a push until it is applied.
    pub push_s: f64,
    /// Processor time of the worker.
    pub cpu_s: f64,
}

/// What steps of D took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DenseSteps {
    /// Each pull.
    pub pull_s: Vec<f64>,
    /// Each push.
    pub push_s: Vec<f64>,
    /// Processor time of the worker.
    pub cpu_s: f64,
}

/// The child's end.
pub(crate) struct Inbox {
    lines: mpsc::UnboundedReceiver<String>,
    ended: Arc<AtomicBool>,
}

/// How long a child may clean up when its stdin has ended.
const GRACE: Duration = Duration::from_secs(5);

impl Inbox {
    /// Reads stdin on a thread of its own, so that its end is noticed at any time.
    pub(crate) fn open() -> anyhow::Result<Self> {
        let (sender, lines) = mpsc::unbounded_channel();
        let ended = Arc::new(AtomicBool::new(false));
        let flag = ended.clone();
        let read = move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
            flag.store(true, Ordering::Relaxed);
            drop(sender);
            std::thread::sleep(GRACE);
            std::process::exit(1);
        };
        std::thread::Builder::new().name("stdin".into()).spawn(read).context("start a thread")?;
        Ok(Self { lines, ended })
    }

    /// The next line; `None` when the parent wants no more.
    pub(crate) async fn next<T: for<'de> Deserialize<'de>>(&mut self) -> anyhow::Result<Option<T>> {
        self.lines.recv().await.map(|line| parse(&line)).transpose()
    }

    /// As [`next`](Self::next), for a child without a runtime.
    pub(crate) fn wait<T: for<'de> Deserialize<'de>>(&mut self) -> anyhow::Result<Option<T>> {
        self.lines.blocking_recv().map(|line| parse(&line)).transpose()
    }

    /// An error when the parent wants no more.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.ended.load(Ordering::Relaxed) { Err(anyhow!("interrupted")) } else { Ok(()) }
    }
}

/// One line to stdout.
pub(crate) fn say(answer: &Answer) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(answer)?)?;
    stdout.flush()?;
    Ok(())
}

pub(crate) fn parse<T: for<'de> Deserialize<'de>>(line: &str) -> anyhow::Result<T> {
    serde_json::from_str(line).with_context(|| format!("read the line `{line}`"))
}
