//! A shard on this server: the state machine, its lock, and who waits for it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};

use downpour_core::id::{Epoch, JobId, ShardId};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::shard::{Contact, Declined, Role, Settled, Shard, Ticket};
use crate::staleness::StalenessMetrics;

/// Names a shard in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ShardKey {
    pub(crate) job: JobId,
    pub(crate) shard: ShardId,
}

/// A replica of a shard on this server. The lock is held for one synchronous call and never across an await.
#[derive(Debug)]
pub(crate) struct Hosted {
    pub(crate) key: ShardKey,
    pub(crate) shard: Mutex<Shard>,
    /// Rings when pushes that wait may settle, or a promotion may go on.
    pub(crate) changed: watch::Sender<()>,
    /// Rings when sessions that wait for others may go on.
    pub(crate) clocks: watch::Sender<()>,
    /// A task drives its promotion.
    pub(crate) promoting: AtomicBool,
    /// A task is changing its in-sync set.
    pub(crate) shrinking: AtomicBool,
    /// A task copies it to who is joining.
    pub(crate) copying: AtomicBool,
    /// Copies that were begun since the last member was added.
    pub(crate) copies: AtomicU32,
    /// A task has who is joining added.
    pub(crate) proposing: AtomicBool,
    /// Which copy this replica was made of, if it was: the tenure in which it was made, and its number there.
    pub(crate) attempt: Option<(Epoch, u64)>,
    /// Files of it that were begun here.
    pub(crate) saves: AtomicU32,
    /// Rows that pulls named here.
    pub(crate) pulled_rows: AtomicU64,
    /// Of pushes to its job, once there was one.
    pub(crate) staleness: OnceLock<StalenessMetrics>,
    /// Bytes of its contributions, as its life counts them.
    pub(crate) contributed: AtomicUsize,
}

impl Hosted {
    pub(crate) fn new(key: ShardKey, shard: Shard) -> Arc<Self> {
        Hosted::made(key, shard, None)
    }

    pub(crate) fn copied(key: ShardKey, shard: Shard, attempt: (Epoch, u64)) -> Arc<Self> {
        Hosted::made(key, shard, Some(attempt))
    }

    fn made(key: ShardKey, shard: Shard, attempt: Option<(Epoch, u64)>) -> Arc<Self> {
        Arc::new(Hosted {
            key,
            shard: Mutex::new(shard),
            changed: watch::Sender::new(()),
            clocks: watch::Sender::new(()),
            promoting: AtomicBool::new(false),
            shrinking: AtomicBool::new(false),
            copying: AtomicBool::new(false),
            copies: AtomicU32::new(0),
            proposing: AtomicBool::new(false),
            attempt,
            saves: AtomicU32::new(0),
            pulled_rows: AtomicU64::new(0),
            staleness: OnceLock::new(),
            contributed: AtomicUsize::new(0),
        })
    }

    /// Whether this is a copy that a newer one replaces.
    pub(crate) fn gives_way_to(&self, epoch: Epoch, attempt: u64) -> bool {
        let shard = self.shard.lock();
        let known = shard.epoch();
        match shard.role() {
            Role::Joining => known <= epoch && self.attempt < Some((epoch, attempt)),
            Role::Removed => known <= epoch,
            Role::Backup | Role::Promoting(_) | Role::Primary(_) => false,
        }
    }

    /// Waits until a push that was logged is acknowledged by every member, or cannot be here.
    pub(crate) async fn settled(
        &self,
        ticket: &Ticket,
        contact: impl Fn() -> Contact,
    ) -> Result<(), Declined> {
        let look = || self.shard.lock().settle(ticket, contact());
        let mut settled = look();
        if settled == Settled::Pending {
            let mut changed = self.changed.subscribe();
            settled = look();
            while settled == Settled::Pending && changed.changed().await.is_ok() {
                settled = look();
            }
        }
        match settled {
            Settled::Acknowledged => Ok(()),
            Settled::Declined(declined) => Err(declined),
            Settled::Pending => unreachable!("the sender lives as long as `self`"),
        }
    }
}
