//! Names of things as numbers that cannot be mixed up.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A server by its stable name; survives restarts.
    NodeId(u32)
);
id!(
    /// One life of a server process. Unique in a cluster, rising.
    Incarnation(u64)
);
id!(
    /// A model being trained.
    JobId(u64)
);
id!(
    /// A variable of a job, in order of definition from 1.
    VariableId(u32)
);
id!(
    /// A slice of every variable of a job, from 0.
    ShardId(u32)
);
id!(
    /// One client's membership of a job; its number never comes back.
    SessionId(u64)
);
id!(
    /// Number of one primary's tenure of a shard, from 1.
    Epoch(u64)
);

/// One life of one server: what in-sync sets and primaries are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerRef {
    /// The server's stable number.
    pub node: NodeId,
    /// Which of its lives.
    pub incarnation: Incarnation,
}

impl fmt::Display for ServerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.node, self.incarnation)
    }
}

/// Bits of an [`Lsn`] that count within an epoch.
const LSN_COUNT_BITS: u32 = 40;

/// A position in one shard's log: `epoch << 40 | n`, n contiguous from 1 within an epoch. Integer order is log order, and no position is
/// ever used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Before the first record of a shard.
    pub const ZERO: Lsn = Lsn(0);
    /// Highest epoch that fits.
    pub const EPOCH_MAX: Epoch = Epoch((1 << (64 - LSN_COUNT_BITS)) - 1);

    /// Position `count` of `epoch`.
    #[must_use]
    pub fn new(epoch: Epoch, count: u64) -> Lsn {
        debug_assert!(epoch <= Lsn::EPOCH_MAX && count >> LSN_COUNT_BITS == 0);
        Lsn(epoch.0 << LSN_COUNT_BITS | count)
    }

    /// The epoch that the record belongs to.
    #[must_use]
    pub fn epoch(self) -> Epoch {
        Epoch(self.0 >> LSN_COUNT_BITS)
    }

    /// Count within the epoch, from 1.
    #[must_use]
    pub fn count(self) -> u64 {
        self.0 & ((1 << LSN_COUNT_BITS) - 1)
    }

    /// The position that a record of `epoch` takes directly after this one.
    #[must_use]
    pub fn next_in(self, epoch: Epoch) -> Lsn {
        if self.epoch() == epoch { Lsn(self.0 + 1) } else { Lsn::new(epoch, 1) }
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch(), self.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integer_order_is_log_order() {
        let first = Lsn::ZERO.next_in(Epoch(1));
        let second = first.next_in(Epoch(1));
        let promoted = second.next_in(Epoch(2));
        assert!(Lsn::ZERO < first && first < second && second < promoted);
        assert_eq!((promoted.epoch(), promoted.count()), (Epoch(2), 1));
        assert_eq!(promoted.to_string(), "2.1");
    }
}
