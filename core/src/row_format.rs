//! How the floats of a table's rows travel between clients and servers. Servers compute and keep f32 in any case.

use crate::tensor_bytes::FLOAT_BYTES;

/// The floats of rows and of their gradients on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowFormat {
    /// 32 bits: nothing is lost.
    #[default]
    F32,
    /// bfloat16, the upper half of an f32, rounded to the nearest (ties to even): half the bytes, 8 bits of precision.
    Bf16,
}

impl RowFormat {
    /// Bytes of one float.
    #[must_use]
    pub const fn float_bytes(self) -> usize {
        match self {
            RowFormat::F32 => FLOAT_BYTES,
            RowFormat::Bf16 => size_of::<u16>(),
        }
    }

    /// Bytes of a row of `dim` floats.
    #[must_use]
    pub const fn row_bytes(self, dim: usize) -> usize {
        dim * self.float_bytes()
    }

    /// Its name in commands and definitions.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            RowFormat::F32 => "f32",
            RowFormat::Bf16 => "bf16",
        }
    }
}

/// The nearest bfloat16, ties to even. A finite number stays finite (the largest become the largest bfloat16), NaN stays NaN.
#[must_use]
#[inline]
pub const fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let upper = (bits >> 16) as u16;
    if !value.is_finite() {
        // The upper half of a NaN may be that of an infinity.
        return if value.is_nan() { upper | 1 << 6 } else { upper };
    }
    let rounded = ((bits as u64 + 0x7FFF + (upper & 1) as u64) >> 16) as u16;
    // Rounding up past the largest finite number carries into the exponent of infinity.
    if rounded & 0x7F80 == 0x7F80 { upper } else { rounded }
}

/// Exact.
#[must_use]
#[inline]
pub const fn from_bf16(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// Whether every bfloat16 of a raw tensor is finite.
#[must_use]
pub fn all_finite_bf16(bytes: &[u8]) -> bool {
    const EXPONENT: u16 = 0x7F80;
    let (floats, _) = bytes.as_chunks::<2>();
    floats
        .iter()
        .fold(true, |finite, &bytes| finite & (u16::from_le_bytes(bytes) & EXPONENT != EXPONENT))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_nearest_bfloat16_is_found(bits: u32) {
            let value = f32::from_bits(bits);
            let near = from_bf16(to_bf16(value));
            prop_assert_eq!(near.is_nan(), value.is_nan());
            prop_assert_eq!(near.is_finite(), value.is_finite());
            if value.is_finite() {
                let error = (f64::from(near) - f64::from(value)).abs();
                for neighbour in [to_bf16(value).wrapping_sub(1), to_bf16(value).wrapping_add(1)] {
                    let other = from_bf16(neighbour);
                    if other.is_finite() {
                        let of_other = (f64::from(other) - f64::from(value)).abs();
                        prop_assert!(error < of_other || (error == of_other && to_bf16(value) & 1 == 0));
                    }
                }
            }
        }

        #[test]
        fn what_is_a_bfloat16_stays_as_it_is(bits: u16) {
            let value = from_bf16(bits);
            prop_assert!(value.is_nan() || to_bf16(value) == bits);
            prop_assert_eq!(all_finite_bf16(&bits.to_le_bytes()), value.is_finite());
        }
    }

    #[test]
    fn ties_go_to_the_even_neighbour_and_the_largest_stay_finite() {
        assert_eq!(to_bf16(1.0 + 1.0 / 256.0), to_bf16(1.0));
        assert_eq!(from_bf16(to_bf16(1.0 + 3.0 / 256.0)), 1.0 + 1.0 / 64.0);
        assert_eq!(to_bf16(f32::MAX), 0x7F7F);
        assert_eq!(to_bf16(f32::MIN), 0xFF7F);
    }
}
