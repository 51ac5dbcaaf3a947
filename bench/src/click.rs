//! The data of E, a click model: made samples whose labels come from a hidden model, and the values that all parameters begin with.
//!
//! Every file is raw little-endian, row-major, without a header; a number `k` of [`normals`] or [`uniform`] belongs to element `k`:
//!
//! | file | shape | content |
//! |---|---|---|
//! | `e_train_ids.u32`, `e_test_ids.u32` | samples × 26 | (rank · 611953 + field · 38461 + 12345) mod rows, ranks of [`Zipf`] with seed 2000 (train) or 3000 (test) |
//! | `e_train_x.f32`, `e_test_x.f32` | samples × 13 | normal, seed + 1 |
//! | `e_train_y.f32`, `e_test_y.f32` | samples | 1 where uniform (seed + 2) < sigmoid(−1 + Σ w\[id\] + x · v), else 0; hidden w = 0.3 normal (seed 77), v = 0.3 normal (78) |
//! | `e_emb_init.f32` | rows × 17 | 0.01 normal (95); column 16, the linear weight, is 0 |
//! | `e_mlp_init.f32` | 143,106 | W1\[429\]\[256\] b1 W2\[256\]\[128\] b2 W3\[128\]\[1\] b3, bias: W = normal · √(2 / inputs) (90, 91, 92), b = 0 |

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context as _;

use crate::random::{Zipf, normals, uniform};
use crate::workload::{OFFSET, SCATTER};

/// Categorical fields of a sample.
pub const FIELDS: usize = 26;
/// Numbers of a sample.
pub const NUMBERS: usize = 13;
/// Samples of a batch.
pub const BATCH: usize = 1024;
/// Floats of an embedding.
pub const EMBEDDING: usize = 16;
/// Floats of a table's row: the embedding and the linear weight.
pub const WIDTH: usize = EMBEDDING + 1;
/// Inputs and outputs of each layer.
const LAYERS: [(usize, usize); 3] = [(FIELDS * EMBEDDING + NUMBERS, 256), (256, 128), (128, 1)];
/// Between the ids of equal ranks in neighbouring fields.
const FIELD_STEP: u64 = 38_461;

/// How much data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Click {
    /// Rows of the table.
    pub rows: u32,
    /// Batches to train on.
    pub train_batches: usize,
    /// Batches to evaluate on.
    pub test_batches: usize,
}

impl Click {
    /// E.
    pub const STANDARD: Self = Self { rows: 1_000_000, train_batches: 500, test_batches: 50 };

    /// Writes all files into `dir`.
    ///
    /// # Errors
    /// The system refuses.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        self.samples(dir, "train", 2000, self.train_batches)?;
        self.samples(dir, "test", 3000, self.test_batches)?;
        write_f32(dir, "e_emb_init.f32", self.embeddings())?;
        write_f32(dir, "e_mlp_init.f32", layers())
    }

    fn samples(&self, dir: &Path, name: &str, seed: u64, batches: usize) -> anyhow::Result<()> {
        let (zipf, rows) = (Zipf::new(self.rows), u64::from(self.rows));
        let samples = batches * BATCH;
        let id = |index: usize| {
            let rank = u64::from(zipf.rank(uniform(seed, index as u64)));
            let field = (index % FIELDS) as u64;
            ((rank * SCATTER + field * FIELD_STEP + OFFSET) % rows) as u32
        };
        let ids: Vec<u32> = (0..samples * FIELDS).map(id).collect();
        let numbers: Vec<f32> =
            normals(seed + 1, (samples * NUMBERS) as u64).map(|x| x as f32).collect();

        let weights: Vec<f64> = normals(77, rows).map(|weight| weight * 0.3).collect();
        let slopes: Vec<f64> = normals(78, NUMBERS as u64).map(|slope| slope * 0.3).collect();
        let labels = ids.chunks_exact(FIELDS).zip(numbers.chunks_exact(NUMBERS)).zip(0..).map(
            |((ids, numbers), sample)| {
                let fields: f64 = ids.iter().map(|&id| weights[id as usize]).sum();
                let products = numbers.iter().zip(&slopes).map(|(&x, slope)| f64::from(x) * slope);
                let logit = -1.0 + fields + products.sum::<f64>();
                let clicked = uniform(seed + 2, sample) < 1.0 / (1.0 + (-logit).exp());
                f32::from(u8::from(clicked))
            },
        );
        write_f32(dir, &format!("e_{name}_y.f32"), labels)?;
        write_f32(dir, &format!("e_{name}_x.f32"), numbers.iter().copied())?;
        write(dir, &format!("e_{name}_ids.u32"), ids.iter().map(|id| id.to_le_bytes()))
    }

    fn embeddings(&self) -> impl Iterator<Item = f32> {
        let floats = normals(95, u64::from(self.rows) * WIDTH as u64).enumerate();
        floats.map(|(at, x)| if at % WIDTH == EMBEDDING { 0.0 } else { (x * 0.01) as f32 })
    }
}

fn layers() -> impl Iterator<Item = f32> {
    let layers = LAYERS.into_iter().zip(90..).flat_map(|((inputs, outputs), seed)| {
        let scale = (2.0 / inputs as f64).sqrt();
        let weights = normals(seed, (inputs * outputs) as u64).map(move |x| (x * scale) as f32);
        weights.chain(std::iter::repeat_n(0.0, outputs))
    });
    layers.chain([0.0])
}

fn write_f32(dir: &Path, name: &str, floats: impl Iterator<Item = f32>) -> anyhow::Result<()> {
    write(dir, name, floats.map(f32::to_le_bytes))
}

fn write(dir: &Path, name: &str, words: impl Iterator<Item = [u8; 4]>) -> anyhow::Result<()> {
    let path = dir.join(name);
    let written = || -> std::io::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
        for word in words {
            file.write_all(&word)?;
        }
        file.flush()
    };
    written().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::tests::digest;

    fn directory(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("downpour-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("directory");
        dir
    }

    /// As for the ids of S: these are the digests of the files that everybody measures with.
    #[test]
    fn the_files_are_those_that_everybody_measures_with() {
        let dir = directory("click");
        let read = |name: &str| std::fs::read(dir.join(name)).expect("written");
        Click::STANDARD.samples(&dir, "test", 3000, 50).expect("written");
        write_f32(&dir, "e_mlp_init.f32", layers()).expect("written");
        let found = ["e_test_ids.u32", "e_test_x.f32", "e_test_y.f32", "e_mlp_init.f32"]
            .map(|name| digest(&read(name)));
        std::fs::remove_dir_all(&dir).expect("remove");
        let wanted =
            ["2300eec965d71661", "7217517cf504584f", "849c6500eed32abf", "d5dac298ee158523"];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_small_set_has_the_same_shape() {
        let dir = directory("small-click");
        let click = Click { rows: 100, train_batches: 1, test_batches: 2 };
        click.write(&dir).expect("written");
        let bytes = |name: &str| std::fs::metadata(dir.join(name)).expect("written").len() as usize;
        assert_eq!(bytes("e_train_ids.u32"), 4 * BATCH * FIELDS);
        assert_eq!(bytes("e_test_x.f32"), 4 * 2 * BATCH * NUMBERS);
        assert_eq!(bytes("e_emb_init.f32"), 4 * 100 * WIDTH);
        assert_eq!(bytes("e_mlp_init.f32"), 4 * 143_106);
        std::fs::remove_dir_all(&dir).expect("remove");
    }
}
