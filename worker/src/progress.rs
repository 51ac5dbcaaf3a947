//! Which steps are over, and which tasks are trained with them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::tasks::Tasks;

/// So many batches and rows, one after the other from where the loop began, every push of them acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Of this worker, in this loop.
    pub batches: u64,
    /// In them.
    pub samples: u64,
}

/// A task of which a batch has the last row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LastRow {
    pub(crate) position: u32,
    pub(crate) rows: u64,
}

/// What a step read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Batch {
    pub(crate) samples: u64,
    pub(crate) last_rows: Vec<LastRow>,
}

/// The steps of a loop, whatever the order in which they end.
pub(crate) struct Progress {
    first_clock: u64,
    at: Position,
    /// Beyond the first step that is not over, by clock.
    ahead: BTreeMap<u64, Batch>,
    /// Tasks without a row in any later step than the one before this clock.
    after: BTreeMap<u64, Vec<LastRow>>,
    told: watch::Sender<Position>,
    /// Those of the job, where they are shared.
    tasks: Option<Arc<Tasks>>,
}

impl Progress {
    pub(crate) fn new(
        first_clock: u64,
        told: watch::Sender<Position>,
        tasks: Option<Arc<Tasks>>,
    ) -> Self {
        let at = Position::default();
        Self { first_clock, at, ahead: BTreeMap::new(), after: BTreeMap::new(), told, tasks }
    }

    /// The step of this clock is over, its push acknowledged. A task is trained when all steps are that had rows of it, and they came one after the other.
    pub(crate) fn over(&mut self, clock: u64, batch: Batch, took: Duration) {
        if let Some(tasks) = &self.tasks {
            tasks.step_took(took);
        }
        self.ahead.insert(clock, batch);
        while let Some(batch) = self.ahead.remove(&self.clock()) {
            self.at.batches += 1;
            self.at.samples += batch.samples;
            self.trained(&batch.last_rows);
            if let Some(rest) = self.after.remove(&self.clock()) {
                self.trained(&rest);
            }
        }
        self.told.send_replace(self.at);
    }

    /// These tasks have no row in the step of this clock or later ones.
    pub(crate) fn ended_before(&mut self, clock: u64, tasks: Vec<LastRow>) {
        if clock == self.clock() {
            self.trained(&tasks);
        } else if !tasks.is_empty() {
            self.after.entry(clock).or_default().extend(tasks);
        }
    }

    /// Of the first step that is not over.
    fn clock(&self) -> u64 {
        self.first_clock + self.at.batches
    }

    fn trained(&self, tasks: &[LastRow]) {
        let clock = self.clock().saturating_sub(1);
        if let Some(shared) = &self.tasks {
            tasks.iter().for_each(|task| shared.done(task.position, task.rows, clock));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_passes_a_step_when_all_before_it_are_over() {
        let (tell, told) = watch::channel(Position::default());
        let mut progress = Progress::new(5, tell, None);
        let mut over = |clock, samples| {
            let batch = Batch { samples, last_rows: Vec::new() };
            progress.over(clock, batch, Duration::ZERO);
            let Position { batches, samples } = *told.borrow();
            (batches, samples)
        };
        assert_eq!(over(6, 10), (0, 0));
        assert_eq!(over(7, 20), (0, 0));
        assert_eq!(over(5, 100), (3, 130));
        assert_eq!(over(8, 1), (4, 131));
    }
}
