//! The stores that are compared.

use bytes::BytesMut;
use dashmap::DashMap;
use downpour_core::id::Lsn;
use downpour_core::init::Init;
use downpour_core::mix::mix64;
use downpour_core::optimizer::{OptimizerSpec, StepScalars};
use downpour_core::prefetch::prefetch;
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_proto::tensor::Keys;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use parking_lot::Mutex;

use super::workload::SHARDS;
use crate::arena::{Arena, HEADER_WORDS};
use crate::table::{Table, TableRules};

/// Rows of one table on all shards of a server.
pub(super) trait Store: Sync {
    /// Appends the rows of keys of one shard, all of which exist.
    fn pull(&self, shard: usize, keys: Keys<'_>, out: &mut BytesMut);
    /// Applies gradients to keys of one shard, and creates rows.
    fn push(&self, shard: usize, keys: Keys<'_>, gradients: &[u8]);
}

/// What all stores need to know.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    pub(super) dim: usize,
    pub(super) optimizer: OptimizerSpec,
}

impl Rules {
    fn scalars(&self) -> StepScalars {
        self.optimizer.scalars(1, 0)
    }

    fn width(&self) -> usize {
        self.dim + self.optimizer.state_width(self.dim)
    }
}

/// The table that servers use, one for each shard, each behind its lock.
pub(super) struct Winner(Vec<Mutex<Table>>, Rules);

impl Winner {
    pub(super) fn new(rules: Rules) -> Self {
        let Rules { dim, optimizer } = rules;
        let table = |_| {
            Mutex::new(Table::new(TableRules {
                dim,
                init: Init::Zeros,
                optimizer,
                seed: 1,
                salt: 2,
            }))
        };
        Winner((0..SHARDS).map(table).collect(), rules)
    }
}

impl Store for Winner {
    fn pull(&self, shard: usize, keys: Keys<'_>, out: &mut BytesMut) {
        self.0[shard].lock().pull(keys, out);
    }

    fn push(&self, shard: usize, keys: Keys<'_>, gradients: &[u8]) {
        self.0[shard].lock().push(keys, gradients, &self.1.scalars(), Lsn(1));
    }
}

/// One concurrent map of boxes for all shards.
pub(super) struct Boxes(DashMap<u64, Box<[f32]>>, Rules);

impl Boxes {
    pub(super) fn new(rules: Rules) -> Self {
        Boxes(DashMap::new(), rules)
    }
}

impl Store for Boxes {
    fn pull(&self, _shard: usize, keys: Keys<'_>, out: &mut BytesMut) {
        for key in keys.iter() {
            let row = self.0.get(&key).expect("rows that are pulled exist");
            out.extend_from_slice(bytemuck::cast_slice(&row[..self.1.dim]));
        }
    }

    fn push(&self, _shard: usize, keys: Keys<'_>, gradients: &[u8]) {
        let update = self.1.optimizer.update(&self.1.scalars());
        let gradients = gradients.chunks_exact(self.1.dim * FLOAT_BYTES);
        for (key, gradient) in keys.iter().zip(gradients) {
            let mut row =
                self.0.entry(key).or_insert_with(|| vec![0.0; self.1.width()].into_boxed_slice());
            let (weights, state) = row.split_at_mut(self.1.dim);
            update.apply(weights, state, gradient);
        }
    }
}

/// Rows with a header of key and LSN, which an index of hashbrown finds.
pub(super) trait Layout: Send {
    fn new(width: usize) -> Self;
    fn push(&mut self) -> u32;
    fn key(&self, row: u32) -> u64;
    fn floats(&self, row: u32) -> &[f32];
    fn row_mut(&mut self, row: u32) -> (&mut [u32], &mut [f32]);
    fn prefetch(&self, row: u32, floats: usize);
}

/// The layout that servers use: headers apart, slabs of the pool.
impl Layout for Arena {
    fn new(width: usize) -> Self {
        Arena::new(width)
    }

    fn push(&mut self) -> u32 {
        self.push()
    }

    fn key(&self, row: u32) -> u64 {
        self.key(row)
    }

    fn floats(&self, row: u32) -> &[f32] {
        self.floats(row)
    }

    fn row_mut(&mut self, row: u32) -> (&mut [u32], &mut [f32]) {
        self.row_mut(row)
    }

    fn prefetch(&self, row: u32, floats: usize) {
        self.prefetch(row, floats);
    }
}

/// Header and floats of a row one after the other, in slabs of the allocator that double.
pub(super) struct Inline {
    stride: usize,
    slabs: Vec<Box<[u32]>>,
    len: u32,
}

const FIRST_ROWS: u64 = 16;

impl Inline {
    fn words(&self, row: u32) -> &[u32] {
        let (slab, at) = place(row);
        &self.slabs[slab][at * self.stride..][..self.stride]
    }
}

fn place(row: u32) -> (usize, usize) {
    let position = u64::from(row) + FIRST_ROWS;
    let slab = position.ilog2() - FIRST_ROWS.ilog2();
    (slab as usize, (position - (FIRST_ROWS << slab)) as usize)
}

impl Layout for Inline {
    fn new(width: usize) -> Self {
        Inline { stride: HEADER_WORDS + width, slabs: Vec::new(), len: 0 }
    }

    fn push(&mut self) -> u32 {
        let row = self.len;
        let (slab, _) = place(row);
        if slab == self.slabs.len() {
            let words = (FIRST_ROWS << slab) as usize * self.stride;
            self.slabs.push(vec![0; words].into_boxed_slice());
        }
        self.len += 1;
        row
    }

    fn key(&self, row: u32) -> u64 {
        let words = self.words(row);
        u64::from(words[0]) | u64::from(words[1]) << 32
    }

    fn floats(&self, row: u32) -> &[f32] {
        bytemuck::cast_slice(&self.words(row)[HEADER_WORDS..])
    }

    fn row_mut(&mut self, row: u32) -> (&mut [u32], &mut [f32]) {
        let (slab, at) = place(row);
        let words = &mut self.slabs[slab][at * self.stride..][..self.stride];
        let (header, floats) = words.split_at_mut(HEADER_WORDS);
        (header, bytemuck::cast_slice_mut(floats))
    }

    fn prefetch(&self, row: u32, floats: usize) {
        self.words(row)[..HEADER_WORDS + floats]
            .chunks(16)
            .for_each(|line| prefetch(line.as_ptr()));
    }
}

/// hashbrown's table of row numbers over rows, one for each shard, each behind its lock.
pub(super) struct Indexed<L, const PREFETCH: bool>(Vec<Mutex<Shard<L>>>, Rules);

struct Shard<L> {
    index: HashTable<u32>,
    rows: L,
}

impl<L: Layout, const PREFETCH: bool> Indexed<L, PREFETCH> {
    pub(super) fn new(rules: Rules) -> Self {
        let shard = |_| Mutex::new(Shard { index: HashTable::new(), rows: L::new(rules.width()) });
        Indexed((0..SHARDS).map(shard).collect(), rules)
    }
}

/// Keys that are looked up together; hashbrown gives no way to ask for a bucket before.
const BLOCK: usize = 32;

impl<L: Layout> Shard<L> {
    fn find(&self, key: u64) -> Option<u32> {
        self.index.find(mix64(key), |&row| self.rows.key(row) == key).copied()
    }

    fn find_or_create(&mut self, key: u64) -> u32 {
        let rows = &self.rows;
        let same = |&row: &u32| rows.key(row) == key;
        match self.index.entry(mix64(key), same, |&row| mix64(rows.key(row))) {
            Entry::Occupied(row) => *row.get(),
            Entry::Vacant(vacant) => {
                let row = self.rows.push();
                vacant.insert(row);
                let (header, floats) = self.rows.row_mut(row);
                header[..2].copy_from_slice(&[key as u32, (key >> 32) as u32]);
                floats.fill(0.0);
                row
            }
        }
    }
}

impl<L: Layout, const PREFETCH: bool> Store for Indexed<L, PREFETCH> {
    fn pull(&self, shard: usize, keys: Keys<'_>, out: &mut BytesMut) {
        let shard = self.0[shard].lock();
        let mut keys = keys.iter();
        let mut block = [0; BLOCK];
        while keys.len() > 0 {
            let count = if PREFETCH { keys.len().min(BLOCK) } else { 1 };
            for (row, key) in block[..count].iter_mut().zip(&mut keys) {
                *row = shard.find(key).expect("rows that are pulled exist");
                if PREFETCH {
                    shard.rows.prefetch(*row, self.1.dim);
                }
            }
            for &row in &block[..count] {
                let floats = &shard.rows.floats(row)[..self.1.dim];
                out.extend_from_slice(bytemuck::cast_slice(floats));
            }
        }
    }

    fn push(&self, shard: usize, keys: Keys<'_>, gradients: &[u8]) {
        let mut shard = self.0[shard].lock();
        let update = self.1.optimizer.update(&self.1.scalars());
        let mut gradients = gradients.chunks_exact(self.1.dim * FLOAT_BYTES);
        let mut keys = keys.iter();
        let mut block = [0; BLOCK];
        while keys.len() > 0 {
            let count = if PREFETCH { keys.len().min(BLOCK) } else { 1 };
            for (row, key) in block[..count].iter_mut().zip(&mut keys) {
                *row = shard.find_or_create(key);
                if PREFETCH {
                    shard.rows.prefetch(*row, self.1.width());
                }
            }
            for (&row, gradient) in block[..count].iter().zip(&mut gradients) {
                let (header, floats) = shard.rows.row_mut(row);
                let (weights, state) = floats.split_at_mut(self.1.dim);
                update.apply(weights, state, gradient);
                header[2..].copy_from_slice(&[1, 0]);
            }
        }
    }
}
