//! One row under one gradient: what all optimizers share.
//!
//! An optimizer says what becomes of one element ([`Element`]) from its weight, its slots and its gradient. The loop here does
//! that to groups of elements that fill a vector register, stores what is finite and counts what is not. Grouping changes no bit:
//! elements do not see each other.

use std::hint::select_unpredictable;

use crate::instruction_set::Work;
use crate::tensor_bytes::{FLOAT_BYTES, float, floats};

/// An optimizer that treats every element alike, with `SLOTS` slots per parameter.
pub(super) trait Element<const SLOTS: usize> {
    /// The new weight and slots. `#[inline(always)]`, + − × ÷ √ only.
    fn next(&self, weight: f32, slots: [f32; SLOTS], gradient: f32) -> (f32, [f32; SLOTS]);
}

/// An optimizer with everything that is constant over the rows of one update worked out.
pub(super) trait Kernel {
    /// Applies one gradient and returns how many elements were left as they were. `#[inline(always)]`.
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32;
}

/// A row and the gradient's bytes for it.
pub(super) struct Row<'a> {
    pub(super) weights: &'a mut [f32],
    pub(super) state: &'a mut [f32],
    pub(super) bytes: &'a [u8],
}

/// How the gradient that arrived becomes the one that the optimizer sees.
pub(super) trait Gradient: Copy {
    /// What there is to work out for a whole row, from its gradient; none when that is not finite.
    fn of_row(self, bytes: &[u8]) -> Option<Self>;

    fn element(self, gradient: f32, weight: f32) -> f32;
}

/// The gradient as it arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct AsItCame;

impl Gradient for AsItCame {
    #[inline(always)]
    fn of_row(self, _: &[u8]) -> Option<Self> {
        Some(self)
    }

    #[inline(always)]
    fn element(self, gradient: f32, _: f32) -> f32 {
        gradient
    }
}

/// Clipped, then with decay: `g·scale + l2·w`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Modified {
    /// Longest that the gradient of a row may be.
    pub(super) norm_max: Option<f32>,
    pub(super) l2: f32,
    /// `norm_max / norm` of this row where it is too long, else 1.
    pub(super) scale: f32,
}

impl Gradient for Modified {
    #[inline(always)]
    fn of_row(self, bytes: &[u8]) -> Option<Self> {
        let Some(norm_max) = self.norm_max else { return Some(self) };
        let norm = sum_of_squares(bytes, |_, g| g).sqrt();
        let scale = if norm > norm_max { norm_max / norm } else { 1.0 };
        norm.is_finite().then_some(Self { scale, ..self })
    }

    #[inline(always)]
    fn element(self, gradient: f32, weight: f32) -> f32 {
        gradient * self.scale + self.l2 * weight
    }
}

/// One row under one kernel, as something that may be compiled for several instruction sets.
pub(super) struct Apply<'a, K, G> {
    pub(super) kernel: &'a K,
    pub(super) gradient: G,
    pub(super) row: Row<'a>,
}

impl<K: Kernel, G: Gradient> Work for Apply<'_, K, G> {
    type Output = u32;

    #[inline(always)]
    fn run(self) -> u32 {
        match self.gradient.of_row(self.row.bytes) {
            Some(gradient) => self.kernel.apply(self.row, gradient),
            None => self.row.weights.len() as u32,
        }
    }
}

/// Applies an optimizer that treats every element alike: in groups of 16 (a register of AVX-512, two of AVX2), then of 4, then one
/// by one.
#[inline(always)]
pub(super) fn elementwise<const SLOTS: usize>(
    optimizer: &impl Element<SLOTS>,
    row: Row<'_>,
    gradient: impl Gradient,
) -> u32 {
    let Row { weights, state, bytes } = row;
    let dim = weights.len();
    assert_eq!(state.len(), SLOTS * dim, "floats of optimizer slots");
    let mut rest = state;
    let mut slots: [&mut [f32]; SLOTS] = std::array::from_fn(|_| {
        let (slot, behind) = std::mem::take(&mut rest).split_at_mut(dim);
        rest = behind;
        slot
    });
    let (weights, slots) = (weights, &mut slots);
    let (done, wide) = groups::<16, SLOTS>(optimizer, gradient, 0, weights, slots, bytes);
    let (done, narrow) = groups::<4, SLOTS>(optimizer, gradient, done, weights, slots, bytes);
    let (_, single) = groups::<1, SLOTS>(optimizer, gradient, done, weights, slots, bytes);
    wide + narrow + single
}

/// As many groups of `LANES` elements as there are behind `start`: how far that came, and how many elements were left as they were.
#[inline(always)]
fn groups<const LANES: usize, const SLOTS: usize>(
    optimizer: &impl Element<SLOTS>,
    gradient: impl Gradient,
    start: usize,
    weights: &mut [f32],
    slots: &mut [&mut [f32]; SLOTS],
    bytes: &[u8],
) -> (usize, u32) {
    let (mut at, mut skipped) = (start, 0);
    while let Some((weights, _)) = weights[at..].split_first_chunk_mut::<LANES>() {
        let bytes = &bytes[at * FLOAT_BYTES..][..LANES * FLOAT_BYTES];
        // Copies: the compiler need not wonder whether weights, slots and gradient overlap.
        let mut new_weights = *weights;
        let mut new_slots: [[f32; LANES]; SLOTS] = [[0.0; LANES]; SLOTS];
        for (new, slot) in new_slots.iter_mut().zip(slots.iter()) {
            new.copy_from_slice(&slot[at..][..LANES]);
        }
        for lane in 0..LANES {
            let old_weight = new_weights[lane];
            let old_slots = std::array::from_fn(|slot| new_slots[slot][lane]);
            let g =
                gradient.element(float(&bytes[lane * FLOAT_BYTES..][..FLOAT_BYTES]), old_weight);
            let (weight, next) = optimizer.next(old_weight, old_slots, g);
            let keep = next.iter().fold(weight.is_finite(), |keep, x| keep & x.is_finite());
            new_weights[lane] = select_unpredictable(keep, weight, old_weight);
            for slot in 0..SLOTS {
                new_slots[slot][lane] = select_unpredictable(keep, next[slot], old_slots[slot]);
            }
            skipped += u32::from(!keep);
        }
        *weights = new_weights;
        for (slot, new) in slots.iter_mut().zip(&new_slots) {
            slot[at..][..LANES].copy_from_slice(new);
        }
        at += LANES;
    }
    (at, skipped)
}

const LANES: usize = 8;

/// Sum of the squares of what `element` makes of each position and float of a raw tensor, in one order everywhere: eight lanes,
/// square `i` added to lane `i mod 8` in rising order of `i`, each lane starting at 0; then `t[j] = lane[j] + lane[j+4]`, and the
/// sum is `(t[0] + t[2]) + (t[1] + t[3])`.
#[inline(always)]
pub(super) fn sum_of_squares(bytes: &[u8], element: impl Fn(usize, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let groups = bytes.chunks_exact(LANES * FLOAT_BYTES);
    let tail = groups.remainder();
    let whole = bytes.len() / (LANES * FLOAT_BYTES) * LANES;
    for (group, start) in groups.zip((0..).step_by(LANES)) {
        for (lane, bytes) in group.chunks_exact(FLOAT_BYTES).enumerate() {
            let g = element(start + lane, float(bytes));
            lanes[lane] += g * g;
        }
    }
    for (lane, g) in floats(tail).enumerate() {
        let g = element(whole + lane, g);
        lanes[lane] += g * g;
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
