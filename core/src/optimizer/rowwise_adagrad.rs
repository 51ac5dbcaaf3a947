//! Row-wise Adagrad: a learning rate per row.

use super::row::{self, Gradient, Row, sum_of_squares};
use super::{OptimizerSlot, StepScalars, require_learning_rate, require_not_negative, sgd};
use crate::parameter::{InvalidParameter, require};

/// `s ← s + mean(g²)`, `w ← w − (lr / (√s + ε))·g`, with one sum `s` per row: Adagrad for embedding tables at one float of
/// state per row.
///
/// The form of `EXACT_ROWWISE_ADAGRAD` in FBGEMM and TorchRec; introduced by Gupta et al., "Training recommender systems at
/// scale: communication-efficient model and data parallelism" (KDD 2021).
///
/// # Order of the sum of squares
///
/// Eight lanes; square `i` is added to lane `i mod 8`, in rising order of `i`, each lane starting at 0. Then
/// `t[j] = lane[j] + lane[j+4]`, and the sum is `(t[0] + t[2]) + (t[1] + t[3])`; then it is divided by the row's dimension.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowwiseAdagrad {
    /// Learning rate.
    pub learning_rate: f32,
    /// Added to the root; 0 is allowed where `initial_accumulator` is above 0.
    pub epsilon: f32,
    /// Sum of mean squares that a row starts with.
    pub initial_accumulator: f32,
}

impl RowwiseAdagrad {
    pub(super) const SLOTS: [OptimizerSlot; 1] = [OptimizerSlot::per_row("rowwise_adagrad_sum")];

    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_learning_rate("rowwise_adagrad.learning_rate", self.learning_rate)?;
        require_not_negative("rowwise_adagrad.initial_accumulator", self.initial_accumulator)?;
        require_not_negative("rowwise_adagrad.epsilon", self.epsilon)?;
        let divides = self.epsilon > 0.0 || self.initial_accumulator > 0.0;
        let rule = "above 0 without initial_accumulator";
        require(divides, "rowwise_adagrad.epsilon", self.epsilon, rule)
    }

    pub(super) fn kernel(&self, scalars: &StepScalars) -> Kernel {
        Kernel { learning_rate: scalars.learning_rate, epsilon: self.epsilon }
    }
}

/// One update by [`RowwiseAdagrad`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    learning_rate: f32,
    epsilon: f32,
}

impl row::Kernel for Kernel {
    #[inline(always)]
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32 {
        let Row { weights, state, bytes } = row;
        let [sum] = state else { panic!("row-wise Adagrad's state is one float") };
        let squares = sum_of_squares(weights, bytes, gradient);
        let new_sum = *sum + squares / weights.len() as f32;
        let rate = self.learning_rate / (new_sum.sqrt() + self.epsilon);
        if !new_sum.is_finite() || !rate.is_finite() {
            return weights.len() as u32;
        }
        *sum = new_sum;
        row::elementwise(&sgd::Kernel::at(rate), Row { weights, state: &mut [], bytes }, gradient)
    }
}
