//! Rows of a table by rising key in bounded memory: sorted runs in a nameless temporary file, merged at the end.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Of a run that is in memory while runs are merged.
const WINDOW_BYTES: usize = 64 << 10;
const KEY_BYTES: usize = 8;

/// Takes rows in any order. Of a key that comes more than once the last row stays.
#[derive(Debug)]
pub(crate) struct Sorter {
    row_bytes: usize,
    memory_bytes_max: usize,
    folder: PathBuf,
    keys: Vec<u64>,
    rows: Vec<u8>,
    file: Option<File>,
    /// Rows of each.
    runs: Vec<u64>,
}

impl Sorter {
    pub(crate) fn new(row_bytes: usize, memory_bytes_max: usize, folder: PathBuf) -> Self {
        let (keys, rows, runs) = (Vec::new(), Vec::new(), Vec::new());
        Self { row_bytes, memory_bytes_max, folder, keys, rows, file: None, runs }
    }

    /// Of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    pub(crate) fn push(&mut self, key: u64, row: &[u8]) -> io::Result<()> {
        debug_assert_eq!(row.len(), self.row_bytes);
        self.keys.push(key);
        self.rows.extend_from_slice(row);
        let held = self.rows.len() + self.keys.len() * KEY_BYTES;
        if held > self.memory_bytes_max { self.spill() } else { Ok(()) }
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(&self.folder)?),
        };
        let mut order: Vec<usize> = (0..self.keys.len()).collect();
        order.sort_by_key(|&i| self.keys[i]);
        let mut out = io::BufWriter::with_capacity(1 << 20, file);
        let mut written = 0;
        for (place, &i) in order.iter().enumerate() {
            if order.get(place + 1).is_some_and(|&next| self.keys[next] == self.keys[i]) {
                continue;
            }
            out.write_all(&self.keys[i].to_le_bytes())?;
            out.write_all(&self.rows[i * self.row_bytes..][..self.row_bytes])?;
            written += 1;
        }
        out.flush()?;
        self.runs.push(written);
        self.keys.clear();
        self.rows.clear();
        Ok(())
    }

    /// Every key once, rising, with its row.
    pub(crate) fn merge(
        mut self,
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.spill()?;
        let Some(file) = self.file else { return Ok(()) };
        let record = KEY_BYTES + self.row_bytes;
        let mut start = 0;
        let mut runs = Vec::new();
        for rows in self.runs {
            let end = start + rows * record as u64;
            runs.push(Run { at: start, end, record, window: Vec::new(), place: 0 });
            start = end;
        }
        let mut next = BinaryHeap::new();
        for (number, run) in runs.iter_mut().enumerate() {
            next.extend(run.key(&file)?.map(|key| Reverse((key, number))));
        }
        while let Some(Reverse((key, number))) = next.pop() {
            // Of equal keys the one of the latest run comes last.
            if next.peek().is_none_or(|Reverse((other, _))| *other != key) {
                each(key, runs[number].row())?;
            }
            runs[number].place += record;
            next.extend(runs[number].key(&file)?.map(|key| Reverse((key, number))));
        }
        Ok(())
    }
}

/// A sorted run that is being read.
struct Run {
    at: u64,
    end: u64,
    record: usize,
    window: Vec<u8>,
    place: usize,
}

impl Run {
    /// The key of its next row.
    fn key(&mut self, file: &File) -> io::Result<Option<u64>> {
        if self.place == self.window.len() {
            let room = (WINDOW_BYTES / self.record).max(1) * self.record;
            let bytes = (self.end - self.at).min(room as u64) as usize;
            self.window.resize(bytes, 0);
            file.read_exact_at(&mut self.window, self.at)?;
            self.at += bytes as u64;
            self.place = 0;
        }
        let key = self.window[self.place..].first_chunk().copied();
        Ok(key.map(u64::from_le_bytes))
    }

    fn row(&self) -> &[u8] {
        &self.window[self.place + KEY_BYTES..self.place + self.record]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_rise_and_the_last_row_of_each_stays_however_little_memory_there_is(
            rows in prop::collection::vec((0u64..50, any::<u32>()), 0..400),
            memory_bytes_max in 0usize..2000,
        ) {
            let mut sorter = Sorter::new(4, memory_bytes_max, std::env::temp_dir());
            for (key, row) in &rows {
                sorter.push(key << 40, &row.to_le_bytes()).unwrap();
            }
            let mut merged = Vec::new();
            sorter.merge(|key, row| {
                merged.push((key >> 40, u32::from_le_bytes(row.try_into().unwrap())));
                Ok(())
            }).unwrap();
            let expected: BTreeMap<u64, u32> = rows.into_iter().collect();
            prop_assert_eq!(merged, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
