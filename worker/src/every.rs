use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// An interval: `2000steps`, or `60s`, `5m`, `250ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// So many steps of this worker.
    Steps(u64),
    /// So much time.
    Time(Duration),
}

impl Every {
    /// Whether it is over after so many steps and so much time.
    #[must_use]
    pub fn due(self, steps: u64, passed: Duration) -> bool {
        match self {
            Every::Steps(every) => steps >= every,
            Every::Time(every) => passed >= every,
        }
    }
}

impl FromStr for Every {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an interval: write 2000steps, 60s, 5m or 250ms");
        let text_end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (count, unit) = text.split_at(text_end);
        let count: u64 = count.parse().ok().filter(|&count| count > 0).ok_or_else(wrong)?;
        match unit.trim() {
            "steps" | "step" => Ok(Every::Steps(count)),
            "ms" => Ok(Every::Time(Duration::from_millis(count))),
            "s" => Ok(Every::Time(Duration::from_secs(count))),
            "m" => Ok(Every::Time(Duration::from_secs(count.saturating_mul(60)))),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Every::Steps(count) => write!(f, "{count}steps"),
            Every::Time(time) => write!(f, "{}ms", time.as_millis()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_read_as_it_is_written() {
        for every in [Every::Steps(2000), Every::Time(Duration::from_millis(250))] {
            assert_eq!(every.to_string().parse(), Ok(every));
        }
        assert_eq!("5m".parse(), Ok(Every::Time(Duration::from_secs(300))));
        for wrong in ["", "60", "0steps", "s", "3 weeks", "-1s"] {
            assert!(wrong.parse::<Every>().is_err(), "{wrong:?}");
        }
    }
}
