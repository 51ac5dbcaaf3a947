use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A schema file word for word; `docs/data.md` describes each key. Code that builds a schema fills one
/// in and calls [`crate::Schema::new`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Spec {
    /// Embedding width of features that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dim: Option<u32>,
    /// Strings that mean "no value", besides the empty one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// Column of sample weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<String>,
    /// Column that says whose row it is: for per-user and ranking metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    pub file: FileSpec,
    #[serde(rename = "key", skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeySpec>,
    #[serde(rename = "bucket", skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<BucketSpec>,
    #[serde(rename = "cross", skip_serializing_if = "Vec::is_empty")]
    pub crosses: Vec<CrossSpec>,
    #[serde(rename = "number", skip_serializing_if = "Vec::is_empty")]
    pub numbers: Vec<NumberSpec>,
    #[serde(rename = "label", skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<LabelSpec>,
}

/// How files are read; what is left out follows from the file's name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Names of a text file's columns, for a file without a header line.
    #[serde(skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Whether a text file's first line is a header. By default: where `columns` is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delimiter: Option<char>,
    /// Whether fields of a text file may stand in `"`. By default: in CSV yes, in TSV no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quotes: Option<bool>,
    /// Whether spaces around a field of a text file are dropped.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub trim: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    Parquet,
    Csv,
    Tsv,
    /// `label field:index:value …`; also reads the next.
    Libfm,
    /// `label index:value …`
    Libsvm,
}

/// One name, or a list of names and ranges (`"C1..C26"`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Columns {
    One(String),
    Many(Vec<String>),
}

/// Columns that hold keys: one embedding feature each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeySpec {
    #[serde(alias = "column")]
    pub columns: Columns,
    /// Default: the column. In `name`, `table` and `salt`, `{column}` stands for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Default: the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dim: Option<u32>,
    /// Integers that are keys as they stand, not hashed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub raw: bool,
    /// Default: the table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub salt: Option<String>,
    /// What stands between the keys of a bag inside one string.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
    /// A bag keeps its first so many keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_len: Option<u32>,
    /// Column with one weight per key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
}

/// How the rows of a bag become the feature's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    #[default]
    Sum,
    Mean,
    /// Sum divided by the square root of the number of keys (with weights: of the sum of their squares).
    Sqrtn,
    /// Not pooled: `max_len` rows and a mask.
    Padded,
}

/// A number turned into a key by the interval it lies in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BucketSpec {
    pub column: String,
    /// Default: `{column}_bucket`. Crosses refer to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Bucket `i` holds `boundaries[i - 1] <= x < boundaries[i]`.
    pub boundaries: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dim: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub salt: Option<String>,
    /// No feature of its own: it exists for crosses.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub hidden: bool,
}

/// Several columns or buckets that make one key together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrossSpec {
    pub columns: Vec<String>,
    /// Default: the columns with `_x_` between.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dim: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub salt: Option<String>,
}

/// Columns that are numbers for the dense part of a model: one each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NumberSpec {
    #[serde(alias = "column")]
    pub columns: Columns,
    pub transform: Transform,
    /// Subtracted after the transform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<f64>,
    /// Divided by at last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<f64>,
    /// What the model sees where the value is missing: not transformed, not standardized.
    pub default: f32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transform {
    #[default]
    Raw,
    /// `sign(x) * ln(1 + |x|)`
    Log,
}

/// What is to be predicted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LabelSpec {
    pub column: String,
    /// Default: the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Strings that are 1; every other is 0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub positive: Vec<String>,
    /// Where given, a string that is neither positive nor negative is an error.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub negative: Vec<String>,
    /// A number above it is 1, every other is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

impl Default for Columns {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl Columns {
    fn is_empty(&self) -> bool {
        matches!(self, Self::Many(names) if names.is_empty())
    }

    /// The names, with ranges written out.
    pub(crate) fn expand(&self) -> Result<Vec<String>> {
        let names = match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        };
        names
            .iter()
            .map(|name| expand_range(name))
            .collect::<Result<Vec<_>>>()
            .map(|all| all.concat())
    }
}

impl<S: Into<String>> FromIterator<S> for Columns {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        Self::Many(names.into_iter().map(Into::into).collect())
    }
}

impl From<&str> for Columns {
    fn from(name: &str) -> Self {
        Self::One(name.into())
    }
}

/// `C1..C26` is C1, C2, …, C26; `x01..x12` keeps its zeros; any other name is itself.
fn expand_range(name: &str) -> Result<Vec<String>> {
    const NAMES_MAX: u64 = 100_000;
    let Some((first, last)) = name.split_once("..") else { return Ok(vec![name.into()]) };
    let bad = || Error::schema(format!("column range {name:?}: wanted one like \"C1..C26\""));
    let cut = |end: &str| end.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (prefix, from) = first.split_at(cut(first));
    let (prefix_last, to) = last.split_at(cut(last));
    let (start, end): (u64, u64) =
        (from.parse().map_err(|_| bad())?, to.parse().map_err(|_| bad())?);
    if prefix != prefix_last || end < start || end - start >= NAMES_MAX {
        return Err(bad());
    }
    let width = if from.starts_with('0') { from.len() } else { 0 };
    Ok((start..=end).map(|i| format!("{prefix}{i:0width$}")).collect())
}
