//! Names of objects.
//!
//! ```text
//! <place>/<job>/<checkpoint>/shard-00003.e2.n157.a1.safetensors     epoch 2, record 157 of it, attempt 1
//! <place>/<job>/<checkpoint>/manifest.json
//! <place>/<job>/<checkpoint>/deleted                                whatever else is here is no checkpoint any more
//! ```
//!
//! A file's name holds the epoch, so a primary that was replaced and does not know it writes under another name than its successor
//! (docs/protocol.md 8.2).

use std::fmt;

use downpour_core::id::{Lsn, ShardId};
use downpour_core::planted::{Bug, planted};
use downpour_core::spec::check_name;

use crate::Malformed;

/// The object that makes a checkpoint one.
pub const MANIFEST: &str = "manifest.json";

/// The object that says that a checkpoint is none any more.
pub const DELETED: &str = "deleted";

/// Most characters of the name of a checkpoint.
pub const CHECKPOINT_NAME_BYTES_MAX: usize = 64;

/// The name of a checkpoint: `A-Z a-z 0-9 -`. Those that are made here begin with the time, so the order of names is that of time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointName(String);

impl CheckpointName {
    /// Checks a name.
    ///
    /// # Errors
    /// It is empty, too long, or has another character.
    pub fn new(name: impl Into<String>) -> Result<Self, Malformed> {
        let name = name.into();
        let allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
        if name.is_empty()
            || name.len() > CHECKPOINT_NAME_BYTES_MAX
            || !name.bytes().all(allowed)
            || name.starts_with('-')
        {
            let problem = format!(
                "{name:?} is not 1 to {CHECKPOINT_NAME_BYTES_MAX} of the characters A-Z a-z 0-9 -"
            );
            return Err(Malformed::new("checkpoint", problem));
        }
        Ok(CheckpointName(name))
    }

    /// The name of a checkpoint that begins at this time (milliseconds since 1970), told apart from others by `nonce`.
    #[must_use]
    pub fn at(unix_ms: u64, nonce: u32) -> Self {
        let seconds = unix_ms / 1000;
        let (year, month, day) = civil(seconds / 86_400);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let millis = unix_ms % 1000;
        CheckpointName(format!(
            "{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}-{millis:03}-{nonce:08x}"
        ))
    }

    /// What tells it apart from others of its time.
    #[must_use]
    pub fn nonce(&self) -> Option<u32> {
        u32::from_str_radix(self.0.rsplit_once('-')?.1, 16).ok()
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CheckpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Year, month and day of a day since 1970-01-01 (Howard Hinnant's `civil_from_days`, for days that are not negative).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// The folder of a job: its name with `@` for `/`, which no name of a job has, and with something else where a path would mean another folder.
///
/// # Errors
/// It is no name of a job.
pub fn job_folder(job: &str) -> Result<String, Malformed> {
    check_name("job", job)?;
    Ok(match job {
        "." => "=".into(),
        ".." => "==".into(),
        _ => job.replace('/', "@"),
    })
}

/// The job whose folder this is.
#[must_use]
pub fn job_of_folder(folder: &str) -> Option<String> {
    let job = match folder {
        "=" => ".".into(),
        "==" => "..".into(),
        _ => folder.replace('@', "/"),
    };
    (job_folder(&job).as_deref() == Ok(folder)).then_some(job)
}

/// The file of a shard.
#[must_use]
pub fn shard_object(shard: ShardId, lsn: Lsn, attempt: u32) -> String {
    if planted(Bug::StaleCheckpoint) {
        return format!("shard-{:05}.safetensors", shard.0);
    }
    let (epoch, count) = (lsn.epoch(), lsn.count());
    format!("shard-{:05}.e{epoch}.n{count}.a{attempt}.safetensors", shard.0)
}

#[cfg(test)]
mod tests {
    use downpour_core::id::Epoch;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_checkpoints_sort_by_time() {
        let name = |unix_ms| CheckpointName::at(unix_ms, 0xAB);
        assert_eq!(name(0).as_str(), "19700101T000000-000-000000ab");
        assert_eq!(name(1_709_209_845_678).as_str(), "20240229T123045-678-000000ab");
        assert_eq!(name(1_735_689_599_999).as_str(), "20241231T235959-999-000000ab");
        assert!(name(1_709_251_199_999) < name(1_709_251_200_000), "over the end of February");
        assert_eq!(CheckpointName::new(name(1).as_str()), Ok(name(1)));
        assert_eq!(name(1).nonce(), Some(0xAB));
        for bad in ["", "..", "a/b", "-x", "ä", &"x".repeat(65)] {
            assert!(CheckpointName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_file_is_named_by_shard_epoch_position_and_attempt() {
        let name = shard_object(ShardId(3), Lsn::new(Epoch(2), 157), 1);
        assert_eq!(name, "shard-00003.e2.n157.a1.safetensors");
    }

    proptest! {
        #[test]
        fn each_job_has_a_folder_of_its_own(job in "[A-Za-z0-9._/-]{1,4}") {
            let folder = job_folder(&job).unwrap();
            prop_assert!(!folder.contains('/') && folder != "." && folder != "..");
            prop_assert_eq!(job_of_folder(&folder), Some(job));
        }
    }
}
