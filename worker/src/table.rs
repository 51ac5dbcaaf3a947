use std::sync::Arc;

use downpour_client::Arrangement;
use downpour_core::init::Init;
use downpour_core::optimizer::OptimizerSpec;
use downpour_core::row_format::RowFormat;
use downpour_core::spec::{Shape, TableSpec, VariableSpec};
use downpour_data::Salt;

use crate::Adagrad;

/// An embedding table as a user defines it: `Table::dim(16).optimizer(Adagrad::lr(0.05))`.
///
/// A key has the value that `init` gives it until it is first pushed; only then is there a row.
#[derive(Clone, Debug)]
pub struct Table {
    dim: u32,
    optimizer: OptimizerSpec,
    init: Init,
    group: Option<String>,
    row_format: RowFormat,
}

impl Table {
    /// Rows of `dim` floats, normally distributed with deviation 0.01, under Adagrad with learning rate 0.05.
    #[must_use]
    pub fn dim(dim: u32) -> Self {
        Self {
            dim,
            optimizer: Adagrad::lr(0.05).into(),
            init: Init::Normal { mean: 0.0, std: 0.01 },
            group: None,
            row_format: RowFormat::F32,
        }
    }

    /// What a push does to a row.
    #[must_use]
    pub fn optimizer(mut self, optimizer: impl Into<OptimizerSpec>) -> Self {
        self.optimizer = optimizer.into();
        self
    }

    /// The value of a row before its first push.
    #[must_use]
    pub fn init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// Tables of one group keep equal keys on one shard: for tables that are always read together.
    #[must_use]
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// How rows and their gradients travel: [`RowFormat::Bf16`] halves their bytes and rounds them to 8 bits of precision. Servers compute and
    /// keep 32 bits.
    #[must_use]
    pub fn row_format(mut self, row_format: RowFormat) -> Self {
        self.row_format = row_format;
        self
    }

    pub(crate) fn spec(self, name: &str) -> VariableSpec {
        let table = TableSpec {
            dim: self.dim,
            init: self.init,
            group: self.group.unwrap_or_else(|| name.into()),
            row_format: self.row_format,
        };
        VariableSpec { name: name.into(), optimizer: self.optimizer, shape: Shape::Table(table) }
    }
}

/// A table of an open job. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TableHandle {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    dim: u32,
    id: downpour_core::id::VariableId,
    arrangement: Arrangement,
}

impl TableHandle {
    pub(crate) fn new(
        name: &str,
        dim: u32,
        id: downpour_core::id::VariableId,
        arrangement: Arrangement,
    ) -> Self {
        Self { inner: Arc::new(Inner { name: name.into(), dim, id, arrangement }) }
    }

    /// Its name in the job.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Floats of a row.
    #[must_use]
    pub fn dim(&self) -> u32 {
        self.inner.dim
    }

    pub(crate) fn id(&self) -> downpour_core::id::VariableId {
        self.inner.id
    }

    /// The order in which its keys travel best.
    pub(crate) fn arrangement(&self) -> Arrangement {
        self.inner.arrangement
    }

    /// The key that [`Features::one`](crate::Features::one) gives a value of this table: for [`Step::lookup`](crate::Step::lookup).
    /// An integer is its decimal digits.
    #[must_use]
    pub fn key(&self, value: impl AsRef<[u8]>) -> u64 {
        Salt::new(self.name()).key(value.as_ref())
    }
}
