//! The thread that reads: rows in, prepared batches out, at most a few ahead.

use std::sync::Arc;

use downpour_data::{BatchOptions, Batches, Dataset, Encoder, Task, shuffled};
use tokio::sync::mpsc;

use crate::features::Layout;
use crate::prepare::Prepared;
use crate::{Error, Result};

/// What one worker reads of a dataset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) batch: usize,
    pub(crate) epochs: u64,
    pub(crate) shuffle_rows: usize,
    pub(crate) seed: u64,
    /// This worker's number and how many there are.
    pub(crate) share: (usize, usize),
    /// What is left out at the start: passes, and batches of the pass after them.
    pub(crate) skip: (u64, u64),
}

/// With fewer tasks than this for each worker, every worker reads all rows and takes each n-th batch: tasks would divide too unevenly.
const TASKS_PER_WORKER_MIN: usize = 8;

/// Starts the thread. It ends with the data, with an error, or when the receiver has gone.
pub(crate) fn start(
    dataset: Arc<dyn Dataset>,
    layout: Arc<Layout>,
    reading: Reading,
    ahead: usize,
) -> Result<mpsc::Receiver<Result<Prepared>>> {
    let (send, receive) = mpsc::channel(ahead);
    let read = move || {
        if let Err(Ended::Failed(error)) = read(&dataset, &layout, reading, &send) {
            // A receiver that has gone wants no error either.
            _ = send.blocking_send(Err(error));
        }
    };
    std::thread::Builder::new()
        .name("downpour-reader".into())
        .spawn(read)
        .map_err(Error::Runtime)?;
    Ok(receive)
}

enum Ended {
    Failed(Error),
    ReceiverGone,
}

impl From<downpour_data::Error> for Ended {
    fn from(error: downpour_data::Error) -> Self {
        Ended::Failed(error.into())
    }
}

fn read(
    dataset: &Arc<dyn Dataset>,
    layout: &Arc<Layout>,
    reading: Reading,
    send: &mpsc::Sender<Result<Prepared>>,
) -> std::result::Result<(), Ended> {
    let Reading { batch, epochs, shuffle_rows, seed, share: (index, workers), skip } = reading;
    let (first, mut skip) = skip;
    let tasks = dataset.tasks()?;
    let by_task = tasks.len() >= TASKS_PER_WORKER_MIN * workers;
    for epoch in first..epochs {
        let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(epoch);
        let tasks = if shuffle_rows > 0 { shuffled(tasks.clone(), seed) } else { tasks.clone() };
        let tasks: Vec<Task> = (tasks.into_iter().enumerate())
            .filter(|(i, _)| !by_task || i % workers == index)
            .map(|(_, task)| task)
            .collect();
        let options = BatchOptions { batch, shuffle_rows, seed };
        let encoder = Encoder::new(layout.schema.clone());
        let mut batches = Batches::new(dataset.clone(), encoder, tasks, options);
        let skipped = if by_task { skip } else { skip * workers as u64 };
        batches.skip_batches(skipped)?;
        skip = 0;
        for (number, encoded) in (skipped..).zip(batches) {
            let encoded = encoded?;
            if encoded.rows() == 0 || !(by_task || number % workers as u64 == index as u64) {
                continue;
            }
            let prepared = Prepared::new(layout, encoded, epoch);
            send.blocking_send(Ok(prepared)).map_err(|_| Ended::ReceiverGone)?;
        }
    }
    Ok(())
}
