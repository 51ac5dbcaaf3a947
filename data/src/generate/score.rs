use serde::Serialize;

use super::sigmoid;

/// The scores of the hidden model, gathered row by row in bounded memory.
#[derive(Clone, Debug)]
pub struct Score {
    /// Negative and positive rows by logit.
    bins: Vec<[u64; 2]>,
    loss: f64,
}

/// What a perfect model scores on the rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceiling {
    pub rows: u64,
    pub positive_share: f64,
    pub auc: f64,
    pub logloss: f64,
}

/// So fine that rows which share a bin do not move the AUC by 1e-6.
const BINS: usize = 1 << 20;
const LOGIT_MAX: f64 = 16.0;

impl Default for Score {
    fn default() -> Self {
        Self { bins: vec![[0; 2]; BINS], loss: 0.0 }
    }
}

impl Score {
    pub fn add(&mut self, logit: f64, label: bool) {
        let share = (logit / LOGIT_MAX + 1.0) / 2.0;
        let bin = (share.clamp(0.0, 1.0) * (BINS - 1) as f64) as usize;
        self.bins[bin][usize::from(label)] += 1;
        self.loss -= sigmoid(if label { logit } else { -logit }).ln();
    }

    /// `None` without rows of both classes.
    #[must_use]
    pub fn ceiling(&self) -> Option<Ceiling> {
        let (mut negatives, mut positives, mut ordered) = (0, 0, 0.0);
        for [negative, positive] in &self.bins {
            ordered += *positive as f64 * (negatives as f64 + *negative as f64 / 2.0);
            negatives += negative;
            positives += positive;
        }
        let rows = negatives + positives;
        (negatives > 0 && positives > 0).then(|| Ceiling {
            rows,
            positive_share: positives as f64 / rows as f64,
            auc: ordered / (positives as f64 * negatives as f64),
            logloss: self.loss / rows as f64,
        })
    }
}
