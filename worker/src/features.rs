use std::collections::BTreeMap;
use std::sync::Arc;

use downpour_data::{FileSpec, KeySpec, LabelSpec, NumberSpec, Pool, Schema, Spec};

use crate::{Error, Result, TableHandle};

/// Which column feeds which table: what prefetching needs to know.
///
/// Strings and integers are hashed under the table's name ([`TableHandle::key`] computes the same); columns that hold keys
/// already are marked [`Features::raw`]. A missing value, or an empty list, is a zero vector
/// and creates no row. For crosses, buckets and other transformations there is the schema file: [`Features::from_schema`].
#[derive(Clone, Debug, Default)]
pub struct Features {
    spec: Spec,
    tables: BTreeMap<String, TableHandle>,
    /// A change of a feature came before the first one.
    misused: Option<&'static str>,
}

impl Features {
    /// No features yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What a schema file says, with a table of the job for each table that it names. The job's table decides the width.
    #[must_use]
    pub fn from_schema(schema: &Schema, tables: BTreeMap<String, TableHandle>) -> Self {
        Self { spec: schema.spec().clone(), tables, misused: None }
    }

    /// A column with one value: the feature's value is its row.
    #[must_use]
    pub fn one(self, column: &str, table: &TableHandle) -> Self {
        self.bag(column, table, Pool::Sum)
    }

    /// A column with a list of values, pooled into one vector, or with [`Pool::Padded`] kept apart (it needs
    /// [`Features::max_len`]).
    #[must_use]
    pub fn bag(mut self, column: &str, table: &TableHandle, pool: Pool) -> Self {
        self.spec.keys.push(KeySpec {
            columns: column.into(),
            table: Some(table.name().into()),
            dim: Some(table.dim()),
            pool: Some(pool),
            ..KeySpec::default()
        });
        self.tables.insert(table.name().into(), table.clone());
        self
    }

    /// The integers of the feature before are keys as they stand, and are not hashed.
    #[must_use]
    pub fn raw(self) -> Self {
        self.change("raw", |key| key.raw = true)
    }

    /// The bag before is a string with this between its values.
    #[must_use]
    pub fn separated_by(self, separator: &str) -> Self {
        self.change("separated_by", |key| key.separator = Some(separator.into()))
    }

    /// The bag before keeps its first so many values.
    #[must_use]
    pub fn max_len(self, len: u32) -> Self {
        self.change("max_len", |key| key.max_len = Some(len))
    }

    /// The bag before has a weight for each value in this column.
    #[must_use]
    pub fn weighted_by(self, column: &str) -> Self {
        self.change("weighted_by", |key| key.weights = Some(column.into()))
    }

    fn change(mut self, what: &'static str, change: impl FnOnce(&mut KeySpec)) -> Self {
        match self.spec.keys.last_mut() {
            Some(key) => change(key),
            None => self.misused = Some(what),
        }
        self
    }

    /// Columns of numbers: [`Step::dense`](crate::Step::dense) has one column for each, in this order.
    #[must_use]
    pub fn dense<'a>(mut self, columns: impl IntoIterator<Item = &'a str>) -> Self {
        let columns = columns.into_iter().collect();
        self.spec.numbers.push(NumberSpec { columns, ..NumberSpec::default() });
        self
    }

    /// A column of labels; several give a label matrix.
    #[must_use]
    pub fn label(mut self, column: &str) -> Self {
        self.spec.labels.push(LabelSpec { column: column.into(), ..LabelSpec::default() });
        self
    }

    /// The column of sample weights.
    #[must_use]
    pub fn weight(mut self, column: &str) -> Self {
        self.spec.weight = Some(column.into());
        self
    }

    /// The column that says whose row it is: for per-user metrics.
    #[must_use]
    pub fn user(mut self, column: &str) -> Self {
        self.spec.user = Some(column.into());
        self
    }

    /// How the files are read, where their names do not tell.
    #[must_use]
    pub fn file(mut self, file: FileSpec) -> Self {
        self.spec.file = file;
        self
    }

    pub(crate) fn layout(self) -> Result<Layout> {
        if let Some(what) = self.misused {
            return Err(Error::usage(format!(
                "{what}() changes the feature before it, and there is none"
            )));
        }
        let schema = Schema::new(self.spec)?;
        let mut tables: Vec<TableHandle> = Vec::new();
        let mut features = Vec::new();
        for feature in schema.features() {
            let Some(table) = self.tables.get(&feature.table) else {
                return Err(Error::usage(format!(
                    "feature {:?} reads table {:?}, and Features has no table of that name",
                    feature.name, feature.table
                )));
            };
            let index = tables.iter().position(|known| known.id() == table.id());
            let index = index.unwrap_or_else(|| {
                tables.push(table.clone());
                tables.len() - 1
            });
            features.push(Feature {
                name: feature.name.clone(),
                table: index,
                pool: feature.pool,
                max_len: feature.max_len.map_or(0, |len| len as usize),
            });
        }
        Ok(Layout { schema: Arc::new(schema), tables, features })
    }
}

/// Features with their tables found.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) schema: Arc<Schema>,
    /// Each once.
    pub(crate) tables: Vec<TableHandle>,
    /// As in the schema.
    pub(crate) features: Vec<Feature>,
}

#[derive(Debug)]
pub(crate) struct Feature {
    pub(crate) name: String,
    /// Index in [`Layout::tables`].
    pub(crate) table: usize,
    pub(crate) pool: Pool,
    /// Columns of a padded feature.
    pub(crate) max_len: usize,
}

impl Layout {
    pub(crate) fn feature(&self, name: &str) -> usize {
        self.features.iter().position(|feature| feature.name == name).unwrap_or_else(|| {
            let names: Vec<&str> = self.features.iter().map(|f| f.name.as_str()).collect();
            panic!("no feature is called {name:?}; there are: {}", names.join(", "))
        })
    }
}
