//! The system below the simulated programs: the clock and the random numbers that the standard library asks for are those of the simulation.
//!
//! The linker prefers these functions to those of the C library. They are what makes the same seed the same bytes: `Instant`, `SystemTime` and the
//! keys of every `HashMap` come from here.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Simulated time began here: long after zero, so that one may subtract.
const BEGIN: Duration = Duration::from_secs(1_000_000_000);

/// Where the simulation stands, for whoever asks from outside of a simulated process.
static ELAPSED_NANOS: AtomicU64 = AtomicU64::new(0);
static RANDOM: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static ASKING: Cell<bool> = const { Cell::new(false) };
}

/// Begins a simulation.
pub(crate) fn seed(seed: u64) {
    RANDOM.store(seed, Relaxed);
}

/// So far has the simulation come.
pub(crate) fn reached(elapsed: Duration) {
    ELAPSED_NANOS.store(elapsed.as_nanos() as u64, Relaxed);
}

/// Since the simulation began.
pub(crate) fn elapsed() -> Duration {
    // Inside, turmoil asks tokio, which must not ask here.
    let inside = ASKING.try_with(|asking| {
        if asking.replace(true) {
            return None;
        }
        let elapsed = turmoil::sim_elapsed();
        asking.set(false);
        elapsed
    });
    let outside = Duration::from_nanos(ELAPSED_NANOS.load(Relaxed));
    inside.ok().flatten().map_or(outside, |inside| inside.max(outside))
}

/// The next random number (SplitMix64).
pub(crate) fn random() -> u64 {
    let state =
        RANDOM.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// # Safety
/// As in C: `time` is to be written to.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(
    _clock: libc::clockid_t,
    time: *mut libc::timespec,
) -> libc::c_int {
    let now = BEGIN + elapsed();
    let now =
        libc::timespec { tv_sec: now.as_secs() as i64, tv_nsec: i64::from(now.subsec_nanos()) };
    // SAFETY: the caller's promise.
    unsafe { time.write(now) };
    0
}

/// # Safety
/// As in C: `buffer` has room for `bytes`.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, bytes: usize, _flags: libc::c_uint) -> isize {
    for at in 0..bytes {
        // SAFETY: the caller's promise.
        unsafe { buffer.add(at).write(random() as u8) };
    }
    bytes as isize
}

#[unsafe(no_mangle)]
extern "C" fn getpid() -> libc::pid_t {
    1
}
