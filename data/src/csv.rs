//! CSV and TSV, streamed line by line; a field is bytes, and an empty one is a missing value.

use std::sync::Arc;

use arrow_array::builder::BinaryBuilder;
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema as ArrowSchema};

use crate::column::show;
use crate::files::{Layout, byte_range};
use crate::lines::Lines;
use crate::{BatchReader, CHUNK_BYTES_MAX, CHUNK_ROWS_MAX, Chunk, Error, Result, Task};

pub(crate) fn open(
    task: &Task,
    layout: &Layout,
    delimiter: u8,
    quotes: bool,
) -> Result<BatchReader> {
    let (start, end) = byte_range(task)?;
    let dialect = Dialect {
        // The schema has checked that it is one byte.
        delimiter: layout.file.delimiter.map_or(delimiter, |character| character as u8),
        quotes: layout.file.quotes.unwrap_or(quotes),
        trim: layout.file.trim,
    };
    let has_header = layout.file.header.unwrap_or(layout.text_columns.is_empty());
    let mut header = Vec::new();
    if has_header {
        let mut lines = Lines::open(&task.file, 0, u64::MAX)?;
        let line = lines.next()?.ok_or_else(|| Error::file(&task.file, "the file is empty"))?;
        dialect
            .split(line, |_, field| header.push(String::from_utf8_lossy(field).into_owned()))
            .map_err(|what| Error::Row { file: task.file.clone(), row: 1, what })?;
    }
    let names = if layout.text_columns.is_empty() { &header } else { &layout.text_columns };
    let mut builders: Vec<Option<usize>> = vec![None; names.len()];
    let mut fields = Vec::new();
    for name in &layout.wanted {
        let at = names.iter().position(|has| has == name).ok_or_else(|| Error::MissingColumn {
            file: task.file.clone(),
            column: name.clone(),
            present: names.clone(),
        })?;
        builders[at] = Some(fields.len());
        fields.push(Field::new(name, DataType::Binary, false));
    }
    let mut lines = Lines::open(&task.file, start, end)?;
    if has_header && start == 0 {
        lines.next()?;
    }
    Ok(Box::new(Reader {
        task: task.clone(),
        lines,
        dialect,
        builders,
        schema: Arc::new(ArrowSchema::new(fields)),
        failed: false,
    }))
}

struct Reader {
    task: Task,
    lines: Lines,
    dialect: Dialect,
    /// For each column of the file, which column of the batch it is.
    builders: Vec<Option<usize>>,
    schema: Arc<ArrowSchema>,
    failed: bool,
}

impl Reader {
    /// Rows up to the chunk's bounds or to a blank line, so that row numbers stay contiguous.
    fn read(&mut self) -> Result<Option<Chunk>> {
        let mut columns: Vec<BinaryBuilder> =
            self.schema.fields().iter().map(|_| BinaryBuilder::new()).collect();
        let (mut rows, mut bytes, mut first_row) = (0, 0, 0);
        while rows < CHUNK_ROWS_MAX && bytes < CHUNK_BYTES_MAX {
            let Some(line) = self.lines.next()? else { break };
            if line.is_empty() && self.builders.len() > 1 {
                if rows > 0 {
                    break;
                }
                continue;
            }
            bytes += line.len();
            let count = self.dialect.split(line, |index, field| {
                if let Some(at) = self.builders.get(index).copied().flatten() {
                    columns[at].append_value(field);
                }
            });
            let fault = match count {
                Ok(count) if count == self.builders.len() => None,
                Ok(count) => Some(format!("{count} fields, but {} columns", self.builders.len())),
                Err(what) => Some(what),
            };
            let number = self.lines.number();
            if let Some(what) = fault {
                let row = self.task.row_in_file(number);
                return Err(Error::Row { file: self.task.file.clone(), row, what });
            }
            if rows == 0 {
                first_row = number;
            }
            rows += 1;
        }
        if rows == 0 {
            return Ok(None);
        }
        let arrays =
            columns.iter_mut().map(|column| Arc::new(column.finish()) as ArrayRef).collect();
        let batch = RecordBatch::try_new(self.schema.clone(), arrays)
            .map_err(|error| Error::file(&self.task.file, error))?;
        Ok(Some(Chunk { batch, first_row }))
    }
}

impl Iterator for Reader {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let chunk = self.read();
        self.failed = chunk.is_err();
        chunk.transpose()
    }
}

#[derive(Clone, Copy, Debug)]
struct Dialect {
    delimiter: u8,
    quotes: bool,
    trim: bool,
}

impl Dialect {
    /// Hands each field of a line to `take` and returns their number.
    fn split(
        self,
        line: &[u8],
        mut take: impl FnMut(usize, &[u8]),
    ) -> std::result::Result<usize, String> {
        let (mut rest, mut index) = (line, 0);
        let mut unquoted = Vec::new();
        loop {
            let start = if self.trim { rest.trim_ascii_start() } else { rest };
            let end = if self.quotes && start.first() == Some(&b'"') {
                let tail = unquote(&start[1..], &mut unquoted)?;
                let tail = if self.trim { tail.trim_ascii_start() } else { tail };
                take(index, &unquoted);
                match tail.first() {
                    None => None,
                    Some(byte) if *byte == self.delimiter => Some(&tail[1..]),
                    Some(_) => {
                        return Err(format!("text behind the quoted field {}", show(&unquoted)));
                    }
                }
            } else {
                let cut = memchr::memchr(self.delimiter, rest);
                let field = &rest[..cut.unwrap_or(rest.len())];
                take(index, if self.trim { field.trim_ascii() } else { field });
                cut.map(|cut| &rest[cut + 1..])
            };
            index += 1;
            match end {
                Some(tail) => rest = tail,
                None => return Ok(index),
            }
        }
    }
}

/// Reads a field behind its opening quote; `""` is one quote. Returns what follows the closing one.
fn unquote<'t>(mut text: &'t [u8], field: &mut Vec<u8>) -> std::result::Result<&'t [u8], String> {
    field.clear();
    loop {
        let Some(quote) = memchr::memchr(b'"', text) else {
            return Err(
                "a quoted field is not closed on its line (line breaks inside a field are not read)"
                    .into(),
            );
        };
        field.extend_from_slice(&text[..quote]);
        text = &text[quote + 1..];
        match text.strip_prefix(b"\"") {
            Some(tail) => {
                field.push(b'"');
                text = tail;
            }
            None => return Ok(text),
        }
    }
}
