use super::Mean;

/// How high the items that a user wanted stand in a ranked catalogue: HR@k, NDCG@k, Recall@k.
///
/// Definitions, for one user with the set R of wanted items and the list of the k best:
/// HR is 1 if the list holds any of R; Recall is |list ∩ R| / |R|; NDCG is Σ 1/log2(position + 1) over the hits, divided by the
/// same sum for min(|R|, k) hits at the top. Each is then the weighted mean over users; users without wanted items are left out.
#[derive(Clone, Debug)]
pub struct Ranking {
    at: Vec<(usize, [Mean; 3])>,
}

/// The three means at one `k`.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct RankingAt {
    /// Length of the list.
    pub k: usize,
    /// HR@k.
    pub hit_rate: f64,
    /// NDCG@k.
    pub ndcg: f64,
    /// Recall@k.
    pub recall: f64,
}

impl Ranking {
    /// Lists of these lengths.
    #[must_use]
    pub fn at(ks: &[usize]) -> Self {
        Self { at: ks.iter().map(|&k| (k, [Mean::default(); 3])).collect() }
    }

    /// One user: the rank of each wanted item in the whole catalogue, the best being 0.
    pub fn add(&mut self, ranks: &[usize], weight: f32) {
        if ranks.is_empty() {
            return;
        }
        for (k, [hit_rate, ndcg, recall]) in &mut self.at {
            let hits: Vec<usize> = ranks.iter().copied().filter(|rank| rank < k).collect();
            let gain: f64 = hits.iter().map(|&rank| gain(rank)).sum();
            let ideal: f64 = (0..ranks.len().min(*k)).map(self::gain).sum();
            hit_rate.add(f64::from(!hits.is_empty()), weight.into());
            ndcg.add(gain / ideal, weight.into());
            recall.add(hits.len() as f64 / ranks.len() as f64, weight.into());
        }
    }

    /// `None` before a user was added.
    #[must_use]
    pub fn value(&self) -> Option<Vec<RankingAt>> {
        self.at
            .iter()
            .map(|(k, [hit_rate, ndcg, recall])| {
                let (hit_rate, ndcg, recall) = (hit_rate.value()?, ndcg.value()?, recall.value()?);
                Some(RankingAt { k: *k, hit_rate, ndcg, recall })
            })
            .collect()
    }
}

fn gain(rank: usize) -> f64 {
    1.0 / (rank as f64 + 2.0).log2()
}

/// The rank of `item` among `scores`, leaving out the items of `excluded` (rising): how many others score higher, and of those
/// that score the same, how many come before it. So the order is total, and two runs agree.
#[must_use]
pub fn rank_of(item: usize, scores: &[f32], excluded: &[usize]) -> usize {
    let above = |other: usize| {
        let order = scores[other].total_cmp(&scores[item]);
        order.is_gt() || (order.is_eq() && other < item)
    };
    let all = (0..scores.len()).filter(|&other| above(other)).count();
    all - excluded.iter().filter(|&&other| other != item && above(other)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_equal_the_definitions() {
        let mut ranking = Ranking::at(&[2, 3]);
        ranking.add(&[0, 2, 7], 1.0);
        ranking.add(&[5], 1.0);
        ranking.add(&[], 1.0);
        let value = ranking.value().unwrap();
        let (second, third, fourth) = (1.0, 1.0 / 3f64.log2(), 0.5);
        assert_eq!(
            value[0],
            RankingAt {
                k: 2,
                hit_rate: 0.5,
                ndcg: 1.0 / (second + third) / 2.0,
                recall: 1.0 / 6.0
            }
        );
        let ndcg = (1.0 + fourth) / (1.0 + third + fourth) / 2.0;
        assert!((value[1].ndcg - ndcg).abs() < 1e-15);
        assert_eq!((value[1].hit_rate, value[1].recall), (0.5, 1.0 / 3.0));
    }

    #[test]
    fn users_count_by_their_weight() {
        let mut ranking = Ranking::at(&[1]);
        ranking.add(&[0], 3.0);
        ranking.add(&[1], 1.0);
        assert_eq!(ranking.value().unwrap()[0].hit_rate, 0.75);
        assert_eq!(Ranking::at(&[1]).value(), None);
    }

    #[test]
    fn a_rank_skips_what_the_user_has_already() {
        let scores = [0.9, 0.5, 0.7, 0.5, 0.1];
        assert_eq!(rank_of(0, &scores, &[]), 0);
        assert_eq!(rank_of(3, &scores, &[]), 3, "of equal scores the lower index comes first");
        assert_eq!(rank_of(3, &scores, &[0, 1]), 1);
        assert_eq!(rank_of(1, &scores, &[3]), 2);
    }
}
