use tch::Tensor;
use tch::nn::Path;

use super::mlp::Mlp;
use super::{Inputs, Model, Options, as_labels, pooled};
use crate::{Error, Result, Step};

/// Wide & Deep (Cheng et al., 2016): a linear model over keys and crosses beside a perceptron over their embeddings.
///
/// A row is the linear weight of its key and then the embedding.
#[derive(Debug)]
pub struct WideDeep {
    deep: Mlp,
}

impl WideDeep {
    /// With weights in `path`.
    pub fn new(path: &Path, inputs: &Inputs, options: &Options) -> Result<Self> {
        if inputs.dims.is_empty() {
            return Err(Error::usage(
                "wide-deep needs at least one key, bucket or cross in the schema",
            ));
        }
        let width = inputs.dims.iter().map(|dim| dim - 1).sum::<i64>() + inputs.numbers;
        let deep =
            Mlp::new(&(path / "deep"), width, &options.hidden, inputs.labels, options.dropout);
        Ok(Self { deep })
    }
}

impl Model for WideDeep {
    fn forward(&self, step: &Step, train: bool) -> Result<Tensor> {
        let mut wide = Vec::new();
        let mut deep = Vec::new();
        for rows in pooled(step) {
            wide.push(rows.f_narrow(1, 0, 1)?);
            deep.push(rows.f_narrow(1, 1, rows.size()[1] - 1)?);
        }
        deep.push(step.dense());
        let wide = Tensor::f_cat(&wide, 1)?.f_sum_dim_intlist(1, true, tch::Kind::Float)?;
        as_labels(&self.deep.forward(&Tensor::f_cat(&deep, 1)?, train)?.f_add(&wide)?)
    }
}
