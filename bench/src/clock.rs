//! Clocks: time that all processes of a machine share, and processor time.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Seconds of the machine's monotonic clock, the same in every process.
#[must_use]
pub fn now_s() -> f64 {
    seconds(clock_gettime(ClockId::Monotonic))
}

/// User and system time of this process, all its threads.
#[must_use]
pub fn own_cpu_s() -> f64 {
    seconds(clock_gettime(ClockId::ProcessCPUTime))
}

/// User and system time of a process that runs, in steps of 10 ms; `None` if it is gone.
#[must_use]
pub fn cpu_s(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks = ticks(&stat)?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The 14th and 15th field. The second is a name in parentheses that may contain anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut fields = after_name.split(' ').skip(11).map(|field| field.parse::<u64>().ok());
    Some(fields.next()?? + fields.next()??)
}

fn seconds(time: Timespec) -> f64 {
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ticks_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 31 11 0 0 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (a) S 1"), None);
        assert!(cpu_s(std::process::id()).is_some());
    }
}
