use tch::Tensor;
use tch::nn::Path;

use super::{Inputs, Model, pooled};
use crate::{Error, Result, Step};

/// Logistic regression: a weight per key (a table of width 1), a weight per number, a bias.
#[derive(Debug)]
pub struct Logistic {
    numbers: Option<Tensor>,
    bias: Tensor,
}

impl Logistic {
    /// With weights in `path`, all zero.
    pub fn new(path: &Path, inputs: &Inputs) -> Result<Self> {
        if inputs.labels != 1 {
            return Err(Error::usage("lr predicts one label: leave one [[label]] in the schema"));
        }
        let numbers = (inputs.numbers > 0).then(|| path.zeros("numbers", &[inputs.numbers]));
        Ok(Self { numbers, bias: path.zeros("bias", &[]) })
    }
}

impl Model for Logistic {
    fn forward(&self, step: &Step, _: bool) -> Result<Tensor> {
        let rows = pooled(step);
        let mut logit = match &self.numbers {
            Some(weights) => step.dense().f_mv(weights)?,
            None => step.dense().f_sum_dim_intlist(1, false, tch::Kind::Float)?,
        };
        if !rows.is_empty() {
            logit = logit.f_add(&Tensor::f_cat(&rows, 1)?.f_sum_dim_intlist(
                1,
                false,
                tch::Kind::Float,
            )?)?;
        }
        Ok(logit.f_add(&self.bias)?)
    }
}
