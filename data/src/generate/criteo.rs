use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::{Row, Sampler, Shape, uniform};
use crate::hash::mix64;
use crate::{Error, Result};

/// Writes rows in the format of the Criteo click logs: no header; label, 13 integers and 26 categories
/// of 8 hexadecimal digits, separated by tabs; integers and categories have gaps, and a few integers
/// are negative.
pub fn write_criteo(rows: u64, seed: u64, path: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::file(path.display().to_string(), error);
    let shape = Shape { fields: 26, dense: 13, ids_per_field: 1000, exponent: 1.05, seed };
    let sampler = Sampler::new(shape);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    let mut row = Row::default();
    for index in 0..rows {
        sampler.row(index, &mut row);
        write_row(&mut file, &row, mix64(seed) ^ mix64(!index)).map_err(failed)?;
    }
    file.flush().map_err(failed)
}

fn write_row(file: &mut impl Write, row: &Row, gaps: u64) -> std::io::Result<()> {
    write!(file, "{}", u8::from(row.label))?;
    // Some columns are nearly always there, some are often missing, as in the original.
    let gap = |column: usize| {
        uniform(mix64(gaps ^ mix64(column as u64))) < [0.0, 0.03, 0.2, 0.4][column % 4]
    };
    for (j, x) in row.dense.iter().enumerate() {
        file.write_all(b"\t")?;
        if !gap(j) {
            write!(file, "{}", (f64::from(*x) * 1.3 + 1.5).exp() as i64 - i64::from(j == 1) * 3)?;
        }
    }
    for (field, id) in row.ids.iter().enumerate() {
        file.write_all(b"\t")?;
        if !gap(row.dense.len() + field) {
            write!(file, "{:08x}", mix64((field as u64) << 32 | *id) >> 32)?;
        }
    }
    file.write_all(b"\n")
}
