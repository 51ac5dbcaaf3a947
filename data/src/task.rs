use std::fmt;

use arrow_array::RecordBatch;
use serde::{Deserialize, Serialize};

use crate::Result;

/// A source of training data: what pieces it has, and one piece as Arrow record batches.
///
/// Implement it to bring a format of your own; [`crate::open`] makes one from files.
pub trait Dataset: Send + Sync {
    /// Every piece, in an order that depends on nothing but the data.
    fn tasks(&self) -> Result<Vec<Task>>;

    /// The rows of one piece, streamed. An implementation holds a bounded number of rows at a time.
    fn open(&self, task: &Task) -> Result<BatchReader>;
}

/// The rows of a task, in file order. After an error nothing follows.
pub type BatchReader = Box<dyn Iterator<Item = Result<Chunk>> + Send>;

/// Some consecutive rows of a task.
#[derive(Clone, Debug)]
pub struct Chunk {
    pub batch: RecordBatch,
    /// The number of the first row, from 1: in a task of [`Part::Bytes`] counted from the part's
    /// first line, in every other task from the start of the file.
    pub first_row: u64,
}

/// A piece of a dataset that one worker trains at a time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    pub file: String,
    pub part: Part,
    /// How many rows it has, where that is known without reading them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u64>,
}

/// Which part of its file a [`Task`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    Whole,
    /// Rows `start..end`, counted from 0, of one row group of a Parquet file.
    Rows {
        group: u32,
        start: u64,
        end: u64,
    },
    /// The lines of a text file that begin at `start` or later and before `end`.
    Bytes {
        start: u64,
        end: u64,
    },
}

impl Task {
    /// A whole file whose number of rows is not known.
    pub fn whole(file: impl Into<String>) -> Self {
        Self { file: file.into(), part: Part::Whole, rows: None }
    }

    /// The number that a row of this task has in its file. Only here, where somebody asks for the row
    /// by name, are the lines before a byte range counted.
    #[must_use]
    pub fn row_in_file(&self, row: u64) -> u64 {
        match self.part {
            Part::Bytes { start, .. } if start > 0 => {
                row + crate::lines::count_before(&self.file, start).unwrap_or(0)
            }
            _ => row,
        }
    }
}

/// `train.parquet (row group 3, rows 0 to 65536)`: what a log line says of a task.
impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.part {
            Part::Whole => f.write_str(&self.file),
            Part::Rows { group, start, end } => {
                write!(f, "{} (row group {group}, rows {start} to {end})", self.file)
            }
            Part::Bytes { start, end } => write!(f, "{} (bytes {start} to {end})", self.file),
        }
    }
}
