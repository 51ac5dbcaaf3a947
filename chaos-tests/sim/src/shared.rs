//! What the hosts of one simulation and its conductor tell each other outside of the simulated network.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use downpour_core::id::ShardId;
use downpour_psctl::probe::Tally;
use prometheus::Registry;

use crate::draw::Draw;
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

/// What clusters differ in from seed to seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) replicas: u32,
    pub(crate) min_in_sync: u32,
    /// Shards whose copies only the coordinators cannot reach are set back, and that happens.
    pub(crate) sets_back: bool,
}

impl Setting {
    fn of(seed: u64) -> Self {
        let replicas = 2 + (Draw::new(seed, 0).next() % 2) as u32;
        let mut draw = Draw::new(seed, 2);
        // With three of three servers there is nobody who never had the shard.
        let sets_back = replicas == 2 && draw.below(2) == 0;
        let min_in_sync = if replicas == 3 { 1 + draw.below(2) as u32 } else { 1 };
        Setting { replicas, min_in_sync, sets_back }
    }
}

/// A dense variable in which every push counts.
#[derive(Clone, Debug)]
pub(crate) struct Dense {
    /// Of each block: which shard has it, and its values.
    pub(crate) blocks: Vec<(ShardId, Vec<f32>)>,
    pub(crate) acknowledged: u64,
    pub(crate) unknown: u64,
    pub(crate) rolled_back: BTreeMap<ShardId, u64>,
}

/// See the module.
pub(crate) struct Shared {
    pub(crate) seed: u64,
    /// What the seed says of the cluster.
    pub(crate) setting: Setting,
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
    pub(crate) counters: RefCell<Vec<(ShardId, f32)>>,
    /// What the trainer's dense variable should be and is.
    pub(crate) dense: RefCell<Option<Dense>>,
    /// Promises that were broken, in the order in which that was found.
    pub(crate) broken: RefCell<Vec<String>>,
    /// Hosts that do not run their program: their ports refuse connections.
    pub(crate) down: RefCell<BTreeSet<String>>,
    /// Of each server's newest process.
    pub(crate) registries: RefCell<BTreeMap<String, Registry>>,
}

impl Shared {
    pub(crate) fn new(seed: u64) -> Self {
        let setting = Setting::of(seed);
        Shared {
            seed,
            setting,
            replicas: setting.replicas,
            phase: Cell::new(Phase::Start),
            seen: RefCell::default(),
            joined: Cell::new(0),
            quiet: Cell::new(0),
            acknowledged: Cell::new(0),
            checkpoints_wanted: Cell::new(0),
            moves_wanted: Cell::new(0),
            tallies: RefCell::default(),
            counters: RefCell::default(),
            dense: RefCell::default(),
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
