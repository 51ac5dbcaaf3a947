//! A shard's file, checked tensor by tensor, and its rows and blocks in pieces of bounded size.
//!
//! The bytes are those of the manifest's checksum; still nothing in them is believed: a tensor that is not where, or not as large as the
//! definitions in the head say, a key of another shard, an LSN outside the file's range or a number that is not finite refuses the file.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Seek, SeekFrom};

use downpour_core::id::{Lsn, ShardId};
use downpour_core::routing::shard_of;
use downpour_core::spec::{DenseSpec, Shape, TableSpec, Variable};
use downpour_core::tensor_bytes::{FLOAT_BYTES, all_finite};
use downpour_proto::v1;
use downpour_proto::v1::cut_piece::Piece;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::head::Head;
use crate::layout::{Dtype, columns, float_widths};
use crate::{Error, Malformed};

/// Largest header: it has the cells of 65,536 sessions and the definitions of 4,096 variables. (The format's own bound is 100 MB.)
const HEADER_BYTES_MAX: u64 = 96 << 20;
/// Rows' floats in one piece, about.
const PIECE_BYTES: usize = 1 << 20;
/// Cells in one piece.
const CELLS_PIECE_MAX: usize = 256;

/// What can be read from.
pub trait Source: Read + Seek + Send {}

impl<T: Read + Seek + Send> Source for T {}

/// A file whose structure is right; its rows are checked as they are read.
pub struct ShardReader {
    object: String,
    input: Box<dyn Source>,
    head: Head,
    /// Those that were not read yet.
    left: VecDeque<Tensors>,
    lines_done: u64,
    /// Of the blocks that were read.
    floats_done: u64,
    /// Rows and blocks of the whole file.
    rows: u64,
    blocks: u64,
    stage: Stage,
}

enum Stage {
    Small,
    /// So many were read.
    Cells(usize),
    Parameters,
    End,
}

struct Tensors {
    /// In the head's list.
    index: usize,
    /// Elements of the first tensor: rows or blocks.
    lines: u64,
    /// Elements of a dense variable's values.
    values: u64,
    /// Where each column starts in the file.
    starts: Vec<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl ShardReader {
    /// Reads the header of a file of `bytes` bytes and checks that every tensor is as it must be.
    ///
    /// # Errors
    /// Names `object` and the field.
    pub fn open(object: &str, bytes: u64, input: impl Source + 'static) -> Result<Self, Error> {
        let mut input: Box<dyn Source> = Box::new(input);
        let header = read_header(&mut input, bytes).map_err(|bad| bad.of(object))?;
        let (head, left) = header;
        let lines = |table: bool| {
            let of = |left: &&Tensors| matches!(shape(&head, left), Shape::Table(_)) == table;
            left.iter().filter(of).map(|tensors| tensors.lines).sum()
        };
        let (rows, blocks) = (lines(true), lines(false));
        let mut reader = ShardReader {
            object: object.to_owned(),
            input,
            head,
            left: left.into(),
            lines_done: 0,
            floats_done: 0,
            rows,
            blocks,
            stage: Stage::Small,
        };
        reader.check_names()?;
        Ok(reader)
    }

    /// What the file says of itself.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Rows and blocks in the file.
    #[must_use]
    pub fn lines(&self) -> (u64, u64) {
        (self.rows, self.blocks)
    }

    /// The next piece of the cut that was written; none after its end.
    ///
    /// # Errors
    /// Names the file and the tensor.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, Error> {
        let cells = &self.head.cells;
        match self.stage {
            Stage::Small => {
                self.stage = Stage::Cells(0);
                Ok(Some(Piece::Small(self.head.small.clone())))
            }
            Stage::Cells(read) if read < cells.len() => {
                let cells = cells[read..].iter().take(CELLS_PIECE_MAX).cloned().collect();
                self.stage = Stage::Cells(read + CELLS_PIECE_MAX);
                Ok(Some(Piece::Cells(v1::CutCells { cells })))
            }
            Stage::Cells(_) | Stage::Parameters => {
                self.stage = Stage::Parameters;
                let piece = self.parameters().map_err(|bad| bad.of(self.object.as_str()))?;
                if piece.is_some() {
                    return Ok(piece);
                }
                self.stage = Stage::End;
                Ok(Some(Piece::End(v1::CutEnd { rows: self.rows, blocks: self.blocks })))
            }
            Stage::End => Ok(None),
        }
    }

    /// Reads all that is left, for the checks alone.
    ///
    /// # Errors
    /// As [`ShardReader::next_piece`].
    pub fn check(mut self) -> Result<(), Error> {
        while self.next_piece()?.is_some() {}
        Ok(())
    }

    fn parameters(&mut self) -> Result<Option<Piece>, Malformed> {
        while let Some(tensors) = self.left.front() {
            if self.lines_done == tensors.lines {
                self.left.pop_front();
                (self.lines_done, self.floats_done) = (0, 0);
                continue;
            }
            return match shape(&self.head, tensors).clone() {
                Shape::Table(table) => self.rows_piece(&table).map(Some),
                Shape::Dense(dense) => self.block_piece(&dense).map(Some),
            };
        }
        Ok(None)
    }

    /// Keys and numbers of blocks: each once, and of this shard.
    fn check_names(&mut self) -> Result<(), Error> {
        for at in 0..self.left.len() {
            let Tensors { index, lines, values, ref starts } = self.left[at];
            let (start, variable) = (starts[0], &self.head.variables()[index]);
            let of = &self.head.owner;
            let place = (variable.spec.routing_salt(), of.shards, of.shard);
            let columns = columns(variable);
            let checked = match &variable.spec.shape {
                Shape::Table(_) => read_at(&mut self.input, start, lines * 8)
                    .and_then(|bytes| check_keys(&bytes, place)),
                Shape::Dense(dense) => read_at(&mut self.input, start, lines * 4)
                    .and_then(|bytes| check_blocks(&bytes, values, dense, place)),
            };
            checked.map_err(|error| {
                Malformed::new(&columns[0].name, error.to_string()).of(self.object.as_str())
            })?;
        }
        Ok(())
    }

    fn rows_piece(&mut self, table: &TableSpec) -> Result<Piece, Malformed> {
        let tensors = &self.left[0];
        let variable = &self.head.variables()[tensors.index];
        let columns = columns(variable);
        let dim = table.dim as usize;
        let widths = float_widths(variable, dim);
        let stride = widths.iter().sum::<usize>() * FLOAT_BYTES;
        let count = (PIECE_BYTES / stride).max(1).min((tensors.lines - self.lines_done) as usize);
        let done = self.lines_done;
        let mut column = |index: usize, width: usize| {
            let start = tensors.starts[index] + done * width as u64;
            read_at(&mut self.input, start, (count * width) as u64)
                .map_err(|error| Malformed::new(&columns[index].name, error.to_string()))
        };
        let (keys, lsns) = (column(0, 8)?, column(1, 8)?);
        check_lsns(&columns[1].name, &lsns, &self.head)?;
        let mut floats = vec![0; count * stride];
        let mut place = 0;
        for (&width, index) in widths.iter().zip(2..) {
            let bytes = width * FLOAT_BYTES;
            let part = column(index, bytes)?;
            check_finite(&columns[index].name, &part)?;
            for (row, part) in floats.chunks_exact_mut(stride).zip(part.chunks_exact(bytes)) {
                row[place..place + bytes].copy_from_slice(part);
            }
            place += bytes;
        }
        let variable = variable.id.0;
        self.lines_done += count as u64;
        let (keys, lsns, floats) = (keys.into(), lsns.into(), floats.into());
        Ok(Piece::Rows(v1::CutRows { variable, keys, lsns, floats }))
    }

    /// The lengths of the blocks before this one in the file give its place.
    fn block_piece(&mut self, dense: &DenseSpec) -> Result<Piece, Malformed> {
        let tensors = &self.left[0];
        let variable = &self.head.variables()[tensors.index];
        let columns = columns(variable);
        let done = self.lines_done;
        let mut part = |index: usize, start: u64, bytes: usize| {
            read_at(&mut self.input, tensors.starts[index] + start, bytes as u64)
                .map_err(|error| Malformed::new(&columns[index].name, error.to_string()))
        };
        let number = part(0, done * 4, 4)?;
        let block = u32_of(&number);
        let lsn = part(1, done * 8, 8)?;
        check_lsns(&columns[1].name, &lsn, &self.head)?;
        let bytes = dense.block_len(block) * FLOAT_BYTES;
        let start = self.floats_done * FLOAT_BYTES as u64;
        let mut floats = Vec::with_capacity(bytes * (columns.len() - 2));
        for (index, column) in columns.iter().enumerate().skip(2) {
            let values = part(index, start, bytes)?;
            check_finite(&column.name, &values)?;
            floats.extend_from_slice(&values);
        }
        let variable = variable.id.0;
        self.lines_done += 1;
        self.floats_done += (bytes / FLOAT_BYTES) as u64;
        let (blocks, lsns, floats) = (vec![block], vec![u64_of(&lsn)], floats.into());
        Ok(Piece::Blocks(v1::CutBlocks { variable, blocks, lsns, floats }))
    }
}

impl std::fmt::Debug for ShardReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardReader").field("object", &self.object).finish_non_exhaustive()
    }
}

fn shape<'a>(head: &'a Head, tensors: &Tensors) -> &'a Shape {
    &head.variables()[tensors.index].spec.shape
}

fn read_header(input: &mut dyn Source, bytes: u64) -> Result<(Head, Vec<Tensors>), Malformed> {
    let broken = |error: io::Error| Malformed::new("header", error.to_string());
    let mut length = [0; 8];
    input.seek(SeekFrom::Start(0)).map_err(broken)?;
    input.read_exact(&mut length).map_err(broken)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX || length > bytes.saturating_sub(8) {
        let problem = format!("has a length of {length} bytes in a file of {bytes}");
        return Err(Malformed::new("header", problem));
    }
    let mut json = vec![0; length as usize];
    input.read_exact(&mut json).map_err(broken)?;
    let json_error = |error: serde_json::Error| Malformed::new("header", error.to_string());
    let mut entries: BTreeMap<String, &RawValue> =
        serde_json::from_slice(&json).map_err(json_error)?;
    let metadata = entries
        .remove("__metadata__")
        .ok_or_else(|| Malformed::new("__metadata__", "is not given"))?;
    let metadata: BTreeMap<String, String> =
        serde_json::from_str(metadata.get()).map_err(json_error)?;
    let head = metadata
        .get("downpour")
        .ok_or_else(|| Malformed::new("__metadata__.downpour", "is not given"))?;
    let head = Head::from_json(head)?;
    let mut left = Vec::new();
    let mut places = Vec::new();
    for (index, variable) in head.variables().iter().enumerate() {
        let (lines, values, tensors) = take_tensors(variable, &mut entries)?;
        let starts = tensors.iter().map(|tensor| 8 + length + tensor.data_offsets[0]).collect();
        places.extend(tensors.iter().map(|tensor| tensor.data_offsets));
        left.push(Tensors { index, lines, values, starts });
    }
    if let Some((name, _)) = entries.first_key_value() {
        return Err(Malformed::new(name, "belongs to no variable of the file"));
    }
    check_places(places, bytes - 8 - length)?;
    Ok((head, left))
}

/// The tensors of a variable with as many lines each, in the order of its columns.
fn take_tensors(
    variable: &Variable,
    entries: &mut BTreeMap<String, &RawValue>,
) -> Result<(u64, u64, Vec<Tensor>), Malformed> {
    let mut lines = None;
    let mut values = None;
    let mut tensors = Vec::new();
    for column in columns(variable) {
        let bad = |problem: String| Malformed::new(&column.name, problem);
        let json = entries.remove(&column.name).ok_or_else(|| bad("is not there".into()))?;
        let tensor: Tensor =
            serde_json::from_str(json.get()).map_err(|error| bad(error.to_string()))?;
        if tensor.dtype != column.dtype {
            return Err(bad(format!("has {:?}, not {:?}", tensor.dtype, column.dtype)));
        }
        // Names and LSNs have a line each; so have a table's floats. The floats of blocks are as many for each slot as for the values.
        let flat_floats = column.dtype == Dtype::F32 && column.width.is_none();
        let expected = if flat_floats { &mut values } else { &mut lines };
        let first = tensor.shape.first().copied().unwrap_or_default();
        let lines = *expected.get_or_insert(first);
        let shape: Vec<u64> =
            std::iter::once(lines).chain(column.width.map(|width| width as u64)).collect();
        if tensor.shape != shape {
            return Err(bad(format!("has the shape {:?}, not {shape:?}", tensor.shape)));
        }
        let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let bytes = elements.and_then(|elements| elements.checked_mul(column.dtype.bytes()));
        let [start, end] = tensor.data_offsets;
        if bytes.is_none() || bytes != end.checked_sub(start) {
            return Err(bad(format!("has the offsets {start} to {end} for the shape {shape:?}")));
        }
        tensors.push(tensor);
    }
    Ok((lines.unwrap_or_default(), values.unwrap_or_default(), tensors))
}

/// Tensors lie side by side and fill the file.
fn check_places(mut places: Vec<[u64; 2]>, bytes: u64) -> Result<(), Malformed> {
    places.sort_unstable();
    let end = places.iter().try_fold(0, |at, place| (place[0] == at).then_some(place[1]));
    if end == Some(bytes) {
        return Ok(());
    }
    let problem = format!("they do not fill the {bytes} bytes behind the header without gaps");
    Err(Malformed::new("data_offsets", problem))
}

/// (routing salt, shards, shard)
type Place = (u64, u32, ShardId);

fn check_keys(bytes: &[u8], (salt, shards, shard): Place) -> io::Result<()> {
    let mut keys: Vec<u64> = bytes.chunks_exact(8).map(u64_of).collect();
    if let Some(key) = keys.iter().find(|&&key| shard_of(key, salt, shards) != shard) {
        return Err(io::Error::other(format!("key {key} belongs to another shard")));
    }
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(io::Error::other(format!("key {} is there twice", pair[0]))),
        None => Ok(()),
    }
}

fn check_blocks(bytes: &[u8], values: u64, dense: &DenseSpec, place: Place) -> io::Result<()> {
    let (salt, shards, shard) = place;
    let mut blocks: Vec<u32> = bytes.chunks_exact(4).map(u32_of).collect();
    let other =
        |&&block: &&u32| block >= dense.blocks() || shard_of(block.into(), salt, shards) != shard;
    if let Some(block) = blocks.iter().find(other) {
        return Err(io::Error::other(format!("block {block} is not one of this shard")));
    }
    let floats: u64 = blocks.iter().map(|&block| dense.block_len(block) as u64).sum();
    if floats != values {
        let problem = format!("the blocks have {floats} floats, and {values} are there");
        return Err(io::Error::other(problem));
    }
    blocks.sort_unstable();
    match blocks.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(io::Error::other(format!("block {} is there twice", pair[0]))),
        None => Ok(()),
    }
}

fn check_lsns(name: &str, lsns: &[u8], head: &Head) -> Result<(), Malformed> {
    let (after, last) = (head.newer_than(), head.lsn());
    let mut lsns = lsns.chunks_exact(8).map(|word| Lsn(u64_of(word)));
    match lsns.find(|&lsn| lsn <= after || lsn > last) {
        Some(lsn) => {
            Err(Malformed::new(name, format!("{lsn} is not after {after} and up to {last}")))
        }
        None => Ok(()),
    }
}

fn check_finite(name: &str, floats: &[u8]) -> Result<(), Malformed> {
    if all_finite(floats) {
        Ok(())
    } else {
        Err(Malformed::new(name, "holds a number that is not finite"))
    }
}

fn u32_of(word: &[u8]) -> u32 {
    word.iter().rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte))
}

fn u64_of(word: &[u8]) -> u64 {
    word.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// The caller checked that the file is this long.
fn read_at(input: &mut dyn Source, start: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut content = vec![0; bytes as usize];
    input.seek(SeekFrom::Start(start))?;
    input.read_exact(&mut content)?;
    Ok(content)
}
