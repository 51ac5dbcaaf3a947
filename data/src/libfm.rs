//! libFM and libsvm text: `label index:value …`, `label field:index:value …`, also `qid:n`.
//!
//! A line becomes the columns `label`, `qid`, `index` and `index.value` (lists), and `f<field>` and
//! `f<field>.value` (lists) for each field; a field that stands there several times is a bag.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, Float32Builder, ListBuilder, UInt64Builder};
use arrow_array::{ArrayRef, RecordBatch};

use crate::column::show;
use crate::files::{Layout, byte_range};
use crate::lines::Lines;
use crate::{BatchReader, CHUNK_BYTES_MAX, CHUNK_ROWS_MAX, Chunk, Error, Result, Task};

pub(crate) fn open(task: &Task, layout: &Layout) -> Result<BatchReader> {
    let (start, end) = byte_range(task)?;
    let mut columns = Columns::default();
    for name in &layout.wanted {
        let list = name.strip_suffix(".value").unwrap_or(name);
        match list {
            "label" | "qid" if list == name => {}
            "index" => _ = columns.lists.entry(Vec::new()).or_default(),
            _ if list.starts_with('f') && list.len() > 1 => {
                columns.lists.entry(list.as_bytes()[1..].to_vec()).or_default();
            }
            _ => {
                let present =
                    ["label", "qid", "index", "index.value", "f<field>", "f<field>.value"];
                return Err(Error::MissingColumn {
                    file: task.file.clone(),
                    column: name.clone(),
                    present: present.map(String::from).to_vec(),
                });
            }
        }
    }
    Ok(Box::new(Reader {
        lines: Lines::open(&task.file, start, end)?,
        task: task.clone(),
        wanted: layout.wanted.iter().cloned().collect(),
        columns,
        failed: false,
    }))
}

struct Reader {
    task: Task,
    lines: Lines,
    wanted: Vec<String>,
    columns: Columns,
    failed: bool,
}

/// The columns of the chunk that is being read.
#[derive(Default)]
struct Columns {
    label: BinaryBuilder,
    qid: BinaryBuilder,
    /// By field; indices without a field are under the empty name.
    lists: HashMap<Vec<u8>, List>,
}

#[derive(Default)]
struct List {
    indices: ListBuilder<UInt64Builder>,
    values: ListBuilder<Float32Builder>,
}

/// What is wrong with a line, and in which column.
type Fault = (&'static str, String);

impl Reader {
    /// Rows up to the chunk's bounds or to a line without a row, so that row numbers stay contiguous.
    fn read(&mut self) -> Result<Option<Chunk>> {
        let (mut rows, mut bytes, mut first_row) = (0, 0, 0);
        while rows < CHUNK_ROWS_MAX && bytes < CHUNK_BYTES_MAX {
            let Some(line) = self.lines.next()? else { break };
            let line = line.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
            if line.is_empty() {
                if rows > 0 {
                    break;
                }
                continue;
            }
            bytes += line.len();
            let parsed = self.columns.append(line);
            let number = self.lines.number();
            parsed.map_err(|(column, what)| Error::Value {
                file: self.task.file.clone(),
                row: self.task.row_in_file(number),
                column: column.into(),
                what,
            })?;
            if rows == 0 {
                first_row = number;
            }
            rows += 1;
        }
        if rows == 0 {
            return Ok(None);
        }
        let arrays = self.columns.finish();
        let named = self.wanted.iter().filter_map(|name| Some((name, arrays.get(name)?.clone())));
        let batch = RecordBatch::try_from_iter(named)
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

impl Columns {
    fn append(&mut self, line: &[u8]) -> std::result::Result<(), Fault> {
        let mut tokens = line.split(u8::is_ascii_whitespace).filter(|token| !token.is_empty());
        let label = tokens.next().unwrap_or_default();
        if label.contains(&b':') {
            return Err(("label", format!("the line begins with {} and no label", show(label))));
        }
        let mut qid: &[u8] = b"";
        for token in tokens {
            let mut parts = token.split(|byte| *byte == b':');
            let (field, index, value) =
                match (parts.next(), parts.next(), parts.next(), parts.next()) {
                    (Some(b"qid"), Some(id), None, None) => {
                        qid = id;
                        continue;
                    }
                    (Some(index), Some(value), None, None) => (&b""[..], index, value),
                    (Some(field), Some(index), Some(value), None) if !field.is_empty() => {
                        (field, index, value)
                    }
                    _ => {
                        let wanted = "neither index:value nor field:index:value";
                        return Err(("index", format!("{} is {wanted}", show(token))));
                    }
                };
            let parsed = number::<u64>(index).zip(number::<f32>(value).filter(|x| x.is_finite()));
            let Some((index, value)) = parsed else {
                return Err((
                    "index",
                    format!("{}: the index must be an integer, the value a number", show(token)),
                ));
            };
            if let Some(list) = self.lists.get_mut(field) {
                list.indices.values().append_value(index);
                list.values.values().append_value(value);
            }
        }
        self.label.append_value(label);
        self.qid.append_value(qid);
        for list in self.lists.values_mut() {
            list.indices.append(true);
            list.values.append(true);
        }
        Ok(())
    }

    fn finish(&mut self) -> HashMap<String, ArrayRef> {
        let mut arrays: HashMap<String, ArrayRef> = HashMap::new();
        arrays.insert("label".into(), Arc::new(self.label.finish()));
        arrays.insert("qid".into(), Arc::new(self.qid.finish()));
        for (field, list) in &mut self.lists {
            let name = match field.as_slice() {
                b"" => "index".into(),
                field => format!("f{}", String::from_utf8_lossy(field)),
            };
            arrays.insert(format!("{name}.value"), Arc::new(list.values.finish()));
            arrays.insert(name, Arc::new(list.indices.finish()));
        }
        arrays
    }
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}
