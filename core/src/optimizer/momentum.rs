//! Gradient descent with momentum.

use super::row::{self, Element, Gradient, Row};
use super::{OptimizerSlot, StepScalars, require_learning_rate, require_share};
use crate::parameter::InvalidParameter;

/// `b ← µ·b + g`, then `w ← w − lr·b`, or with Nesterov's look-ahead `w ← w − lr·(g + µ·b)`.
///
/// Heavy-ball momentum in the form of `torch.optim.SGD(momentum=µ, nesterov=…)` without dampening: the learning rate is outside the
/// buffer, so a schedule takes effect at once.
///
/// A row that a push does not name keeps its buffer: it rolls on when the row is pushed, and not with time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Momentum {
    /// Learning rate.
    pub learning_rate: f32,
    /// Share of the old buffer that is kept.
    pub momentum: f32,
    /// Looks ahead along the buffer.
    pub nesterov: bool,
}

impl Momentum {
    pub(super) const SLOTS: [OptimizerSlot; 1] = [OptimizerSlot::per_parameter("momentum")];

    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_learning_rate("momentum.learning_rate", self.learning_rate)?;
        require_share("momentum.momentum", self.momentum.into())
    }

    pub(super) fn kernel(&self, scalars: &StepScalars) -> Kernel {
        Kernel {
            learning_rate: scalars.learning_rate,
            momentum: self.momentum,
            nesterov: self.nesterov,
        }
    }
}

/// One update by [`Momentum`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    learning_rate: f32,
    momentum: f32,
    nesterov: bool,
}

impl Element<1> for Kernel {
    #[inline(always)]
    fn next(&self, weight: f32, [buffer]: [f32; 1], g: f32) -> (f32, [f32; 1]) {
        let buffer = self.momentum * buffer + g;
        let step = if self.nesterov { g + self.momentum * buffer } else { buffer };
        (weight - self.learning_rate * step, [buffer])
    }
}

impl row::Kernel for Kernel {
    #[inline(always)]
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32 {
        row::elementwise(self, row, gradient)
    }
}
