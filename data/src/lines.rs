//! Lines of a text file, in byte ranges that begin and end anywhere.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

use crate::{Error, Result};

const BUFFER_BYTES: usize = 256 << 10;
/// A longer line is no table but some other kind of file.
const LINE_BYTES_MAX: u64 = 16 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The lines that begin in `start..end` of a file.
pub(crate) struct Lines {
    file: String,
    input: BufReader<File>,
    position: u64,
    end: u64,
    /// Of the line that was read last, from 1 in this range.
    number: u64,
    line: Vec<u8>,
}

impl Lines {
    pub(crate) fn open(file: &str, start: u64, end: u64) -> Result<Self> {
        let failed = |error: io::Error| Error::file(file, error);
        let mut handle = File::open(file).map_err(failed)?;
        // A line begins at `start` only if the byte before it ends one.
        handle.seek(SeekFrom::Start(start.saturating_sub(1))).map_err(failed)?;
        let mut lines = Self {
            file: file.into(),
            input: BufReader::with_capacity(BUFFER_BYTES, handle),
            position: start.saturating_sub(1),
            end,
            number: 0,
            line: Vec::new(),
        };
        if start > 0 {
            lines.read()?;
            lines.number = 0;
        }
        Ok(lines)
    }

    /// The next line without its end. [`Lines::number`] is its number.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>> {
        if self.position >= self.end || !self.read()? {
            return Ok(None);
        }
        let mut line = self.line.as_slice();
        line = line.strip_suffix(b"\n").unwrap_or(line);
        line = line.strip_suffix(b"\r").unwrap_or(line);
        if self.position == self.line.len() as u64 {
            line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        }
        Ok(Some(line))
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    fn read(&mut self) -> Result<bool> {
        self.line.clear();
        let mut bounded = (&mut self.input).take(LINE_BYTES_MAX);
        let count = bounded
            .read_until(b'\n', &mut self.line)
            .map_err(|error| Error::file(&self.file, error))? as u64;
        self.position += count;
        self.number += 1;
        if count == LINE_BYTES_MAX && self.line.last() != Some(&b'\n') {
            return Err(Error::file(
                &self.file,
                format!("a line is longer than {} MiB: is this a text file?", LINE_BYTES_MAX >> 20),
            ));
        }
        Ok(count > 0)
    }
}

/// How many lines begin before byte `start`, which is not the file's first.
pub(crate) fn count_before(file: &str, start: u64) -> io::Result<u64> {
    let mut input =
        BufReader::with_capacity(BUFFER_BYTES, File::open(file)?).take(start.saturating_sub(1));
    let mut lines = 1;
    loop {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            return Ok(lines);
        }
        lines += memchr::memchr_iter(b'\n', buffer).count() as u64;
        let read = buffer.len();
        input.consume(read);
    }
}
