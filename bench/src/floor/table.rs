//! A flat array of rows without locks.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::workload::{LEARNING_RATE, Optimizer};

/// How many rows ahead memory is asked for.
const AHEAD: usize = 16;
/// Bytes of a cache line in words.
const LINE_WORDS: usize = 8;

/// Rows of `2 * row_words` floats, two in a word. Words are read and written whole; an update of a word is not one operation.
pub(super) struct Table {
    words: Vec<AtomicU64>,
    row_words: usize,
}

impl Table {
    pub(super) fn new(rows: u32, dim: u32) -> Self {
        let row_words = dim as usize / 2;
        let words = (0..rows).flat_map(|id| {
            let value = Optimizer::Sgd.first_value(id);
            std::iter::repeat_n(pack([value; 2]), row_words)
        });
        Self { words: words.map(AtomicU64::new).collect(), row_words }
    }

    pub(super) fn row_words(&self) -> usize {
        self.row_words
    }

    /// Copies rows into `out`.
    pub(super) fn pull(&self, ids: &[u64], out: &mut [u64]) {
        for (at, out) in out.chunks_exact_mut(self.row_words).enumerate() {
            self.prefetch(ids, at);
            for (out, word) in out.iter_mut().zip(self.row(ids[at])) {
                *out = word.load(Ordering::Relaxed);
            }
        }
    }

    /// Applies gradients.
    pub(super) fn push(&self, ids: &[u64], gradients: &[u64]) {
        for (at, gradients) in gradients.chunks_exact(self.row_words).enumerate() {
            self.prefetch(ids, at);
            for (word, gradient) in self.row(ids[at]).iter().zip(gradients) {
                let ([a, b], [da, db]) = (floats(word.load(Ordering::Relaxed)), floats(*gradient));
                let new = pack([a - LEARNING_RATE * da, b - LEARNING_RATE * db]);
                word.store(new, Ordering::Relaxed);
            }
        }
    }

    fn row(&self, id: u64) -> &[AtomicU64] {
        &self.words[id as usize * self.row_words..][..self.row_words]
    }

    #[inline(always)]
    fn prefetch(&self, ids: &[u64], at: usize) {
        if let Some(&id) = ids.get(at + AHEAD) {
            self.row(id).iter().step_by(LINE_WORDS).for_each(prefetch);
        }
    }
}

#[inline(always)]
#[allow(unsafe_code)]
fn prefetch(word: &AtomicU64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch changes nothing that a program can see, whatever the address; SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(word).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = word;
}

/// Two floats in the order in which they lie in memory.
fn pack(floats: [f32; 2]) -> u64 {
    bytemuck::cast(floats)
}

fn floats(word: u64) -> [f32; 2] {
    bytemuck::cast(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_moves_the_rows_that_it_names() {
        let table = Table::new(3000, 4);
        let ids: Vec<u64> = (0..100).map(|at| at * 7).collect();
        let gradients = vec![pack([1.0, 2.0]); 200];
        table.push(&ids, &gradients);
        let mut out = vec![0; 200];
        table.pull(&ids, &mut out);
        for (id, row) in ids.iter().zip(out.chunks(2)) {
            let first = ((id % 1000) as f64 * 0.001) as f32;
            let wanted = [first - LEARNING_RATE, first - LEARNING_RATE * 2.0];
            assert_eq!([floats(row[0]), floats(row[1])], [wanted; 2]);
        }
        table.pull(&[1], &mut out[..2]);
        assert_eq!(floats(out[1]), [0.001; 2]);
    }
}
