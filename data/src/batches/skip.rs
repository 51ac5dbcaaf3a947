//! The place after so many batches, without making them.
//!
//! Which row is drawn when depends on the numbers of rows alone, so the draws are repeated on numbers; only what waits in the buffer at the end is read.

use std::sync::Arc;

use super::{Batches, MOVED_ROWS_MIN, Reading, Shuffle};
use crate::rng::Rng;
use crate::{BatchOptions, CHUNK_ROWS_MAX, Chunk, Encoded, Part, Result, Task};

impl Batches {
    /// Leaves out the first batches; to be called before the first `next`. It asks for all tasks at once.
    ///
    /// Of Parquet files only the parts are read that hold rows of the buffer at that place; of text, whose rows nobody has counted, everything before it.
    pub fn skip_batches(&mut self, count: u64) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let tasks: Vec<Task> = self.tasks.by_ref().collect();
        let counted = |task: &Task| matches!(task.part, Part::Rows { .. }) && task.rows.is_some();
        if tasks.iter().all(counted)
            && self.go_to(Place::after(count, &tasks, self.options), &tasks)?
        {
            return Ok(());
        }
        self.reading = None;
        self.shuffle = Shuffle::new(Encoded::empty(self.encoder.schema()), self.options.seed);
        self.tasks = Box::new(tasks.into_iter());
        for _ in 0..count {
            if self.next().transpose()?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// False where the tasks do not come in the pieces that the place was computed for.
    fn go_to(&mut self, place: Place, tasks: &[Task]) -> Result<bool> {
        let mut order = place.waiting.clone();
        order.sort_unstable();
        let mut kept = order.as_slice();
        let mut start = 0;
        for (index, task) in tasks.iter().enumerate().take(place.task + 1) {
            let rows = task.rows.unwrap_or(0);
            let current = index == place.task;
            let read = if current { place.rows_read } else { rows };
            let (here, later) = kept.split_at(kept.partition_point(|row| *row < start + rows));
            kept = later;
            // Of a task before the current one nothing is read behind its last row that is kept.
            let until = if current { read } else { here.last().map_or(0, |row| row - start + 1) };
            if until > 0 {
                let here: Vec<u64> = here.iter().map(|row| row - start).collect();
                if !self.enter(task, rows, until, &here, current)? {
                    return Ok(false);
                }
            }
            start += rows;
        }
        let of_row = |row: &u64| order.partition_point(|other| other < row);
        self.shuffle.waiting = place.waiting.iter().map(of_row).collect();
        self.shuffle.held = place.held;
        self.shuffle.rng = place.rng;
        let next = place.task + usize::from(place.rows_read > 0);
        let left: Vec<Task> = tasks.iter().skip(next).cloned().collect();
        self.tasks = Box::new(left.into_iter());
        Ok(true)
    }

    /// Reads a task up to a row, and puts those of its rows that are kept into the buffer. The current task stays open there.
    fn enter(
        &mut self,
        task: &Task,
        rows: u64,
        until: u64,
        kept: &[u64],
        current: bool,
    ) -> Result<bool> {
        let task = Arc::new(task.clone());
        let mut reader = self.dataset.open(&task)?;
        let shuffles = self.options.shuffle_rows > 0;
        if shuffles {
            self.shuffle.enter(&task);
            if let Some(waiting) = self.shuffle.tasks.last_mut() {
                (waiting.rows, waiting.read) = (kept.len(), !current);
            }
        }
        let (mut at, mut left, mut rest) = (0, kept, None);
        while at < until {
            let Some(Chunk { batch, first_row }) = reader.next().transpose()? else {
                return Ok(false);
            };
            let count = batch.num_rows() as u64;
            if count == 0 || (shuffles && count != (rows - at).min(CHUNK_ROWS_MAX as u64)) {
                return Ok(false);
            }
            let (here, later) = left.split_at(left.partition_point(|row| *row < at + count));
            left = later;
            for run in here.chunk_by(|row, next| row + 1 == *next) {
                let offset = run[0] - at;
                let rows = batch.slice(offset as usize, run.len());
                self.encoder.append(&mut self.shuffle.rows, &task, &rows, first_row + offset)?;
            }
            if at + count > until {
                let (done, left) = ((until - at) as usize, (at + count - until) as usize);
                rest = Some(Chunk {
                    batch: batch.slice(done, left),
                    first_row: first_row + done as u64,
                });
            }
            at += count;
        }
        if current {
            // In a buffer whole chunks are read.
            if shuffles && rest.is_some() {
                return Ok(false);
            }
            self.reading = Some(Reading { task, reader, chunk: rest });
        }
        Ok(true)
    }
}

/// Where [`Batches`] is.
struct Place {
    /// Rows that wait in the buffer, counted over all tasks, as they lie there.
    waiting: Vec<u64>,
    held: usize,
    rng: Rng,
    /// The task that is being read, and how much of it was.
    task: usize,
    rows_read: u64,
}

impl Place {
    /// Repeats what `Batches::advance` does.
    fn after(count: u64, tasks: &[Task], options: BatchOptions) -> Self {
        let BatchOptions { batch, shuffle_rows, seed } = options;
        let rng = Rng::new(seed);
        let mut place = Self { waiting: Vec::new(), held: 0, rng, task: 0, rows_read: 0 };
        let mut start = 0;
        for _ in 0..count {
            let mut built = 0;
            while built < batch {
                let wanted = batch - built;
                let waiting = place.waiting.len();
                if waiting > shuffle_rows {
                    built += place.draw((waiting - shuffle_rows).min(wanted));
                } else if let Some(task) = tasks.get(place.task) {
                    let rows = task.rows.unwrap_or(0);
                    let left = rows - place.rows_read;
                    if left == 0 {
                        start += rows;
                        (place.task, place.rows_read) = (place.task + 1, 0);
                    } else if shuffle_rows > 0 {
                        let chunk = left.min(CHUNK_ROWS_MAX as u64);
                        let first = start + place.rows_read;
                        place.waiting.extend(first..first + chunk);
                        place.held += chunk as usize;
                        place.rows_read += chunk;
                    } else {
                        let taken = left.min(wanted as u64);
                        built += taken as usize;
                        place.rows_read += taken;
                    }
                } else if waiting > 0 {
                    built += place.draw(waiting.min(wanted));
                } else {
                    break;
                }
            }
            if built == 0 {
                break;
            }
        }
        place
    }

    fn draw(&mut self, count: usize) -> usize {
        for _ in 0..count {
            let at = self.rng.below(self.waiting.len());
            self.waiting.swap_remove(at);
        }
        if self.held > 2 * self.waiting.len().max(MOVED_ROWS_MIN) {
            self.waiting.sort_unstable();
            self.held = self.waiting.len();
        }
        count
    }
}
