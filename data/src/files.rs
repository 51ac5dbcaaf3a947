use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::schema::{FileSpec, Format};
use crate::{BatchReader, Dataset, Error, Part, Result, Schema, Task, csv, libfm, parquet};

/// Files as a [`Dataset`]: Parquet, CSV, TSV, libFM and libsvm, also mixed.
pub struct Files {
    files: Vec<String>,
    layout: Arc<Layout>,
    /// Most rows, and bytes of text, of a task; else what [`TASKS`] asks for.
    task_max: Option<(u64, u64)>,
}

/// So many tasks there are at least, where a task is then not too small: they are what workers share, and what is trained again when one dies.
const TASKS: u64 = 128;
/// Of a task of Parquet: opening one in the middle of a row group passes over all rows before it.
const TASK_ROWS: (u64, u64) = (1024, 1 << 16);
/// Of a task of text, which can be opened anywhere.
const TASK_BYTES: (u64, u64) = (64 << 10, 16 << 20);

/// What readers need to know of a schema.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) file: FileSpec,
    /// Names of a text file's columns, if the schema gives them.
    pub(crate) text_columns: Vec<String>,
    /// The columns to read.
    pub(crate) wanted: BTreeSet<String>,
}

/// The dataset behind paths: files, directories and patterns (`train/*.parquet`).
///
/// Only the columns that the schema uses are read.
pub fn open<S: AsRef<str>>(paths: &[S], schema: &Schema) -> Result<Files> {
    let mut files = BTreeSet::new();
    for path in paths {
        files.extend(find(path.as_ref())?);
    }
    if files.is_empty() {
        return Err(Error::NoData { path: "data".into(), what: "no file is named".into() });
    }
    let layout = Layout {
        file: schema.spec().file.clone(),
        text_columns: schema.text_columns().to_vec(),
        wanted: schema.columns().into_iter().map(String::from).collect(),
    };
    let files =
        Files { files: files.into_iter().collect(), layout: Arc::new(layout), task_max: None };
    files.files.iter().try_for_each(|file| files.format(file).map(drop))?;
    Ok(files)
}

impl Files {
    /// The files, sorted.
    #[must_use]
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Cuts into tasks of at most so many rows (Parquet) or bytes (text). Otherwise there are at least 128 of them, if they do not get smaller than 1,024 rows or 64 KiB,
    /// and none has more than 65,536 rows or 16 MiB.
    #[must_use]
    pub fn task_size(mut self, rows_max: u64, bytes_max: u64) -> Self {
        self.task_max = Some((rows_max.max(1), bytes_max.max(1)));
        self
    }

    /// Most rows and bytes of a task.
    fn task_max(&self) -> Result<(u64, u64)> {
        if let Some(max) = self.task_max {
            return Ok(max);
        }
        let (mut rows, mut bytes) = (0, 0);
        for file in &self.files {
            match self.format(file)? {
                Format::Parquet => rows += parquet::rows(file)?,
                _ => bytes += size(file)?,
            }
        }
        let share = |of: u64, (min, max): (u64, u64)| (of / TASKS).clamp(min, max);
        Ok((share(rows, TASK_ROWS), share(bytes, TASK_BYTES)))
    }

    fn format(&self, file: &str) -> Result<Format> {
        let known = self.layout.file.format.or_else(|| format_by_name(Path::new(file)));
        known.ok_or_else(|| {
            Error::file(
                file,
                "the name does not tell the format (.parquet, .csv, .tsv, .libfm, .libsvm); \
                 give `format` under [file] in the schema, and unpack compressed text first",
            )
        })
    }
}

impl Dataset for Files {
    fn tasks(&self) -> Result<Vec<Task>> {
        let mut tasks = Vec::new();
        let (rows_max, bytes_max) = self.task_max()?;
        for file in &self.files {
            match self.format(file)? {
                Format::Parquet => tasks.extend(parquet::tasks(file, rows_max)?),
                _ => tasks.extend(text_tasks(file, bytes_max)?),
            }
        }
        if tasks.is_empty() {
            let what = format!("no rows in any of {} files", self.files.len());
            return Err(Error::NoData { path: self.files[0].clone(), what });
        }
        Ok(tasks)
    }

    fn open(&self, task: &Task) -> Result<BatchReader> {
        match self.format(&task.file)? {
            Format::Parquet => parquet::open(task, &self.layout),
            Format::Csv => csv::open(task, &self.layout, b',', true),
            Format::Tsv => csv::open(task, &self.layout, b'\t', false),
            Format::Libfm | Format::Libsvm => libfm::open(task, &self.layout),
        }
    }
}

/// The byte range of a task of a text file.
pub(crate) fn byte_range(task: &Task) -> Result<(u64, u64)> {
    match task.part {
        Part::Whole => Ok((0, u64::MAX)),
        Part::Bytes { start, end } => Ok((start, end)),
        Part::Rows { .. } => Err(Error::file(&task.file, "a text file has no row groups")),
    }
}

fn size(file: &str) -> Result<u64> {
    Ok(fs::metadata(file).map_err(|error| Error::file(file, error))?.len())
}

/// Equal byte ranges: a line belongs to the range in which it begins.
fn text_tasks(file: &str, bytes_max: u64) -> Result<Vec<Task>> {
    let size = size(file)?;
    if size == 0 {
        return Err(Error::file(file, "the file is empty"));
    }
    let count = size.div_ceil(bytes_max);
    let cut = |i: u64| (u128::from(size) * u128::from(i) / u128::from(count)) as u64;
    let part = |i| Part::Bytes { start: cut(i), end: cut(i + 1) };
    Ok((0..count).map(|i| Task { file: file.into(), part: part(i), rows: None }).collect())
}

fn format_by_name(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "parquet" | "pq" => Some(Format::Parquet),
        "csv" => Some(Format::Csv),
        "tsv" | "tab" => Some(Format::Tsv),
        "libfm" | "ffm" | "libffm" => Some(Format::Libfm),
        "libsvm" | "svm" | "svmlight" => Some(Format::Libsvm),
        _ => None,
    }
}

/// The files behind one path: itself, what a pattern matches, or what a directory holds.
fn find(path: &str) -> Result<Vec<String>> {
    let no_data = |what: &str| Error::NoData { path: path.into(), what: what.into() };
    let name = |path: &Path| {
        let name = path.to_str().map(String::from);
        name.ok_or_else(|| Error::file(path.to_string_lossy(), "the file's name is not UTF-8"))
    };
    if Path::new(path).is_dir() {
        let entries = fs::read_dir(path).map_err(|error| Error::file(path, error))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::file(path, error))?.path();
            // Spark and others put markers such as _SUCCESS beside the data.
            let hidden = |entry: &Path| {
                entry.file_name().is_some_and(|name| {
                    matches!(name.as_encoded_bytes().first(), Some(b'.' | b'_'))
                })
            };
            if entry.is_file() && !hidden(&entry) && format_by_name(&entry).is_some() {
                found.push(name(&entry)?);
            }
        }
        return if found.is_empty() {
            Err(no_data("the directory holds no .parquet, .csv, .tsv, .libfm or .libsvm file"))
        } else {
            Ok(found)
        };
    }
    if Path::new(path).exists() {
        return Ok(vec![path.into()]);
    }
    if !path.contains(['*', '?', '[']) {
        return Err(no_data("no such file or directory"));
    }
    let matches = glob::glob(path).map_err(|error| no_data(error.msg))?;
    let files = matches
        .map(|found| name(&found.map_err(|error| Error::file(path, error))?))
        .filter(|file| !file.as_ref().is_ok_and(|file| Path::new(file).is_dir()))
        .collect::<Result<Vec<_>>>()?;
    if files.is_empty() { Err(no_data("no file matches")) } else { Ok(files) }
}
