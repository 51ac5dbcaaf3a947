//! Adagrad: a learning rate per parameter.

use super::{OptimizerSlot, StepScalars, store};
use super::{require_learning_rate, require_not_negative};
use crate::parameter::{InvalidParameter, require};
use crate::tensor_bytes::floats;

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

impl Kernel {
    #[inline(always)]
    pub(super) fn apply(&self, weights: &mut [f32], state: &mut [f32], gradient: &[u8]) -> u32 {
        assert_eq!(state.len(), weights.len(), "Adagrad's state");
        let mut skipped = 0;
        for ((weight, sum), g) in weights.iter_mut().zip(state).zip(floats(gradient)) {
            let new_sum = *sum + g * g;
            let new = *weight - self.learning_rate * g / (new_sum.sqrt() + self.epsilon);
            let keep = new_sum.is_finite() & new.is_finite();
            store(sum, new_sum, keep);
            store(weight, new, keep);
            skipped += u32::from(!keep);
        }
        skipped
    }
}
