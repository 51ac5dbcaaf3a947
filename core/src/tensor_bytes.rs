//! Little-endian f32 tensors read where the network put them: at any alignment, without a copy.

use crate::instruction_set::{InstructionSet, Work};

/// Bytes of one f32.
pub const FLOAT_BYTES: usize = size_of::<f32>();

/// The floats of a raw tensor, in order. Bytes after the last whole float are ignored: who receives a tensor checks its
/// length first.
#[inline(always)]
pub fn floats(bytes: &[u8]) -> impl ExactSizeIterator<Item = f32> + '_ {
    bytes.chunks_exact(FLOAT_BYTES).map(float)
}

/// One float from its four bytes; `bytes` holds exactly four.
#[inline(always)]
pub(crate) fn float(bytes: &[u8]) -> f32 {
    let mut word = [0; FLOAT_BYTES];
    word.copy_from_slice(bytes);
    f32::from_le_bytes(word)
}

/// The bit of [`beyond_finite`] that numbers which are not finite have.
pub(crate) const NOT_FINITE: u32 = 1 << 31;

/// Has the bit [`NOT_FINITE`] exactly where `x` is not finite: such numbers have an exponent of ones, to which the lowest bit of an
/// exponent is added. Many of them may be or-ed before anybody looks.
#[inline(always)]
pub(crate) fn beyond_finite(x: f32) -> u32 {
    const EXPONENT: u32 = 0x7F80_0000;
    (x.to_bits() & EXPONENT) + 0x0080_0000
}

/// Whether every f32 of a raw tensor is finite. No early exit: gradients are nearly always finite, and without it the loop is a few
/// vector instructions for each cache line.
#[must_use]
pub fn all_finite(bytes: &[u8]) -> bool {
    all_finite_by(InstructionSet::best(), bytes)
}

fn all_finite_by(instructions: InstructionSet, bytes: &[u8]) -> bool {
    instructions.run(&Exponents, &mut [], &mut [], bytes) & NOT_FINITE == 0
}

/// Or-s [`beyond_finite`] of all floats.
struct Exponents;

impl Work for Exponents {
    #[inline(always)]
    fn run(&self, _: &mut [f32], _: &mut [f32], bytes: &[u8]) -> u32 {
        floats(bytes).fold(0, |bits, x| bits | beyond_finite(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_that_is_not_finite_is_found_at_every_place_and_alignment() {
        for bad in
            [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7F80_0001)]
        {
            for place in 0..67 {
                for offset in 0..4 {
                    let mut bytes = vec![0xFF; offset];
                    bytes.extend((0..67).flat_map(|_| f32::MAX.to_le_bytes()));
                    assert!(all_finite(&bytes[offset..]));
                    let at = offset + place * FLOAT_BYTES;
                    bytes[at..at + FLOAT_BYTES].copy_from_slice(&bad.to_le_bytes());
                    for (name, set) in InstructionSet::all() {
                        let found = set.is_none_or(|set| !all_finite_by(set, &bytes[offset..]));
                        assert!(found, "{bad} at {place} by {name}");
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_subnormals_and_an_empty_tensor_are_finite() {
        let bytes: Vec<u8> = [0.0, -0.0, f32::from_bits(1), -f32::MIN_POSITIVE, f32::MIN]
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        assert!(all_finite(&bytes) && all_finite(&[]));
    }
}
