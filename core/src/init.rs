//! The value of a parameter that was never pushed: a pure function of (seed, variable, key), the same on every machine.
//!
//! Element `i` of row `key` uses the 64 bits
//!
//! ```text
//! stream = mix64(key ^ mix64(seed ^ mix64(variable_salt)))
//! bits   = mix64(stream + (i + 1) * 0x9E3779B97F4A7C15)        // wrapping: SplitMix64 seeded with `stream`
//! ```
//!
//! - uniform: `u = (bits >> 40) * 2^-24`, the result is `low + (high - low) * u`;
//! - normal: `p = (2 * (bits >> 12) + 1) * 2^-53`, the result is `mean + std * quantile(p)`, with the quantile function of
//!   the standard normal distribution by Wichura's algorithm AS 241 (PPND16; Applied Statistics 37, 1988), whose logarithm is
//!   the fixed series of `ln`.
//!
//! All of it is f64 arithmetic with + − × ÷ √ in the order written, rounded once to f32 at the end: no fused multiply-add and
//! no function of the platform's math library. `golden/init.py` is a second implementation; it made `testdata/init.json`.

use crate::mix::mix64;
use crate::parameter::{InvalidParameter, require};

/// How a row begins. `Zeros` suits wide (linear) weights and counters; `Uniform` or `Normal` with a spread of about
/// `1 / sqrt(dim)` or less suits embeddings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Every element is 0.
    Zeros,
    /// Every element is this value.
    Constant(f32),
    /// Evenly spread over 2^24 values from `low` to `high`; `high` itself appears only by rounding.
    Uniform {
        /// Smallest value.
        low: f32,
        /// Upper bound.
        high: f32,
    },
    /// Normally distributed, not truncated: no value is further than 8.3 `std` from `mean`.
    Normal {
        /// Centre.
        mean: f32,
        /// Standard deviation.
        std: f32,
    },
}

impl Init {
    /// Refuses what could give a value that is not finite, and names the field.
    pub fn validate(&self) -> Result<(), InvalidParameter> {
        match *self {
            Self::Zeros => Ok(()),
            Self::Constant(value) => require(value.is_finite(), "init.constant", value, "finite"),
            Self::Uniform { low, high } => {
                require(low.is_finite(), "init.uniform.low", low, "finite")?;
                require(high.is_finite(), "init.uniform.high", high, "finite")?;
                require(low <= high, "init.uniform.low", low, "at most init.uniform.high")
            }
            Self::Normal { mean, std } => {
                require(mean.is_finite(), "init.normal.mean", mean, "finite")?;
                let valid = std.is_finite() && std >= 0.0;
                require(valid, "init.normal.std", std, "finite and at least 0")?;
                let furthest = f64::from(mean).abs() + QUANTILE_MAX * f64::from(std);
                let fits = furthest <= f64::from(f32::MAX);
                require(fits, "init.normal.std", std, "small enough that all values are finite")
            }
        }
    }
}

/// Writes row `key` of a variable into `out`, whose length is the row's dimension (for a dense tensor: `key` is the block
/// number). `variable_salt` is [`salt`](crate::mix::salt) of the variable's *name*, which restores and renumbered variables
/// keep. `init` has passed [`Init::validate`]. Every value is finite; element `i` does not depend on `out.len()`.
pub fn init_row(init: &Init, seed: u64, variable_salt: u64, key: u64, out: &mut [f32]) {
    let bits = element_bits(seed, variable_salt, key);
    match *init {
        Init::Zeros => out.fill(0.0),
        Init::Constant(value) => out.fill(value),
        Init::Uniform { low, high } => {
            let (low, width) = (f64::from(low), f64::from(high) - f64::from(low));
            for (x, bits) in out.iter_mut().zip(bits) {
                *x = (low + width * ((bits >> 40) as f64 * TWO_POW_MINUS_24)) as f32;
            }
        }
        Init::Normal { mean, std } => {
            let (mean, std) = (f64::from(mean), f64::from(std));
            for (x, bits) in out.iter_mut().zip(bits) {
                let p = ((bits >> 12) * 2 + 1) as f64 * TWO_POW_MINUS_53;
                *x = (mean + std * normal_quantile(p)) as f32;
            }
        }
    }
}

const TWO_POW_MINUS_24: f64 = 1.0 / (1u64 << 24) as f64;
const TWO_POW_MINUS_53: f64 = 1.0 / (1u64 << 53) as f64;

/// No quantile is larger: that of 2^-53 is -8.21.
const QUANTILE_MAX: f64 = 8.3;

/// The 64 random bits of each element of a row.
fn element_bits(seed: u64, variable_salt: u64, key: u64) -> impl Iterator<Item = u64> {
    let stream = mix64(key ^ mix64(seed ^ mix64(variable_salt)));
    (1..=u64::MAX).map(move |n| mix64(stream.wrapping_add(n.wrapping_mul(0x9E37_79B9_7F4A_7C15))))
}

/// Quantile of the standard normal distribution for 0 < p < 1 (AS 241, PPND16), to about 16 digits.
fn normal_quantile(p: f64) -> f64 {
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180625 - q * q;
        return polynomial(&CENTRE.0, r) * q / polynomial(&CENTRE.1, r);
    }
    let tail = if q < 0.0 { p } else { 1.0 - p };
    let r = (-ln(tail)).sqrt();
    let (offset, (numerator, denominator)) = if r <= 5.0 { (1.6, &TAIL) } else { (5.0, &FAR_TAIL) };
    let x = polynomial(numerator, r - offset) / polynomial(denominator, r - offset);
    if q < 0.0 { -x } else { x }
}

/// Natural logarithm of a positive normal number, to about 16 digits: with x = 2^e · m, m in (√½, √2], and s = (m−1)/(m+1),
/// it is e·ln 2 + 2·(s + s³/3 + … + s²¹/21).
fn ln(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut mantissa = f64::from_bits((bits & MANTISSA) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    f64::from(exponent) * std::f64::consts::LN_2 + 2.0 * s * polynomial(&LN_SERIES, s * s)
}

/// Horner's rule; coefficients from the highest power down.
fn polynomial<const N: usize>(coefficients: &[f64; N], x: f64) -> f64 {
    coefficients[1..].iter().fold(coefficients[0], |sum, c| sum * x + c)
}

const LN_SERIES: [f64; 11] = [
    1.0 / 21.0,
    1.0 / 19.0,
    1.0 / 17.0,
    1.0 / 15.0,
    1.0 / 13.0,
    1.0 / 11.0,
    1.0 / 9.0,
    1.0 / 7.0,
    1.0 / 5.0,
    1.0 / 3.0,
    1.0,
];

/// Numerator and denominator of a rational function.
type Rational = ([f64; 8], [f64; 8]);

/// |p − ½| ≤ 0.425, in 0.425² − (p − ½)².
const CENTRE: Rational = (
    [
        2509.0809287301227,
        33430.57558358813,
        67265.7709270087,
        45921.95393154987,
        13731.69376550946,
        1971.5909503065513,
        133.14166789178438,
        3.3871328727963665,
    ],
    [
        5226.495278852854,
        28729.085735721943,
        39307.89580009271,
        21213.794301586597,
        5394.196021424751,
        687.1870074920579,
        42.31333070160091,
        1.0,
    ],
);
/// √(−ln tail) ≤ 5, in √(−ln tail) − 1.6.
const TAIL: Rational = (
    [
        0.0007745450142783414,
        0.022723844989269184,
        0.2417807251774506,
        1.2704582524523684,
        3.6478483247632045,
        5.769497221460691,
        4.630337846156546,
        1.4234371107496835,
    ],
    [
        1.0507500716444169e-09,
        0.0005475938084995345,
        0.015198666563616457,
        0.14810397642748008,
        0.6897673349851,
        1.6763848301838038,
        2.053191626637759,
        1.0,
    ],
);
/// Beyond, in √(−ln tail) − 5.
const FAR_TAIL: Rational = (
    [
        2.0103343992922881e-07,
        2.7115555687434876e-05,
        0.0012426609473880784,
        0.026532189526576124,
        0.29656057182850487,
        1.7848265399172913,
        5.463784911164114,
        6.657904643501103,
    ],
    [
        2.0442631033899397e-15,
        1.421511758316446e-07,
        1.8463183175100548e-05,
        0.0007868691311456133,
        0.014875361290850615,
        0.1369298809227358,
        0.599832206555888,
        1.0,
    ],
);

#[cfg(test)]
mod tests;
