//! Parquet, page by page: a row group of any size is read in chunks, and only the columns in use.

use std::fs::File;

use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder,
};
use parquet::basic::Compression;
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};

use crate::files::Layout;
use crate::{BatchReader, CHUNK_ROWS_MAX, Chunk, Error, Part, Result, Task};

/// Rows of a file.
pub(crate) fn rows(file: &str) -> Result<u64> {
    let (_, metadata) = load(file)?;
    Ok(metadata.metadata().file_metadata().num_rows().max(0) as u64)
}

/// Row groups, cut where they have more than `rows_max` rows.
pub(crate) fn tasks(file: &str, rows_max: u64) -> Result<Vec<Task>> {
    let (_, metadata) = load(file)?;
    let mut tasks = Vec::new();
    for (group, metadata) in metadata.metadata().row_groups().iter().enumerate() {
        let rows = u64::try_from(metadata.num_rows())
            .map_err(|_| Error::file(file, "a row group has a negative number of rows"))?;
        let count = rows.div_ceil(rows_max);
        let cut = |i: u64| (u128::from(rows) * u128::from(i) / u128::from(count)) as u64;
        tasks.extend((0..count).map(|i| Task {
            file: file.into(),
            part: Part::Rows { group: group as u32, start: cut(i), end: cut(i + 1) },
            rows: Some(cut(i + 1) - cut(i)),
        }));
    }
    Ok(tasks)
}

pub(crate) fn open(task: &Task, layout: &Layout) -> Result<BatchReader> {
    let (file, metadata) = load(&task.file)?;
    let fields = metadata.parquet_schema().root_schema().get_fields();
    let present: Vec<&str> = fields.iter().map(|field| field.name()).collect();
    let mut roots = Vec::new();
    for name in &layout.wanted {
        roots.push(present.iter().position(|has| has == name).ok_or_else(|| {
            Error::MissingColumn {
                file: task.file.clone(),
                column: name.clone(),
                present: present.iter().map(ToString::to_string).collect(),
            }
        })?);
    }
    let projection = ProjectionMask::roots(metadata.parquet_schema(), roots);
    let groups = metadata.metadata().row_groups();
    let rows_of = |groups: &[RowGroupMetaData]| -> u64 {
        groups.iter().map(|group| group.num_rows().max(0) as u64).sum()
    };
    if let Some(codec) = groups.iter().find_map(unread_codec) {
        let codec = codec.to_string();
        let codec = codec.split('(').next().unwrap_or_default();
        let read = "is not read here, only Snappy, Zstandard and none";
        return Err(Error::file(&task.file, format!("its compression {codec} {read}")));
    }
    let mut first_row = 1;
    let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata.clone())
        .with_batch_size(CHUNK_ROWS_MAX)
        .with_projection(projection);
    match task.part {
        Part::Whole => {}
        Part::Rows { group, start, end } => {
            let group = group as usize;
            if start > end
                || groups.get(group).is_none_or(|g| rows_of(std::slice::from_ref(g)) < end)
            {
                return Err(Error::file(&task.file, format!("it has no {task}: has it changed?")));
            }
            first_row += rows_of(&groups[..group]) + start;
            builder = builder
                .with_row_groups(vec![group])
                .with_offset(start as usize)
                .with_limit((end - start) as usize);
        }
        Part::Bytes { .. } => {
            return Err(Error::file(&task.file, "a Parquet file is not cut by bytes"));
        }
    }
    let reader = builder.build().map_err(|error| unreadable(&task.file, error))?;
    Ok(Box::new(Reader { file: task.file.clone(), reader: Some(reader), first_row }))
}

struct Reader {
    file: String,
    /// Gone after the end or an error.
    reader: Option<ParquetRecordBatchReader>,
    first_row: u64,
}

impl Iterator for Reader {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.reader.as_mut()?.next() {
            None => {
                self.reader = None;
                None
            }
            Some(Ok(batch)) => {
                let first_row = self.first_row;
                self.first_row += batch.num_rows() as u64;
                Some(Ok(Chunk { batch, first_row }))
            }
            Some(Err(error)) => {
                self.reader = None;
                let row = self.first_row;
                Some(Err(Error::file(
                    &self.file,
                    format!("damaged near row {row} ({error}): was it written and copied whole?"),
                )))
            }
        }
    }
}

/// A compression that this build leaves out.
fn unread_codec(group: &RowGroupMetaData) -> Option<Compression> {
    let codecs = group.columns().iter().map(ColumnChunkMetaData::compression);
    codecs.into_iter().find(|codec| {
        !matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_))
    })
}

/// The file and its footer. Arrow's own schema in it is left out: plain types are enough here, and
/// pandas' dictionaries come as the strings they are.
fn load(file: &str) -> Result<(File, ArrowReaderMetadata)> {
    let handle = File::open(file).map_err(|error| Error::file(file, error))?;
    if handle.metadata().map_err(|error| Error::file(file, error))?.len() == 0 {
        return Err(Error::file(file, "the file is empty"));
    }
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let metadata = ArrowReaderMetadata::load(&handle, options);
    Ok((handle, metadata.map_err(|error| unreadable(file, error))?))
}

fn unreadable(file: &str, error: impl std::fmt::Display) -> Error {
    Error::file(
        file,
        format!("not a whole Parquet file ({error}): was it written and copied whole?"),
    )
}
