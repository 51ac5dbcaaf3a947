use std::collections::BTreeMap;

use downpour_core::mix::mix64;
use serde::Serialize;
use tch::{Kind, Tensor};

use super::Catalogue;
use crate::metrics::{Ranking, rank_of};
use crate::{Error, Job, Result, Step, TableHandle};

/// Matrix factorisation trained to rank by BPR (Rendle et al., 2009): of a pair of items, the one that the user had shall score
/// higher than one drawn uniformly from the catalogue.
#[derive(Debug)]
pub struct MatrixFactorisation {
    users: TableHandle,
    items: TableHandle,
    seen: Catalogue,
    /// Every item, to draw from.
    drawn_from: Vec<u64>,
    l2: f64,
    seed: u64,
}

/// How well a model ranks the items of a test set in the whole catalogue, without the items that a user had in training.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankingReport {
    /// Users with items in the test set.
    pub users: u64,
    /// Items in the catalogue.
    pub items: u64,
    /// `hr@k`, `ndcg@k`, `recall@k`.
    #[serde(flatten)]
    pub values: BTreeMap<String, f64>,
}

impl MatrixFactorisation {
    /// `seen` is the training data: negatives are drawn from its items, and never one that the user had. `l2` pulls the vectors
    /// of each step towards 0. `seed` should differ between workers.
    pub fn new(
        users: TableHandle,
        items: TableHandle,
        seen: Catalogue,
        l2: f64,
        seed: u64,
    ) -> Result<Self> {
        if users.dim() != items.dim() {
            return Err(Error::usage("mf-bpr needs the same `dim` for users and items"));
        }
        let drawn_from = seen.items();
        if drawn_from.len() < 2 {
            return Err(Error::usage("mf-bpr needs at least two items in the training data"));
        }
        Ok(Self { users, items, seen, drawn_from, l2, seed })
    }

    /// −ln σ(⟨user, item⟩ − ⟨user, drawn⟩), the mean over the rows, and the penalty.
    pub fn loss(&self, step: &Step) -> Result<Tensor> {
        let drawn = step.lookup(&self.items, &self.draw(step))?;
        let (user, item) = (step.rows_at(0), step.rows_at(1));
        let difference =
            user.f_mul(&item.f_sub(&drawn)?)?.f_sum_dim_intlist(1, false, Kind::Float)?;
        let loss = difference.f_log_sigmoid()?.f_neg()?.f_mean(Kind::Float)?;
        if self.l2 == 0.0 {
            return Ok(loss);
        }
        let squares = [&user, &item, &drawn].map(|rows| rows.square().sum(Kind::Float));
        let [user, item, drawn] = &squares;
        let penalty = user.f_add(item)?.f_add(drawn)?.f_mul_scalar(self.l2 / step.len() as f64)?;
        Ok(loss.f_add(&penalty)?)
    }

    /// One item for each row that its user never had (or, should he have nearly all, any).
    fn draw(&self, step: &Step) -> Vec<u64> {
        const TRIES: u64 = 20;
        let users = &step.batch().features[0];
        let mut random = mix64(self.seed ^ mix64(step.clock().wrapping_add(1)));
        let mut draw = || {
            random = random.wrapping_add(0x9E37_79B9_7F4A_7C15);
            // The high half of a 64 × 64 bit product: even over the items without a division.
            let scaled = u128::from(mix64(random)) * self.drawn_from.len() as u128;
            self.drawn_from[(scaled >> 64) as usize]
        };
        let fits = |row: usize, item| users.row(row).iter().all(|&user| !self.seen.has(user, item));
        (0..step.len())
            .map(|row| {
                let mut item = draw();
                for _ in 1..TRIES {
                    if fits(row, item) {
                        break;
                    }
                    item = draw();
                }
                item
            })
            .collect()
    }

    /// Ranks the items of every user of `test`, for each k: `hr@k`, `ndcg@k`, `recall@k`.
    pub fn rank(&self, job: &Job, test: &Catalogue, ks: &[usize]) -> Result<RankingReport> {
        let mut catalogue = self.seen.items();
        catalogue.extend(test.items());
        catalogue.sort_unstable();
        catalogue.dedup();
        let place = |item: &u64| catalogue.binary_search(item).ok();
        let items = job.rows(&self.items, &catalogue)?.f_tr()?;
        let mut ranking = Ranking::at(ks);
        let users: Vec<(u64, Vec<usize>)> = test
            .users()
            .map(|(user, items)| (user, items.iter().filter_map(place).collect()))
            .collect();
        let seen: BTreeMap<u64, Vec<usize>> = self
            .seen
            .users()
            .map(|(user, items)| (user, items.iter().filter_map(place).collect()))
            .collect();
        for chunk in users.chunks(USERS_AT_ONCE) {
            let keys: Vec<u64> = chunk.iter().map(|(user, _)| *user).collect();
            let scores = job.rows(&self.users, &keys)?.f_matmul(&items)?;
            for (row, (user, wanted)) in chunk.iter().enumerate() {
                let mut of_user = vec![0f32; catalogue.len()];
                scores.get(row as i64).f_copy_data(&mut of_user, catalogue.len())?;
                let had: &[usize] = seen.get(user).map_or(&[], Vec::as_slice);
                let ranks: Vec<usize> = wanted
                    .iter()
                    .filter(|&&item| had.binary_search(&item).is_err())
                    .map(|&item| rank_of(item, &of_user, had))
                    .collect();
                ranking.add(&ranks, 1.0);
            }
        }
        let mut values = BTreeMap::new();
        for at in ranking.value().unwrap_or_default() {
            values.insert(format!("hr@{}", at.k), at.hit_rate);
            values.insert(format!("ndcg@{}", at.k), at.ndcg);
            values.insert(format!("recall@{}", at.k), at.recall);
        }
        Ok(RankingReport { users: users.len() as u64, items: catalogue.len() as u64, values })
    }
}

/// Scores of so many users are in memory together.
const USERS_AT_ONCE: usize = 256;
