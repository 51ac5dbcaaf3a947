//! Reading rows and dense blocks.

use std::collections::BTreeMap;

use downpour_core::id::{Lsn, ShardId, VariableId};

/// Rows of one table to read.
#[derive(Debug)]
pub struct TableRows<'a> {
    /// The table.
    pub variable: VariableId,
    /// Strictly increasing.
    pub keys: &'a [u64],
    /// Where the rows go, in the order of the keys: `keys.len() * dim` floats.
    pub values: &'a mut [f32],
}

/// What a pull read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pulled {
    /// For each shard that was asked: the values contain every record up to here (the lowest, when it was asked in several messages). A push
    /// that later gets LSN `x` on this shard overtook `x.count() - lsn.count()` records of others, if both are of one epoch: its staleness.
    pub lsns: BTreeMap<ShardId, Lsn>,
}
