//! Smaller steps by gradients that were computed with older weights.

use std::fmt;
use std::str::FromStr;

use super::require_positive;
use crate::parameter::InvalidParameter;

/// How far a shard had gone on between the pull that a gradient was computed with and its push.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Staleness {
    /// Steps of the furthest worker.
    pub clocks: u64,
    /// Records of the shard's log. None: what was read is not part of its history.
    pub records: Option<u64>,
}

/// What staleness does to a variable's learning rate: it is divided by `1 + staleness / per`. After Zhang, Gupta, Lian and Liu, "Staleness-aware
/// Async-SGD for Distributed Deep Learning" (IJCAI 2016), which divides by the number of updates in between, so with [`Scaling::Records`] and 1.
///
/// Only the primary looks at it, once per update and into the log record, as at a [`Schedule`](super::Schedule). What it does not know divides by 1, and so
/// does the step at the end of a round.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Scaling {
    /// Nothing.
    #[default]
    None,
    /// Staleness counts in steps of the furthest worker.
    Clocks {
        /// So many halve the learning rate.
        per: f32,
    },
    /// Staleness counts in records of the shard's log.
    Records {
        /// So many halve the learning rate: with n workers about n − 1 are nothing unusual.
        per: f32,
    },
}

impl Scaling {
    pub(super) fn validate(self) -> Result<(), InvalidParameter> {
        match self {
            Scaling::None => Ok(()),
            Scaling::Clocks { per } => require_positive("staleness.clocks", per),
            Scaling::Records { per } => require_positive("staleness.records", per),
        }
    }

    /// The learning rate of an update that is so stale.
    #[must_use]
    pub fn learning_rate(self, rate: f32, staleness: Staleness) -> f32 {
        let (passed, per) = match self {
            Scaling::None => return rate,
            Scaling::Clocks { per } => (staleness.clocks, per),
            Scaling::Records { per } => (staleness.records.unwrap_or_default(), per),
        };
        (f64::from(rate) / (1.0 + passed as f64 / f64::from(per))) as f32
    }
}

impl fmt::Display for Scaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scaling::None => f.write_str("none"),
            Scaling::Clocks { per } => write!(f, "clocks:{per}"),
            Scaling::Records { per } => write!(f, "records:{per}"),
        }
    }
}

/// A text is not a scaling.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is none of none, clocks, clocks:PER, records, records:PER, with PER above 0")]
pub struct UnknownScaling(String);

impl FromStr for Scaling {
    type Err = UnknownScaling;

    fn from_str(text: &str) -> Result<Self, UnknownScaling> {
        let unknown = || UnknownScaling(text.into());
        let (unit, per) = text.split_once(':').unwrap_or((text, "1"));
        let per: f32 = per.parse().map_err(|_| unknown())?;
        let scaling = match unit {
            "none" if text == unit => Scaling::None,
            "clocks" => Scaling::Clocks { per },
            "records" => Scaling::Records { per },
            _ => return Err(unknown()),
        };
        scaling.validate().map_err(|_| unknown())?;
        Ok(scaling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scaling_reads_as_it_is_written() {
        for text in ["none", "clocks:1", "records:0.5"] {
            assert_eq!(text.parse::<Scaling>().map(|scaling| scaling.to_string()), Ok(text.into()));
        }
        assert_eq!("clocks".parse(), Ok(Scaling::Clocks { per: 1.0 }));
        for text in ["", "steps", "none:1", "clocks:", "clocks:0", "records:-1", "records:NaN"] {
            assert!(text.parse::<Scaling>().is_err(), "{text}");
        }
    }
}
