//! A shard on this server: the state machine, its lock, and who waits for it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use downpour_core::id::{JobId, ShardId};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::shard::{Declined, Settled, Shard, Ticket};

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
    /// A task drives its promotion.
    pub(crate) promoting: AtomicBool,
    /// A task is changing its in-sync set.
    pub(crate) shrinking: AtomicBool,
}

impl Hosted {
    pub(crate) fn new(key: ShardKey, shard: Shard) -> Arc<Self> {
        Arc::new(Hosted {
            key,
            shard: Mutex::new(shard),
            changed: watch::Sender::new(()),
            promoting: AtomicBool::new(false),
            shrinking: AtomicBool::new(false),
        })
    }

    /// Waits until a push that was logged is acknowledged by every member, or cannot be here.
    pub(crate) async fn settled(
        &self,
        ticket: &Ticket,
        lease: impl Fn() -> bool,
    ) -> Result<(), Declined> {
        let look = || self.shard.lock().settle(ticket, lease());
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
