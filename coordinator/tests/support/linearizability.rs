//! Whether a recorded history of one register with compare-and-swap is linearizable: the search of Wing and Gong with the memo of Lowe.

use std::collections::HashSet;

/// What an operation did to the register, as its answer says. Values are unique but for 0, the value at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Read(u64),
    Write(u64),
    Swap {
        expected: u64,
        new: u64,
    },
    /// A compare-and-swap that found another value.
    NoSwap {
        expected: u64,
        found: u64,
    },
}

/// An operation from its invocation to its answer, on any clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub invoked: u64,
    /// None: the outcome is unknown. It took effect at any time after its invocation, or never.
    pub answered: Option<u64>,
    pub effect: Effect,
}

impl Effect {
    /// The value of the register afterwards, if it may have been `value` before.
    fn apply(self, value: u64) -> Option<u64> {
        match self {
            Effect::Read(read) => (read == value).then_some(value),
            Effect::Write(new) => Some(new),
            Effect::Swap { expected, new } => (expected == value).then_some(new),
            Effect::NoSwap { expected, found } => {
                (found == value && expected != value).then_some(value)
            }
        }
    }

    fn written(self) -> Option<u64> {
        match self {
            Effect::Write(new) | Effect::Swap { new, .. } => Some(new),
            Effect::Read(_) | Effect::NoSwap { .. } => None,
        }
    }

    fn observed(self) -> Option<u64> {
        match self {
            Effect::Read(value) | Effect::NoSwap { found: value, .. } => Some(value),
            Effect::Swap { expected, .. } => Some(expected),
            Effect::Write(_) => None,
        }
    }
}

/// Whether some order of the operations, each at one moment between invocation and answer, explains every answer.
pub(crate) fn linearizable(history: &[Operation]) -> bool {
    let observed: HashSet<u64> = history.iter().filter_map(|one| one.effect.observed()).collect();
    // A write of unknown outcome that nobody saw may as well not have happened.
    let seen = |one: &&Operation| {
        one.answered.is_some()
            || one.effect.written().is_some_and(|value| observed.contains(&value))
    };
    let mut history: Vec<Operation> = history.iter().filter(seen).copied().collect();
    history.sort_by_key(|one| one.invoked);
    let mut tried = HashSet::new();
    let mut stack = vec![(Done(vec![0; history.len().div_ceil(64)]), 0)];
    while let Some((done, value)) = stack.pop() {
        let open = || history.iter().enumerate().filter(|(at, _)| !done.has(*at));
        let Some(deadline) = open().filter_map(|(_, one)| one.answered).min() else { return true };
        for (at, one) in open().take_while(|(_, one)| one.invoked <= deadline) {
            let Some(next) = one.effect.apply(value) else { continue };
            let state = (done.with(at), next);
            if tried.insert(state.clone()) {
                stack.push(state);
            }
        }
    }
    false
}

/// Operations that took their place in the order, as bits.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Done(Vec<u64>);

impl Done {
    fn has(&self, at: usize) -> bool {
        self.0[at / 64] >> (at % 64) & 1 == 1
    }

    fn with(&self, at: usize) -> Done {
        let mut bits = self.0.clone();
        bits[at / 64] |= 1 << (at % 64);
        Done(bits)
    }
}
