//! Stochastic gradient descent.

use super::require_learning_rate;
use super::row::{self, Element, Gradient, Row};
use crate::parameter::InvalidParameter;

/// `w ← w − lr·g`. No optimizer slots.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub learning_rate: f32,
}

impl Sgd {
    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_learning_rate("sgd.learning_rate", self.learning_rate)
    }
}

/// One update by [`Sgd`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    learning_rate: f32,
}

impl Kernel {
    #[inline(always)]
    pub(super) fn at(learning_rate: f32) -> Self {
        Self { learning_rate }
    }
}

impl Element<0> for Kernel {
    #[inline(always)]
    fn next(&self, weight: f32, []: [f32; 0], g: f32) -> (f32, [f32; 0]) {
        (weight - self.learning_rate * g, [])
    }
}

impl row::Kernel for Kernel {
    #[inline(always)]
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32 {
        row::elementwise(self, row, gradient)
    }
}
