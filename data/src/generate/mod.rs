//! Synthetic clicks with power-law keys and a known ceiling: what the hidden model itself would score.
//!
//! Row `i` of a seed is a pure function of both: [`Sampler::row`] draws it, [`write_clicks`] writes rows
//! as Parquet and [`write_criteo`] as text in the format of the Criteo click logs. Label and hidden
//! model: `label ~ Bernoulli(sigmoid(-1 + sum of w(field, id) + x . v))` with `w`, `v` about N(0, 0.3²)
//! and `x` about N(0, 1).

mod clicks;
mod criteo;
mod score;

pub use clicks::{Clicks, Compression, Summary, write_clicks};
pub use criteo::write_criteo;
pub use score::{Ceiling, Score};

use crate::hash::mix64;
use crate::rng::Rng;

/// The shape of the rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Key columns.
    pub fields: usize,
    /// Number columns.
    pub dense: usize,
    pub ids_per_field: u64,
    /// The id of rank `r` is drawn about as often as `(r + 1)^-exponent`; 0 is uniform.
    pub exponent: f64,
    pub seed: u64,
}

/// Draws rows.
#[derive(Clone, Debug)]
pub struct Sampler {
    shape: Shape,
    dense_weights: Vec<f64>,
}

/// One sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// One per field, below `ids_per_field`, the most frequent first.
    pub ids: Vec<u64>,
    pub dense: Vec<f32>,
    pub label: bool,
    /// What the hidden model says.
    pub logit: f64,
}

const BIAS: f64 = -1.0;
const WEIGHT_STD: f64 = 0.3;

impl Sampler {
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let shape = Shape { ids_per_field: shape.ids_per_field.max(1), ..shape };
        let weight = |j: usize| WEIGHT_STD * gauss(mix64(shape.seed ^ mix64(!(j as u64))));
        Self { shape, dense_weights: (0..shape.dense).map(weight).collect() }
    }

    /// Row `index`, into memory that is there.
    pub fn row(&self, index: u64, row: &mut Row) {
        let mut rng = Rng::new(mix64(self.shape.seed).wrapping_add(mix64(index)));
        row.ids.clear();
        row.dense.clear();
        row.logit = BIAS;
        for field in 0..self.shape.fields {
            let id = self.rank(uniform(rng.next()));
            row.logit += self.weight(field, id);
            row.ids.push(id);
        }
        for weight in &self.dense_weights {
            let x = gauss(rng.next()) as f32;
            row.logit += weight * f64::from(x);
            row.dense.push(x);
        }
        row.label = uniform(rng.next()) < sigmoid(row.logit);
    }

    fn weight(&self, field: usize, id: u64) -> f64 {
        let place = mix64((field as u64 + 1) << 48 ^ id);
        WEIGHT_STD * gauss(mix64(self.shape.seed ^ place))
    }

    /// The inverse of the power law's distribution function, continuous and then cut.
    fn rank(&self, u: f64) -> u64 {
        let (n, s) = (self.shape.ids_per_field as f64 + 1.0, self.shape.exponent);
        let x = if (s - 1.0).abs() < 1e-9 {
            n.powf(u)
        } else {
            (1.0 + u * (n.powf(1.0 - s) - 1.0)).powf(1.0 / (1.0 - s))
        };
        (x as u64).clamp(1, self.shape.ids_per_field) - 1
    }
}

/// Uniform in [0, 1).
fn uniform(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// About N(0, 1): the sum of four uniform numbers of 16 bits. Exact, so every machine agrees.
fn gauss(bits: u64) -> f64 {
    let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
    (sum as f64 / 65_535.0 - 2.0) * 3.0_f64.sqrt()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
