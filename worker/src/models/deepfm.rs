use tch::nn::Path;
use tch::{Kind, Tensor};

use super::mlp::Mlp;
use super::{Inputs, Model, Options, as_labels, common_dim, pooled};
use crate::{Result, Step};

/// DeepFM (Guo et al., 2017): a linear part, the products of all pairs of features, and a perceptron, over the same embeddings.
///
/// A row is the linear weight of its key and then the embedding. Numbers enter the linear part and the perceptron.
#[derive(Debug)]
pub struct DeepFm {
    numbers: Option<Tensor>,
    deep: Mlp,
}

impl DeepFm {
    /// With weights in `path`.
    pub fn new(path: &Path, inputs: &Inputs, options: &Options) -> Result<Self> {
        let dim = common_dim(inputs, "deepfm")? - 1;
        let width = dim * inputs.dims.len() as i64 + inputs.numbers;
        let numbers =
            (inputs.numbers > 0).then(|| path.zeros("numbers", &[inputs.numbers, inputs.labels]));
        let deep =
            Mlp::new(&(path / "deep"), width, &options.hidden, inputs.labels, options.dropout);
        Ok(Self { numbers, deep })
    }
}

impl Model for DeepFm {
    fn forward(&self, step: &Step, train: bool) -> Result<Tensor> {
        let rows = Tensor::f_stack(&pooled(step), 1)?;
        let dim = rows.size()[2] - 1;
        let linear = rows.f_select(2, 0)?.f_sum_dim_intlist(1, true, Kind::Float)?;
        let vectors = rows.f_narrow(2, 1, dim)?;
        // Σ_{i<j} ⟨v_i, v_j⟩ = ½ (‖Σ v_i‖² − Σ ‖v_i‖²)
        let square_of_sum = vectors.f_sum_dim_intlist(1, false, Kind::Float)?.f_square()?;
        let sum_of_squares = vectors.f_square()?.f_sum_dim_intlist(1, false, Kind::Float)?;
        let pairs =
            square_of_sum.f_sub(&sum_of_squares)?.f_sum_dim_intlist(1, true, Kind::Float)?;
        let dense = step.dense();
        let deep = Tensor::f_cat(&[vectors.f_flatten(1, 2)?, dense.shallow_clone()], 1)?;
        let mut logits =
            self.deep.forward(&deep, train)?.f_add(&linear)?.f_add(&pairs.f_mul_scalar(0.5)?)?;
        if let Some(numbers) = &self.numbers {
            logits = logits.f_add(&dense.f_matmul(numbers)?)?;
        }
        as_labels(&logits)
    }
}
