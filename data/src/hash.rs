//! From values to 64-bit keys, to the letter (`docs/data.md` has the same in Python).
//!
//! A value is a string of bytes; an integer is its decimal digits, so that 42 in Parquet and `42` in
//! CSV are one key. Keys must never change between versions: they name rows of trained models.

/// The basis that FNV-1a starts from where nothing is salted.
pub const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
/// What FNV-1a multiplies by.
pub const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// What [`mix64`] multiplies by.
pub const MIX: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

/// The finaliser of splitmix64: a bijection in which every input bit moves every output bit.
#[inline]
#[must_use]
pub fn mix64(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(MIX[0]);
    z = (z ^ (z >> 27)).wrapping_mul(MIX[1]);
    z ^ (z >> 31)
}

#[inline]
fn fnv1a(basis: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(basis, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME))
}

/// A field's salt: the same value under two salts gives two unrelated keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Salt {
    text: String,
    basis: u64,
}

impl Salt {
    /// The basis of the field's hashes is `mix64(fnv1a(salt))`.
    #[must_use]
    pub fn new(salt: &str) -> Self {
        Self { text: salt.into(), basis: mix64(fnv1a(FNV_OFFSET, salt.as_bytes())) }
    }

    /// What it was made from: all that another language needs for the same keys.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The key of one value: `mix64(fnv1a(value))`, where FNV-1a starts from the salt's basis.
    #[inline]
    #[must_use]
    pub fn key(&self, value: &[u8]) -> u64 {
        mix64(fnv1a(self.basis, value))
    }

    /// The key of several values together, in their order. Each is hashed on its own, so that
    /// ("ab", "c") and ("a", "bc") differ.
    #[inline]
    #[must_use]
    pub fn cross<'a>(&self, values: impl IntoIterator<Item = &'a [u8]>) -> u64 {
        values.into_iter().fold(self.basis, fold)
    }

    /// The start of a cross that [`fold`] continues value by value.
    pub(crate) fn start(&self) -> u64 {
        self.basis
    }
}

#[inline]
pub(crate) fn fold(hash: u64, value: &[u8]) -> u64 {
    mix64(hash ^ mix64(fnv1a(FNV_OFFSET, value)))
}
