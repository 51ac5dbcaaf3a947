//! One row under one gradient: what all optimizers share.
//!
//! An optimizer says what becomes of one element ([`Element`]) from its weight, its slots and its gradient. The loop here does
//! that to groups of elements that fill a vector register, stores what is finite and counts what is not. Grouping changes no bit:
//! elements do not see each other.

use crate::tensor_bytes::{FLOAT_BYTES, NOT_FINITE, beyond_finite, float};

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
    fn element(self, gradient: f32, weight: f32) -> f32;
}

/// The gradient as it arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct AsItCame;

impl Gradient for AsItCame {
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

impl Modified {
    /// Works out the scale of a row; none when its norm is not finite.
    #[inline(always)]
    pub(super) fn of_row(self, row: &Row<'_>) -> Option<Self> {
        let Some(norm_max) = self.norm_max else { return Some(self) };
        let norm = sum_of_squares(row.weights, row.bytes, AsItCame).sqrt();
        let scale = if norm > norm_max { norm_max / norm } else { 1.0 };
        norm.is_finite().then_some(Self { scale, ..self })
    }
}

impl Gradient for Modified {
    #[inline(always)]
    fn element(self, gradient: f32, weight: f32) -> f32 {
        gradient * self.scale + self.l2 * weight
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
        let old = *weights;
        let old_slots: [[f32; LANES]; SLOTS] =
            std::array::from_fn(|slot| *chunk_mut(slots[slot], at));
        let (mut new, mut new_slots) = (old, old_slots);
        let mut exponents = 0;
        for lane in 0..LANES {
            let g = float(&bytes[lane * FLOAT_BYTES..][..FLOAT_BYTES]);
            let g = gradient.element(g, old[lane]);
            let slots = std::array::from_fn(|slot| old_slots[slot][lane]);
            let (weight, slots) = optimizer.next(old[lane], slots, g);
            exponents |= beyond_finite(weight);
            new[lane] = weight;
            for slot in 0..SLOTS {
                exponents |= beyond_finite(slots[slot]);
                new_slots[slot][lane] = slots[slot];
            }
        }
        if exponents & NOT_FINITE == 0 {
            *weights = new;
            for slot in 0..SLOTS {
                *chunk_mut(slots[slot], at) = new_slots[slot];
            }
        } else {
            // Copies again, so that what is nearly always the case needs no memory.
            let (new, new_slots) = (new, new_slots);
            let slots = slots.each_mut().map(|slot| &mut slot[at..][..LANES]);
            skipped += store_finite(weights, slots, &new, &new_slots);
        }
        at += LANES;
    }
    (at, skipped)
}

#[inline(always)]
fn chunk_mut<const LANES: usize>(floats: &mut [f32], at: usize) -> &mut [f32; LANES] {
    floats[at..].first_chunk_mut().expect("slots are as long as weights")
}

/// Stores the elements whose weight and slots are finite, and counts the others.
#[cold]
#[inline(never)]
fn store_finite<const LANES: usize, const SLOTS: usize>(
    weights: &mut [f32; LANES],
    mut slots: [&mut [f32]; SLOTS],
    new: &[f32; LANES],
    new_slots: &[[f32; LANES]; SLOTS],
) -> u32 {
    let mut skipped = 0;
    for lane in 0..LANES {
        if new[lane].is_finite() && new_slots.iter().all(|slot| slot[lane].is_finite()) {
            weights[lane] = new[lane];
            slots.iter_mut().zip(new_slots).for_each(|(slot, new)| slot[lane] = new[lane]);
        } else {
            skipped += 1;
        }
    }
    skipped
}

const LANES: usize = 8;

/// Sum of the squares of a row's gradient as the optimizer sees it, in one order everywhere: eight lanes, square `i` added to lane
/// `i mod 8` in rising order of `i`, each lane starting at 0; then `t[j] = lane[j] + lane[j+4]`, and the sum is
/// `(t[0] + t[2]) + (t[1] + t[3])`.
#[inline(always)]
pub(super) fn sum_of_squares(weights: &[f32], bytes: &[u8], gradient: impl Gradient) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut at = 0;
    while let Some(weights) = weights[at..].first_chunk::<LANES>() {
        let bytes = &bytes[at * FLOAT_BYTES..][..LANES * FLOAT_BYTES];
        for lane in 0..LANES {
            let g = float(&bytes[lane * FLOAT_BYTES..][..FLOAT_BYTES]);
            let g = gradient.element(g, weights[lane]);
            lanes[lane] += g * g;
        }
        at += LANES;
    }
    // All lanes again, so that their sums stay in registers.
    for (lane, sum) in lanes.iter_mut().enumerate() {
        if let Some(&weight) = weights.get(at + lane) {
            let g = float(&bytes[(at + lane) * FLOAT_BYTES..][..FLOAT_BYTES]);
            let g = gradient.element(g, weight);
            *sum += g * g;
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
