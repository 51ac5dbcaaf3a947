//! What a model is worth on data that it was not trained on: exact, weighted, accumulated sample by sample.
//!
//! Each metric is a value with `add` and `value`; `value` is `None` where it is not defined (no samples, or one class only).
//! [`Auc`] and [`UserAuc`] keep every score, because an exact rank needs them: 9 and 17 bytes a sample.

mod auc;
mod pointwise;
mod ranking;

pub use auc::{Auc, UserAuc};
pub use pointwise::{Accuracy, LogLoss, Rmse, log_loss_of_logit};
pub use ranking::{Ranking, RankingAt, rank_of};

/// A weighted mean that accumulates.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    /// Counts `value` with `weight`.
    pub fn add(&mut self, value: f64, weight: f64) {
        self.sum += value * weight;
        self.weight += weight;
    }

    /// `None` before anything of a positive weight was added.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}
