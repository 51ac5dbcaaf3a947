//! What the hosts of one simulation and its conductor tell each other outside of the simulated network.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use downpour_psctl::probe::Tally;
use prometheus::Registry;

use crate::monitor::Seen;

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// The job is made.
    Start,
    /// Clients push, things go wrong.
    Faults,
    /// Everything was undone; clients finish what they had begun.
    Calm,
    /// All sets are full and nobody pushes: it is read back.
    Judgement,
}

/// See the module.
pub(crate) struct Shared {
    pub(crate) seed: u64,
    /// Copies of each shard.
    pub(crate) replicas: u32,
    pub(crate) phase: Cell<Phase>,
    pub(crate) seen: RefCell<Seen>,
    /// Clients that take part, and those that have nothing on its way any more.
    pub(crate) joined: Cell<u32>,
    pub(crate) quiet: Cell<u32>,
    pub(crate) acknowledged: Cell<u64>,
    /// Checkpoints that are to be begun.
    pub(crate) checkpoints_wanted: Cell<u32>,
    /// Moves that are to be begun.
    pub(crate) moves_wanted: Cell<u32>,
    pub(crate) tallies: RefCell<Vec<Tally>>,
    pub(crate) counters: RefCell<Vec<f32>>,
    /// Promises that were broken, in the order in which that was found.
    pub(crate) broken: RefCell<Vec<String>>,
    /// Hosts that do not run their program: their ports refuse connections.
    pub(crate) down: RefCell<BTreeSet<String>>,
    /// Of each server's newest process.
    pub(crate) registries: RefCell<BTreeMap<String, Registry>>,
}

impl Shared {
    pub(crate) fn new(seed: u64, replicas: u32) -> Self {
        Shared {
            seed,
            replicas,
            phase: Cell::new(Phase::Start),
            seen: RefCell::default(),
            joined: Cell::new(0),
            quiet: Cell::new(0),
            acknowledged: Cell::new(0),
            checkpoints_wanted: Cell::new(0),
            moves_wanted: Cell::new(0),
            tallies: RefCell::default(),
            counters: RefCell::default(),
            broken: RefCell::default(),
            down: RefCell::default(),
            registries: RefCell::default(),
        }
    }

    pub(crate) fn broken(&self, promise: &str, how: impl std::fmt::Display) {
        self.broken.borrow_mut().push(format!("{promise}: {how}"));
    }

    pub(crate) async fn wait_for(&self, phase: Phase) {
        while self.phase.get() < phase {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// One more.
pub(crate) fn count(cell: &Cell<u32>) {
    cell.set(cell.get() + 1);
}
