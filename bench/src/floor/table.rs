//! A flat array of rows without locks.

use std::sync::atomic::AtomicU64;

use crate::workload::{LEARNING_RATE, Optimizer};

/// How many rows ahead memory is asked for.
const AHEAD: usize = 16;
/// Quads of a cache line.
const LINE_QUADS: usize = 4;

/// Floats of a [`Quad`]; the floor's rows are made of whole ones.
pub(super) const QUAD: usize = 4;

/// Four floats that several threads read and write without waiting for each other. A reader sees each half of it as somebody wrote it; a
/// row may be half new, and of two updates at the same time one may be lost.
#[repr(C, align(16))]
struct Quad([AtomicU64; 2]);

impl Quad {
    fn new(floats: [f32; QUAD]) -> Self {
        let [low, high]: [u64; 2] = bytemuck::cast(floats);
        Self([AtomicU64::new(low), AtomicU64::new(high)])
    }
}

/// In one instruction, which the language's atomics do not offer: the halves one by one make rows of 64 floats cost 1.6 times as much.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
impl Quad {
    #[inline(always)]
    fn load(&self) -> [f32; QUAD] {
        let floats: std::arch::x86_64::__m128;
        // SAFETY: reads the 16 bytes of `self`, which are aligned; the processor reads aligned halves whole, as a relaxed load of each.
        unsafe {
            std::arch::asm!("movaps {floats}, [{quad}]", quad = in(reg) self, floats = lateout(xmm_reg) floats,
                options(nostack, readonly, preserves_flags));
        }
        bytemuck::cast(floats)
    }

    #[inline(always)]
    fn store(&self, floats: [f32; QUAD]) {
        let floats: std::arch::x86_64::__m128 = bytemuck::cast(floats);
        // SAFETY: as in `load`; `AtomicU64` may be written through a shared reference.
        unsafe {
            std::arch::asm!("movaps [{quad}], {floats}", quad = in(reg) self, floats = in(xmm_reg) floats,
                options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn prefetch(&self) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch changes nothing that a program can see, whatever the address; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(self).cast()) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Quad {
    fn load(&self) -> [f32; QUAD] {
        bytemuck::cast(
            self.0.each_ref().map(|half| half.load(std::sync::atomic::Ordering::Relaxed)),
        )
    }

    fn store(&self, floats: [f32; QUAD]) {
        let new: [u64; 2] = bytemuck::cast(floats);
        for (half, new) in self.0.iter().zip(new) {
            half.store(new, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn prefetch(&self) {}
}

/// Rows of `row_quads` quads.
pub(super) struct Table {
    quads: Vec<Quad>,
    row_quads: usize,
}

impl Table {
    pub(super) fn new(rows: u32, dim: u32) -> Self {
        let row_quads = dim as usize / QUAD;
        let mut quads = Vec::with_capacity(rows as usize * row_quads);
        for id in 0..rows {
            let value = Optimizer::Sgd.first_value(id);
            quads.extend((0..row_quads).map(|_| Quad::new([value; QUAD])));
        }
        Self { quads, row_quads }
    }

    pub(super) fn row_quads(&self) -> usize {
        self.row_quads
    }

    /// Copies rows into `out`.
    pub(super) fn pull(&self, ids: &[u64], out: &mut [[f32; QUAD]]) {
        for (at, out) in out.chunks_exact_mut(self.row_quads.max(1)).enumerate() {
            self.prefetch(ids, at);
            for (out, quad) in out.iter_mut().zip(self.row(ids[at])) {
                *out = quad.load();
            }
        }
    }

    /// Applies gradients.
    pub(super) fn push(&self, ids: &[u64], gradients: &[[f32; QUAD]]) {
        for (at, gradients) in gradients.chunks_exact(self.row_quads.max(1)).enumerate() {
            self.prefetch(ids, at);
            for (quad, gradient) in self.row(ids[at]).iter().zip(gradients) {
                let mut floats = quad.load();
                for (float, gradient) in floats.iter_mut().zip(gradient) {
                    *float -= LEARNING_RATE * gradient;
                }
                quad.store(floats);
            }
        }
    }

    fn row(&self, id: u64) -> &[Quad] {
        &self.quads[id as usize * self.row_quads..][..self.row_quads]
    }

    #[inline(always)]
    fn prefetch(&self, ids: &[u64], at: usize) {
        if let Some(&id) = ids.get(at + AHEAD) {
            self.row(id).iter().step_by(LINE_QUADS).for_each(Quad::prefetch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_moves_the_rows_that_it_names() {
        let table = Table::new(3000, 8);
        let ids: Vec<u64> = (0..100).map(|at| at * 7).collect();
        table.push(&ids, &[[1.0, 2.0, 3.0, 4.0]; 200]);
        let mut out = vec![[0.0; QUAD]; 200];
        table.pull(&ids, &mut out);
        for (id, row) in ids.iter().zip(out.chunks(2)) {
            let first = ((id % 1000) as f64 * 0.001) as f32;
            let wanted = [1.0, 2.0, 3.0, 4.0].map(|gradient| first - LEARNING_RATE * gradient);
            assert_eq!(row, [wanted; 2]);
        }
        table.pull(&[1], &mut out[..2]);
        assert_eq!(out[1], [0.001; QUAD]);
    }

    #[test]
    fn a_quad_is_written_and_read_as_a_whole() {
        let quad = Quad::new([1.0, 2.0, 3.0, 4.0]);
        assert_eq!(quad.load(), [1.0, 2.0, 3.0, 4.0]);
        quad.store([5.0, -0.0, f32::MIN_POSITIVE, 8.0]);
        assert_eq!(quad.load(), [5.0, -0.0, f32::MIN_POSITIVE, 8.0]);
    }
}
