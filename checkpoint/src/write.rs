//! One shard's rows and blocks become one safetensors file.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use downpour_core::id::Lsn;
use downpour_core::spec::{Shape, Variable, VariableSpec};
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_proto::tensor::KEY_BYTES;
use downpour_proto::v1;
use downpour_proto::v1::cut_piece::Piece;
use serde::Serialize;
use thiserror::Error;

pub use crate::spool::SpoolReader;

use crate::Malformed;
use crate::head::{Head, Owner};
use crate::layout::{Dtype, columns, float_widths};
use crate::spool::Spool;

/// Takes the pieces of a cut and keeps them in bounded memory until the file can be laid out: a tensor's place in it depends on the sizes of those before.
#[derive(Debug)]
pub struct ShardWriter {
    scratch: Scratch,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Nothing came yet.
    New(Owner),
    Open(Box<Open>),
}

#[derive(Debug)]
struct Open {
    head: Head,
    variables: Vec<Tensors>,
    spool: Spool,
    rows: u64,
    blocks: u64,
}

/// Where a variable's tensors are.
#[derive(Debug)]
struct Tensors {
    /// Of the variable's first.
    column: usize,
    lines: u64,
}

/// Where files may wait that are too large for memory.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// A folder for nameless temporary files.
    pub folder: PathBuf,
    /// Above this the file is used.
    pub memory_bytes_max: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch { folder: std::env::temp_dir(), memory_bytes_max: 32 << 20 }
    }
}

impl Scratch {
    /// Whether a file can be made there: found out before it is wanted.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self) -> io::Result<()> {
        tempfile::tempfile_in(&self.folder).map(drop)
    }
}

/// A file that is ready to be stored: read it from its beginning to its end.
#[derive(Debug)]
pub struct ShardFile {
    /// The shard is here.
    pub lsn: Lsn,
    /// What is not newer was left out.
    pub newer_than: Lsn,
    /// Its bytes.
    pub content: SpoolReader,
    /// Rows of all tables.
    pub rows: u64,
    /// Blocks of all dense variables.
    pub blocks: u64,
}

impl ShardWriter {
    /// For a shard.
    #[must_use]
    pub fn new(owner: Owner, scratch: Scratch) -> Self {
        ShardWriter { scratch, stage: Stage::New(owner) }
    }

    /// Takes the next piece. The file, when it was the last.
    ///
    /// # Errors
    /// The piece does not fit those before, or the disk for what does not fit into memory failed.
    pub fn take(mut self, piece: Piece) -> Result<Progress, Unwritten> {
        match (piece, &mut self.stage) {
            (Piece::Small(small), Stage::New(owner)) => {
                let head = Head::new(owner.clone(), small, Vec::new())?;
                self.stage = Stage::Open(Box::new(Open::new(head, self.scratch.clone())));
            }
            (Piece::Cells(cells), Stage::Open(open)) => open.head.add_cells(cells.cells),
            // Of a round that is over for whoever goes on from here: all sessions have ended, or the shard has missed its end.
            (Piece::Contribution(_), Stage::Open(_)) => {}
            (Piece::Rows(rows), Stage::Open(open)) => open.rows(&rows)?,
            (Piece::Blocks(blocks), Stage::Open(open)) => open.blocks(&blocks)?,
            (Piece::End(end), Stage::Open(open)) => {
                if (end.rows, end.blocks) != (open.rows, open.blocks) {
                    return Err(Malformed::new("end", "counts other rows and blocks").into());
                }
                let Stage::Open(open) = self.stage else { return Err(out_of_turn().into()) };
                return Ok(Progress::Whole(open.finish()));
            }
            _ => return Err(out_of_turn().into()),
        }
        Ok(Progress::More(self))
    }
}

/// What came of a piece.
#[derive(Debug)]
pub enum Progress {
    /// There are more to come.
    More(ShardWriter),
    /// It was the last.
    Whole(ShardFile),
}

/// Why there is no file.
#[derive(Debug, Error)]
pub enum Unwritten {
    /// The pieces do not fit together.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The disk for temporary files failed.
    #[error("write a temporary file: {0}")]
    Io(#[from] io::Error),
}

fn out_of_turn() -> Malformed {
    Malformed::new("piece", "comes out of turn")
}

impl Open {
    fn new(head: Head, scratch: Scratch) -> Self {
        let mut next = 0;
        let tensors = |variable: &Variable| {
            let column = next;
            next += columns(variable).len();
            Tensors { column, lines: 0 }
        };
        let variables = head.variables().iter().map(tensors).collect();
        let spool = Spool::new(next, scratch.memory_bytes_max, scratch.folder);
        Open { head, variables, spool, rows: 0, blocks: 0 }
    }

    fn rows(&mut self, rows: &v1::CutRows) -> Result<(), Unwritten> {
        let at = place(rows.variable);
        let Some(variable @ Variable { spec: VariableSpec { shape: Shape::Table(table), .. }, .. }) =
            self.head.variables().get(at)
        else {
            return Err(Malformed::new("rows.variable", "is no table of the cut").into());
        };
        let widths = float_widths(variable, table.dim as usize);
        let row_bytes = widths.iter().sum::<usize>() * FLOAT_BYTES;
        let count = rows.keys.len() / KEY_BYTES;
        let expected = (count * KEY_BYTES, count * KEY_BYTES, count * row_bytes);
        if (rows.keys.len(), rows.lsns.len(), rows.floats.len()) != expected {
            return Err(Malformed::new("rows.floats", "are not as many as the keys ask for").into());
        }
        let Tensors { column, lines } = &mut self.variables[at];
        self.spool.append(*column, &rows.keys)?;
        self.spool.append(*column + 1, &rows.lsns)?;
        for row in rows.floats.chunks_exact(row_bytes) {
            split(&mut self.spool, *column + 2, &widths, row)?;
        }
        *lines += count as u64;
        self.rows += count as u64;
        Ok(())
    }

    /// In whatever order blocks come, they are told apart by their numbers; but a reader finds them by the sum of the lengths before.
    fn blocks(&mut self, blocks: &v1::CutBlocks) -> Result<(), Unwritten> {
        let at = place(blocks.variable);
        let Some(variable @ Variable { spec: VariableSpec { shape: Shape::Dense(dense), .. }, .. }) =
            self.head.variables().get(at)
        else {
            return Err(Malformed::new("blocks.variable", "is not dense").into());
        };
        let mut rest = &blocks.floats[..];
        let Tensors { column, lines } = &mut self.variables[at];
        for (&number, &lsn) in blocks.blocks.iter().zip(&blocks.lsns) {
            let widths = float_widths(variable, dense.block_len(number));
            let bytes = widths.iter().sum::<usize>() * FLOAT_BYTES;
            let Some((block, tail)) = rest.split_at_checked(bytes) else {
                return Err(Malformed::new("blocks.floats", "are too few for the blocks").into());
            };
            self.spool.append(*column, &number.to_le_bytes())?;
            self.spool.append(*column + 1, &lsn.to_le_bytes())?;
            split(&mut self.spool, *column + 2, &widths, block)?;
            rest = tail;
            *lines += 1;
            self.blocks += 1;
        }
        if !rest.is_empty() || blocks.blocks.len() != blocks.lsns.len() {
            return Err(Malformed::new("blocks.floats", "are more than the blocks ask for").into());
        }
        Ok(())
    }

    fn finish(self) -> ShardFile {
        let Open { head, variables, spool, rows, blocks } = self;
        // Eight bytes wide first: every tensor is then aligned to its elements.
        let mut tensors = BTreeMap::new();
        let mut order = Vec::new();
        let mut at = 0;
        for wide in [true, false] {
            for (Tensors { column: first, lines }, variable) in
                variables.iter().zip(head.variables())
            {
                for (column, index) in columns(variable).into_iter().zip(*first..) {
                    if (column.dtype == Dtype::U64) != wide {
                        continue;
                    }
                    let bytes = spool.bytes(index);
                    let shape = match column.width {
                        Some(width) => vec![*lines, width as u64],
                        None => vec![bytes / column.dtype.bytes()],
                    };
                    let data_offsets = [at, at + bytes];
                    tensors
                        .insert(column.name, Tensor { dtype: column.dtype, shape, data_offsets });
                    order.push(index);
                    at += bytes;
                }
            }
        }
        let header = header(&head, &tensors);
        let (lsn, newer_than) = (head.lsn(), head.newer_than());
        ShardFile { lsn, newer_than, content: spool.into_reader(header, &order), rows, blocks }
    }
}

/// Where a variable is in the head's list.
fn place(variable: u32) -> usize {
    (variable as usize).wrapping_sub(1)
}

/// Appends weights and slots of a row or block to their columns, from `column` on.
fn split(spool: &mut Spool, column: usize, widths: &[usize], mut floats: &[u8]) -> io::Result<()> {
    for (column, width) in (column..).zip(widths) {
        let (part, rest) = floats.split_at(width * FLOAT_BYTES);
        spool.append(column, part)?;
        floats = rest;
    }
    Ok(())
}

#[derive(Serialize)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Eight bytes of length, then JSON, padded with spaces so that the tensors begin aligned.
fn header(head: &Head, tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Header<'a> {
        __metadata__: BTreeMap<&'a str, String>,
        #[serde(flatten)]
        tensors: &'a BTreeMap<String, Tensor>,
    }
    let metadata =
        BTreeMap::from([("format", "downpour".to_owned()), ("downpour", head.to_json())]);
    let header = Header { __metadata__: metadata, tensors };
    let mut json = serde_json::to_vec(&header).expect("names and numbers are JSON");
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}
