//! Dense variables: tensors of a VarStore bound to variables of the job.

use downpour_core::id::VariableId;
use downpour_core::optimizer::OptimizerSpec;
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// A trainable tensor of a VarStore and the variable of the job that it is a copy of.
#[derive(Debug)]
pub(crate) struct DenseVariable {
    pub(crate) name: String,
    pub(crate) id: VariableId,
    /// Where this process trains it.
    pub(crate) optimizer: Option<OptimizerSpec>,
    /// Shares its memory with the VarStore.
    pub(crate) tensor: Tensor,
}

impl DenseVariable {
    /// Overwrites the tensor in place. Never between a forward and its backward: that gives a silently wrong gradient.
    pub(crate) fn write(&self, values: &[f32]) -> Result<()> {
        let source = Tensor::f_from_slice(values)?.f_view(self.tensor.size().as_slice())?;
        tch::no_grad(|| self.tensor.shallow_clone().f_copy_(&source))?;
        Ok(())
    }

    pub(crate) fn shallow_clone(&self) -> Self {
        Self { name: self.name.clone(), tensor: self.tensor.shallow_clone(), ..*self }
    }
}

/// A tensor's values in row-major order, wherever it lives.
pub(crate) fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?;
    let tensor = tensor.f_contiguous()?;
    let mut values = vec![0.0; tensor.numel()];
    tensor.f_copy_data(&mut values, tensor.numel())?;
    Ok(values)
}

/// The name of a VarStore's tensor in the job: `prefix/name`, every character that a name may not have turned into `_`.
pub(crate) fn variable_name(prefix: &str, tensor: &str) -> Result<String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    let name: String = tensor.chars().map(|c| if allowed(c) { c } else { '_' }).collect();
    let name = format!("{prefix}/{name}");
    downpour_core::spec::check_name("name", &name)
        .map_err(|invalid| Error::usage(format!("dense variable {name:?}: {invalid}")))?;
    Ok(name)
}
