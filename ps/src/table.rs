//! Embedding rows of one table on one shard.
//!
//! A row is key, LSN, weights and optimizer slots in an [`Arena`]. They change as one (docs/protocol.md 2.4), and never move while the table grows. The
//! [`Index`] holds row numbers and finds keys in the rows themselves.
//!
//! A batch is looked up in three stages, each [`GROUP`] keys ahead of the next: hash, and ask for the buckets; read the buckets, and ask for the rows; use
//! the rows. So the waits for memory overlap, which is most of the speed (docs/performance.md, "The table").
//!
//! **Price.** 16 bytes of header and about 7 of index beside a row's floats. Growing pauses for some thousand rows at once (0.1 ms), never for all.

use std::ops::RangeInclusive;

use bytes::BytesMut;
use downpour_core::id::Lsn;
use downpour_core::init::{Init, init_row};
use downpour_core::mix::mix64;
use downpour_core::optimizer::{OptimizerSpec, StepScalars};
use downpour_core::tensor_bytes::{FLOAT_BYTES, floats};
use downpour_proto::tensor::{KEY_BYTES, Keys, put_floats};

use crate::arena::Arena;
use crate::cut::{self, CutId, CutRange, RowCuts, RowsOut};
use crate::index::{Index, NONE};

/// Keys by which each stage of a lookup is ahead of the next.
const GROUP: usize = 16;

/// Bytes of a row in the index, at most (measured by its tests).
const INDEX_ROW_BYTES: u64 = 8;

/// The rows of one table on one shard.
#[derive(Debug)]
pub(crate) struct Table {
    dim: usize,
    init: Init,
    optimizer: OptimizerSpec,
    seed: u64,
    salt: u64,
    index: Index,
    arena: Arena,
    cuts: RowCuts,
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

/// A key on its way to its row.
#[derive(Clone, Copy, Default)]
struct Lookup {
    key: u64,
    hash: u64,
    /// First the page of the index that it is on, then the row.
    at: u32,
}

impl Table {
    pub(crate) fn new(rules: TableRules) -> Self {
        let TableRules { dim, init, optimizer, seed, salt } = rules;
        let arena = Arena::new(dim + optimizer.state_width(dim));
        Table {
            dim,
            init,
            optimizer,
            seed,
            salt,
            index: Index::default(),
            arena,
            cuts: RowCuts::default(),
        }
    }

    /// Floats of a row's weights.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    pub(crate) fn rows(&self) -> u64 {
        self.arena.len() as u64
    }

    /// Bytes that the rows and their index occupy.
    pub(crate) fn bytes(&self) -> u64 {
        (self.arena.bytes() + self.index.bytes()) as u64
    }

    /// Bytes that the rows take on their way to another server.
    pub(crate) fn copy_bytes(&self) -> u64 {
        self.rows() * self.arena.row_bytes() as u64
    }

    /// Appends the weights of `keys` to `out`. A key that was never pushed has its initial value, and no row is made for it.
    pub(crate) fn pull(&self, keys: Keys<'_>, out: &mut BytesMut) {
        out.reserve(keys.len() * self.dim * FLOAT_BYTES);
        let mut keys = keys.iter();
        let mut lookups = Lookups::default();
        let mut initial = Vec::new();
        while let Some(group) = lookups.next(self, &mut keys, self.dim) {
            for lookup in group {
                if let Some(row) = self.settle(lookup) {
                    put_row(out, &self.arena.floats(row)[..self.dim]);
                } else {
                    initial.resize(self.dim, 0.0);
                    init_row(&self.init, self.seed, self.salt, lookup.key, &mut initial);
                    put_row(out, &initial);
                }
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
        if self.cuts.is_empty() {
            return self.push_rows(keys, gradients, scalars, lsn, |_, _| ());
        }
        let mut cuts = std::mem::take(&mut self.cuts);
        let save = |arena: &Arena, row| cuts.before_write(arena, row);
        let skipped = self.push_rows(keys, gradients, scalars, lsn, save);
        self.cuts = cuts;
        skipped
    }

    /// `before` is shown each row that is about to change.
    fn push_rows(
        &mut self,
        keys: Keys<'_>,
        gradients: &[u8],
        scalars: &StepScalars,
        lsn: Lsn,
        mut before: impl FnMut(&Arena, u32),
    ) -> u64 {
        let update = self.optimizer.update(scalars);
        let width = self.arena.width();
        let mut keys = keys.iter();
        let mut gradients = gradients.chunks_exact(self.dim * FLOAT_BYTES);
        let mut lookups = Lookups::default();
        let mut skipped = 0;
        while let Some(group) = lookups.next(self, &mut keys, width) {
            for (lookup, gradient) in group.iter().zip(&mut gradients) {
                let row = match self.settle(lookup) {
                    Some(row) => {
                        before(&self.arena, row);
                        row
                    }
                    None => self.create(lookup),
                };
                let (header, floats) = self.arena.row_mut(row);
                let (weights, state) = floats.split_at_mut(self.dim);
                skipped += u64::from(update.apply(weights, state, gradient));
                put_u64(&mut header[2..], lsn.0);
            }
        }
        skipped
    }

    /// Bytes that a new row costs, its place in the index included.
    pub(crate) fn row_cost(&self) -> u64 {
        self.arena.row_bytes() as u64 + INDEX_ROW_BYTES
    }

    /// Places in `keys` of those that have no row and for which `room`, in bytes, is too small. Takes what the others cost from `room`.
    pub(crate) fn without_room(&self, keys: Keys<'_>, room: &mut u64) -> Vec<usize> {
        let cost = self.row_cost();
        let mut refused = Vec::new();
        for (place, key) in keys.iter().enumerate() {
            if self.find(key).is_none() {
                match room.checked_sub(cost) {
                    Some(left) => *room = left,
                    None => refused.push(place),
                }
            }
        }
        refused
    }

    /// Hands the canonical encoding to `sink`: by rising key, header and floats of each row.
    pub(crate) fn encode(&self, sink: &mut impl FnMut(u64)) {
        self.encode_rows(self.arena.numbers(), sink);
    }

    /// The same of the rows whose hash is in `range` (by its low word): members with the same rows choose the same, wherever these lie.
    pub(crate) fn sample(&self, range: RangeInclusive<u32>, sink: &mut impl FnMut(u64)) {
        let inside = |row: &u32| range.contains(&(self.hash(self.arena.key(*row)) as u32));
        self.encode_rows(self.index.near(range.clone()).filter(inside), sink);
    }

    fn encode_rows(&self, rows: impl Iterator<Item = u32>, sink: &mut impl FnMut(u64)) {
        let mut rows: Vec<(u64, u32)> = rows.map(|row| (self.arena.key(row), row)).collect();
        rows.sort_unstable();
        sink(rows.len() as u64);
        for (_, row) in rows {
            self.arena.header(row).iter().for_each(|&word| sink(word.into()));
            self.arena.floats(row).iter().for_each(|float| sink(float.to_bits().into()));
        }
    }

    /// The row of a key that was looked up.
    #[inline]
    fn settle(&self, lookup: &Lookup) -> Option<u32> {
        if lookup.at != NONE && self.arena.key(lookup.at) == lookup.key {
            return Some(lookup.at);
        }
        self.find(lookup.key)
    }

    fn find(&self, key: u64) -> Option<u32> {
        self.index.find(self.hash(key), |row| self.arena.key(row) == key)
    }

    fn create(&mut self, lookup: &Lookup) -> u32 {
        let row = self.add(lookup.key, lookup.hash);
        let (_, floats) = self.arena.row_mut(row);
        let (weights, state) = floats.split_at_mut(self.dim);
        init_row(&self.init, self.seed, self.salt, lookup.key, weights);
        self.optimizer.init_state(state);
        row
    }

    /// A row for a key that has none. Its floats and its LSN are arbitrary.
    fn add(&mut self, key: u64, hash: u64) -> u32 {
        let row = self.arena.push();
        put_u64(self.arena.row_mut(row).0, key);
        let (arena, salt) = (&self.arena, self.salt);
        let soon = |row| arena.prefetch_header(row);
        self.index.insert(hash, row, soon, |row| mix64(arena.key(row) ^ salt));
        row
    }

    /// Floats of a row, its optimizer slots included.
    pub(crate) fn width(&self) -> usize {
        self.arena.width()
    }

    /// Puts back a row as a cut had it, over one that is not newer than `base`. False if there is a newer one.
    pub(crate) fn restore(&mut self, key: u64, lsn: Lsn, raw: &[u8], base: Lsn) -> bool {
        let row = match self.find(key) {
            Some(row) if cut::row_lsn(self.arena.header(row)) > base => return false,
            Some(row) => row,
            None => self.add(key, self.hash(key)),
        };
        let (header, row) = self.arena.row_mut(row);
        put_u64(&mut header[2..], lsn.0);
        row.iter_mut().zip(floats(raw)).for_each(|(float, value)| *float = value);
        true
    }

    pub(crate) fn open_cut(&mut self, range: CutRange) {
        self.cuts.open(range, self.arena.end());
    }

    pub(crate) fn close_cut(&mut self, id: CutId) {
        self.cuts.close(id);
    }

    pub(crate) fn saved_bytes(&self, id: CutId) -> usize {
        self.cuts.saved_bytes(id)
    }

    /// The next rows of a cut, and whether these were the last.
    pub(crate) fn read_cut(&mut self, id: CutId, bytes_max: usize) -> (RowsOut, bool) {
        let mut out = RowsOut::with_capacity(bytes_max, self.arena.width());
        let end = self.cuts.read(id, &self.arena, bytes_max, &mut out);
        (out, end)
    }

    #[inline]
    fn hash(&self, key: u64) -> u64 {
        mix64(key ^ self.salt)
    }
}

/// Keys in the stages of a lookup.
#[derive(Default)]
struct Lookups {
    groups: [([Lookup; GROUP], usize); 3],
    /// The oldest of them: its rows were asked for.
    oldest: usize,
    /// Keys that were taken, but not handed out.
    waiting: usize,
}

impl Lookups {
    /// The next keys whose rows were asked for: header, and the first `floats`. None when all of `keys` were handed out.
    #[inline]
    fn next(
        &mut self,
        table: &Table,
        keys: &mut impl ExactSizeIterator<Item = u64>,
        floats: usize,
    ) -> Option<&[Lookup]> {
        loop {
            let newest = self.oldest;
            let middle = (newest + 2) % 3;
            self.oldest = (newest + 1) % 3;
            self.ask_for_buckets(newest, table, keys);
            self.ask_for_rows(middle, table, floats);
            if self.waiting == 0 {
                return None;
            }
            let count = self.groups[self.oldest].1;
            if count > 0 {
                self.waiting -= count;
                return Some(&self.groups[self.oldest].0[..count]);
            }
        }
    }

    fn ask_for_buckets(
        &mut self,
        group: usize,
        table: &Table,
        keys: &mut impl ExactSizeIterator<Item = u64>,
    ) {
        let (group, count) = &mut self.groups[group];
        *count = keys.len().min(GROUP);
        self.waiting += *count;
        for (lookup, key) in group[..*count].iter_mut().zip(keys) {
            (lookup.key, lookup.hash) = (key, table.hash(key));
            lookup.at = table.index.prefetch(lookup.hash);
        }
    }

    fn ask_for_rows(&mut self, group: usize, table: &Table, floats: usize) {
        let (group, count) = &mut self.groups[group];
        for lookup in &mut group[..*count] {
            lookup.at = table.index.candidate(lookup.hash, lookup.at);
            if lookup.at != NONE {
                table.arena.prefetch(lookup.at, floats);
            }
        }
    }
}

#[inline]
pub(crate) fn put_row(out: &mut BytesMut, floats: &[f32]) {
    if cfg!(target_endian = "little") {
        out.extend_from_slice(bytemuck::cast_slice(floats));
    } else {
        put_floats(out, floats);
    }
}

fn put_u64(words: &mut [u32], value: u64) {
    words[0] = value as u32;
    words[1] = (value >> 32) as u32;
}

/// How a raw tensor of keys and one of rows belong together.
pub(crate) fn fits(keys: &[u8], rows: &[u8], row_bytes: usize) -> bool {
    let count = keys.len() / KEY_BYTES;
    count.checked_mul(row_bytes) == Some(rows.len())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use downpour_core::optimizer::Sgd;
    use downpour_core::tensor_bytes::floats;
    use proptest::prelude::*;

    use super::*;
    use crate::pool::LARGE_BYTES;

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
    fn many_rows_cost_at_most_24_bytes_each_beside_their_floats_and_are_all_found() {
        let mut table = counting(4, Init::Zeros);
        let rows = 100_000u64;
        let keys: Vec<u64> = (0..rows).map(|key| key * 3).collect();
        push_ones(&mut table, &keys, 1);
        push_ones(&mut table, &keys[..50_000], 2);
        // The last slab is not full.
        let most = rows * (16 + 24) + LARGE_BYTES as u64;
        assert!(table.bytes() < most, "{} bytes a row", table.bytes() / rows);
        let all: Vec<u64> = (0..rows * 3).collect();
        for (row, key) in pulled(&table, &all).chunks_exact(4).zip(all) {
            let pushed = if key < 150_000 { 2.0 } else { 1.0 };
            assert_eq!(row, [if key % 3 == 0 { pushed } else { 0.0 }; 4], "{key}");
        }
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
