use std::fmt;

/// Why data could not be read, in words that name the file, the row and the column.
///
/// Rows count from 1 as in the file: lines of a text file (a header is line 1), rows of a Parquet file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The schema contradicts itself or cannot be parsed.
    #[error("schema: {0}")]
    Schema(String),
    /// A path or pattern matches nothing that can be read as data.
    #[error("{path}: {what}")]
    NoData { path: String, what: String },
    /// The file cannot be read at all: not there, empty, truncated, of an unknown format.
    #[error("{file}: {what}")]
    File { file: String, what: String },
    /// A column that the schema names is not in the file.
    #[error("{file}: {}", missing_column(column, present))]
    MissingColumn { file: String, column: String, present: Vec<String> },
    /// A column has a type from which the schema's wish cannot be served.
    #[error("{file}: column {column:?}: {what}")]
    Column { file: String, column: String, what: String },
    /// A row cannot be cut into columns.
    #[error("{file}: row {row}: {what}")]
    Row { file: String, row: u64, what: String },
    /// One value is unusable.
    #[error("{file}: row {row}, column {column:?}: {what}")]
    Value { file: String, row: u64, column: String, what: String },
}

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn file(file: impl Into<String>, what: impl fmt::Display) -> Self {
        Self::File { file: file.into(), what: what.to_string() }
    }

    pub(crate) fn schema(what: impl Into<String>) -> Self {
        Self::Schema(what.into())
    }
}

fn missing_column(column: &str, present: &[String]) -> String {
    const NAMED_MAX: usize = 60;
    let mut text = format!("no column {column:?}");
    if let Some(near) = did_you_mean(column, present) {
        text += &format!(", did you mean {near:?}?");
    } else {
        text.push('.');
    }
    text += &format!(" The file has: {}", present[..present.len().min(NAMED_MAX)].join(", "));
    if present.len() > NAMED_MAX {
        text += &format!(" and {} more", present.len() - NAMED_MAX);
    }
    text
}

/// The name in `present` that a typing error could have turned into `wanted`.
fn did_you_mean<'a>(wanted: &str, present: &'a [String]) -> Option<&'a str> {
    let wanted = wanted.to_lowercase();
    present
        .iter()
        .map(|name| (edit_distance(&wanted, &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= 1 + name.chars().count().min(wanted.len()) / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name.as_str())
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
