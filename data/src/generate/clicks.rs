use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, Int32Array, Int64Array, RecordBatch};
use arrow_schema::{DataType, Field, Schema as ArrowSchema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::{self, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde::Serialize;

use super::{Ceiling, Row, Sampler, Score, Shape};
use crate::{Error, Result};

/// What to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Clicks {
    pub shape: Shape,
    /// Rows to train on, in `train-00000.parquet` and so on.
    pub rows: u64,
    /// Rows in `test.parquet`.
    pub test_rows: u64,
    pub file_rows: u64,
    pub row_group_rows: u64,
    /// The size of the first row group of all, if it is to be another.
    pub first_row_group_rows: Option<u64>,
    pub compression: Compression,
    /// A first column `row` has the number of each row, from 0 through all files.
    pub row_numbers: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    None,
    Snappy,
    #[default]
    Zstd,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub files: Vec<PathBuf>,
    pub schema: PathBuf,
    pub bytes: u64,
    pub train_rows: u64,
    pub test_rows: u64,
    /// Different (field, id) pairs of the training rows: the rows that a trained model has.
    pub distinct_keys: u64,
    pub largest_row_group_bytes: u64,
    /// What the hidden model scores on the test rows (without any: on the training rows).
    pub ceiling: Option<Ceiling>,
}

const CHUNK_ROWS: u64 = 8192;

/// Writes training and test files and `schema.toml` into a directory. `progress` is told the rows so far.
pub fn write_clicks(
    clicks: &Clicks,
    directory: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<Summary> {
    let name = directory.display().to_string();
    fs::create_dir_all(directory).map_err(|error| Error::file(&name, error))?;
    let schema = directory.join("schema.toml");
    fs::write(&schema, schema_file(&clicks.shape)).map_err(|error| Error::file(&name, error))?;
    let mut writer = Writer {
        clicks,
        sampler: Sampler::new(clicks.shape),
        arrow: arrow_schema(clicks),
        seen: vec![Bits::new(clicks.shape.ids_per_field.max(1)); clicks.shape.fields],
        group_rows: clicks.first_row_group_rows,
        bytes: 0,
        largest_row_group_bytes: 0,
        done: 0,
        progress,
    };
    let mut files = Vec::new();
    let mut train = Score::default();
    let mut start = 0;
    while start < clicks.rows {
        let end = clicks.rows.min(start.saturating_add(clicks.file_rows.max(1)));
        let path = directory.join(format!("train-{:05}.parquet", files.len()));
        writer.file(&path, start..end, &mut train, true)?;
        files.push(path);
        start = end;
    }
    let mut test = Score::default();
    if clicks.test_rows > 0 {
        let path = directory.join("test.parquet");
        writer.file(&path, clicks.rows..clicks.rows + clicks.test_rows, &mut test, false)?;
        files.push(path);
    }
    Ok(Summary {
        files,
        schema,
        bytes: writer.bytes,
        train_rows: clicks.rows,
        test_rows: clicks.test_rows,
        distinct_keys: writer.seen.iter().map(Bits::count).sum(),
        largest_row_group_bytes: writer.largest_row_group_bytes,
        ceiling: if clicks.test_rows > 0 { test.ceiling() } else { train.ceiling() },
    })
}

struct Writer<'a> {
    clicks: &'a Clicks,
    sampler: Sampler,
    arrow: SchemaRef,
    seen: Vec<Bits>,
    /// Of the next row group, where it is not the usual number.
    group_rows: Option<u64>,
    bytes: u64,
    largest_row_group_bytes: u64,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Writer<'_> {
    fn file(
        &mut self,
        path: &Path,
        rows: std::ops::Range<u64>,
        score: &mut Score,
        train: bool,
    ) -> Result<()> {
        let failed = |error: &dyn std::fmt::Display| Error::file(path.display().to_string(), error);
        let file = File::create(path).map_err(|error| failed(&error))?;
        let mut writer = ArrowWriter::try_new(file, self.arrow.clone(), Some(self.properties()))
            .map_err(|error| failed(&error))?;
        let mut start = rows.start;
        while start < rows.end {
            let group = self.group_rows.take().unwrap_or(self.clicks.row_group_rows).max(1);
            let group_end = rows.end.min(start.saturating_add(group));
            while start < group_end {
                let end = group_end.min(start + CHUNK_ROWS);
                let batch = self.batch(start..end, score, train).map_err(|error| failed(&error))?;
                writer.write(&batch).map_err(|error| failed(&error))?;
                self.done += end - start;
                (self.progress)(self.done);
                start = end;
            }
            writer.flush().map_err(|error| failed(&error))?;
        }
        let metadata = writer.close().map_err(|error| failed(&error))?;
        let groups =
            metadata.row_groups().iter().map(|group| group.compressed_size().max(0) as u64);
        self.largest_row_group_bytes = groups.fold(self.largest_row_group_bytes, u64::max);
        self.bytes += fs::metadata(path).map_err(|error| failed(&error))?.len();
        Ok(())
    }

    fn batch(
        &mut self,
        rows: std::ops::Range<u64>,
        score: &mut Score,
        train: bool,
    ) -> std::result::Result<RecordBatch, arrow_schema::ArrowError> {
        let shape = &self.clicks.shape;
        let mut labels = Vec::new();
        let mut dense = vec![Vec::new(); shape.dense];
        let mut ids = vec![Vec::new(); shape.fields];
        let mut row = Row::default();
        let numbers = self
            .clicks
            .row_numbers
            .then(|| Int64Array::from_iter_values(rows.clone().map(|row| row as i64)));
        for index in rows {
            self.sampler.row(index, &mut row);
            score.add(row.logit, row.label);
            labels.push(i32::from(row.label));
            for (column, x) in dense.iter_mut().zip(&row.dense) {
                column.push(*x);
            }
            for ((column, seen), id) in ids.iter_mut().zip(&mut self.seen).zip(&row.ids) {
                column.push(*id as i64);
                if train {
                    seen.set(*id);
                }
            }
        }
        let mut columns: Vec<ArrayRef> = Vec::new();
        columns.extend(numbers.map(|numbers| Arc::new(numbers) as ArrayRef));
        columns.push(Arc::new(Int32Array::from(labels)));
        columns.extend(dense.into_iter().map(|x| Arc::new(Float32Array::from(x)) as ArrayRef));
        columns.extend(ids.into_iter().map(|x| Arc::new(Int64Array::from(x)) as ArrayRef));
        RecordBatch::try_new(self.arrow.clone(), columns)
    }

    fn properties(&self) -> WriterProperties {
        WriterProperties::builder()
            .set_compression(match self.clicks.compression {
                Compression::None => basic::Compression::UNCOMPRESSED,
                Compression::Snappy => basic::Compression::SNAPPY,
                Compression::Zstd => basic::Compression::ZSTD(ZstdLevel::default()),
            })
            // So many different values are no gain for a dictionary.
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::None)
            .set_max_row_group_row_count(None)
            .build()
    }
}

fn arrow_schema(Clicks { shape, row_numbers, .. }: &Clicks) -> SchemaRef {
    let mut fields = Vec::new();
    fields.extend(row_numbers.then(|| Field::new("row", DataType::Int64, false)));
    fields.push(Field::new("label", DataType::Int32, false));
    fields.extend((1..=shape.dense).map(|i| Field::new(format!("I{i}"), DataType::Float32, false)));
    fields.extend((1..=shape.fields).map(|i| Field::new(format!("C{i}"), DataType::Int64, false)));
    Arc::new(ArrowSchema::new(fields))
}

/// A schema that fits the files: one table per field.
fn schema_file(shape: &Shape) -> String {
    let mut text = String::from("dim = 16\n\n[[label]]\ncolumn = \"label\"\n");
    if shape.dense > 0 {
        text += &format!("\n[[number]]\ncolumns = \"I1..I{}\"\n", shape.dense);
    }
    if shape.fields > 0 {
        text += &format!("\n[[key]]\ncolumns = \"C1..C{}\"\n", shape.fields);
    }
    text
}

/// A set of small integers.
#[derive(Clone)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(size: u64) -> Self {
        Self(vec![0; size.div_ceil(64) as usize])
    }

    fn set(&mut self, i: u64) {
        self.0[(i / 64) as usize] |= 1 << (i % 64);
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}
