//! AdamW: Adam with decoupled weight decay.

use super::{Adam, OptimizerSlot, StepScalars, adam};
use super::{require_learning_rate, require_not_negative, require_positive, require_share};
use crate::parameter::InvalidParameter;

/// [`Adam`] on a weight that first shrinks: `w ← w·(1 − lr·λ)`, then Adam's step. The decay does not pass through the means.
///
/// Loshchilov, Hutter: "Decoupled weight decay regularization" (ICLR 2019), as in `torch.optim.AdamW`. What [`Adam`] says of step
/// counts and of rows that a push does not name holds here too: **a row decays when it is pushed**, and not with time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f32,
    /// Share of the old mean of gradients that is kept.
    pub beta1: f64,
    /// Share of the old mean of squares that is kept.
    pub beta2: f64,
    /// Added to the corrected root.
    pub epsilon: f32,
    /// λ: each push of a row takes the share lr·λ of its weights.
    pub weight_decay: f32,
}

impl AdamW {
    pub(super) const SLOTS: [OptimizerSlot; 2] = Adam::SLOTS;

    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_learning_rate("adam_w.learning_rate", self.learning_rate)?;
        require_share("adam_w.beta1", self.beta1)?;
        require_share("adam_w.beta2", self.beta2)?;
        require_positive("adam_w.epsilon", self.epsilon)?;
        require_not_negative("adam_w.weight_decay", self.weight_decay)
    }

    pub(super) fn kernel(&self, scalars: &StepScalars) -> adam::Kernel {
        let Self { learning_rate, beta1, beta2, epsilon, weight_decay } = *self;
        let decay = f64::from(scalars.learning_rate) * f64::from(weight_decay);
        let mut kernel = Adam { learning_rate, beta1, beta2, epsilon }.kernel(scalars);
        kernel.retained = (1.0 - decay) as f32;
        kernel
    }
}
