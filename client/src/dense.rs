//! Dense variables on the client: which blocks live where, and the values that were pulled so far.

use std::collections::BTreeMap;
use std::sync::Arc;

use downpour_core::id::{Lsn, ShardId, VariableId};
use downpour_core::routing::shard_of;
use downpour_core::spec::{Shape, Variable};
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_core::view::JobView;
use downpour_proto::tensor::get_floats;
use downpour_proto::v1;
use parking_lot::Mutex;

use crate::Error;
use crate::encode::unknown;

/// Where the blocks of one dense variable live. Worked out once: a job's shards never change.
#[derive(Debug)]
pub(crate) struct DenseLayout {
    pub(crate) variable: VariableId,
    pub(crate) floats: usize,
    block_floats: usize,
    /// By shard, only those that hold blocks: (shard, its blocks rising).
    pub(crate) shards: Vec<(ShardId, Vec<u32>)>,
}

impl DenseLayout {
    /// `None` for a table.
    pub(crate) fn new(variable: &Variable, shards: u32) -> Option<Self> {
        let Shape::Dense(dense) = &variable.spec.shape else { return None };
        let salt = variable.spec.routing_salt();
        let mut by_shard = vec![Vec::new(); shards as usize];
        for block in 0..dense.blocks() {
            by_shard[shard_of(block.into(), salt, shards).0 as usize].push(block);
        }
        let shards = (0..).map(ShardId).zip(by_shard).filter(|(_, blocks)| !blocks.is_empty());
        Some(DenseLayout {
            variable: variable.id,
            floats: dense.floats() as usize,
            block_floats: dense.block_floats as usize,
            shards: shards.collect(),
        })
    }

    /// Blocks of one shard, rising.
    pub(crate) fn blocks_on(&self, shard: ShardId) -> &[u32] {
        let at = self.shards.binary_search_by_key(&shard, |(shard, _)| *shard);
        at.map_or(&[], |at| &self.shards[at].1)
    }

    /// Where block `block` lies in the flat tensor.
    pub(crate) fn range(&self, block: u32) -> std::ops::Range<usize> {
        let start = block as usize * self.block_floats;
        start..(start + self.block_floats).min(self.floats)
    }

    /// Floats of these blocks.
    pub(crate) fn floats_of(&self, blocks: &[u32]) -> usize {
        blocks.iter().map(|&block| self.range(block).len()).sum()
    }
}

/// The layouts of a job's dense variables, each worked out when it is first needed.
#[derive(Debug, Default)]
pub(crate) struct Layouts(Mutex<BTreeMap<VariableId, Arc<DenseLayout>>>);

impl Layouts {
    pub(crate) fn get(&self, view: &JobView, id: VariableId) -> Result<Arc<DenseLayout>, Error> {
        if let Some(layout) = self.0.lock().get(&id) {
            return Ok(layout.clone());
        }
        let variable = view.variable(id).ok_or_else(|| unknown(id))?;
        let layout = DenseLayout::new(variable, view.spec.shards).ok_or_else(|| {
            let problem = format!("{:?} is a table, not dense", variable.spec.name);
            Error::invalid("variable", problem)
        })?;
        let layout = Arc::new(layout);
        self.0.lock().insert(id, layout.clone());
        Ok(layout)
    }
}

/// Values of dense variables as of the last pull. A pull asks each shard only for blocks that are newer, so keep it between pulls; made by
/// [`crate::Session::dense_cache`].
#[derive(Clone, Debug)]
pub struct DenseCache {
    pub(crate) tensors: Vec<CachedTensor>,
}

#[derive(Clone, Debug)]
pub(crate) struct CachedTensor {
    pub(crate) layout: Arc<DenseLayout>,
    pub(crate) values: Vec<f32>,
    /// As `layout.shards`.
    pub(crate) shards: Vec<CachedShard>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct CachedShard {
    /// The values contain every record up to here.
    pub(crate) have: Lsn,
    /// Blocks that were never initialised, as of `have`.
    pub(crate) uninitialized: u32,
}

impl DenseCache {
    pub(crate) fn new(mut layouts: Vec<Arc<DenseLayout>>) -> Self {
        layouts.sort_unstable_by_key(|layout| layout.variable);
        layouts.dedup_by_key(|layout| layout.variable);
        let tensors = layouts.into_iter().map(|layout| {
            let unknown = |blocks: &Vec<u32>| CachedShard {
                have: Lsn::ZERO,
                uninitialized: blocks.len() as u32,
            };
            let shards = layout.shards.iter().map(|(_, blocks)| unknown(blocks)).collect();
            CachedTensor { values: vec![0.0; layout.floats], shards, layout }
        });
        DenseCache { tensors: tensors.collect() }
    }

    /// The variables, rising.
    pub fn variables(&self) -> impl Iterator<Item = VariableId> + '_ {
        self.tensors.iter().map(|tensor| tensor.layout.variable)
    }

    /// The whole tensor, row-major; zeros before the first pull. `None` for a variable that is not in this cache.
    #[must_use]
    pub fn values(&self, variable: VariableId) -> Option<&[f32]> {
        Some(&self.tensor(variable)?.values)
    }

    /// Blocks that have no first values yet; until it is 0 the tensor is not what its initializer made.
    #[must_use]
    pub fn uninitialized(&self, variable: VariableId) -> Option<u64> {
        let shards = &self.tensor(variable)?.shards;
        Some(shards.iter().map(|shard| u64::from(shard.uninitialized)).sum())
    }

    fn tensor(&self, variable: VariableId) -> Option<&CachedTensor> {
        let at = self.tensors.binary_search_by_key(&variable, |tensor| tensor.layout.variable);
        at.ok().map(|at| &self.tensors[at])
    }
}

impl CachedTensor {
    /// Takes newer blocks of the `at`th shard over.
    ///
    /// # Errors
    /// What is wrong with the answer; nothing was taken over then.
    pub(crate) fn take(
        &mut self,
        at: usize,
        lsn: Lsn,
        pulled: &v1::PulledDense,
    ) -> Result<(), String> {
        let (shard, own) = &self.layout.shards[at];
        let blocks = &pulled.blocks;
        let rising = blocks.windows(2).all(|pair| pair[0] < pair[1]);
        if !rising || !blocks.iter().all(|block| own.binary_search(block).is_ok()) {
            return Err(format!("blocks that do not rise or are not of shard {shard}"));
        }
        if pulled.values.len() != self.layout.floats_of(blocks) * FLOAT_BYTES {
            return Err(format!("{} bytes for {} blocks", pulled.values.len(), blocks.len()));
        }
        if pulled.uninitialized as usize > own.len() {
            return Err("more blocks without a value than there are".into());
        }
        let mut bytes = &pulled.values[..];
        for &block in blocks {
            let target = &mut self.values[self.layout.range(block)];
            let (block_bytes, rest) = bytes.split_at(target.len() * FLOAT_BYTES);
            get_floats("dense", block_bytes, target).map_err(|error| error.to_string())?;
            bytes = rest;
        }
        self.shards[at] = CachedShard { have: lsn, uninitialized: pulled.uninitialized };
        Ok(())
    }
}
