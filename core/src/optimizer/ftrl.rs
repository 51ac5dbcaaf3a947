//! FTRL-proximal: follow the regularised leader.

use std::hint::select_unpredictable;

use super::row::{self, Element, Gradient, Row};
use super::{OptimizerSlot, StepScalars, require_not_negative, require_positive};
use crate::parameter::{InvalidParameter, require};

/// `n' = n + g²`, `z' = z + g − ((√n' − √n) / α)·w`, and from them the weight: 0 where `|z'| ≤ λ₁`, else
/// `w' = −sign(z')·(|z'| − λ₁) / ((β + √n') / α + λ₂)`.
///
/// McMahan et al.: "Ad click prediction: a view from the trenches" (KDD 2013, algorithm 1): a learning rate per parameter, and
/// weights that are exactly 0 until their evidence exceeds λ₁. α is the learning rate, and what a schedule changes.
///
/// # First values
///
/// The weight follows from z and n alone, so the paper starts at 0. Here a row may start at any `w₀`: its first update starts from
/// the z that has `w₀` as its weight, `z₀ = −w₀·((β + √n) / α + λ₂) − sign(w₀)·λ₁`. A stored z of 0 beside a weight other than 0 is what
/// tells a row that was never updated, since every update that leaves z = 0 leaves w = 0. With λ₁ > 0 most users want zeros to start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ftrl {
    /// α: the learning rate.
    pub learning_rate: f32,
    /// β: damps the first steps; the paper's 1 is a good choice. 0 is allowed where `l2` is above 0.
    pub beta: f32,
    /// λ₁: weights are 0 until |z| exceeds it.
    pub l1: f32,
    /// λ₂: pulls weights towards 0.
    pub l2: f32,
}

impl Ftrl {
    pub(super) const SLOTS: [OptimizerSlot; 2] =
        [OptimizerSlot::per_parameter("ftrl_z"), OptimizerSlot::per_parameter("ftrl_n")];

    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_positive("ftrl.learning_rate", self.learning_rate)?;
        require_not_negative("ftrl.beta", self.beta)?;
        require_not_negative("ftrl.l1", self.l1)?;
        require_not_negative("ftrl.l2", self.l2)?;
        let divides = self.beta > 0.0 || self.l2 > 0.0;
        require(divides, "ftrl.beta", self.beta, "above 0 without l2")
    }

    pub(super) fn kernel(&self, scalars: &StepScalars) -> Kernel {
        // A learning rate of 0 divides by 0, so that nothing is stored. An infinite one must not pass for a rate either.
        let alpha = scalars.learning_rate;
        let alpha = if alpha.is_finite() { alpha } else { 0.0 };
        Kernel { alpha, beta: self.beta, l1: self.l1, l2: self.l2 }
    }
}

/// One update by [`Ftrl`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    alpha: f32,
    beta: f32,
    l1: f32,
    l2: f32,
}

impl Kernel {
    /// What a weight is multiplied by to get the part of z beyond λ₁.
    #[inline(always)]
    fn strength(&self, root: f32) -> f32 {
        (self.beta + root) / self.alpha + self.l2
    }
}

impl Element<2> for Kernel {
    #[inline(always)]
    fn next(&self, weight: f32, [z, n]: [f32; 2], g: f32) -> (f32, [f32; 2]) {
        let root = n.sqrt();
        let first = -(weight * self.strength(root) + self.l1.copysign(weight));
        let z = select_unpredictable((z == 0.0) & (weight != 0.0), first, z);
        let n = n + g * g;
        let new_root = n.sqrt();
        let z = z + g - (new_root - root) / self.alpha * weight;
        let beyond = z.abs() - self.l1;
        let leader = -beyond.copysign(z) / self.strength(new_root);
        (select_unpredictable(beyond > 0.0, leader, 0.0), [z, n])
    }
}

impl row::Kernel for Kernel {
    #[inline(always)]
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32 {
        row::elementwise(self, row, gradient)
    }
}
