use std::sync::Arc;

use crate::{Schema, Task};

/// A batch as a model wants it. Features, numbers and labels are in the order of the [`Schema`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    rows: usize,
    /// One per [`Schema::features`].
    pub features: Vec<Keys>,
    /// Row-major `[rows, schema.numbers().len()]`.
    pub numbers: Vec<f32>,
    /// Row-major `[rows, schema.labels().len()]`.
    pub labels: Vec<f32>,
    /// One per row where the schema names a weight column, otherwise empty: every row counts 1.
    pub weights: Vec<f32>,
    /// One per row where the schema names a user column, otherwise empty.
    pub users: Vec<u64>,
    /// Where each row came from.
    pub origins: Vec<Origin>,
    /// Tasks whose last row is in this batch or was in an earlier one. [`crate::Batches`] names each
    /// task once; a task is done when this batch is acknowledged.
    pub finished: Vec<Finished>,
}

/// A task of which no row is left.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub task: Arc<Task>,
    /// How many it had.
    pub rows: u64,
}

/// The keys of one feature: row `i` has `keys[offsets[i]..offsets[i + 1]]`; none is a zero vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Keys {
    pub offsets: Vec<u32>,
    pub keys: Vec<u64>,
    /// One per key where the schema names a weight column for the feature, otherwise empty.
    pub weights: Vec<f32>,
}

/// The place of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    pub task: Arc<Task>,
    /// As [`crate::Chunk::first_row`] counts.
    pub row: u64,
}

impl Default for Keys {
    fn default() -> Self {
        Self { offsets: vec![0], keys: Vec::new(), weights: Vec::new() }
    }
}

impl Keys {
    /// The keys of row `i`.
    #[must_use]
    pub fn row(&self, i: usize) -> &[u64] {
        &self.keys[self.range(i)]
    }

    fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }

    pub(crate) fn end_row(&mut self) {
        self.offsets.push(u32::try_from(self.keys.len()).expect("a batch is bounded by its rows"));
    }

    fn push_rows(&mut self, from: &Keys, rows: &[usize]) {
        for row in rows {
            let range = from.range(*row);
            self.keys.extend_from_slice(&from.keys[range.clone()]);
            if !from.weights.is_empty() {
                self.weights.extend_from_slice(&from.weights[range]);
            }
            self.end_row();
        }
    }
}

impl Encoded {
    /// A batch without rows, of the schema's shape.
    #[must_use]
    pub fn empty(schema: &Schema) -> Self {
        Self { features: vec![Keys::default(); schema.features().len()], ..Self::default() }
    }

    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The places of the rows in words: `train.tsv rows 1025 to 2048; more.tsv row 3`.
    ///
    /// It may read a text file to count its lines, so it is for reports and not for every batch.
    #[must_use]
    pub fn describe_rows(&self) -> String {
        const SPANS_MAX: usize = 20;
        let mut spans: Vec<(&Arc<Task>, u64, u64)> = Vec::new();
        for origin in &self.origins {
            match spans.last_mut() {
                Some((task, _, last)) if *task == &origin.task && *last + 1 == origin.row => {
                    *last = origin.row;
                }
                _ => spans.push((&origin.task, origin.row, origin.row)),
            }
        }
        let mut words: Vec<String> = spans
            .iter()
            .take(SPANS_MAX)
            .map(|(task, first, last)| {
                let start = task.row_in_file(*first);
                if first == last {
                    format!("{} row {start}", task.file)
                } else {
                    format!("{} rows {start} to {}", task.file, start + (last - first))
                }
            })
            .collect();
        if spans.len() > SPANS_MAX {
            words.push(format!("and {} more places", spans.len() - SPANS_MAX));
        }
        words.join("; ")
    }

    /// Appends rows of a batch of the same schema, column by column: each is walked once.
    pub(crate) fn push_rows(&mut self, from: &Encoded, rows: &[usize]) {
        for (keys, other) in self.features.iter_mut().zip(&from.features) {
            keys.push_rows(other, rows);
        }
        let (numbers, labels) = (from.numbers.len() / from.rows, from.labels.len() / from.rows);
        for row in rows {
            self.numbers.extend_from_slice(&from.numbers[row * numbers..(row + 1) * numbers]);
            self.labels.extend_from_slice(&from.labels[row * labels..(row + 1) * labels]);
            self.weights.extend(from.weights.get(*row));
            self.users.extend(from.users.get(*row));
            self.origins.push(from.origins[*row].clone());
        }
        self.rows += rows.len();
    }

    pub(crate) fn end_rows(&mut self, count: usize) {
        self.rows += count;
    }
}
