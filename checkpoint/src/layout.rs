//! Which tensors a variable is made of.

use downpour_core::spec::{Shape, Variable};
use serde::{Deserialize, Serialize};

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Dtype {
    U64,
    U32,
    F32,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Dtype::U64 => 8,
            Dtype::U32 | Dtype::F32 => 4,
        }
    }
}

/// One tensor of a variable. Tables: a line for each row. Dense variables: a number for each block, and the blocks' floats one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// `<variable>/<what>`: no name of an optimizer slot holds a `/`, so the last one ends the variable's name.
    pub name: String,
    /// Of its elements.
    pub dtype: Dtype,
    /// Floats in a table's line. None: the tensor has one dimension.
    pub width: Option<usize>,
}

/// The tensors of a variable in their order: keys or block numbers, LSNs, weights, optimizer slots.
#[must_use]
pub fn columns(variable: &Variable) -> Vec<Column> {
    let spec = &variable.spec;
    let column =
        |what: &str, dtype, width| Column { name: format!("{}/{what}", spec.name), dtype, width };
    let (identity, weights, dim) = match &spec.shape {
        Shape::Table(table) => {
            let dim = table.dim as usize;
            (column("keys", Dtype::U64, None), column("rows", Dtype::F32, Some(dim)), Some(dim))
        }
        Shape::Dense(_) => {
            (column("blocks", Dtype::U32, None), column("values", Dtype::F32, None), None)
        }
    };
    let slots = spec.optimizer.slots().iter();
    let slots = slots.map(|slot| column(slot.name, Dtype::F32, dim.map(|dim| slot.width(dim))));
    [identity, column("lsn", Dtype::U64, None), weights].into_iter().chain(slots).collect()
}

/// Floats of each column from the weights on, for a line of `dim` weights.
#[must_use]
pub fn float_widths(variable: &Variable, dim: usize) -> Vec<usize> {
    let slots = variable.spec.optimizer.slots().iter();
    std::iter::once(dim).chain(slots.map(|slot| slot.width(dim))).collect()
}
