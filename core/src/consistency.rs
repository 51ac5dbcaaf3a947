//! How far workers may drift apart: the consistency of a job, for each variable (docs/consistency.md).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::id::VariableId;
use crate::spec::{InvalidSpec, Shape, Variable, check_range};

/// Largest bound of `ssp`. Beyond some thousands of steps nobody would notice a bound.
pub const BOUND_MAX: u32 = 1 << 20;
/// Most backup workers of `sync`.
pub const BACKUP_WORKERS_MAX: u32 = 1 << 14;

/// When pushes of one variable become visible to others, and who waits for whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// A push is applied when it arrives, and nobody waits for anybody.
    #[default]
    Async,
    /// As async, but nobody begins a step while it has finished more than `bound` steps more than the slowest.
    Ssp {
        /// In steps.
        bound: u32,
    },
    /// The mean of what the workers contribute to a round is applied once, and the next round begins then.
    Sync {
        /// So many workers are not waited for: a round ends without the slowest, and what they computed for it is dropped.
        backup_workers: u32,
    },
}

impl Mode {
    /// Checks every bound.
    ///
    /// # Errors
    /// Names the field.
    pub fn validate(self) -> Result<(), InvalidSpec> {
        match self {
            Mode::Async => Ok(()),
            Mode::Ssp { bound } => check_range("ssp.bound", bound.into(), 0, BOUND_MAX.into()),
            Mode::Sync { backup_workers } => {
                let most = BACKUP_WORKERS_MAX.into();
                check_range("sync.backup_workers", backup_workers.into(), 0, most)
            }
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Async => f.write_str("async"),
            Mode::Ssp { bound } => write!(f, "ssp({bound})"),
            Mode::Sync { backup_workers: 0 } => f.write_str("sync"),
            Mode::Sync { backup_workers } => write!(f, "sync({backup_workers})"),
        }
    }
}

/// A text is not a mode.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is none of async, ssp(STEPS), sync, sync(BACKUP_WORKERS), hybrid, hybrid(BACKUP_WORKERS)"
)]
pub struct UnknownMode(String);

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        let unknown = || UnknownMode(text.into());
        let (name, number) = call(text).ok_or_else(unknown)?;
        let mode = match (name, number) {
            ("async", None) => Mode::Async,
            ("ssp", Some(bound)) => Mode::Ssp { bound },
            ("sync", backup_workers) => {
                Mode::Sync { backup_workers: backup_workers.unwrap_or_default() }
            }
            _ => return Err(unknown()),
        };
        mode.validate().map_err(|_| unknown())?;
        Ok(mode)
    }
}

/// `name` or `name(number)`.
fn call(text: &str) -> Option<(&str, Option<u32>)> {
    match text.split_once('(') {
        None => Some((text, None)),
        Some((name, rest)) => Some((name, Some(rest.strip_suffix(')')?.parse().ok()?))),
    }
}

/// The modes of a job's variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Consistency {
    /// Of tables, but for those in `variables`.
    pub tables: Mode,
    /// Of dense variables, but for those in `variables`.
    pub dense: Mode,
    /// Of these.
    pub variables: BTreeMap<VariableId, Mode>,
}

impl Consistency {
    /// Everything in one mode.
    #[must_use]
    pub fn all(mode: Mode) -> Self {
        Consistency { tables: mode, dense: mode, variables: BTreeMap::new() }
    }

    /// Dense variables synchronous, tables asynchronous.
    #[must_use]
    pub fn hybrid(backup_workers: u32) -> Self {
        Consistency { dense: Mode::Sync { backup_workers }, ..Consistency::default() }
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// Names the field.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        self.modes().try_for_each(Mode::validate)
    }

    /// The mode of a variable.
    #[must_use]
    pub fn of(&self, variable: &Variable) -> Mode {
        let shared = match variable.spec.shape {
            Shape::Table(_) => self.tables,
            Shape::Dense(_) => self.dense,
        };
        self.variables.get(&variable.id).copied().unwrap_or(shared)
    }

    /// Whether workers tell their clocks at all.
    #[must_use]
    pub fn has_clocks(&self) -> bool {
        self.modes().any(|mode| mode != Mode::Async)
    }

    /// How many steps more than the slowest a worker may have finished when it begins one: the narrowest bound.
    #[must_use]
    pub fn bound(&self) -> Option<u32> {
        let bounds = self.modes().filter_map(|mode| match mode {
            Mode::Ssp { bound } => Some(bound),
            Mode::Async | Mode::Sync { .. } => None,
        });
        bounds.min()
    }

    /// Given if there are rounds: how many workers a round does not wait for. All variables have the same rounds, so the fewest count.
    #[must_use]
    pub fn backup_workers(&self) -> Option<u32> {
        let workers = self.modes().filter_map(|mode| match mode {
            Mode::Sync { backup_workers } => Some(backup_workers),
            Mode::Async | Mode::Ssp { .. } => None,
        });
        workers.min()
    }

    /// As it is displayed, with the names that `name` gives to variables with modes of their own.
    #[must_use]
    pub fn with_names(&self, name: impl Fn(VariableId) -> String) -> String {
        let shared = match (self.tables, self.dense) {
            (tables, dense) if tables == dense => tables.to_string(),
            (Mode::Async, Mode::Sync { backup_workers: 0 }) => "hybrid".to_owned(),
            (Mode::Async, Mode::Sync { backup_workers }) => format!("hybrid({backup_workers})"),
            (tables, dense) => format!("tables {tables}, dense {dense}"),
        };
        let own = self.variables.iter().map(|(id, mode)| format!(", {} {mode}", name(*id)));
        shared + &own.collect::<String>()
    }

    fn modes(&self) -> impl Iterator<Item = Mode> {
        [self.tables, self.dense].into_iter().chain(self.variables.values().copied())
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_names(|id| format!("variable {id}")))
    }
}

impl FromStr for Consistency {
    type Err = UnknownMode;

    /// A mode for all variables, or `hybrid`.
    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        match call(text) {
            Some(("hybrid", number)) => {
                let hybrid = Consistency::hybrid(number.unwrap_or_default());
                hybrid.validate().map_err(|_| UnknownMode(text.into()))?;
                Ok(hybrid)
            }
            _ => Ok(Consistency::all(text.parse()?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_reads_as_it_is_written() {
        for text in ["async", "ssp(4)", "ssp(0)", "sync", "sync(2)", "hybrid", "hybrid(1)"] {
            let parsed: Consistency = text.parse().expect("a mode");
            assert_eq!(parsed.to_string(), text);
        }
        for text in ["", "ssp", "ssp()", "ssp(4", "ssp(-1)", "async(1)", "sync(x)", "ssp(9999999)"]
        {
            assert!(text.parse::<Consistency>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_narrowest_bound_and_the_fewest_backup_workers_count() {
        let mut mixed = Consistency::hybrid(2);
        assert_eq!((mixed.bound(), mixed.backup_workers()), (None, Some(2)));
        mixed.variables.insert(VariableId(3), Mode::Ssp { bound: 5 });
        mixed.variables.insert(VariableId(4), Mode::Ssp { bound: 3 });
        mixed.variables.insert(VariableId(5), Mode::Sync { backup_workers: 1 });
        assert_eq!((mixed.bound(), mixed.backup_workers()), (Some(3), Some(1)));
        assert!(mixed.has_clocks() && !Consistency::default().has_clocks());
        assert_eq!(
            mixed.to_string(),
            "hybrid(2), variable 3 ssp(5), variable 4 ssp(3), variable 5 sync(1)"
        );
    }
}
