//! Where a worker is in its data, as a label of the job that checkpoints keep: how many batches are trained, one after the other from the start, every push of
//! them acknowledged. A checkpoint takes labels before it cuts the shards, so what a label says is trained is in the rows (`docs/protocol.md`, 8).

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use downpour_client::{Coordinators, Session};
use downpour_data::{Dataset, hash};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::reader::Reading;
use crate::{Error, Result, begin};

/// How often a label is written where there is something new. So much is trained again after everything was killed, beside what was on its way.
const LABEL_EVERY: Duration = Duration::from_secs(1);

/// So many batches and rows, from the start of the first pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Of this worker.
    pub batches: u64,
    /// In them.
    pub samples: u64,
    /// The pass that the last of them was read in, from 0.
    pub epoch: u64,
    /// How many came before that pass.
    pub epoch_start: u64,
}

/// What a step read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    pub(crate) samples: u64,
    pub(crate) epoch: u64,
}

/// The steps that are over, whatever the order in which they end.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    position: Position,
    /// Beyond the first that is not over, by clock.
    ahead: BTreeMap<u64, Batch>,
}

impl Finished {
    pub(crate) fn from(position: Position) -> Self {
        Self { position, ahead: BTreeMap::new() }
    }

    /// The step of this clock is over.
    pub(crate) fn add(&mut self, clock: u64, batch: Batch) -> Position {
        self.ahead.insert(clock, batch);
        let at = &mut self.position;
        while let Some(batch) = self.ahead.remove(&at.batches) {
            if batch.epoch != at.epoch {
                (at.epoch, at.epoch_start) = (batch.epoch, at.batches);
            }
            at.batches += 1;
            at.samples += batch.samples;
        }
        *at
    }
}

/// What must be the same for a position to mean the same rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reads {
    batch: usize,
    shuffle_rows: usize,
    seed: u64,
    workers: usize,
    tasks: usize,
    /// Of names, sizes and order of files, not of what is in them.
    data: String,
}

impl Reads {
    pub(crate) fn new(reading: &Reading, dataset: &dyn Dataset) -> Result<Self> {
        let tasks = dataset.tasks()?;
        let sum = tasks.iter().fold(0, |sum, task| {
            // The folder may be another one on another machine.
            let file = task.file.rsplit('/').next().unwrap_or_default();
            let text = format!("{file}\n{:?}\n{:?}", task.part, task.rows);
            text.bytes().fold(sum, |sum, byte| hash::mix64(sum ^ u64::from(byte)))
        });
        Ok(Self {
            batch: reading.batch,
            shuffle_rows: reading.shuffle_rows,
            seed: reading.seed,
            workers: reading.share.1,
            tasks: tasks.len(),
            data: format!("{sum:016x}"),
        })
    }

    /// What differs, in words.
    fn differences(&self, now: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut number = |what: &str, was: u64, is: u64| {
            if was != is {
                differences.push(format!("{what} was {was} and is {is}"));
            }
        };
        number("the batch size", self.batch as u64, now.batch as u64);
        number("the shuffle buffer", self.shuffle_rows as u64, now.shuffle_rows as u64);
        number("the seed", self.seed, now.seed);
        number("the number of workers", self.workers as u64, now.workers as u64);
        if (&self.data, self.tasks) != (&now.data, now.tasks) {
            differences.push("the training data has other files, or files of other sizes".into());
        }
        differences
    }
}

/// What the label says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    #[serde(flatten)]
    position: Position,
    /// Of so many passes nothing is left. 0: there is something.
    done: u64,
    /// Whose label it is: who finds another session here has been replaced.
    session: u64,
    reads: Reads,
}

/// Where a worker begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// There.
    pub at: Position,
    /// The checkpoint, and where it is, that the job began from, if it did.
    pub checkpoint: Option<(String, String)>,
    /// Every batch had been trained when the label was written: nothing is left to do. More epochs would go on.
    pub done: bool,
}

/// How far the pipeline is, and whether it has come to the end of the data.
pub(crate) type Told = (Position, bool);

/// Keeps a worker's label.
pub(crate) struct Labels {
    coordinators: Coordinators,
    job: downpour_core::id::JobId,
    key: String,
    now: Progress,
    epochs: u64,
    start: Position,
    /// As it is in the cluster.
    written: String,
    /// Version of the job when it was read: labels that are set back later may say the very same, and what was trained since is gone.
    since: u64,
}

impl Labels {
    /// Reads where the worker was, and makes the label its own.
    pub(crate) async fn begin(
        coordinators: &Coordinators,
        session: &Session,
        reading: &Reading,
        reads: Reads,
    ) -> Result<(Self, Start)> {
        let (worker, epochs) = (reading.share.0, reading.epochs);
        let name = session.state().view.spec.name.clone();
        let status = begin::status(coordinators, &name).await?.ok_or_else(|| {
            Error::usage(format!("job {name:?} was deleted while this worker joined it"))
        })?;
        let key = begin::label(worker);
        let written = status.labels.get(&key).cloned().unwrap_or_default();
        let (at, done) = match written.as_str() {
            "" => (Position::default(), 0),
            text => start(text, &reads).map_err(|problem| {
                Error::usage(format!("worker {worker} of job {name:?} cannot go on: {problem}"))
            })?,
        };
        let now = Progress { position: at, done, session: session.id().0, reads };
        let coordinators = coordinators.clone();
        let job = session.job();
        let since = status.view.as_ref().map_or(0, |view| view.version);
        let mut labels = Self { coordinators, job, key, now, epochs, start: at, written, since };
        labels.write().await?;
        let checkpoint =
            begin::began_from(&status).map(|(uri, name)| (name.to_owned(), uri.to_owned()));
        Ok((labels, Start { at, checkpoint, done: done > 0 && done >= epochs }))
    }

    /// Writes what is new, until the pipeline has ended.
    pub(crate) async fn follow(mut self, mut told: watch::Receiver<Told>) -> Result<()> {
        while told.changed().await.is_ok() {
            self.note(*told.borrow_and_update());
            match self.write().await {
                Ok(()) => {}
                Err(Error::Cluster(error)) => {
                    tracing::warn!(%error, "what is trained could not be noted");
                }
                Err(error) => return Err(error),
            }
            // The end need not wait.
            let mut until = told.clone();
            let ended = async { while until.changed().await.is_ok() {} };
            _ = tokio::time::timeout(LABEL_EVERY, ended).await;
        }
        self.note(*told.borrow());
        self.write().await
    }

    fn note(&mut self, (position, ended): Told) {
        self.now.position = position;
        // A training that was done stays so where it goes on for fewer passes.
        if ended {
            self.now.done = self.now.done.max(self.epochs);
        } else if position != self.start {
            self.now.done = 0;
        }
    }

    async fn write(&mut self) -> Result<()> {
        let text = serde_json::to_string(&self.now).unwrap_or_default();
        if text == self.written {
            return Ok(());
        }
        let expected = Some(self.written.as_str());
        let (changed, found) = self
            .coordinators
            .label_job(self.job, &self.key, &text, expected, Some(self.since))
            .await?;
        // A repeated call finds what it wrote itself.
        if !changed && found != text {
            // Sessions are numbered in the order of their beginning.
            match serde_json::from_str::<Progress>(&found) {
                Ok(newer) if newer.session > self.now.session => {}
                Ok(Progress { position: Position { batches, .. }, .. }) => {
                    return Err(Error::SetBack { batches });
                }
                Err(_) if found.is_empty() => return Err(Error::SetBack { batches: 0 }),
                Err(_) => {}
            }
            return Err(Error::usage(format!(
                "another process trains as this worker: the job's label {:?} was changed to {found}",
                self.key
            )));
        }
        self.written = text;
        Ok(())
    }
}

/// Whether so many workers have trained all that they had to.
pub(crate) fn all_done(labels: &HashMap<String, String>, workers: usize) -> bool {
    (0..workers).all(|worker| {
        let text = labels.get(&begin::label(worker)).map_or("", String::as_str);
        serde_json::from_str(text).is_ok_and(|progress: Progress| progress.done > 0)
    })
}

/// Where the label says that this worker was.
fn start(label: &str, reads: &Reads) -> std::result::Result<(Position, u64), String> {
    let was: Progress = serde_json::from_str(label).map_err(|error| {
        format!("its label is not understood ({error}); --fresh starts the job over")
    })?;
    let differences = was.reads.differences(reads);
    if differences.is_empty() {
        return Ok((was.position, was.done));
    }
    if was.done > 0 || was.position.batches == 0 {
        // What it was trained on is over, or was never begun: this is another training of the same model.
        return Ok((Position::default(), 0));
    }
    Err(format!(
        "it was at batch {} of a training that read other rows: {}. Give what it was begun with, or --fresh to start the job over",
        was.position.batches,
        differences.join("; ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads() -> Reads {
        let data = "0123456789abcdef".into();
        Reads { batch: 100, shuffle_rows: 10, seed: 1, workers: 2, tasks: 3, data }
    }

    fn at(batches: u64, samples: u64, epoch: u64, epoch_start: u64) -> Position {
        Position { batches, samples, epoch, epoch_start }
    }

    fn label(done: u64) -> String {
        let position = at(7, 690, 1, 4);
        serde_json::to_string(&Progress { position, done, session: 5, reads: reads() }).unwrap()
    }

    #[test]
    fn a_position_passes_a_step_when_all_before_it_are_over() {
        let mut finished = Finished::from(at(5, 500, 0, 0));
        let mut add = |clock, samples, epoch| finished.add(clock, Batch { samples, epoch });
        assert_eq!(add(6, 10, 1), at(5, 500, 0, 0));
        assert_eq!(add(7, 20, 1), at(5, 500, 0, 0));
        assert_eq!(add(5, 100, 0), at(8, 630, 1, 6));
        assert_eq!(add(8, 1, 2), at(9, 631, 2, 8));
    }

    #[test]
    fn the_same_reading_goes_on_where_it_was() {
        assert_eq!(start(&label(0), &reads()), Ok((at(7, 690, 1, 4), 0)));
        assert_eq!(start(&label(2), &reads()), Ok((at(7, 690, 1, 4), 2)));
    }

    #[test]
    fn another_reading_is_refused_by_what_differs_unless_the_first_is_done() {
        let data = "other".to_owned();
        for (other, word) in [
            (Reads { batch: 200, ..reads() }, "the batch size was 100 and is 200"),
            (Reads { shuffle_rows: 0, ..reads() }, "shuffle buffer"),
            (Reads { seed: 2, ..reads() }, "the seed"),
            (Reads { workers: 3, ..reads() }, "the number of workers was 2 and is 3"),
            (Reads { data, ..reads() }, "other files"),
        ] {
            let problem = start(&label(0), &other).unwrap_err();
            assert!(problem.contains(word) && problem.contains("--fresh"), "{problem}");
            assert_eq!(start(&label(2), &other), Ok((Position::default(), 0)));
        }
        let nothing = label(0).replace("\"batches\":7", "\"batches\":0");
        assert_eq!(start(&nothing, &Reads { seed: 2, ..reads() }), Ok((Position::default(), 0)));
        assert!(start("{}", &reads()).unwrap_err().contains("--fresh"));
    }
}
