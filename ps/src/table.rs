//! Embedding rows of one table on one shard.
//!
//! A row is one run of words in an [`Arena`]: key, LSN, weights, optimizer slots. They change as one (docs/protocol.md 2.4), lie in one or two
//! cache lines, and never move while the table grows. The index holds row numbers only, and finds keys in the rows themselves.
//!
//! **Price.** 16 bytes of header and 6 to 12 bytes of index beside a row's floats. Growing the index rehashes it at once (about 20 ns a row).

use bytes::BytesMut;
use downpour_core::id::Lsn;
use downpour_core::init::{Init, init_row};
use downpour_core::mix::mix64;
use downpour_core::optimizer::{OptimizerSpec, StepScalars};
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_proto::tensor::{KEY_BYTES, Keys, put_floats};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::arena::Arena;

/// Words before a row's floats: the key and the LSN, low word first.
const HEADER_WORDS: usize = 4;

/// The rows of one table on one shard.
#[derive(Debug)]
pub(crate) struct Table {
    dim: usize,
    init: Init,
    optimizer: OptimizerSpec,
    seed: u64,
    salt: u64,
    /// Row numbers, hashed by the key of the row.
    index: HashTable<u32>,
    arena: Arena,
}

/// Where the first values of a table come from, and what changes them.
pub(crate) struct TableRules {
    pub(crate) dim: usize,
    pub(crate) init: Init,
    pub(crate) optimizer: OptimizerSpec,
    pub(crate) seed: u64,
    /// Of the variable's name.
    pub(crate) salt: u64,
}

impl Table {
    pub(crate) fn new(rules: TableRules) -> Self {
        let TableRules { dim, init, optimizer, seed, salt } = rules;
        let stride = HEADER_WORDS + dim + optimizer.state_width(dim);
        Table {
            dim,
            init,
            optimizer,
            seed,
            salt,
            index: HashTable::new(),
            arena: Arena::new(stride),
        }
    }

    /// Floats of a row's weights.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    pub(crate) fn rows(&self) -> u64 {
        u64::from(self.arena.len())
    }

    /// Bytes that the rows and their index occupy.
    pub(crate) fn bytes(&self) -> u64 {
        let index = self.index.allocation_size() as u64;
        self.arena.bytes() + index
    }

    /// Appends the weights of `keys` to `out`. A key that was never pushed has its initial value, and no row is made for it.
    pub(crate) fn pull(&self, keys: Keys<'_>, out: &mut BytesMut) {
        let mut initial = Vec::new();
        for key in keys.iter() {
            if let Some(row) = self.find(key) {
                let floats = &self.arena.row(row)[HEADER_WORDS..];
                put_floats(out, bytemuck::cast_slice(&floats[..self.dim]));
            } else {
                initial.resize(self.dim, 0.0);
                init_row(&self.init, self.seed, self.salt, key, &mut initial);
                put_floats(out, &initial);
            }
        }
    }

    /// Applies one gradient to each of `keys`. `gradients` holds `dim` floats for each. Returns how many elements were left as they were
    /// because they would not be finite.
    pub(crate) fn push(
        &mut self,
        keys: Keys<'_>,
        gradients: &[u8],
        scalars: &StepScalars,
        lsn: Lsn,
    ) -> u64 {
        let update = self.optimizer.update(scalars);
        let mut skipped = 0;
        for (key, gradient) in keys.iter().zip(gradients.chunks_exact(self.dim * FLOAT_BYTES)) {
            let row = self.find_or_create(key);
            let words = self.arena.row_mut(row);
            let (header, floats) = words.split_at_mut(HEADER_WORDS);
            let (weights, state) = bytemuck::cast_slice_mut(floats).split_at_mut(self.dim);
            skipped += u64::from(update.apply(weights, state, gradient));
            put_u64(&mut header[2..], lsn.0);
        }
        skipped
    }

    /// Hands the canonical encoding to `sink`: by rising key, each row as it lies in the arena.
    pub(crate) fn encode(&self, sink: &mut impl FnMut(u64)) {
        let mut rows: Vec<(u64, u32)> =
            (0..self.arena.len()).map(|row| (key_of(self.arena.row(row)), row)).collect();
        rows.sort_unstable();
        sink(rows.len() as u64);
        for (_, row) in rows {
            self.arena.row(row).iter().for_each(|&word| sink(word.into()));
        }
    }

    fn find(&self, key: u64) -> Option<u32> {
        self.index.find(mix64(key), |&row| key_of(self.arena.row(row)) == key).copied()
    }

    fn find_or_create(&mut self, key: u64) -> u32 {
        let arena = &self.arena;
        let same = |&row: &u32| key_of(arena.row(row)) == key;
        let hash = |&row: &u32| mix64(key_of(arena.row(row)));
        let vacant = match self.index.entry(mix64(key), same, hash) {
            Entry::Occupied(row) => return *row.get(),
            Entry::Vacant(vacant) => vacant,
        };
        let row = self.arena.push();
        vacant.insert(row);
        let (header, floats) = self.arena.row_mut(row).split_at_mut(HEADER_WORDS);
        put_u64(header, key);
        let (weights, state) = bytemuck::cast_slice_mut(floats).split_at_mut(self.dim);
        init_row(&self.init, self.seed, self.salt, key, weights);
        self.optimizer.init_state(state);
        row
    }
}

fn key_of(row: &[u32]) -> u64 {
    u64::from(row[0]) | u64::from(row[1]) << 32
}

fn put_u64(words: &mut [u32], value: u64) {
    words[0] = value as u32;
    words[1] = (value >> 32) as u32;
}

/// How a raw tensor of keys and one of floats belong together.
pub(crate) fn fits(keys: &[u8], floats: &[u8], dim: usize) -> bool {
    let rows = keys.len() / KEY_BYTES;
    rows.checked_mul(dim * FLOAT_BYTES) == Some(floats.len())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use downpour_core::optimizer::Sgd;
    use downpour_core::tensor_bytes::floats;
    use proptest::prelude::*;

    use super::*;

    fn counting(dim: usize, init: Init) -> Table {
        let optimizer = OptimizerSpec::Sgd(Sgd { learning_rate: -1.0 });
        Table::new(TableRules { dim, init, optimizer, seed: 1, salt: 2 })
    }

    fn raw_keys(keys: impl IntoIterator<Item = u64>) -> Vec<u8> {
        keys.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    fn pulled(table: &Table, keys: &[u64]) -> Vec<f32> {
        let mut out = BytesMut::new();
        table.pull(Keys::trusted(&raw_keys(keys.iter().copied())), &mut out);
        floats(&out).collect()
    }

    fn push_ones(table: &mut Table, keys: &[u64], lsn: u64) {
        let gradients: Vec<u8> =
            (0..keys.len() * table.dim()).flat_map(|_| 1f32.to_le_bytes()).collect();
        let scalars = StepScalars { learning_rate: -1.0, beta1_power: 0.0, beta2_power: 0.0 };
        let raw = raw_keys(keys.iter().copied());
        assert_eq!(table.push(Keys::trusted(&raw), &gradients, &scalars, Lsn(lsn)), 0);
    }

    #[test]
    fn pulling_creates_no_row_and_a_push_starts_from_the_pulled_value() {
        let mut table = counting(3, Init::Uniform { low: -1.0, high: 1.0 });
        let before = pulled(&table, &[5, 9]);
        assert_eq!(table.rows(), 0);
        push_ones(&mut table, &[9], 1);
        assert_eq!(table.rows(), 1);
        let after = pulled(&table, &[5, 9]);
        assert_eq!(after[..3], before[..3]);
        let sums: Vec<f32> = before[3..].iter().map(|value| value + 1.0).collect();
        assert_eq!(after[3..], sums);
    }

    #[test]
    fn many_rows_cost_at_most_32_bytes_each_beside_their_floats() {
        let mut table = counting(4, Init::Zeros);
        let rows = 200_000u64;
        push_ones(&mut table, &(0..rows).collect::<Vec<_>>(), 1);
        assert!(table.bytes() < rows * (16 + 32), "{} bytes a row", table.bytes() / rows);
    }

    proptest! {
        #[test]
        fn a_table_counts_like_a_map(pushes: Vec<std::collections::BTreeSet<u16>>) {
            let mut table = counting(2, Init::Zeros);
            let mut model = BTreeMap::new();
            for (keys, lsn) in pushes.iter().zip(1..) {
                let keys: Vec<u64> = keys.iter().map(|&key| u64::from(key) << 40 | 3).collect();
                push_ones(&mut table, &keys, lsn);
                for key in keys {
                    let entry = model.entry(key).or_insert((0u64, 0.0));
                    *entry = (lsn, entry.1 + 1.0);
                }
            }
            let mut encoded = Vec::new();
            table.encode(&mut |word| encoded.push(word as u32));
            let mut expected = vec![model.len() as u32];
            for (key, (lsn, count)) in model {
                let count = f32::to_bits(count);
                expected.extend([key as u32, (key >> 32) as u32, lsn as u32, 0, count, count]);
            }
            prop_assert_eq!(encoded, expected);
        }
    }
}
