//! The vector instructions of this machine: arithmetic is compiled once for each set below and the best one is chosen at run time.
//!
//! **Every set gives the same bits** (docs/protocol.md 2). The compiler only ever widens the loops: it neither contracts a
//! multiplication and an addition into one rounding nor reorders a sum, because nothing here allows it to. A test runs every
//! kernel under every set that the machine has and compares.
//!
//! This is the one module of the crate with `unsafe`: calling a function that was compiled for instructions which the machine
//! might lack.

#![allow(unsafe_code)]

/// Arithmetic that may be compiled for several instruction sets. `run` and all that it calls must be `#[inline(always)]`: what is
/// not inlined is compiled for the baseline.
pub(crate) trait Work {
    type Output;

    fn run(self) -> Self::Output;
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
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl InstructionSet {
    /// The widest that this machine has. Detection is cached: this costs a load.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Self(Level::Avx512);
            }
            if std::arch::is_x86_feature_detected!("avx2") {
                return Self(Level::Avx2);
            }
        }
        Self(Level::Baseline)
    }

    /// Runs `work` as compiled for this set.
    #[inline(always)]
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            Level::Baseline => work.run(),
            // SAFETY: a value of this level is made only where the machine was found to have AVX2.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2(work) },
            // SAFETY: a value of this level is made only where the machine was found to have these features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512(work) },
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

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512dq")
        && std::arch::is_x86_feature_detected!("avx512bw")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<W: Work>(work: W) -> W::Output {
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
fn avx512<W: Work>(work: W) -> W::Output {
    work.run()
}
