//! Stochastic gradient descent.

use super::{StepScalars, require_learning_rate, store};
use crate::parameter::InvalidParameter;
use crate::tensor_bytes::floats;

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
    pub(super) fn new(scalars: &StepScalars) -> Self {
        Self { learning_rate: scalars.learning_rate }
    }

    #[inline(always)]
    pub(super) fn apply(&self, weights: &mut [f32], state: &mut [f32], gradient: &[u8]) -> u32 {
        assert!(state.is_empty(), "SGD has no state");
        let mut skipped = 0;
        for (weight, g) in weights.iter_mut().zip(floats(gradient)) {
            let new = *weight - self.learning_rate * g;
            store(weight, new, new.is_finite());
            skipped += u32::from(!new.is_finite());
        }
        skipped
    }
}
