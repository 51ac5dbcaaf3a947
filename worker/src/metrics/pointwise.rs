use super::Mean;

/// −(y ln p + (1−y) ln(1−p)) with p = 1/(1+e^−x), without overflow for any finite logit `x`.
#[must_use]
pub fn log_loss_of_logit(logit: f64, label: f64) -> f64 {
    logit.max(0.0) - logit * label + (-logit.abs()).exp().ln_1p()
}

/// Mean binary cross-entropy.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogLoss(Mean);

impl LogLoss {
    /// `logit` is the score before the logistic function; `label` lies in 0..=1.
    pub fn add(&mut self, logit: f32, label: f32, weight: f32) {
        self.0.add(log_loss_of_logit(logit.into(), label.into()), weight.into());
    }

    /// `None` before anything of a positive weight was added.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        self.0.value()
    }
}

/// Share of samples on the right side of a logit of 0. A logit of exactly 0 counts as negative.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accuracy(Mean);

impl Accuracy {
    /// A label above one half is positive.
    pub fn add(&mut self, logit: f32, label: f32, weight: f32) {
        self.0.add(f64::from((logit > 0.0) == (label > 0.5)), weight.into());
    }

    /// `None` before anything of a positive weight was added.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        self.0.value()
    }
}

/// Root of the mean squared error.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rmse(Mean);

impl Rmse {
    /// Counts one prediction.
    pub fn add(&mut self, prediction: f32, label: f32, weight: f32) {
        self.0.add((f64::from(prediction) - f64::from(label)).powi(2), weight.into());
    }

    /// `None` before anything of a positive weight was added.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        self.0.value().map(f64::sqrt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (logit, label, weight)
    const SAMPLES: [(f32, f32, f32); 4] =
        [(2.0, 1.0, 1.0), (-1.0, 0.0, 2.0), (0.5, 0.0, 1.0), (-3.0, 1.0, 0.5)];

    #[test]
    fn weighted_values_equal_those_of_scikit_learn() {
        let (mut loss, mut accuracy, mut rmse) = <(LogLoss, Accuracy, Rmse)>::default();
        for (logit, label, weight) in SAMPLES {
            loss.add(logit, label, weight);
            accuracy.add(logit, label, weight);
            rmse.add(logit, label, weight);
        }
        let near = |value: Option<f64>, wanted: f64| (value.unwrap() - wanted).abs() < 1e-12;
        assert!(near(loss.value(), 0.722_627_121_343_643_6), "{loss:?}");
        assert!(near(accuracy.value(), 3.0 / 4.5), "{accuracy:?}");
        assert!(near(rmse.value(), (11.25f64 / 4.5).sqrt()), "{rmse:?}");
    }

    #[test]
    fn the_loss_of_a_huge_logit_is_finite() {
        assert_eq!(log_loss_of_logit(1e30, 0.0), 1e30);
        assert_eq!(log_loss_of_logit(-1e30, 0.0), 0.0);
        assert_eq!(log_loss_of_logit(0.0, 1.0), std::f64::consts::LN_2);
    }

    #[test]
    fn nothing_added_is_no_value() {
        assert_eq!(LogLoss::default().value(), None);
        assert_eq!(Rmse::default().value(), None);
        let mut accuracy = Accuracy::default();
        accuracy.add(1.0, 1.0, 0.0);
        assert_eq!(accuracy.value(), None, "a weight of 0 is no sample");
    }
}
