//! The vector instructions of this machine: arithmetic is compiled once for each set below and the best one is chosen at run time.
//!
//! **Every set gives the same bits** (docs/protocol.md 2). The compiler only ever widens the loops: it neither contracts a
//! multiplication and an addition into one rounding nor reorders a sum, because nothing here allows it to. A test runs every
//! kernel under every set that the machine has and compares.
//!
//! AVX-512 is compiled for that test only: rows of 16 to 64 floats were no faster with it (a division of 16 floats takes as long as
//! two of 8), and Adagrad and Adam 5 to 25 % slower.
//!
//! Beside [`crate::prefetch`] this is the one module of the crate with `unsafe`: calling a function that was compiled for instructions which the machine
//! might lack.

#![allow(unsafe_code)]

/// Arithmetic that may be compiled for several instruction sets. `run` and all that it calls must be `#[inline(always)]`: what is
/// not inlined is compiled for the baseline.
///
/// One signature for all of it, since arguments that travel in registers are what makes a call per row cheap (measured: a struct
/// of them costs 2 ns more).
pub(crate) trait Work {
    fn run(&self, weights: &mut [f32], state: &mut [f32], bytes: &[u8]) -> u32;
}

/// An instruction set that this machine has: only detection makes one other than the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InstructionSet(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// What every machine of this architecture has: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(all(test, target_arch = "x86_64"))]
    Avx512,
}

impl InstructionSet {
    /// The best that this machine has. Detection is cached: this costs a load.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            return Self(Level::Avx2);
        }
        Self(Level::Baseline)
    }

    /// Runs `work` as compiled for this set.
    #[inline(always)]
    pub(crate) fn run(
        self,
        work: &impl Work,
        weights: &mut [f32],
        state: &mut [f32],
        bytes: &[u8],
    ) -> u32 {
        match self.0 {
            Level::Baseline => work.run(weights, state, bytes),
            // SAFETY: a value of this level is made only where the machine was found to have AVX2.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2(work, weights, state, bytes) },
            // SAFETY: a value of this level is made only where the machine was found to have these features.
            #[cfg(all(test, target_arch = "x86_64"))]
            Level::Avx512 => unsafe { avx512(work, weights, state, bytes) },
        }
    }

    /// Every set that is compiled, and whether this machine has it.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<(String, Option<Self>)> {
        #[cfg(target_arch = "x86_64")]
        let wider = [
            (Level::Avx2, std::arch::is_x86_feature_detected!("avx2")),
            (Level::Avx512, has_avx512()),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let wider = [];
        [(Level::Baseline, true)]
            .into_iter()
            .chain(wider)
            .map(|(level, here)| (format!("{level:?}"), here.then_some(Self(level))))
            .collect()
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512dq")
        && std::arch::is_x86_feature_detected!("avx512bw")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(work: &impl Work, weights: &mut [f32], state: &mut [f32], bytes: &[u8]) -> u32 {
    work.run(weights, state, bytes)
}

#[cfg(all(test, target_arch = "x86_64"))]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
fn avx512(work: &impl Work, weights: &mut [f32], state: &mut [f32], bytes: &[u8]) -> u32 {
    work.run(weights, state, bytes)
}
