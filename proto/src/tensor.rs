//! Raw tensors on the wire: little-endian, unpadded, read where they arrived at whatever alignment.

use std::ops::Range;

use bytes::{BufMut, BytesMut};
use downpour_core::prefetch::prefetch_row;
use downpour_core::row_format::{RowFormat, from_bf16, to_bf16};
use downpour_core::tensor_bytes::{FLOAT_BYTES, floats};

use crate::Invalid;

/// Bytes of one key.
pub const KEY_BYTES: usize = size_of::<u64>();

/// Keys of an update or a pull: u64 each, strictly increasing.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a>(&'a [u8]);

impl<'a> Keys<'a> {
    /// Checks a raw tensor of keys.
    ///
    /// # Errors
    /// The length is not a multiple of eight, or the keys do not strictly increase.
    pub fn new(field: &'static str, bytes: &'a [u8]) -> Result<Self, Invalid> {
        if !bytes.len().is_multiple_of(KEY_BYTES) {
            return Err(Invalid::new(field, "must hold whole keys of 8 bytes"));
        }
        let keys = Keys(bytes);
        let mut previous = None;
        for key in keys.iter() {
            if previous.is_some_and(|previous| previous >= key) {
                return Err(Invalid::new(field, format!("must strictly increase, at key {key}")));
            }
            previous = Some(key);
        }
        Ok(keys)
    }

    /// Keys that were checked before (a received request after `validate`, a log record).
    #[must_use]
    pub fn trusted(bytes: &'a [u8]) -> Self {
        Keys(bytes)
    }

    /// How many.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.len() / KEY_BYTES
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// In order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.0.chunks_exact(KEY_BYTES).map(|word| {
            let mut bytes = [0; KEY_BYTES];
            bytes.copy_from_slice(word);
            u64::from_le_bytes(bytes)
        })
    }
}

/// Which rows of a matrix: those that belong to one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Places<'a> {
    /// One after the other: copied as one, which costs a fraction of the next.
    Range(Range<usize>),
    /// At these positions.
    At(&'a [u32]),
}

impl<'a> Places<'a> {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Places::Range(range) => range.len(),
            Places::At(positions) => positions.len(),
        }
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of them.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn part(&self, part: Range<usize>) -> Places<'a> {
        match self {
            Places::Range(range) => {
                assert!(part.end <= range.len(), "{part:?} of {range:?}");
                Places::Range(range.start + part.start..range.start + part.end)
            }
            Places::At(positions) => Places::At(&positions[part]),
        }
    }
}

/// Appends keys to an outgoing buffer.
pub fn put_keys(out: &mut BytesMut, keys: &[u64]) {
    if cfg!(target_endian = "little") {
        out.extend_from_slice(bytemuck::cast_slice(keys));
    } else {
        out.extend(keys.iter().flat_map(|key| key.to_le_bytes()));
    }
}

/// Appends the keys at some places to an outgoing buffer.
///
/// # Panics
/// If a place is past the last key.
pub fn put_keys_at(out: &mut BytesMut, keys: &[u64], places: &Places<'_>) {
    match places {
        Places::Range(range) => put_keys(out, &keys[range.clone()]),
        Places::At(positions) => {
            out.reserve(positions.len() * KEY_BYTES);
            positions.iter().for_each(|&at| out.put_u64_le(keys[at as usize]));
        }
    }
}

/// Appends floats to an outgoing buffer.
pub fn put_floats(out: &mut BytesMut, values: &[f32]) {
    if cfg!(target_endian = "little") {
        out.extend_from_slice(bytemuck::cast_slice(values));
    } else {
        out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
}

/// Reads floats into `out`.
///
/// # Errors
/// `bytes` does not hold exactly `out.len()` floats.
pub fn get_floats(field: &'static str, bytes: &[u8], out: &mut [f32]) -> Result<(), Invalid> {
    if bytes.len() != out.len() * FLOAT_BYTES {
        return Err(Invalid::new(
            field,
            format!("holds {} bytes, {} expected", bytes.len(), out.len() * FLOAT_BYTES),
        ));
    }
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
    } else {
        out.iter_mut().zip(floats(bytes)).for_each(|(value, float)| *value = float);
    }
    Ok(())
}

/// Appends floats to an outgoing buffer in a table's row format.
fn put_row_floats(out: &mut BytesMut, format: RowFormat, values: &[f32]) {
    match format {
        RowFormat::F32 => put_floats(out, values),
        RowFormat::Bf16 => {
            out.reserve(values.len() * format.float_bytes());
            values.iter().for_each(|&value| out.put_u16_le(to_bf16(value)));
        }
    }
}

/// Reads floats in a table's row format; `bytes` holds as many as `out`.
fn get_row_floats(bytes: &[u8], format: RowFormat, out: &mut [f32]) {
    match format {
        RowFormat::F32 if cfg!(target_endian = "little") => {
            bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
        }
        RowFormat::F32 => out.iter_mut().zip(floats(bytes)).for_each(|(out, float)| *out = float),
        RowFormat::Bf16 => {
            let (words, _) = bytes.as_chunks();
            let float = |word: &[u8; 2]| from_bf16(u16::from_le_bytes(*word));
            out.iter_mut().zip(words).for_each(|(out, word)| *out = float(word));
        }
    }
}

/// Appends raw f32 as [`RowFormat::Bf16`].
pub fn put_narrowed(out: &mut BytesMut, bytes: &[u8]) {
    out.reserve(bytes.len() / 2);
    floats(bytes).for_each(|value| out.put_u16_le(to_bf16(value)));
}

/// The f32 of floats in [`RowFormat::Bf16`], raw.
#[must_use]
pub fn widened(bytes: &[u8]) -> Vec<u8> {
    let (words, _) = bytes.as_chunks();
    words.iter().flat_map(|&word| from_bf16(u16::from_le_bytes(word)).to_le_bytes()).collect()
}

/// Appends the rows at some places of a matrix with `dim` columns to an outgoing buffer.
///
/// # Panics
/// If a place is past the last row.
pub fn put_rows(
    out: &mut BytesMut,
    format: RowFormat,
    matrix: &[f32],
    dim: usize,
    places: &Places<'_>,
) {
    let positions = match places {
        Places::Range(range) => {
            return put_row_floats(out, format, &matrix[range.start * dim..range.end * dim]);
        }
        Places::At(positions) => *positions,
    };
    out.reserve(positions.len() * format.row_bytes(dim));
    // Copies of a length that the compiler knows need no call, which for a short row takes longer than the copy.
    match (matrix.as_chunks::<16>(), dim, format) {
        ((rows, []), 16, RowFormat::F32) if cfg!(target_endian = "little") => {
            for (at, &position) in positions.iter().enumerate() {
                ahead(matrix, dim, positions, at);
                out.put_slice(bytemuck::bytes_of(&rows[position as usize]));
            }
        }
        _ => {
            for (at, &position) in positions.iter().enumerate() {
                ahead(matrix, dim, positions, at);
                put_row_floats(out, format, &matrix[position as usize * dim..][..dim]);
            }
        }
    }
}

/// Reads rows into places of a matrix with `dim` columns.
///
/// # Errors
/// `bytes` does not hold exactly as many rows as there are places.
///
/// # Panics
/// If a place is past the last row.
pub fn get_rows(
    field: &'static str,
    bytes: &[u8],
    format: RowFormat,
    dim: usize,
    places: &Places<'_>,
    matrix: &mut [f32],
) -> Result<(), Invalid> {
    let row_bytes = format.row_bytes(dim);
    if bytes.len() != places.len() * row_bytes {
        let problem = format!("holds {} bytes for {} rows", bytes.len(), places.len());
        return Err(Invalid::new(field, problem));
    }
    let positions = match places {
        Places::Range(range) => {
            get_row_floats(bytes, format, &mut matrix[range.start * dim..range.end * dim]);
            return Ok(());
        }
        Places::At(positions) => *positions,
    };
    match (bytes.as_chunks::<64>(), dim, format) {
        ((from, []), 16, RowFormat::F32) if cfg!(target_endian = "little") => {
            for (at, (row, &position)) in from.iter().zip(positions).enumerate() {
                ahead(matrix, dim, positions, at);
                let (rows, _) = matrix.as_chunks_mut::<16>();
                bytemuck::bytes_of_mut(&mut rows[position as usize]).copy_from_slice(row);
            }
        }
        _ => {
            let rows = bytes.chunks_exact(row_bytes).zip(positions);
            for (at, (row, &position)) in rows.enumerate() {
                ahead(matrix, dim, positions, at);
                get_row_floats(row, format, &mut matrix[position as usize * dim..][..dim]);
            }
        }
    }
    Ok(())
}

/// Bytes of rows that are asked for before they are copied. The positions of a shard jump through the matrix in a way that no processor foresees.
const AHEAD_BYTES: usize = 2048;

/// Asks for the row that is copied some rows after the one at `at`.
#[inline(always)]
fn ahead(matrix: &[f32], dim: usize, positions: &[u32], at: usize) {
    let rows = (AHEAD_BYTES / FLOAT_BYTES / dim.max(1)).clamp(1, 16);
    if let Some(&position) = positions.get(at + rows) {
        prefetch_row(matrix, dim, position);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_keys_or_an_error(bytes: Vec<u8>) {
            if let Ok(keys) = Keys::new("keys", &bytes) {
                let list: Vec<u64> = keys.iter().collect();
                prop_assert_eq!(list.len(), keys.len());
                prop_assert!(list.windows(2).all(|pair| pair[0] < pair[1]));
            }
        }

        #[test]
        fn keys_and_floats_survive_the_wire_at_any_alignment(
            keys: std::collections::BTreeSet<u64>, values: Vec<u32>, offset in 0usize..8,
        ) {
            let keys: Vec<u64> = keys.into_iter().collect();
            let values: Vec<f32> = values.into_iter().map(f32::from_bits).collect();
            let mut out = BytesMut::zeroed(offset);
            put_keys(&mut out, &keys);
            let end = out.len();
            put_floats(&mut out, &values);
            let read: Vec<u64> = Keys::new("keys", &out[offset..end]).unwrap().iter().collect();
            prop_assert_eq!(read, keys);
            let mut back = vec![0.0; values.len()];
            get_floats("values", &out[end..], &mut back).unwrap();
            let bits = |floats: &[f32]| floats.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&back), bits(&values));
        }
    }

    #[test]
    fn rows_go_out_in_the_order_of_their_positions_and_come_back_to_their_places() {
        let at = Places::At(&[4, 0, 2]);
        for dim in [1, 3, 16, 17, 32, 64] {
            let matrix: Vec<f32> = (0..5 * dim).map(|at| (at % 200) as f32).collect();
            let mut out = BytesMut::new();
            put_rows(&mut out, RowFormat::F32, &matrix, dim, &at);
            let rows = [4, 0, 2].into_iter().flat_map(|row| &matrix[row * dim..][..dim]);
            assert!(floats(&out).eq(rows.copied()), "{dim}");
            let mut back = vec![-1.0; 5 * dim];
            get_rows("rows", &out, RowFormat::F32, dim, &at, &mut back).unwrap();
            for row in 0..5 {
                let wanted = if row % 2 == 0 { (row * dim % 200) as f32 } else { -1.0 };
                assert_eq!(back[row * dim], wanted, "{dim}");
            }
            let short = get_rows("rows", &out[1..], RowFormat::F32, dim, &at, &mut back);
            assert_eq!(short.unwrap_err().field, "rows");
            // Small whole numbers are bfloat16.
            let (mut half, mut same) = (BytesMut::new(), vec![-1.0; 5 * dim]);
            put_rows(&mut half, RowFormat::Bf16, &matrix, dim, &at);
            assert_eq!(half.len() * 2, out.len());
            assert!(floats(&widened(&half)).eq(floats(&out)));
            let mut narrowed = BytesMut::new();
            put_narrowed(&mut narrowed, &out);
            assert_eq!(narrowed, half);
            get_rows("rows", &half, RowFormat::Bf16, dim, &at, &mut same).unwrap();
            assert_eq!(same, back);
        }
    }

    #[test]
    fn rows_that_follow_each_other_travel_like_the_same_ones_named_one_by_one() {
        let (keys, matrix) = ([7, 8, 9, 10u64], (0..12).map(|at| at as f32).collect::<Vec<_>>());
        let range = Places::Range(0..4).part(1..3);
        assert_eq!(
            (range.clone(), Places::At(&[0, 1, 2, 3]).part(1..3)),
            (Places::Range(1..3), Places::At(&[1, 2]))
        );
        for format in [RowFormat::F32, RowFormat::Bf16] {
            let sent = |places: &Places<'_>| {
                let (mut names, mut rows) = (BytesMut::new(), BytesMut::new());
                put_keys_at(&mut names, &keys, places);
                put_rows(&mut rows, format, &matrix, 3, places);
                let mut back = vec![-1.0; 12];
                get_rows("rows", &rows, format, 3, places, &mut back).unwrap();
                assert!(get_rows("rows", &rows[1..], format, 3, places, &mut back).is_err());
                (names, rows, back)
            };
            assert_eq!(sent(&range), sent(&Places::At(&[1, 2])));
        }
    }

    #[test]
    fn a_length_that_does_not_fit_is_refused_by_field() {
        assert_eq!(get_floats("rows", &[0; 9], &mut [0.0; 2]).unwrap_err().field, "rows");
        assert!(Keys::new("keys", &[0; 7]).is_err());
    }
}
