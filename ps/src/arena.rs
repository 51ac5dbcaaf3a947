//! Rows of one width that never move.

/// Rows in the first slab; each further slab holds twice as many as the one before.
const FIRST_ROWS: u64 = 16;

/// Rows of a fixed number of words, in slabs that double, so that growing copies nothing. Memory that no row was written to yet is not
/// resident: the system hands out zeroed pages when they are touched.
#[derive(Debug)]
pub(crate) struct Arena {
    stride: usize,
    slabs: Vec<Box<[u32]>>,
    len: u32,
}

impl Arena {
    /// For rows of `stride` words.
    pub(crate) fn new(stride: usize) -> Self {
        Arena { stride, slabs: Vec::new(), len: 0 }
    }

    /// Rows so far.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Bytes of the rows so far.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.len) * (self.stride * size_of::<u32>()) as u64
    }

    /// Adds a row of zeros and returns its number.
    ///
    /// # Panics
    /// At 2^32 rows, 64 GiB of headers alone.
    pub(crate) fn push(&mut self) -> u32 {
        let row = self.len;
        let (slab, _) = place(row);
        if slab == self.slabs.len() {
            let words = (FIRST_ROWS << slab) as usize * self.stride;
            self.slabs.push(vec![0; words].into_boxed_slice());
        }
        self.len = row.checked_add(1).expect("a shard's table has fewer than 2^32 rows");
        row
    }

    /// The words of a row.
    #[inline]
    pub(crate) fn row(&self, row: u32) -> &[u32] {
        let (slab, at) = place(row);
        &self.slabs[slab][at * self.stride..][..self.stride]
    }

    /// The words of a row, to change them.
    #[inline]
    pub(crate) fn row_mut(&mut self, row: u32) -> &mut [u32] {
        let (slab, at) = place(row);
        &mut self.slabs[slab][at * self.stride..][..self.stride]
    }
}

/// Slab of a row, and its place there.
#[inline]
fn place(row: u32) -> (usize, usize) {
    let position = u64::from(row) + FIRST_ROWS;
    let slab = position.ilog2() - FIRST_ROWS.ilog2();
    (slab as usize, (position - (FIRST_ROWS << slab)) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_tile_the_row_numbers() {
        let mut next = (0, 0);
        for row in 0..100_000 {
            assert_eq!(place(row), next);
            next.1 += 1;
            if next.1 == (FIRST_ROWS as usize) << next.0 {
                next = (next.0 + 1, 0);
            }
        }
    }

    #[test]
    fn rows_keep_what_was_written_while_the_arena_grows() {
        let mut arena = Arena::new(3);
        for expected in 0..1000u32 {
            let row = arena.push();
            assert_eq!(row, expected);
            arena.row_mut(row).fill(row + 1);
        }
        assert!((0..1000).all(|row| arena.row(row) == [row + 1; 3]));
        assert_eq!((arena.len(), arena.bytes()), (1000, 12_000));
    }
}
