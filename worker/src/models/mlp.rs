use tch::Tensor;
use tch::nn::{self, Path};

use crate::Result;

/// Hidden layers with ReLU and dropout, and a linear one at the end.
#[derive(Debug)]
pub(super) struct Mlp {
    hidden: Vec<nn::Linear>,
    last: nn::Linear,
    dropout: f64,
}

impl Mlp {
    pub(super) fn new(path: &Path, input: i64, hidden: &[i64], output: i64, dropout: f64) -> Self {
        let mut width = input;
        let mut layers = Vec::new();
        for (i, &next) in hidden.iter().enumerate() {
            layers.push(nn::linear(path / i, width, next, nn::LinearConfig::default()));
            width = next;
        }
        let last = nn::linear(path / hidden.len(), width, output, nn::LinearConfig::default());
        Self { hidden: layers, last, dropout }
    }

    pub(super) fn forward(&self, input: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = input.shallow_clone();
        for layer in &self.hidden {
            x = x.f_linear(&layer.ws, layer.bs.as_ref())?.f_relu()?;
            if self.dropout > 0.0 {
                x = x.f_dropout(self.dropout, train)?;
            }
        }
        Ok(x.f_linear(&self.last.ws, self.last.bs.as_ref())?)
    }
}
