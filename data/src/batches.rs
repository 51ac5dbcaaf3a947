use std::sync::Arc;

use crate::rng::Rng;
use crate::{BatchReader, Chunk, Dataset, Encoded, Encoder, Finished, Result, Task};

/// How [`Batches`] cuts and mixes rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Rows of every batch but the last.
    pub batch: usize,
    /// Rows that wait in memory to be drawn at random; 0 keeps the order of the file.
    pub shuffle_rows: usize,
    /// The same seed and tasks give the same batches.
    pub seed: u64,
}

/// Tasks as a stream of batches of exactly [`BatchOptions::batch`] rows, across the borders of tasks.
///
/// Tasks are asked for one at a time, so the iterator may lease them from elsewhere. When it has none,
/// the rows that are left come as a last, shorter batch, and then `None`; a later `next` asks for tasks
/// again. A batch without rows can come last: it brings tasks in [`Encoded::finished`] that had none.
/// After an error nothing follows.
pub struct Batches {
    dataset: Arc<dyn Dataset>,
    encoder: Encoder,
    tasks: Box<dyn Iterator<Item = Task> + Send>,
    options: BatchOptions,
    reading: Option<Reading>,
    building: Encoded,
    shuffle: Shuffle,
    failure: Option<crate::Error>,
    failed: bool,
}

/// The task that is being read.
struct Reading {
    task: Arc<Task>,
    reader: BatchReader,
    /// What is not yet encoded.
    chunk: Option<Chunk>,
    /// So far.
    rows: u64,
}

impl Batches {
    /// `tasks` decides the order.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        encoder: Encoder,
        tasks: impl IntoIterator<Item = Task, IntoIter: Send + 'static>,
        options: BatchOptions,
    ) -> Self {
        let building = Encoded::empty(encoder.schema());
        Self {
            dataset,
            shuffle: Shuffle::new(building.clone(), options.seed),
            encoder,
            tasks: Box::new(tasks.into_iter()),
            options: BatchOptions { batch: options.batch.max(1), ..options },
            reading: None,
            building,
            failure: None,
            failed: false,
        }
    }

    /// One batch, a last short one, or `None` where nothing is left.
    fn advance(&mut self) -> Result<Option<Encoded>> {
        while self.building.rows() < self.options.batch {
            let wanted = self.options.batch - self.building.rows();
            if self.shuffle.rows() > self.options.shuffle_rows {
                let spare = self.shuffle.rows() - self.options.shuffle_rows;
                self.shuffle.draw(spare.min(wanted), &mut self.building);
            } else if let Some(reading) = &mut self.reading {
                if let Some(chunk) = reading.chunk.take() {
                    self.take_rows(chunk)?;
                } else {
                    self.read()?;
                }
            } else if let Some(task) = self.tasks.next() {
                let task = Arc::new(task);
                let reader = self.dataset.open(&task)?;
                if self.options.shuffle_rows > 0 {
                    self.shuffle.enter(&task);
                }
                self.reading = Some(Reading { task, reader, chunk: None, rows: 0 });
            } else if self.shuffle.rows() > 0 {
                self.shuffle.draw(self.shuffle.rows().min(wanted), &mut self.building);
            } else if self.building.rows() > 0 || !self.building.finished.is_empty() {
                break;
            } else {
                return Ok(None);
            }
        }
        // The end of a task is seen now and not one batch later, which might never come.
        if self.reading.as_ref().is_some_and(|reading| reading.chunk.is_none()) {
            self.failure = self.read().err();
        }
        let empty = Encoded::empty(self.encoder.schema());
        Ok(Some(std::mem::replace(&mut self.building, empty)))
    }

    /// Encodes rows of a chunk into the batch, as many as it wants, or all into the shuffle buffer.
    fn take_rows(&mut self, chunk: Chunk) -> Result<()> {
        let Some(reading) = &mut self.reading else { return Ok(()) };
        let Chunk { batch, first_row } = chunk;
        if self.options.shuffle_rows > 0 {
            return self.shuffle.fill(&self.encoder, &reading.task, &batch, first_row);
        }
        let count = batch.num_rows().min(self.options.batch - self.building.rows());
        let rows = batch.slice(0, count);
        self.encoder.append(&mut self.building, &reading.task, &rows, first_row)?;
        if count < batch.num_rows() {
            reading.chunk = Some(Chunk {
                batch: batch.slice(count, batch.num_rows() - count),
                first_row: first_row + count as u64,
            });
        }
        Ok(())
    }

    /// Reads a chunk, or notes that the task has no more.
    fn read(&mut self) -> Result<()> {
        let Some(reading) = &mut self.reading else { return Ok(()) };
        reading.chunk = reading.reader.next().transpose()?;
        if let Some(chunk) = &reading.chunk {
            reading.rows += chunk.batch.num_rows() as u64;
        } else {
            if self.options.shuffle_rows == 0 {
                let (task, rows) = (reading.task.clone(), reading.rows);
                self.building.finished.push(Finished { task, rows });
            } else {
                self.building.finished.extend(self.shuffle.leave(&reading.task));
            }
            self.reading = None;
        }
        Ok(())
    }
}

impl Iterator for Batches {
    type Item = Result<Encoded>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let outcome = match self.failure.take() {
            Some(error) => Err(error),
            None => self.advance(),
        };
        self.failed = outcome.is_err();
        outcome.transpose()
    }
}

/// Rows from which the next one is drawn at random. It holds at most twice the rows that wait, plus
/// one chunk: drawn rows stay where they are until they are more than half.
struct Shuffle {
    rows: Encoded,
    empty: Encoded,
    /// Indices of the rows that wait.
    waiting: Vec<usize>,
    /// Rows that came since they were last moved, and those that waited then: what tells when to move them again.
    held: usize,
    tasks: Vec<Waiting>,
    rng: Rng,
}

/// A task of which rows wait or may still come.
struct Waiting {
    task: Arc<Task>,
    rows: usize,
    /// With those that wait no more.
    all_rows: u64,
    read: bool,
}

impl Shuffle {
    fn new(empty: Encoded, seed: u64) -> Self {
        let rows = empty.clone();
        Self { rows, empty, waiting: Vec::new(), held: 0, tasks: Vec::new(), rng: Rng::new(seed) }
    }

    fn rows(&self) -> usize {
        self.waiting.len()
    }

    fn enter(&mut self, task: &Arc<Task>) {
        self.tasks.push(Waiting { task: task.clone(), rows: 0, all_rows: 0, read: false });
    }

    fn position(&self, task: &Arc<Task>) -> Option<usize> {
        self.tasks.iter().rposition(|waiting| Arc::ptr_eq(&waiting.task, task))
    }

    fn fill(
        &mut self,
        encoder: &Encoder,
        task: &Arc<Task>,
        batch: &arrow_array::RecordBatch,
        first_row: u64,
    ) -> Result<()> {
        let start = self.rows.rows();
        encoder.append(&mut self.rows, task, batch, first_row)?;
        self.waiting.extend(start..self.rows.rows());
        self.held += self.rows.rows() - start;
        if let Some(at) = self.position(task) {
            self.tasks[at].rows += batch.num_rows();
            self.tasks[at].all_rows += batch.num_rows() as u64;
        }
        Ok(())
    }

    /// Moves so many rows to the batch, and to its finished tasks those of which it was the last row.
    fn draw(&mut self, count: usize, batch: &mut Encoded) {
        let rng = &mut self.rng;
        let waiting = &mut self.waiting;
        let mut draw = |_| waiting.swap_remove(rng.below(waiting.len()));
        let rows: Vec<usize> = (0..count).map(&mut draw).collect();
        batch.push_rows(&self.rows, &rows);
        for row in rows {
            if let Some(at) = self.position(&self.rows.origins[row].task) {
                self.tasks[at].rows -= 1;
                batch.finished.extend(self.done(at));
            }
        }
        if self.held > 2 * self.waiting.len().max(MOVED_ROWS_MIN) {
            let mut kept = self.empty.clone();
            self.waiting.sort_unstable();
            kept.push_rows(&self.rows, &self.waiting);
            self.waiting = (0..kept.rows()).collect();
            self.held = kept.rows();
            self.rows = kept;
        }
    }

    /// The task has no more rows to come.
    fn leave(&mut self, task: &Arc<Task>) -> Option<Finished> {
        let at = self.position(task)?;
        self.tasks[at].read = true;
        self.done(at)
    }

    fn done(&mut self, at: usize) -> Option<Finished> {
        let Waiting { rows, read, .. } = self.tasks[at];
        (rows == 0 && read).then(|| {
            let Waiting { task, all_rows, .. } = self.tasks.remove(at);
            Finished { task, rows: all_rows }
        })
    }
}

/// Fewer drawn rows than this are not worth moving the others for.
const MOVED_ROWS_MIN: usize = 1024;
