//! What is done, and what must come of it. `docs/performance.md`, "Measure it", defines the same in words.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use downpour_core::optimizer::{Adagrad, OptimizerSpec, Sgd};
use downpour_core::tensor_bytes::FLOAT_BYTES;
use serde::{Deserialize, Serialize};

use crate::random::{Zipf, uniform};

/// Of sparse and dense steps.
pub const LEARNING_RATE: f32 = 0.1;
/// Every element of every gradient.
pub const GRADIENT: f32 = 0.01;
/// A larger difference from what the values should be is a failure.
pub const ERROR_MAX: f64 = 1e-4;

/// Ranks become ids by `(rank * SCATTER + OFFSET) mod rows`, which spreads the hot rows over the table.
pub(crate) const SCATTER: u64 = 611_953;
pub(crate) const OFFSET: u64 = 12_345;

/// Which optimizer the table has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// Rows begin at (id mod 1000) / 1000.
    #[default]
    Sgd,
    /// Rows begin at 0.
    Adagrad,
}

impl Optimizer {
    /// With the workload's learning rate.
    #[must_use]
    pub fn spec(self) -> OptimizerSpec {
        match self {
            Self::Sgd => OptimizerSpec::Sgd(Sgd { learning_rate: LEARNING_RATE }),
            Self::Adagrad => OptimizerSpec::Adagrad(Adagrad {
                learning_rate: LEARNING_RATE,
                epsilon: 1e-10,
                initial_accumulator: 0.0,
            }),
        }
    }

    /// The value that every element of row `id` begins with.
    #[must_use]
    pub fn first_value(self, id: u32) -> f32 {
        match self {
            Self::Sgd => (f64::from(id % 1000) * 0.001) as f32,
            Self::Adagrad => 0.0,
        }
    }

    /// The gradient that makes a row of zeros hold its first value.
    pub(crate) fn first_gradient(self, id: u32) -> f32 {
        -self.first_value(id) / LEARNING_RATE
    }

    /// What so many steps make of a value, in the server's arithmetic: after thousands of them rounding alone is more than [`ERROR_MAX`].
    fn after(self, first: f32, steps: u32) -> f64 {
        let mut sum = 0.0f32;
        let step = |value: f32, _| match self {
            Self::Sgd => value - LEARNING_RATE * GRADIENT,
            Self::Adagrad => {
                sum += GRADIENT * GRADIENT;
                value - LEARNING_RATE * GRADIENT / (sum.sqrt() + 1e-10)
            }
        };
        (0..steps).fold(first, step).into()
    }
}

/// S: steps of pull and push on one table. With two workers it is called S2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sparse {
    /// Rows of the table.
    pub rows: u32,
    /// Floats of a row.
    pub dim: u32,
    /// Steps of a repeat.
    pub steps: usize,
    /// Steps before the first repeat, the first ones of the same ids.
    pub warm_up: usize,
    /// Ids of a step, before they are made unique.
    pub ids_per_step: usize,
    /// Processes that take steps at the same time, each its own ids.
    pub workers: usize,
    /// Of the table.
    pub optimizer: Optimizer,
    /// Worker `w` draws its ids with seed `seed + w`.
    pub seed: u64,
    /// One file for each worker instead: little-endian u32 below `rows`.
    pub ids: Vec<PathBuf>,
}

impl Sparse {
    /// S-`dim`, or S2-`dim` for two workers.
    #[must_use]
    pub fn standard(dim: u32, workers: usize) -> Self {
        Self {
            rows: 1_000_000,
            dim,
            steps: 200,
            warm_up: 20,
            ids_per_step: 26_624,
            workers,
            optimizer: Optimizer::Sgd,
            seed: 1000,
            ids: Vec::new(),
        }
    }

    /// S-16, S2-64 and so on.
    #[must_use]
    pub fn name(&self) -> String {
        match self.workers {
            1 => format!("S-{}", self.dim),
            workers => format!("S{workers}-{}", self.dim),
        }
    }

    /// Names the option that makes no sense.
    ///
    /// # Errors
    /// There is one.
    pub fn validate(&self) -> anyhow::Result<()> {
        ensure!(self.rows > 0, "--rows: there must be at least one");
        ensure!(self.dim > 0, "--dim: there must be at least one");
        ensure!(self.steps > 0, "--steps: there must be at least one");
        ensure!(self.ids_per_step > 0, "--ids-per-step: there must be at least one");
        ensure!(self.warm_up <= self.steps, "--warm-up: at most --steps, {}", self.steps);
        ensure!(
            self.ids.is_empty() || self.ids.len() == self.workers,
            "--ids: {} files for {} workers; give one for each",
            self.ids.len(),
            self.workers
        );
        (0..self.ids.len()).try_for_each(|worker| self.ids(worker).map(drop))
    }

    /// All ids of a worker, step after step.
    pub(crate) fn ids(&self, worker: usize) -> anyhow::Result<Vec<u32>> {
        let count = self.steps * self.ids_per_step;
        let Some(path) = self.ids.get(worker) else {
            let (zipf, rows) = (Zipf::new(self.rows), u64::from(self.rows));
            let seed = self.seed + worker as u64;
            let id = |index| {
                let rank = u64::from(zipf.rank(uniform(seed, index)));
                ((rank * SCATTER + OFFSET) % rows) as u32
            };
            return Ok((0..count as u64).map(id).collect());
        };
        let bytes = fs::read(path).with_context(|| format!("--ids: read {}", path.display()))?;
        let ids: Vec<u32> = bytes
            .chunks_exact(size_of::<u32>())
            .take(count)
            .map(|id| u32::from_le_bytes(id.try_into().expect("four bytes")))
            .collect();
        if ids.len() < count {
            bail!(
                "--ids: {} holds {} ids; {} steps of {} need {count}",
                path.display(),
                ids.len(),
                self.steps,
                self.ids_per_step
            );
        }
        if let Some(id) = ids.iter().find(|&&id| id >= self.rows) {
            bail!("--ids: {} has id {id}; --rows is {}", path.display(), self.rows);
        }
        Ok(ids)
    }

    /// What every element of each row must be after the warm-up and this many repeats.
    pub(crate) fn expected(&self, repeats: u32) -> anyhow::Result<Vec<f64>> {
        let mut updates = vec![0u32; self.rows as usize];
        let mut seen = vec![0usize; self.rows as usize];
        let mut stamp = 0;
        for worker in 0..self.workers {
            for (step, ids) in self.ids(worker)?.chunks(self.ids_per_step).enumerate() {
                stamp += 1;
                let times = repeats + u32::from(step < self.warm_up);
                for &id in ids {
                    let id = id as usize;
                    if seen[id] != stamp {
                        seen[id] = stamp;
                        updates[id] += times;
                    }
                }
            }
        }
        let first = (0..self.rows).map(|id| self.optimizer.first_value(id));
        Ok(first
            .zip(&updates)
            .map(|(first, &updates)| self.optimizer.after(first, updates))
            .collect())
    }
}

/// D: pull a whole tensor, push a whole gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dense {
    /// Of the tensor.
    pub floats: usize,
    /// Floats of a block.
    pub block_floats: u32,
}

impl Dense {
    /// A tensor of so many megabytes (10^6 bytes).
    #[must_use]
    pub fn megabytes(mb: u32, block_floats: u32) -> Self {
        Self { floats: mb as usize * 1_000_000 / FLOAT_BYTES, block_floats }
    }

    /// What every element must be after so many steps.
    pub(crate) fn expected(steps: usize) -> f64 {
        -f64::from(LEARNING_RATE) * f64::from(GRADIENT) * steps as f64
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    fn small() -> Sparse {
        Sparse {
            rows: 50,
            steps: 4,
            warm_up: 1,
            ids_per_step: 30,
            workers: 2,
            ..Sparse::standard(4, 2)
        }
    }

    /// Other programs measure with the same ids; these are the digests of their files.
    #[test]
    fn the_ids_are_those_that_everybody_measures_with() {
        for (worker, wanted) in [(0, "74673d0d14eea279"), (1, "7617ba565c8b95a1")] {
            let ids = Sparse::standard(16, 2).ids(worker).expect("generated");
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            assert_eq!(digest(&bytes), wanted, "worker {worker}");
        }
    }

    /// The first 16 digits of SHA-256.
    pub(crate) fn digest(bytes: &[u8]) -> String {
        Sha256::digest(bytes)[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn an_id_counts_once_in_a_step() {
        let sparse = small();
        let mut updates = vec![0u32; 50];
        for worker in 0..2 {
            let ids = sparse.ids(worker).expect("generated");
            for step in 0..4 {
                let mut unique = ids[step * 30..][..30].to_vec();
                unique.sort_unstable();
                unique.dedup();
                unique.iter().for_each(|&id| updates[id as usize] += 3 + u32::from(step == 0));
            }
        }
        let expected = sparse.expected(3).expect("generated");
        for (id, (expected, updates)) in expected.into_iter().zip(updates).enumerate() {
            let wanted = id as f64 * 0.001 - 0.001 * f64::from(updates);
            assert!((expected - wanted).abs() < 1e-6, "{id}: {expected} {wanted}");
        }
    }

    #[test]
    fn values_move_as_the_servers_kernels_move_them() {
        for optimizer in [Optimizer::Sgd, Optimizer::Adagrad] {
            let spec = optimizer.spec();
            let first = optimizer.first_value(7);
            let (mut weight, mut sum) = ([first], [0.0f32]);
            let slots = spec.slots().len();
            for steps in 0..1000 {
                assert_eq!(f64::from(weight[0]), optimizer.after(first, steps));
                let update = spec.update(&spec.scalars(1, 0));
                update.apply(&mut weight, &mut sum[..slots], &GRADIENT.to_le_bytes());
            }
        }
    }

    #[test]
    fn what_makes_no_sense_names_its_option() {
        let refused = |sparse: Sparse| sparse.validate().unwrap_err().to_string();
        assert!(refused(Sparse { warm_up: 5, ..small() }).starts_with("--warm-up"));
        assert!(refused(Sparse { ids: vec!["a".into()], ..small() }).starts_with("--ids"));
        assert!(refused(Sparse { steps: 0, ..small() }).starts_with("--steps"));
        let missing = Sparse { ids: vec!["no-such-file".into(); 2], ..small() };
        assert!(refused(missing).starts_with("--ids: read no-such-file"));
    }
}
