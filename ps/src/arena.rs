//! Rows of one width that never move.

use crate::pool::{self, LARGE_BYTES, LINE_WORDS, MEDIUM_BYTES, PAGE_BYTES, Slab};

/// Words of a row's header: key and LSN, low word first.
pub(crate) const HEADER_WORDS: usize = 4;

const WORD_BYTES: usize = size_of::<u32>();

/// Rows with a header and a fixed number of floats each, in slabs that grow with the table: growing copies nothing.
///
/// A slab holds the headers of all its rows, then their floats, so that rows of whole cache lines lie in whole cache lines. The number of a
/// row names its slab and its place there; numbers rise with age, but not one by one.
#[derive(Debug)]
pub(crate) struct Arena {
    width: usize,
    slabs: Vec<Rows>,
    /// Low bits of a row's number: its place in its slab.
    place_bits: u32,
    len: usize,
}

/// A slab of rows.
#[derive(Debug)]
struct Rows {
    slab: Slab,
    /// Word that the floats begin at.
    floats: usize,
    len: usize,
    capacity: usize,
}

impl Arena {
    /// For rows of `width` floats.
    pub(crate) fn new(width: usize) -> Self {
        let capacity = capacity(slab_bytes(usize::MAX, width), width);
        Arena { width, slabs: Vec::new(), place_bits: capacity.next_power_of_two().ilog2(), len: 0 }
    }

    /// Floats of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Bytes of a row with its header.
    pub(crate) fn row_bytes(&self) -> usize {
        (HEADER_WORDS + self.width) * WORD_BYTES
    }

    /// Rows so far.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the slabs so far.
    pub(crate) fn bytes(&self) -> usize {
        self.slabs.iter().map(|rows| rows.slab.bytes()).sum()
    }

    /// Adds a row and returns its number. What it holds is arbitrary.
    ///
    /// # Panics
    /// When the numbers are used up: at about 2^32 rows.
    pub(crate) fn push(&mut self) -> u32 {
        if self.slabs.last().is_none_or(|rows| rows.len == rows.capacity) {
            let slab = Slab::new(slab_bytes(self.slabs.len(), self.width));
            let capacity = capacity(slab.bytes(), self.width);
            let floats = (capacity * HEADER_WORDS).next_multiple_of(LINE_WORDS);
            self.slabs.push(Rows { slab, floats, len: 0, capacity });
        }
        let last = self.slabs.len() - 1;
        let rows = &mut self.slabs[last];
        let row = last << self.place_bits | rows.len;
        rows.len += 1;
        self.len += 1;
        // The highest number is left out: an index uses it for "none".
        u32::try_from(row)
            .ok()
            .filter(|&row| row < u32::MAX)
            .expect("a shard's table has fewer rows")
    }

    /// Numbers of all rows, by age.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.numbers_from(0)
    }

    /// Numbers of the rows from this one on, by age.
    pub(crate) fn numbers_from(&self, first: u32) -> impl Iterator<Item = u32> + '_ {
        let (first_slab, first_place) = self.split(first);
        let slabs = self.slabs.iter().enumerate().skip(first_slab);
        let places = slabs.flat_map(move |(slab, rows)| {
            let first = if slab == first_slab { first_place } else { 0 };
            (first..rows.len).map(move |place| (slab, place))
        });
        places.map(|(slab, place)| (slab << self.place_bits | place) as u32)
    }

    /// A number above those of all rows, and not above that of the next one.
    pub(crate) fn end(&self) -> u32 {
        let last = self.slabs.len().saturating_sub(1);
        let len = self.slabs.last().map_or(0, |rows| rows.len);
        ((last << self.place_bits) + len) as u32
    }

    /// The key of a row.
    #[inline]
    pub(crate) fn key(&self, row: u32) -> u64 {
        let header = self.header(row);
        u64::from(header[0]) | u64::from(header[1]) << 32
    }

    /// The header of a row.
    #[inline]
    pub(crate) fn header(&self, row: u32) -> &[u32] {
        let (rows, place) = self.at(row);
        &rows.slab.words()[place * HEADER_WORDS..][..HEADER_WORDS]
    }

    /// The floats of a row.
    #[inline]
    pub(crate) fn floats(&self, row: u32) -> &[f32] {
        let (rows, place) = self.at(row);
        bytemuck::cast_slice(&rows.slab.words()[rows.floats + place * self.width..][..self.width])
    }

    /// Header and floats of a row, to change them.
    #[inline]
    pub(crate) fn row_mut(&mut self, row: u32) -> (&mut [u32], &mut [f32]) {
        let (slab, place) = self.split(row);
        let rows = &mut self.slabs[slab];
        let (headers, floats) = rows.slab.words_mut().split_at_mut(rows.floats);
        let floats = &mut floats[place * self.width..][..self.width];
        (&mut headers[place * HEADER_WORDS..][..HEADER_WORDS], bytemuck::cast_slice_mut(floats))
    }

    /// Asks for the header of a row and for its first `floats` floats.
    #[inline]
    pub(crate) fn prefetch(&self, row: u32, floats: usize) {
        let (rows, place) = self.at(row);
        rows.slab.prefetch(place * HEADER_WORDS);
        let mut word = rows.floats + place * self.width;
        let mut left = floats;
        // Not a counted loop: the compiler would unroll it, and then lookups take a third longer (measured).
        while left > 0 {
            rows.slab.prefetch(word);
            let line = left.min(LINE_WORDS);
            (word, left) = (word + line, left - line);
        }
    }

    /// Asks for the header of a row.
    #[inline]
    pub(crate) fn prefetch_header(&self, row: u32) {
        let (rows, place) = self.at(row);
        rows.slab.prefetch(place * HEADER_WORDS);
    }

    #[inline]
    fn at(&self, row: u32) -> (&Rows, usize) {
        let (slab, place) = self.split(row);
        (&self.slabs[slab], place)
    }

    /// Slab of a row, and its place there.
    #[inline]
    fn split(&self, row: u32) -> (usize, usize) {
        let row = row as usize;
        (row >> self.place_bits, row & ((1 << self.place_bits) - 1))
    }
}

/// Bytes of slab number `at` for rows of `width` floats: eight pages, then as much again in each of some medium ones, then large ones. Rows that are
/// large themselves come by eight or more, so that little of a slab is left over.
fn slab_bytes(at: usize, width: usize) -> usize {
    let row = (HEADER_WORDS + width) * WORD_BYTES;
    let bytes = match at {
        0..8 => PAGE_BYTES,
        8..15 => MEDIUM_BYTES,
        _ => LARGE_BYTES,
    };
    pool::slab_bytes(bytes.max(8 * row))
}

/// Rows of `width` floats that fit into a slab: their headers are followed by less than a line of padding.
fn capacity(bytes: usize, width: usize) -> usize {
    let padding = LINE_WORDS - HEADER_WORDS;
    (bytes / WORD_BYTES - padding) / (HEADER_WORDS + width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_what_was_written_while_the_arena_grows() {
        for (width, count) in [(1, 100_000), (16, 20_000), (17, 20_000), (5000, 100), (100_000, 20)]
        {
            let mut arena = Arena::new(width);
            let numbers: Vec<u32> = (0..count)
                .map(|mark| {
                    let row = arena.push();
                    let (header, floats) = arena.row_mut(row);
                    header.fill(mark);
                    floats.fill(mark as f32);
                    row
                })
                .collect();
            assert!(numbers.is_sorted_by(|a, b| a < b));
            assert!(arena.numbers().eq(numbers.iter().copied()));
            assert_eq!(arena.len(), numbers.len());
            for (row, mark) in numbers.into_iter().zip(0..) {
                assert!(arena.header(row).iter().all(|&word| word == mark));
                assert!(arena.floats(row).iter().all(|&float| float == mark as f32));
                assert_eq!(arena.floats(row).len(), width);
            }
        }
    }

    #[test]
    fn rows_of_whole_cache_lines_lie_in_whole_cache_lines() {
        let mut arena = Arena::new(32);
        for _ in 0..10_000 {
            let row = arena.push();
            assert!(arena.floats(row).as_ptr().addr().is_multiple_of(64));
        }
    }

    #[test]
    fn a_small_table_costs_pages_and_a_large_one_little_beside_its_rows() {
        let mut arena = Arena::new(16);
        arena.push();
        assert_eq!(arena.bytes(), PAGE_BYTES);
        while arena.len() < 100_000 {
            arena.push();
        }
        let rows = 100_000 * (HEADER_WORDS + 16) * WORD_BYTES;
        assert!(arena.bytes() < rows + LARGE_BYTES + rows / 100, "{}", arena.bytes());
    }
}
