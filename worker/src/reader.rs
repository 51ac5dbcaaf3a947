//! The thread that reads: rows in, prepared batches out, at most a few ahead.
//!
//! Batches have one size, whatever the size of tasks: a step may have rows of several, and a task is done when the last step with rows of it is. Only where nothing more is to be had for
//! now, at the end of a pass or because other workers have what is left, the rows that wait are put out as they are: a shorter batch then, so that nobody waits for rows that lie in a buffer.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use downpour_core::ledger::Order;
use downpour_data::{BatchOptions, Batches, Dataset, Encoded, Encoder, Task};
use tokio::sync::mpsc;

use crate::features::Layout;
use crate::prepare::Prepared;
use crate::progress::LastRow;
use crate::tasks::{Next, Tasks};
use crate::{Error, Result};

/// What one worker reads of a dataset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) batch: usize,
    pub(crate) epochs: u64,
    pub(crate) shuffle_rows: usize,
    pub(crate) seed: u64,
}

impl Reading {
    fn options(&self, pass: u64) -> BatchOptions {
        let Reading { batch, shuffle_rows, seed, .. } = *self;
        let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(pass);
        BatchOptions { batch, shuffle_rows, seed }
    }
}

/// What the thread has to say.
#[allow(clippy::large_enum_variant, reason = "nearly all are batches, and few wait at a time")]
#[derive(Debug)]
pub(crate) enum Read {
    /// Rows.
    Batch(Prepared),
    /// Nothing more comes before steps are over. These tasks have no row in what comes then.
    Pause(Vec<LastRow>),
}

/// Starts the thread. It ends with the data, with an error, or when the receiver has gone. Without `shared` it reads every task itself.
pub(crate) fn start(
    dataset: Arc<dyn Dataset>,
    layout: Arc<Layout>,
    reading: Reading,
    shared: Option<Arc<Tasks>>,
    ahead: usize,
) -> Result<mpsc::Receiver<Result<Read>>> {
    let (send, receive) = mpsc::channel(ahead);
    let reader = Reader { dataset, layout, reading, send };
    let read = move || {
        let read = || match shared {
            Some(tasks) => reader.read_shared(&tasks),
            None => reader.read_all(),
        };
        // Datasets are others' code, and a thread that is gone would pass for one that came to the end.
        let ended = catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
            Err(Ended::Failed(Error::usage("the reader of the data panicked: see its message")))
        });
        if let Err(Ended::Failed(error)) = ended {
            // A receiver that has gone wants no error either.
            _ = reader.send.blocking_send(Err(error));
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

struct Reader {
    dataset: Arc<dyn Dataset>,
    layout: Arc<Layout>,
    reading: Reading,
    send: mpsc::Sender<Result<Read>>,
}

impl Reader {
    /// All passes over all tasks.
    fn read_all(&self) -> std::result::Result<(), Ended> {
        let tasks = self.dataset.tasks()?;
        let seed = (self.reading.shuffle_rows > 0).then_some(self.reading.seed);
        for pass in 0..self.reading.epochs {
            let order = Order::new(tasks.len().try_into().unwrap_or(u32::MAX), seed, pass);
            let task = |position| tasks[order.task(position) as usize].clone();
            let ordered: Vec<Task> = (0..tasks.len() as u32).map(task).collect();
            for encoded in self.batches(pass, ordered) {
                self.batch(encoded?, Vec::new())?;
            }
        }
        Ok(())
    }

    /// Those that the job's ledger gives to this worker.
    fn read_shared(&self, shared: &Arc<Tasks>) -> std::result::Result<(), Ended> {
        let tasks: Arc<[Task]> = self.dataset.tasks()?.into();
        let mut next = shared.next();
        while let Some(Next { pass, position }) = next {
            let order = shared.plan().order(pass);
            let (sender, first) = std::sync::mpsc::channel();
            _ = sender.send(position);
            let (leases, list) = (shared.clone(), tasks.clone());
            let leased = std::iter::from_fn(move || {
                let position = first.try_recv().ok().or_else(|| leases.next_of(pass))?;
                Some(list[order.task(position) as usize].clone())
            });
            let positions: HashMap<&Task, u32> = (0..tasks.len() as u32)
                .map(|position| (&tasks[order.task(position) as usize], position))
                .collect();
            let mut batches = self.batches(pass, leased);
            loop {
                let mut rest = Vec::new();
                for encoded in batches.by_ref() {
                    let encoded = encoded?;
                    let last_row = |one: &downpour_data::Finished| {
                        let position = *positions.get(&*one.task)?;
                        Some(LastRow { position, rows: one.rows })
                    };
                    let last_rows = encoded.finished.iter().filter_map(last_row).collect();
                    if encoded.rows() == 0 {
                        rest = last_rows;
                    } else {
                        self.batch(encoded, last_rows)?;
                    }
                }
                self.send(Read::Pause(rest))?;
                next = shared.next();
                match next {
                    // Somebody gave a task back.
                    Some(next) if next.pass == pass => _ = sender.send(next.position),
                    _ => break,
                }
            }
        }
        Ok(())
    }

    fn batches(
        &self,
        pass: u64,
        tasks: impl IntoIterator<Item = Task, IntoIter: Send + 'static>,
    ) -> Batches {
        let encoder = Encoder::new(self.layout.schema.clone());
        Batches::new(self.dataset.clone(), encoder, tasks, self.reading.options(pass))
    }

    fn batch(&self, encoded: Encoded, last_rows: Vec<LastRow>) -> std::result::Result<(), Ended> {
        if encoded.rows() == 0 {
            return Ok(());
        }
        self.send(Read::Batch(Prepared::new(&self.layout, encoded, last_rows)))
    }

    fn send(&self, read: Read) -> std::result::Result<(), Ended> {
        self.send.blocking_send(Ok(read)).map_err(|_| Ended::ReceiverGone)
    }
}
