//! The blocks of one dense variable on one shard.

use std::collections::BTreeMap;

use bytes::BytesMut;
use downpour_core::id::{Lsn, ShardId};
use downpour_core::optimizer::{OptimizerSpec, StepScalars};
use downpour_core::routing::shard_of;
use downpour_core::spec::DenseSpec;
use downpour_core::tensor_bytes::{FLOAT_BYTES, floats};
use downpour_proto::tensor::put_floats;

use crate::cut::{CutId, CutRange};

/// Blocks that one call of a cut looks at.
const BLOCKS_LOOK_MAX: usize = 1 << 12;

/// Blocks of one dense variable on one shard. A block exists once its first values arrived: the first win, and until then a gradient for
/// it does not fit (there is nothing that it could be a gradient of).
#[derive(Debug)]
pub(crate) struct Dense {
    spec: DenseSpec,
    optimizer: OptimizerSpec,
    place: Place,
    /// Blocks that belong to this shard.
    owned: u32,
    blocks: BTreeMap<u32, Block>,
    cuts: Vec<BlockCut>,
}

/// What an open cut has of a variable.
#[derive(Debug)]
struct BlockCut {
    range: CutRange,
    /// Where the cursor goes on; none: it is at the end.
    next: Option<u32>,
    saved: BTreeMap<u32, Block>,
}

/// Blocks on their way out of a cut.
#[derive(Debug, Default)]
pub(crate) struct BlocksOut {
    pub(crate) numbers: Vec<u32>,
    pub(crate) lsns: Vec<u64>,
    pub(crate) floats: BytesMut,
}

impl BlocksOut {
    fn put(&mut self, number: u32, block: &Block) {
        self.numbers.push(number);
        self.lsns.push(block.lsn.0);
        put_floats(&mut self.floats, &block.floats);
    }
}

/// Which blocks of a variable a shard has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) shard: ShardId,
    pub(crate) shards: u32,
    /// Salt of the routing function.
    pub(crate) salt: u64,
}

impl Place {
    pub(crate) fn has(self, number: u64) -> bool {
        shard_of(number, self.salt, self.shards) == self.shard
    }
}

#[derive(Clone, Debug)]
struct Block {
    lsn: Lsn,
    /// Weights, then optimizer slots.
    floats: Box<[f32]>,
}

impl Dense {
    pub(crate) fn new(spec: DenseSpec, optimizer: OptimizerSpec, place: Place) -> Self {
        let owned = (0..spec.blocks()).filter(|&block| place.has(block.into())).count() as u32;
        Dense { spec, optimizer, place, owned, blocks: BTreeMap::new(), cuts: Vec::new() }
    }

    /// Bytes that the blocks occupy.
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks.values().map(|block| size_of_val(&*block.floats) as u64).sum()
    }

    /// Blocks of this shard that have no values yet.
    pub(crate) fn uninitialized(&self) -> u32 {
        self.owned - self.blocks.len() as u32
    }

    /// Whether `values` are the values of `numbers` (rising), all of this shard.
    pub(crate) fn fits(&self, numbers: &[u32], values: &[u8]) -> bool {
        let here = |number: &u32| *number < self.spec.blocks() && self.place.has((*number).into());
        let floats: usize = numbers.iter().map(|&number| self.spec.block_len(number)).sum();
        numbers.iter().all(here) && floats * FLOAT_BYTES == values.len()
    }

    /// Bytes of a block's values.
    pub(crate) fn block_bytes(&self, number: u32) -> usize {
        self.spec.block_len(number) * FLOAT_BYTES
    }

    /// Whether all of `numbers` have values.
    pub(crate) fn initialized(&self, numbers: &[u32]) -> bool {
        numbers.iter().all(|number| self.blocks.contains_key(number))
    }

    /// Gives the blocks that have none their first values.
    pub(crate) fn put(&mut self, numbers: &[u32], mut values: &[u8], lsn: Lsn) {
        for &number in numbers {
            let len = self.spec.block_len(number);
            let (first, rest) = values.split_at(len * FLOAT_BYTES);
            values = rest;
            self.blocks.entry(number).or_insert_with(|| {
                let mut block = vec![0.0; len + self.optimizer.state_width(len)];
                let (weights, state) = block.split_at_mut(len);
                weights.iter_mut().zip(floats(first)).for_each(|(weight, value)| *weight = value);
                self.optimizer.init_state(state);
                Block { lsn, floats: block.into_boxed_slice() }
            });
        }
    }

    /// Applies gradients. Returns how many elements were left as they were because they would not be finite.
    pub(crate) fn push(
        &mut self,
        numbers: &[u32],
        mut gradients: &[u8],
        scalars: &StepScalars,
        lsn: Lsn,
    ) -> u64 {
        let update = self.optimizer.update(scalars);
        let mut skipped = 0;
        for number in numbers {
            let len = self.spec.block_len(*number);
            let (gradient, rest) = gradients.split_at(len * FLOAT_BYTES);
            gradients = rest;
            let Some(block) = self.blocks.get_mut(number) else { continue };
            for cut in &mut self.cuts {
                if cut.next.is_some_and(|next| *number >= next) && cut.range.has(block.lsn) {
                    cut.saved.insert(*number, block.clone());
                }
            }
            let (weights, state) = block.floats.split_at_mut(len);
            skipped += u64::from(update.apply(weights, state, gradient));
            block.lsn = lsn;
        }
        skipped
    }

    /// Bytes of the weights of blocks newer than `have`.
    pub(crate) fn newer_bytes(&self, have: Lsn) -> usize {
        self.newer(have).map(|(number, _)| self.spec.block_len(number) * FLOAT_BYTES).sum()
    }

    /// Appends the weights of blocks newer than `have` to `out` and returns their numbers.
    pub(crate) fn pull(&self, have: Lsn, out: &mut BytesMut) -> Vec<u32> {
        self.newer(have)
            .map(|(number, block)| {
                put_floats(out, &block.floats[..self.spec.block_len(number)]);
                number
            })
            .collect()
    }

    fn newer(&self, have: Lsn) -> impl Iterator<Item = (u32, &Block)> {
        self.blocks.iter().filter(move |(_, block)| block.lsn > have).map(|(n, block)| (*n, block))
    }

    /// Floats of a block, its optimizer slots included.
    fn stored_len(&self, number: u32) -> usize {
        let len = self.spec.block_len(number);
        len + self.optimizer.state_width(len)
    }

    /// Puts back a block as a cut had it, over one that is not newer than `base`. Gives the raw floats after those of the block; none if it does not
    /// belong here, if there are too few, or if there is a newer block.
    pub(crate) fn restore<'a>(
        &mut self,
        number: u32,
        lsn: Lsn,
        raw: &'a [u8],
        base: Lsn,
    ) -> Option<&'a [u8]> {
        let here = number < self.spec.blocks() && self.place.has(number.into());
        if !here || self.blocks.get(&number).is_some_and(|block| block.lsn > base) {
            return None;
        }
        let (raw, rest) = raw.split_at_checked(self.stored_len(number) * FLOAT_BYTES)?;
        self.blocks.insert(number, Block { lsn, floats: floats(raw).collect() });
        Some(rest)
    }

    pub(crate) fn open_cut(&mut self, range: CutRange) {
        self.cuts.push(BlockCut { range, next: Some(0), saved: BTreeMap::new() });
    }

    pub(crate) fn close_cut(&mut self, id: CutId) {
        self.cuts.retain(|cut| cut.range.id != id);
    }

    pub(crate) fn saved_bytes(&self, id: CutId) -> usize {
        let bytes = |block: &Block| size_of_val(&*block.floats);
        let cut = self.cuts.iter().find(|cut| cut.range.id == id);
        cut.map_or(0, |cut| cut.saved.values().map(bytes).sum())
    }

    /// The next blocks of a cut, saved ones first, and whether these were the last.
    pub(crate) fn read_cut(&mut self, id: CutId, bytes_max: usize) -> (BlocksOut, bool) {
        let mut out = BlocksOut::default();
        let Some(cut) = self.cuts.iter_mut().find(|cut| cut.range.id == id) else {
            return (out, true);
        };
        while out.floats.len() < bytes_max
            && let Some((number, block)) = cut.saved.pop_first()
        {
            out.put(number, &block);
        }
        let Some(next) = cut.next else { return (out, cut.saved.is_empty()) };
        for (looked, (&number, block)) in self.blocks.range(next..).enumerate() {
            if looked == BLOCKS_LOOK_MAX || out.floats.len() >= bytes_max {
                cut.next = Some(number);
                return (out, false);
            }
            if cut.range.has(block.lsn) {
                out.put(number, block);
            }
        }
        cut.next = None;
        (out, cut.saved.is_empty())
    }

    /// Blocks of the variable, on all shards.
    pub(crate) fn count(&self) -> u32 {
        self.spec.blocks()
    }

    /// Hands the canonical encoding to `sink`: by rising number, LSN and floats of each block.
    pub(crate) fn encode(&self, sink: &mut impl FnMut(u64)) {
        sink(self.blocks.len() as u64);
        self.sample(0, usize::MAX, sink);
    }

    /// The same of some blocks: from `first` on, and from the beginning after the last, about `floats` floats.
    pub(crate) fn sample(&self, first: u32, floats: usize, sink: &mut impl FnMut(u64)) {
        let mut sampled = 0;
        for (&number, block) in self.blocks.range(first..).chain(self.blocks.range(..first)) {
            if sampled >= floats {
                break;
            }
            sampled += block.floats.len();
            sink(number.into());
            sink(block.lsn.0);
            block.floats.iter().for_each(|float| sink(float.to_bits().into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use downpour_core::optimizer::Sgd;

    use super::*;

    /// A tensor of 21 floats in blocks of 8, all on the only shard.
    fn dense() -> Dense {
        let spec = DenseSpec { shape: vec![3, 7], block_floats: 8 };
        let optimizer = OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 });
        Dense::new(spec, optimizer, Place { shard: ShardId(0), shards: 1, salt: 3 })
    }

    fn raw(value: f32, count: usize) -> Vec<u8> {
        (0..count).flat_map(|_| value.to_le_bytes()).collect()
    }

    fn pulled(dense: &Dense, have: u64) -> (Vec<u32>, Vec<f32>) {
        let mut out = BytesMut::new();
        let blocks = dense.pull(Lsn(have), &mut out);
        assert_eq!(out.len(), dense.newer_bytes(Lsn(have)));
        (blocks, floats(&out).collect())
    }

    #[test]
    fn the_first_values_win() {
        let mut dense = dense();
        assert_eq!(dense.uninitialized(), 3);
        dense.put(&[1], &raw(4.0, 8), Lsn(1));
        dense.put(&[1, 2], &raw(7.0, 13), Lsn(2));
        assert_eq!(dense.uninitialized(), 1);
        let expected = [vec![4.0; 8], vec![7.0; 5]].concat();
        assert_eq!(pulled(&dense, 0), (vec![1, 2], expected));
    }

    #[test]
    fn a_pull_gets_the_blocks_newer_than_it_has() {
        let mut dense = dense();
        dense.put(&[0, 1, 2], &raw(1.0, 21), Lsn(1));
        let scalars = StepScalars { learning_rate: 1.0, beta1_power: 0.0, beta2_power: 0.0 };
        assert_eq!(dense.push(&[2], &raw(0.25, 5), &scalars, Lsn(2)), 0);
        assert_eq!(pulled(&dense, 1), (vec![2], vec![0.75; 5]));
        assert_eq!(pulled(&dense, 2), (vec![], vec![]));
    }

    #[test]
    fn blocks_of_another_length_or_shard_do_not_fit() {
        let dense = dense();
        assert!(dense.fits(&[0, 2], &raw(0.0, 13)));
        assert!(!dense.fits(&[0, 2], &raw(0.0, 16)));
        assert!(!dense.fits(&[3], &[]), "past the end");
        let elsewhere = Dense { place: Place { shard: ShardId(9), ..dense.place }, ..dense };
        assert!(!elsewhere.fits(&[0], &raw(0.0, 8)));
        assert!(!elsewhere.initialized(&[0]));
    }
}
