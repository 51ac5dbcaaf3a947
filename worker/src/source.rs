use std::sync::Arc;

use downpour_data::{Dataset, Schema};

use crate::Result;

/// Something that becomes a [`Dataset`] once the columns are known: [`Parquet::glob`], [`Paths`], or a dataset of your own in an
/// `Arc`.
pub trait Source {
    /// The dataset, for the columns of this schema.
    fn open(self, schema: &Schema) -> Result<Arc<dyn Dataset>>;
}

/// Files, directories and patterns (`train/*.parquet`); what a file holds follows from its name, or from the schema's `[file]`.
#[derive(Clone, Debug)]
pub struct Paths(Vec<String>);

/// Parquet files.
#[derive(Clone, Copy, Debug)]
pub struct Parquet;

impl Paths {
    /// These.
    pub fn new<P: Into<String>>(paths: impl IntoIterator<Item = P>) -> Self {
        Self(paths.into_iter().map(Into::into).collect())
    }
}

impl Parquet {
    /// The files that match a pattern.
    pub fn glob(pattern: impl Into<String>) -> Paths {
        Paths(vec![pattern.into()])
    }
}

impl Source for Paths {
    fn open(self, schema: &Schema) -> Result<Arc<dyn Dataset>> {
        Ok(Arc::new(downpour_data::open(&self.0, schema)?))
    }
}

impl Source for Arc<dyn Dataset> {
    fn open(self, _: &Schema) -> Result<Arc<dyn Dataset>> {
        Ok(self)
    }
}
