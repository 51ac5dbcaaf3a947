//! The files of workload E as a dataset: one task for each batch, of which worker w of n takes the batches w, w + n, and so on.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use arrow_array::{
    Array as _, ArrayRef, FixedSizeListArray, Float32Array, RecordBatch, UInt32Array, UInt64Array,
};
use arrow_schema::Field;
use downpour::Dataset;
use downpour_data::{BatchReader, Chunk, Error, Part, Result, Task};

/// Ids of a sample.
pub(crate) const FIELDS: usize = 26;
/// Numbers of a sample.
pub(crate) const NUMBERS: usize = 13;

/// How the ids of a sample are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ids {
    /// A list in the column `ids`: an id is one key, in whatever field it stands.
    List,
    /// The same, but an id is another key in each field.
    ListOfApart,
    /// Columns `id0`, `id1`, ...
    Columns,
}

/// `e_{split}_ids.u32`, `e_{split}_x.f32`, `e_{split}_y.f32`: row-major, little-endian.
#[derive(Debug)]
pub(crate) struct Clicks {
    paths: [PathBuf; 3],
    files: [File; 3],
    ids: Ids,
    batch: u64,
    rows: u64,
    /// The first batch, and from one to the next.
    share: (usize, usize),
}

impl Clicks {
    /// The first so many batches.
    pub(crate) fn open(
        folder: &Path,
        split: &str,
        ids: Ids,
        batch: usize,
        batches: usize,
    ) -> anyhow::Result<Self> {
        let paths =
            ["ids.u32", "x.f32", "y.f32"].map(|end| folder.join(format!("e_{split}_{end}")));
        let open = |path: &PathBuf| File::open(path).with_context(|| path.display().to_string());
        let files = [open(&paths[0])?, open(&paths[1])?, open(&paths[2])?];
        let mut rows = u64::MAX;
        for ((file, path), width) in files.iter().zip(&paths).zip([FIELDS, NUMBERS, 1]) {
            let bytes = file.metadata().with_context(|| path.display().to_string())?.len();
            rows = rows.min(bytes / (width * 4) as u64);
        }
        ensure!(rows > 0, "{}: no rows", folder.display());
        let rows = rows.min((batch as u64).saturating_mul(batches as u64));
        Ok(Self { paths, files, ids, batch: batch as u64, rows, share: (0, 1) })
    }

    /// Those of worker w of n.
    pub(crate) fn share(self, worker: usize, workers: usize) -> Self {
        Self { share: (worker, workers.max(1)), ..self }
    }

    /// Rows `start..end` of the `at`th file.
    fn values<T>(
        &self,
        at: usize,
        width: usize,
        (start, end): (u64, u64),
        value: impl Fn([u8; 4]) -> T,
    ) -> Result<Vec<T>> {
        let mut bytes = vec![0; (end - start) as usize * width * 4];
        self.files[at]
            .read_exact_at(&mut bytes, start * width as u64 * 4)
            .map_err(|error| self.fault(at, &error))?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| value(bytes)).collect())
    }

    fn read(&self, rows: (u64, u64)) -> Result<RecordBatch> {
        let ids = self.values(0, FIELDS, rows, u32::from_le_bytes)?;
        let numbers = self.values(1, NUMBERS, rows, f32::from_le_bytes)?;
        let labels = self.values(2, 1, rows, f32::from_le_bytes)?;
        let mut columns: Vec<(String, ArrayRef)> = Vec::new();
        let lists = |ids: ArrayRef| {
            let item = Arc::new(Field::new("item", ids.data_type().clone(), false));
            let lists = FixedSizeListArray::try_new(item, FIELDS as i32, ids, None);
            lists.map_err(|error| self.fault(0, &error))
        };
        match self.ids {
            Ids::List => {
                let ids = lists(Arc::new(UInt32Array::from(ids)))?;
                columns.push(("ids".into(), Arc::new(ids)));
            }
            Ids::ListOfApart => {
                let fields = (0..FIELDS as u64).cycle();
                let keys =
                    ids.into_iter().zip(fields).map(|(id, field)| field << 32 | u64::from(id));
                let keys = lists(Arc::new(UInt64Array::from_iter_values(keys)))?;
                columns.push(("ids".into(), Arc::new(keys)));
            }
            Ids::Columns => {
                for field in 0..FIELDS {
                    let column: UInt32Array =
                        ids.iter().skip(field).step_by(FIELDS).copied().collect();
                    columns.push((format!("id{field}"), Arc::new(column)));
                }
            }
        }
        for number in 0..NUMBERS {
            let column: Float32Array =
                numbers.iter().skip(number).step_by(NUMBERS).copied().collect();
            columns.push((format!("x{number}"), Arc::new(column)));
        }
        columns.push(("y".into(), Arc::new(Float32Array::from(labels))));
        RecordBatch::try_from_iter(columns).map_err(|error| self.fault(0, &error))
    }

    fn fault(&self, at: usize, error: &dyn std::error::Error) -> Error {
        Error::File { file: self.paths[at].display().to_string(), what: error.to_string() }
    }
}

impl Dataset for Clicks {
    fn tasks(&self) -> Result<Vec<Task>> {
        let file = self.paths[0].display().to_string();
        let task = |start: u64| {
            let end = (start + self.batch).min(self.rows);
            let part = Part::Rows { group: 0, start, end };
            Task { file: file.clone(), part, rows: Some(end - start) }
        };
        let starts = (0..self.rows).step_by(self.batch as usize);
        let (worker, workers) = self.share;
        Ok(starts.skip(worker).step_by(workers).map(task).collect())
    }

    fn open(&self, task: &Task) -> Result<BatchReader> {
        let Part::Rows { start, end, .. } = task.part else {
            let what = "not a task of this dataset".into();
            return Err(Error::File { file: task.file.clone(), what });
        };
        let chunk = self.read((start, end)).map(|batch| Chunk { batch, first_row: start + 1 });
        Ok(Box::new(std::iter::once(chunk)))
    }
}

/// A file of floats.
pub(crate) fn floats(path: &Path) -> anyhow::Result<Vec<f32>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let (floats, rest) = bytes.as_chunks();
    ensure!(rest.is_empty(), "{}: not a whole number of floats", path.display());
    Ok(floats.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
}
