//! Which columns are what: the schema file ([`Spec`]) and what follows from it ([`Schema`]).

mod spec;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub use spec::{
    BucketSpec, Columns, CrossSpec, FileSpec, Format, KeySpec, LabelSpec, NumberSpec, Pool, Spec,
    Transform,
};

use crate::{Error, Result, Salt};

/// A schema that is checked and written out: defaults filled in, ranges expanded.
#[derive(Clone, Debug, PartialEq)]
pub struct Schema {
    spec: Spec,
    text_columns: Vec<String>,
    features: Vec<Feature>,
    numbers: Vec<Number>,
    labels: Vec<Label>,
}

/// One embedding feature of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Feature {
    pub name: String,
    /// The embedding table that its keys are rows of; features may share one.
    pub table: String,
    pub dim: u32,
    pub pool: Pool,
    /// A bag keeps its first so many keys. Always there with [`Pool::Padded`].
    pub max_len: Option<u32>,
    pub source: Source,
}

/// Where the keys of a [`Feature`] come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    Column {
        column: String,
        hash: Option<Salt>,
        separator: Option<String>,
        weights: Option<String>,
    },
    Bucket {
        bucket: Bucket,
        salt: Salt,
    },
    Cross {
        parts: Vec<Part>,
        salt: Salt,
    },
}

/// One side of a cross.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    Column(String),
    Bucket(Bucket),
}

/// The interval of a number.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    pub column: String,
    pub boundaries: Vec<f64>,
}

/// One column of the dense matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    pub column: String,
    pub transform: Transform,
    pub mean: f64,
    pub std: f64,
    pub default: f32,
}

/// One column of the label matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Label {
    pub name: String,
    pub column: String,
    pub rule: LabelRule,
}

/// How a value becomes a label.
#[derive(Clone, Debug, PartialEq)]
pub enum LabelRule {
    /// The number as it stands.
    Number,
    /// 1 above the threshold, otherwise 0.
    Above(f64),
    /// 1 for a positive string; where negative ones are listed, no other is allowed.
    OneOf { positive: Vec<String>, negative: Vec<String> },
}

impl Bucket {
    /// How many boundaries are at or below `x`.
    #[must_use]
    pub fn index(&self, x: f64) -> usize {
        self.boundaries.partition_point(|boundary| *boundary <= x)
    }
}

impl Schema {
    /// Reads a schema file (TOML).
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::file(path.display().to_string(), error))?;
        Self::parse(&text).map_err(|error| match error {
            Error::Schema(what) => Error::Schema(format!("{}: {what}", path.display())),
            other => other,
        })
    }

    pub fn parse(text: &str) -> Result<Self> {
        Self::new(toml::from_str(text).map_err(|error| Error::schema(error.to_string()))?)
    }

    /// Checks and completes a schema.
    pub fn new(spec: Spec) -> Result<Self> {
        let text_columns = spec.file.columns.expand()?;
        unique("file column", &text_columns)?;
        if let Some(wrong) =
            spec.file.delimiter.filter(|c| !c.is_ascii() || matches!(c, '\n' | '\r' | '"'))
        {
            return Err(Error::schema(format!("[file] delimiter {wrong:?} is no ASCII delimiter")));
        }
        let features = features(&spec)?;
        let mut numbers = Vec::new();
        for number in &spec.numbers {
            let std = number.std.unwrap_or(1.0);
            let mean = number.mean.unwrap_or(0.0);
            if !(std > 0.0 && std.is_finite() && mean.is_finite() && number.default.is_finite()) {
                return Err(Error::schema(format!(
                    "number {:?}: mean, std and default must be finite and std above 0",
                    number.columns.expand()?
                )));
            }
            numbers.extend(number.columns.expand()?.into_iter().map(|column| Number {
                column,
                transform: number.transform,
                mean,
                std,
                default: number.default,
            }));
        }
        let labels = spec.labels.iter().map(label).collect::<Result<Vec<_>>>()?;
        unique("feature", features.iter().map(|feature| &feature.name))?;
        unique("label", labels.iter().map(|label| &label.name))?;
        let schema = Self { spec, text_columns, features, numbers, labels };
        schema.check_columns()?;
        schema.tables()?;
        Ok(schema)
    }

    /// The embedding features: keys, then buckets, then crosses, each in the order of the file.
    #[must_use]
    pub fn features(&self) -> &[Feature] {
        &self.features
    }

    #[must_use]
    pub fn numbers(&self) -> &[Number] {
        &self.numbers
    }

    #[must_use]
    pub fn labels(&self) -> &[Label] {
        &self.labels
    }

    /// What the schema was made from.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The columns of a text file without a header.
    #[must_use]
    pub fn text_columns(&self) -> &[String] {
        &self.text_columns
    }

    /// The embedding tables with their widths.
    pub fn tables(&self) -> Result<BTreeMap<&str, u32>> {
        let mut tables = BTreeMap::new();
        for feature in &self.features {
            let dim = *tables.entry(feature.table.as_str()).or_insert(feature.dim);
            if dim != feature.dim {
                return Err(Error::schema(format!(
                    "table {:?} has dim {dim} and, by feature {:?}, dim {}",
                    feature.table, feature.name, feature.dim
                )));
            }
        }
        Ok(tables)
    }

    /// Every column that has to be read.
    #[must_use]
    pub fn columns(&self) -> BTreeSet<&str> {
        let mut columns = BTreeSet::new();
        for feature in &self.features {
            match &feature.source {
                Source::Column { column, weights, .. } => {
                    columns.insert(column.as_str());
                    columns.extend(weights.as_deref());
                }
                Source::Bucket { bucket, .. } => _ = columns.insert(bucket.column.as_str()),
                Source::Cross { parts, .. } => columns.extend(parts.iter().map(Part::column)),
            }
        }
        columns.extend(self.numbers.iter().map(|number| number.column.as_str()));
        columns.extend(self.labels.iter().map(|label| label.column.as_str()));
        columns.extend(self.spec.weight.as_deref());
        columns.extend(self.spec.user.as_deref());
        columns
    }

    /// With the file's columns named in the schema, a wrong name is found before any file is opened.
    fn check_columns(&self) -> Result<()> {
        let columns = self.columns();
        if columns.contains("") {
            return Err(Error::schema(
                "a [[key]], [[bucket]], [[number]] or [[label]] names no column",
            ));
        }
        if self.text_columns.is_empty() {
            return Ok(());
        }
        match columns.iter().find(|name| !self.text_columns.iter().any(|has| has == *name)) {
            None => Ok(()),
            Some(name) => Err(Error::MissingColumn {
                file: "schema".into(),
                column: (*name).into(),
                present: self.text_columns.clone(),
            }),
        }
    }
}

impl Part {
    fn column(&self) -> &str {
        match self {
            Self::Column(column) | Self::Bucket(Bucket { column, .. }) => column,
        }
    }
}

fn features(spec: &Spec) -> Result<Vec<Feature>> {
    const DIM_MAX: u32 = 65_536;
    let dim = |name: &str, own: Option<u32>| match own.or(spec.dim) {
        Some(dim @ 1..=DIM_MAX) => Ok(dim),
        Some(dim) => {
            Err(Error::schema(format!("feature {name:?}: dim {dim} is not 1 to {DIM_MAX}")))
        }
        None => {
            Err(Error::schema(format!("feature {name:?} has no dim, and there is no default dim")))
        }
    };
    let mut features = Vec::new();
    for key in &spec.keys {
        let columns = key.columns.expand()?;
        if columns.is_empty() {
            return Err(Error::schema("a [[key]] names no column"));
        }
        for column in columns {
            let fill = |text: &Option<String>, otherwise: &str| {
                text.as_deref().unwrap_or(otherwise).replace("{column}", &column)
            };
            let name = fill(&key.name, "{column}");
            let table = fill(&key.table, &name);
            let pool = key.pool.unwrap_or_default();
            if key.max_len == Some(0) || (pool == Pool::Padded && key.max_len.is_none()) {
                return Err(Error::schema(format!("feature {name:?}: it needs a max_len above 0")));
            }
            if key.raw && key.salt.is_some() {
                return Err(Error::schema(format!("feature {name:?}: raw keys have no salt")));
            }
            if key.separator.as_deref() == Some("") {
                return Err(Error::schema(format!("feature {name:?}: the separator is empty")));
            }
            features.push(Feature {
                dim: dim(&name, key.dim)?,
                pool,
                max_len: key.max_len,
                source: Source::Column {
                    hash: (!key.raw).then(|| Salt::new(&fill(&key.salt, &table))),
                    separator: key.separator.clone(),
                    weights: key.weights.as_ref().map(|text| text.replace("{column}", &column)),
                    column,
                },
                name,
                table,
            });
        }
    }
    let mut buckets = BTreeMap::new();
    for spec in &spec.buckets {
        let name = spec.name.clone().unwrap_or_else(|| format!("{}_bucket", spec.column));
        let bucket = Bucket { column: spec.column.clone(), boundaries: spec.boundaries.clone() };
        let rising = spec.boundaries.windows(2).all(|pair| pair[0] < pair[1]);
        if !rising || spec.boundaries.is_empty() || !spec.boundaries.iter().all(|b| b.is_finite()) {
            return Err(Error::schema(format!(
                "bucket {name:?}: boundaries must be finite and rise"
            )));
        }
        if buckets.insert(name.clone(), bucket.clone()).is_some() {
            return Err(Error::schema(format!("two buckets are called {name:?}")));
        }
        if !spec.hidden {
            let table = spec.table.clone().unwrap_or_else(|| name.clone());
            let salt = Salt::new(spec.salt.as_ref().unwrap_or(&table));
            features.push(Feature {
                dim: dim(&name, spec.dim)?,
                pool: Pool::Sum,
                max_len: None,
                source: Source::Bucket { bucket, salt },
                name,
                table,
            });
        }
    }
    for spec in &spec.crosses {
        let name = spec.name.clone().unwrap_or_else(|| spec.columns.join("_x_"));
        if spec.columns.len() < 2 {
            return Err(Error::schema(format!("cross {name:?}: it needs two columns or more")));
        }
        let table = spec.table.clone().unwrap_or_else(|| name.clone());
        let parts = spec.columns.iter().map(|part| match buckets.get(part) {
            Some(bucket) => Part::Bucket(bucket.clone()),
            None => Part::Column(part.clone()),
        });
        features.push(Feature {
            dim: dim(&name, spec.dim)?,
            pool: Pool::Sum,
            max_len: None,
            source: Source::Cross {
                parts: parts.collect(),
                salt: Salt::new(spec.salt.as_ref().unwrap_or(&table)),
            },
            name,
            table,
        });
    }
    Ok(features)
}

fn label(spec: &LabelSpec) -> Result<Label> {
    let name = spec.name.clone().unwrap_or_else(|| spec.column.clone());
    let rule = match (spec.threshold, spec.positive.is_empty()) {
        (Some(threshold), true) if threshold.is_finite() => LabelRule::Above(threshold),
        (None, false) => {
            LabelRule::OneOf { positive: spec.positive.clone(), negative: spec.negative.clone() }
        }
        (None, true) if spec.negative.is_empty() => LabelRule::Number,
        _ => {
            return Err(Error::schema(format!(
                "label {name:?}: give a finite threshold, or positive strings (and negative ones), or nothing"
            )));
        }
    };
    Ok(Label { name, column: spec.column.clone(), rule })
}

fn unique<'a>(what: &str, names: impl IntoIterator<Item = &'a String>) -> Result<()> {
    let mut seen = BTreeSet::new();
    match names.into_iter().find(|name| !seen.insert(name.as_str())) {
        None => Ok(()),
        Some(name) => Err(Error::schema(format!("two {what}s are called {name:?}"))),
    }
}
