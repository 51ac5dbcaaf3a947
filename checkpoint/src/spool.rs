//! Tensors that grow side by side in bounded memory: what is over the bound waits in a nameless temporary file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

/// Bytes of one column that are written at once, at least: smaller ones stay in memory.
const EXTENT_BYTES_MIN: usize = 16 << 10;

/// Columns that grow.
#[derive(Debug)]
pub(crate) struct Spool {
    columns: Vec<Column>,
    file: Option<File>,
    folder: PathBuf,
    file_bytes: u64,
    in_memory: usize,
    memory_bytes_max: usize,
}

#[derive(Debug, Default)]
struct Column {
    /// Places in the file: (start, bytes).
    extents: Vec<(u64, u64)>,
    tail: Vec<u8>,
    bytes: u64,
}

impl Spool {
    pub(crate) fn new(columns: usize, memory_bytes_max: usize, folder: PathBuf) -> Self {
        let columns = std::iter::repeat_with(Column::default).take(columns).collect();
        Spool { columns, file: None, folder, file_bytes: 0, in_memory: 0, memory_bytes_max }
    }

    /// Appends to a column.
    pub(crate) fn append(&mut self, column: usize, bytes: &[u8]) -> io::Result<()> {
        let column = &mut self.columns[column];
        column.tail.extend_from_slice(bytes);
        column.bytes += bytes.len() as u64;
        self.in_memory += bytes.len();
        if self.in_memory > self.memory_bytes_max { self.spill() } else { Ok(()) }
    }

    /// Bytes of a column.
    pub(crate) fn bytes(&self, column: usize) -> u64 {
        self.columns[column].bytes
    }

    fn spill(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(tempfile::tempfile_in(&self.folder)?);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        for column in &mut self.columns {
            let bytes = column.tail.len();
            if bytes >= EXTENT_BYTES_MIN {
                file.write_all(&column.tail)?;
                column.extents.push((self.file_bytes, bytes as u64));
                column.tail.clear();
                self.file_bytes += bytes as u64;
                self.in_memory -= bytes;
            }
        }
        // Many small columns: they may stay, and the next spill comes when they have grown.
        self.memory_bytes_max = self.memory_bytes_max.max(2 * self.in_memory);
        Ok(())
    }

    /// The columns in this order, behind `header`.
    pub(crate) fn into_reader(mut self, header: Vec<u8>, order: &[usize]) -> SpoolReader {
        let bytes = header.len() as u64 + self.columns.iter().map(|one| one.bytes).sum::<u64>();
        let mut pieces = vec![Piece::Memory(header)];
        for &column in order {
            let column = std::mem::take(&mut self.columns[column]);
            pieces.extend(column.extents.into_iter().map(|(at, bytes)| Piece::File { at, bytes }));
            pieces.push(Piece::Memory(column.tail));
        }
        pieces.reverse();
        SpoolReader { pieces, file: self.file, done: 0, bytes }
    }
}

#[derive(Debug)]
enum Piece {
    Memory(Vec<u8>),
    File { at: u64, bytes: u64 },
}

/// The bytes of a whole file, in order.
#[derive(Debug)]
pub struct SpoolReader {
    /// The next one is the last.
    pieces: Vec<Piece>,
    file: Option<File>,
    /// Bytes of the next piece that were read.
    done: u64,
    bytes: u64,
}

impl SpoolReader {
    /// How many there are.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes
    }
}

impl Read for SpoolReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while let Some(piece) = self.pieces.last() {
            let read = match (piece, &mut self.file) {
                (Piece::Memory(memory), _) => (&memory[self.done as usize..]).read(out)?,
                (&Piece::File { at, bytes }, Some(file)) => {
                    let most = out.len().min((bytes - self.done) as usize);
                    file.seek(SeekFrom::Start(at + self.done))?;
                    file.read(&mut out[..most])?
                }
                (Piece::File { .. }, None) => return Err(io::ErrorKind::NotFound.into()),
            };
            self.done += read as u64;
            if read > 0 || out.is_empty() {
                return Ok(read);
            }
            // A file that lost its end would give a file that lost its middle.
            if matches!(piece, Piece::File { bytes, .. } if self.done < *bytes) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.pieces.pop();
            self.done = 0;
        }
        Ok(0)
    }
}
