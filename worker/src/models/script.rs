use std::path::Path as FilePath;

use tch::nn::Path;
use tch::{IValue, Tensor, TrainableCModule};

use super::{Model, as_labels, pooled};
use crate::{Error, Result, Step};

/// A TorchScript module made in Python, whose parameters become dense variables.
///
/// Its signature is `forward(self, features: List[Tensor], dense: Tensor) -> Tensor`: the pooled rows of each feature in the
/// schema's order, each `[batch, dim]`; the numbers, `[batch, count]`; logits of `[batch]` or `[batch, labels]`.
#[derive(Debug)]
pub struct Script {
    module: TrainableCModule,
}

impl Script {
    /// Loads `torch.jit.script(module).save(file)`.
    pub fn load(path: &Path, file: Option<&FilePath>) -> Result<Self> {
        let file = file.ok_or_else(|| Error::usage("the model `script` needs --model-file"))?;
        let module = TrainableCModule::load(file, path.clone()).map_err(|error| {
            Error::usage(format!(
                "--model-file {}: not a TorchScript module: {error}",
                file.display()
            ))
        })?;
        Ok(Self { module })
    }
}

impl Model for Script {
    fn forward(&self, step: &Step, _: bool) -> Result<Tensor> {
        let inputs = [IValue::TensorList(pooled(step)), IValue::Tensor(step.dense())];
        match self.module.forward_is(&inputs)? {
            IValue::Tensor(logits) => as_labels(&logits),
            other => Err(Error::usage(format!(
                "--model-file: forward(features: List[Tensor], dense: Tensor) must return a tensor, not {other:?}"
            ))),
        }
    }
}
