//! Adam: running means of the gradient and of its square.

use super::row::{self, Element, Gradient, Row};
use super::{OptimizerSlot, StepScalars, require_learning_rate, require_positive, require_share};
use crate::parameter::InvalidParameter;

/// `m ← β1·m + (1−β1)·g`, `v ← β2·v + (1−β2)·g²`, `w ← w − (lr / (1−β1ᵗ))·m / (√v / √(1−β2ᵗ) + ε)`.
///
/// Kingma, Ba: "Adam: a method for stochastic optimization" (ICLR 2015, algorithm 1), as in `torch.optim.Adam`.
///
/// # Which step count t is
///
/// t counts the pushes that one *shard* applied to the *variable*, and is carried in each log record. It is one count for all
/// rows of a table on that shard, and not one per row: with one worker and one shard it is the global step of
/// `torch.optim.Adam` and `torch.optim.SparseAdam`. With many shards, a push that touches no row of a shard does not count
/// there, so t may be smaller than the number of steps; it matters only to the first pushes, before βᵗ vanishes.
///
/// # Rows
///
/// A row that a push does not name keeps m and v: they decay when the row is pushed, and not with time ("lazy", as in
/// `SparseAdam`). `SparseAdam` adds ε to √v before the correction; here ε is added after it, for rows and dense alike.
///
/// The betas are f64, because 1 − β2 of an f32 such as 0.999 is already wrong in the fifth digit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Learning rate.
    pub learning_rate: f32,
    /// Share of the old mean of gradients that is kept.
    pub beta1: f64,
    /// Share of the old mean of squares that is kept.
    pub beta2: f64,
    /// Added to the corrected root.
    pub epsilon: f32,
}

impl Adam {
    pub(super) const SLOTS: [OptimizerSlot; 2] =
        [OptimizerSlot::per_parameter("adam_m"), OptimizerSlot::per_parameter("adam_v")];

    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_learning_rate("adam.learning_rate", self.learning_rate)?;
        require_share("adam.beta1", self.beta1)?;
        require_share("adam.beta2", self.beta2)?;
        require_positive("adam.epsilon", self.epsilon)
    }

    pub(super) fn kernel(&self, scalars: &StepScalars) -> Kernel {
        let correction1 = 1.0 - scalars.beta1_power;
        let correction2 = 1.0 - scalars.beta2_power;
        Kernel {
            beta1: self.beta1 as f32,
            rest1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rest2: (1.0 - self.beta2) as f32,
            step_size: (f64::from(scalars.learning_rate) / correction1) as f32,
            root_correction2: correction2.sqrt() as f32,
            epsilon: self.epsilon,
            retained: 1.0,
        }
    }
}

/// One update by [`Adam`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    beta1: f32,
    /// 1 − β1.
    rest1: f32,
    beta2: f32,
    /// 1 − β2.
    rest2: f32,
    step_size: f32,
    root_correction2: f32,
    epsilon: f32,
    /// Share of the weight that decay leaves: 1 − lr·λ of [`AdamW`](super::AdamW), 1 (which changes no bit) of [`Adam`].
    pub(super) retained: f32,
}

impl Element<2> for Kernel {
    #[inline(always)]
    fn next(&self, weight: f32, [m, v]: [f32; 2], g: f32) -> (f32, [f32; 2]) {
        let m = self.beta1 * m + self.rest1 * g;
        let v = self.beta2 * v + self.rest2 * (g * g);
        let root = v.sqrt() / self.root_correction2;
        (weight * self.retained - self.step_size * m / (root + self.epsilon), [m, v])
    }
}

impl row::Kernel for Kernel {
    #[inline(always)]
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32 {
        row::elementwise(self, row, gradient)
    }
}
