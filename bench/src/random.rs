//! Random numbers that every implementation of the workloads can repeat: SplitMix64, nothing else.

use std::f64::consts::TAU;

use downpour_core::mix::mix64;

/// Output number `index` (from 0) of SplitMix64 with this seed.
fn output(seed: u64, index: u64) -> u64 {
    mix64(seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

/// Number `index` of a sequence that is uniform on [0, 1).
#[must_use]
pub fn uniform(seed: u64, index: u64) -> f64 {
    (output(seed, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// `count` standard normal numbers: Box-Muller, the cosine alone, from uniform numbers `0..2 * count` of the seed.
pub fn normals(seed: u64, count: u64) -> impl Iterator<Item = f64> {
    (0..count).map(move |index| {
        let (radius, angle) = (uniform(seed, index), uniform(seed, count + index));
        (-2.0 * (1.0 - radius).ln()).sqrt() * (TAU * angle).cos()
    })
}

/// Ranks `0..n` with P(rank) proportional to (rank + 1)^-1.05.
#[derive(Debug)]
pub struct Zipf {
    cumulative: Vec<f64>,
    /// For each of `GUIDES` equal parts of [0, 1): the first rank that a number in it can have.
    guides: Vec<u32>,
}

const EXPONENT: f64 = 1.05;
const GUIDES: usize = 1 << 16;

impl Zipf {
    /// Over `n` ranks, at least one.
    #[must_use]
    pub fn new(n: u32) -> Self {
        let mut sum = 0.0;
        let mut cumulative: Vec<f64> = (1..=n)
            .map(|rank| {
                sum += f64::from(rank).powf(-EXPONENT);
                sum
            })
            .collect();
        cumulative.iter_mut().for_each(|value| *value /= sum);
        let first = |part: usize| {
            let start = part as f64 / GUIDES as f64;
            cumulative.partition_point(|&value| value <= start) as u32
        };
        let guides = (0..=GUIDES).map(first).collect();
        Self { cumulative, guides }
    }

    /// The first rank whose cumulative probability is above `uniform`, which is in [0, 1).
    #[must_use]
    pub fn rank(&self, uniform: f64) -> u32 {
        let part = (uniform * GUIDES as f64) as usize;
        let (low, high) = (self.guides[part] as usize, self.guides[part + 1] as usize);
        let within = &self.cumulative[low..high];
        let rank = low + within.partition_point(|&value| value <= uniform);
        rank.min(self.cumulative.len() - 1) as u32
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_outputs_are_those_of_the_published_generator() {
        let outputs = [0, 1, 2].map(|index| output(1_234_567, index));
        assert_eq!(
            outputs,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    proptest! {
        #[test]
        fn a_rank_is_the_first_above(n in 1u32..3000, uniform in 0.0..1.0f64) {
            let zipf = Zipf::new(n);
            let plain = zipf.cumulative.partition_point(|&value| value <= uniform);
            prop_assert_eq!(zipf.rank(uniform) as usize, plain.min(n as usize - 1));
        }
    }
}
