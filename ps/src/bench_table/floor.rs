//! What no table can beat: rows in a flat array whose places are known.

use downpour_core::prefetch::prefetch;
use downpour_core::tensor_bytes::floats;

/// Rows ahead that are asked for.
const AHEAD: usize = 16;
const LINE_FLOATS: usize = 16;

/// Rows of `dim` floats, one after the other, where the allocator puts them.
pub(super) struct Floor {
    dim: usize,
    rows: Vec<f32>,
}

impl Floor {
    pub(super) fn new(rows: usize, dim: usize) -> Self {
        // Written to, so that every page is there.
        Floor { dim, rows: vec![1.0; rows * dim] }
    }

    /// Copies the rows at `places` out.
    #[inline(never)]
    pub(super) fn gather(&self, places: &[u32], out: &mut [f32]) {
        for (at, (place, out)) in places.iter().zip(out.chunks_exact_mut(self.dim)).enumerate() {
            if let Some(&ahead) = places.get(at + AHEAD) {
                self.prefetch(ahead);
            }
            out.copy_from_slice(self.row(*place));
        }
    }

    /// Subtracts from the rows at `places` what SGD would.
    #[inline(never)]
    pub(super) fn scatter(&mut self, places: &[u32], gradients: &[u8], rate: f32) {
        let dim = self.dim;
        let gradients = gradients.chunks_exact(dim * size_of::<f32>());
        for (at, (place, gradient)) in places.iter().zip(gradients).enumerate() {
            if let Some(&ahead) = places.get(at + AHEAD) {
                self.prefetch(ahead);
            }
            let row = &mut self.rows[*place as usize * dim..][..dim];
            row.iter_mut().zip(floats(gradient)).for_each(|(weight, g)| *weight -= rate * g);
        }
    }

    #[inline(always)]
    fn row(&self, place: u32) -> &[f32] {
        &self.rows[place as usize * self.dim..][..self.dim]
    }

    #[inline(always)]
    fn prefetch(&self, place: u32) {
        let row = self.row(place);
        row.chunks(LINE_FLOATS).for_each(|line| prefetch(line.as_ptr()));
        // Rows need not begin at a cache line.
        prefetch(&raw const row[row.len() - 1]);
    }
}
