use super::Mean;

/// Area under the ROC curve: the chance that a positive sample scores above a negative one, ties counting half.
///
/// Exact for any distribution of scores: they are kept and sorted.
#[derive(Clone, Debug, Default)]
pub struct Auc {
    samples: Vec<Scored>,
}

/// Mean over users of each user's own AUC, weighted by the user's samples. A user with one class only has no AUC and is left out.
#[derive(Clone, Debug, Default)]
pub struct UserAuc {
    samples: Vec<(u64, Scored)>,
}

#[derive(Clone, Copy, Debug)]
struct Scored {
    score: f32,
    positive: bool,
    weight: f32,
}

impl Auc {
    /// A label above one half is positive.
    pub fn add(&mut self, score: f32, label: f32, weight: f32) {
        self.samples.push(Scored { score, positive: label > 0.5, weight });
    }

    /// `None` unless both classes have a positive weight.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        area(&mut self.samples.clone())
    }
}

impl UserAuc {
    /// A label above one half is positive.
    pub fn add(&mut self, user: u64, score: f32, label: f32, weight: f32) {
        self.samples.push((user, Scored { score, positive: label > 0.5, weight }));
    }

    /// `None` when no user has both classes.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        let mut samples = self.samples.clone();
        samples.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.order(&b.1)));
        let mut mean = Mean::default();
        for of_user in samples.chunk_by(|a, b| a.0 == b.0) {
            let mut scored: Vec<Scored> = of_user.iter().map(|(_, scored)| *scored).collect();
            if let Some(area) = area(&mut scored) {
                mean.add(area, scored.iter().map(|s| f64::from(s.weight)).sum());
            }
        }
        mean.value()
    }
}

impl Scored {
    /// By score, then so that equal multisets of samples are summed in one order.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let rest = |s: &Self| (s.positive, s.weight.to_bits());
        self.score.total_cmp(&other.score).then_with(|| rest(self).cmp(&rest(other)))
    }
}

fn area(samples: &mut [Scored]) -> Option<f64> {
    samples.sort_unstable_by(Scored::order);
    let (mut positive, mut negative, mut area) = (0.0, 0.0, 0.0);
    for tied in samples.chunk_by(|a, b| a.score == b.score) {
        let weight_of = |positive| {
            tied.iter().filter(|s| s.positive == positive).map(|s| f64::from(s.weight)).sum::<f64>()
        };
        let (tied_positive, tied_negative): (f64, f64) = (weight_of(true), weight_of(false));
        area += tied_positive * (negative + tied_negative / 2.0);
        positive += tied_positive;
        negative += tied_negative;
    }
    (positive > 0.0 && negative > 0.0).then(|| area / (positive * negative))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auc(samples: &[(f32, f32, f32)]) -> Option<f64> {
        let mut auc = Auc::default();
        samples.iter().for_each(|&(score, label, weight)| auc.add(score, label, weight));
        auc.value()
    }

    #[test]
    fn ties_count_half() {
        assert_eq!(auc(&[(0.1, 0.0, 1.0), (0.2, 1.0, 1.0)]), Some(1.0));
        assert_eq!(auc(&[(0.2, 0.0, 1.0), (0.1, 1.0, 1.0)]), Some(0.0));
        assert_eq!(auc(&[(0.1, 0.0, 1.0), (0.1, 1.0, 1.0)]), Some(0.5));
        // Pairs: 0.4 beats 0.1 and 0.3, ties with 0.4; 0.35 beats 0.1 and 0.3.
        let samples =
            [(0.1, 0.0, 1.0), (0.4, 0.0, 1.0), (0.35, 1.0, 1.0), (0.4, 1.0, 1.0), (0.3, 0.0, 1.0)];
        assert_eq!(auc(&samples), Some(4.5 / 6.0));
    }

    #[test]
    fn minus_zero_ties_with_zero() {
        assert_eq!(auc(&[(0.0, 0.0, 1.0), (-0.0, 1.0, 1.0)]), Some(0.5));
    }

    #[test]
    fn one_class_has_no_area() {
        assert_eq!(auc(&[]), None);
        assert_eq!(auc(&[(0.1, 1.0, 1.0), (0.2, 1.0, 1.0)]), None);
        assert_eq!(auc(&[(0.1, 1.0, 1.0), (0.2, 0.0, 0.0)]), None);
    }

    #[test]
    fn a_weight_of_two_is_the_sample_twice() {
        let weighted = auc(&[(0.1, 0.0, 2.0), (0.4, 0.0, 1.0), (0.3, 1.0, 3.0), (0.4, 1.0, 1.0)]);
        let repeated = auc(&[
            (0.1, 0.0, 1.0),
            (0.1, 0.0, 1.0),
            (0.4, 0.0, 1.0),
            (0.3, 1.0, 1.0),
            (0.3, 1.0, 1.0),
            (0.3, 1.0, 1.0),
            (0.4, 1.0, 1.0),
        ]);
        assert_eq!(weighted, repeated);
        assert_eq!(weighted, Some(8.5 / 12.0));
    }

    /// Values of `sklearn.metrics.roc_auc_score(y, s, sample_weight=w)` for the same sequence.
    #[test]
    fn many_samples_equal_scikit_learn() {
        let samples: Vec<(f32, f32, f32)> = (0..1000u32)
            .map(|i| {
                let mixed = i.wrapping_mul(2_654_435_761) >> 16;
                let score = (mixed % 97) as f32 / 97.0;
                let label = f32::from((mixed / 97 + mixed % 97) % 150 > 90);
                (score, label, 1.0 + (i % 3) as f32 / 2.0)
            })
            .collect();
        let value = auc(&samples).unwrap();
        assert!((value - SKLEARN_AUC).abs() < 1e-12, "{value}");
    }

    const SKLEARN_AUC: f64 = 0.542_573_903_682_772;

    #[test]
    fn per_user_area_is_the_mean_weighted_by_samples() {
        let mut auc = UserAuc::default();
        for (user, score, label) in [
            (7, 0.9, 1.0),
            (7, 0.1, 0.0),
            (9, 0.2, 1.0),
            (9, 0.4, 0.0),
            (9, 0.1, 0.0),
            (5, 0.3, 1.0), // one class: no area
        ] {
            auc.add(user, score, label, 1.0);
        }
        assert_eq!(auc.value(), Some((1.0 * 2.0 + 0.5 * 3.0) / 5.0));
        assert_eq!(UserAuc::default().value(), None);
    }
}
