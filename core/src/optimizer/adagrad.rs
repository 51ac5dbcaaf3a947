//! Adagrad: a learning rate per parameter.

use super::row::{self, Element, Gradient, Row};
use super::{OptimizerSlot, StepScalars, require_learning_rate, require_not_negative};
use crate::parameter::{InvalidParameter, require};

/// `s ← s + g²`, `w ← w − (lr·g) / (√s + ε)`, with one sum `s` per parameter.
///
/// Duchi, Hazan, Singer: "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 12 (2011), in
/// the form of `torch.optim.Adagrad` without decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adagrad {
    /// Learning rate.
    pub learning_rate: f32,
    /// Added to the root; 0 is allowed where `initial_accumulator` is above 0.
    pub epsilon: f32,
    /// Sum of squares that a parameter starts with.
    pub initial_accumulator: f32,
}

impl Adagrad {
    pub(super) const SLOTS: [OptimizerSlot; 1] = [OptimizerSlot::per_parameter("adagrad_sum")];

    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_learning_rate("adagrad.learning_rate", self.learning_rate)?;
        require_not_negative("adagrad.initial_accumulator", self.initial_accumulator)?;
        require_not_negative("adagrad.epsilon", self.epsilon)?;
        let divides = self.epsilon > 0.0 || self.initial_accumulator > 0.0;
        require(divides, "adagrad.epsilon", self.epsilon, "above 0 without initial_accumulator")
    }

    pub(super) fn kernel(&self, scalars: &StepScalars) -> Kernel {
        Kernel { learning_rate: scalars.learning_rate, epsilon: self.epsilon }
    }
}

/// One update by [`Adagrad`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    learning_rate: f32,
    epsilon: f32,
}

impl Element<1> for Kernel {
    #[inline(always)]
    fn next(&self, weight: f32, [sum]: [f32; 1], g: f32) -> (f32, [f32; 1]) {
        let sum = sum + g * g;
        (weight - self.learning_rate * g / (sum.sqrt() + self.epsilon), [sum])
    }
}

impl row::Kernel for Kernel {
    #[inline(always)]
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32 {
        row::elementwise(self, row, gradient)
    }
}
