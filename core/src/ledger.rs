//! Who trains which task of a dataset (docs/protocol.md 7.2): pending, leased, done, pass by pass.
//!
//! Tasks are known by their *position* in the order of the pass, which [`Order`] makes of a seed. They are given out by rising position, so what is done needs no list: everything
//! before `next` that nobody holds and that has not come back. Follow one task: [`Ledger::advance`] leases it to a session (*ahead*, it may still be given to another), then
//! *starts* it (it stays with that session until the session ends), and takes note that it is done. A session trains a task only after a committed answer said that it is
//! started, so each task of a pass is trained once, and more often only when its session ended before it was done.

mod order;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use crate::id::SessionId;
use crate::spec::{InvalidSpec, check_range};

pub use order::Order;

/// Most tasks of a dataset.
pub const TASKS_MAX: u32 = 1 << 24;
/// Most passes.
pub const PASSES_MAX: u64 = u32::MAX as u64;
/// Most tasks that are leased or have come back at a time: what a snapshot, a command and a manifest have room for.
pub const OUT_MAX: usize = 16_384;
/// Most tasks that one session holds.
pub const HELD_MAX: u32 = 4096;
/// Most bytes of what tells one dataset from another.
const DATA_BYTES_MAX: u64 = 64;
/// A step that takes so many times the median of the others' is a straggler's.
const SLOW: u64 = 2;

/// What is to be trained. Workers that share a ledger agree on all of it but the passes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Tells one dataset from another.
    pub data: String,
    /// How many tasks it has.
    pub tasks: u32,
    /// How often each is trained.
    pub passes: u64,
    /// Of the order of tasks.
    pub seed: u64,
    /// Or in the dataset's own order.
    pub shuffled: bool,
}

/// A worker's part of the job's data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Holder {
    /// Of the newest request that was heard.
    pub turn: u64,
    /// What 95 of 100 steps took at most, in microseconds. 0: not known.
    pub step_us: u64,
    /// By position: nobody else gets them as long as the session is open.
    pub started: BTreeSet<u32>,
    /// By position: may be given to another.
    pub ahead: BTreeSet<u32>,
    /// How many it has done, in all passes.
    pub done: u64,
}

impl Holder {
    fn held(&self) -> usize {
        self.started.len() + self.ahead.len()
    }
}

/// What was trained, over all passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Totals {
    /// Tasks.
    pub tasks: u64,
    /// Rows in them.
    pub samples: u64,
    /// One after the highest clock under which a task was done.
    pub clock: u64,
}

/// The tasks of a job.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ledger {
    plan: Plan,
    /// Tells it from those before it: what is asked of another changes nothing.
    generation: u64,
    /// From 0. That of the plan's passes: all is done.
    pass: u64,
    /// No task from this position on was given out.
    next: u32,
    /// Was given out, and came back before it was done.
    returned: BTreeSet<u32>,
    holders: BTreeMap<SessionId, Holder>,
    totals: Totals,
    /// Who did the last task of the last pass.
    finished_by: Option<SessionId>,
}

/// A ledger in pieces, to be encoded. What comes back is checked by [`Ledger::from_parts`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Parts {
    pub plan: Plan,
    pub generation: u64,
    pub pass: u64,
    pub next: u32,
    pub returned: BTreeSet<u32>,
    pub holders: BTreeMap<SessionId, Holder>,
    pub totals: Totals,
    pub finished_by: Option<SessionId>,
}

/// What a worker did and wants. Whatever is asked twice, or late, changes something once: `turn` rises with each request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advance {
    /// From 1.
    pub turn: u64,
    /// That the positions are of.
    pub pass: u64,
    /// Tasks whose pushes are all acknowledged.
    pub done: Vec<Done>,
    /// Tasks that it does not train, or has not trained whole.
    pub back: Vec<u32>,
    /// So many tasks are to be started and not done.
    pub started: u32,
    /// And so many leased beyond these.
    pub ahead: u32,
    /// See [`Holder::step_us`].
    pub step_us: u64,
    /// It gives everything back and wants nothing.
    pub leave: bool,
}

/// A task that was trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Which.
    pub position: u32,
    /// Of the step that had its last row.
    pub clock: u64,
    /// How many it has.
    pub rows: u64,
}

impl Plan {
    /// Checks bounds.
    ///
    /// # Errors
    /// Names the field.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        check_range("data", self.data.len() as u64, 1, DATA_BYTES_MAX)?;
        check_range("tasks", self.tasks.into(), 1, TASKS_MAX.into())?;
        check_range("passes", self.passes, 1, PASSES_MAX)
    }

    /// The order of the tasks in a pass.
    #[must_use]
    pub fn order(&self, pass: u64) -> Order {
        Order::new(self.tasks, self.shuffled.then_some(self.seed), pass)
    }

    /// What differs, in words, where two plans are not of the same rows in the same order.
    #[must_use]
    pub fn differences(&self, now: &Plan) -> Vec<String> {
        let mut differences = Vec::new();
        if (&self.data, self.tasks) != (&now.data, now.tasks) {
            let (was, is) = (self.tasks, now.tasks);
            differences.push(format!("the training data has other files, or files of other sizes ({was} tasks then, {is} now)"));
        }
        match (self.shuffled, now.shuffled) {
            (true, true) if self.seed != now.seed => {
                differences.push(format!("the seed was {} and is {}", self.seed, now.seed));
            }
            (true, false) => differences.push("the rows were shuffled and are not".into()),
            (false, true) => differences.push("the rows were not shuffled and are".into()),
            _ => {}
        }
        differences
    }
}

impl Ledger {
    /// Of a plan, with nothing done.
    #[must_use]
    pub fn new(plan: Plan, generation: u64) -> Self {
        Ledger {
            plan,
            generation,
            pass: 0,
            next: 0,
            returned: BTreeSet::new(),
            holders: BTreeMap::new(),
            totals: Totals::default(),
            finished_by: None,
        }
    }

    /// What is to be trained.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Tells it from those before it.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The pass, from 0; as many as there are when all is done.
    #[must_use]
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// Whether every task of every pass is done.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.pass >= self.plan.passes
    }

    /// What was trained.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Who did the last task of the last pass.
    #[must_use]
    pub fn finished_by(&self) -> Option<SessionId> {
        self.finished_by
    }

    /// What a session has.
    #[must_use]
    pub fn holder(&self, session: SessionId) -> Option<&Holder> {
        self.holders.get(&session)
    }

    /// Tasks of the pass that are leased, and that nobody has and that are not done.
    #[must_use]
    pub fn leased_and_pending(&self) -> (u32, u32) {
        if self.is_over() {
            return (0, 0);
        }
        let leased: usize = self.holders.values().map(Holder::held).sum();
        (leased as u32, self.plan.tasks - self.next + self.returned.len() as u32)
    }

    /// Tasks of the pass that are done.
    #[must_use]
    pub fn done(&self) -> u32 {
        let (leased, pending) = self.leased_and_pending();
        self.plan.tasks - leased - pending
    }

    /// Nothing was done and nobody holds anything.
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        self.totals.tasks == 0 && self.holders.values().all(|holder| holder.held() == 0)
    }

    /// Whoever asks for more passes gets them; fewer are none less.
    pub fn extend(&mut self, passes: u64) {
        if passes > self.plan.passes {
            self.plan.passes = passes;
            self.finished_by = None;
        }
    }

    /// Takes note of what a session did, and gives it what it wants and what there is.
    pub fn advance(&mut self, session: SessionId, request: &Advance) {
        let holder = self.holders.entry(session).or_default();
        if request.turn <= holder.turn {
            return;
        }
        (holder.turn, holder.step_us) = (request.turn, request.step_us);
        // Where it is of an earlier pass it is a repeat: that pass ended when everything in it was done.
        if request.pass == self.pass {
            for done in &request.done {
                if holder.started.remove(&done.position) {
                    holder.done += 1;
                    self.totals.tasks += 1;
                    self.totals.samples = self.totals.samples.saturating_add(done.rows);
                    self.totals.clock = self.totals.clock.max(done.clock.saturating_add(1));
                }
            }
            for position in &request.back {
                if holder.started.remove(position) || holder.ahead.remove(position) {
                    self.returned.insert(*position);
                }
            }
        }
        if request.leave {
            self.returned.append(&mut holder.started);
            self.returned.append(&mut holder.ahead);
        }
        if !self.is_over() && self.leased_and_pending() == (0, 0) {
            (self.pass, self.next) = (self.pass + 1, 0);
            self.finished_by = self.is_over().then_some(session);
        }
        if !request.leave && !self.is_over() {
            self.grant(session, request.started.min(HELD_MAX), request.ahead.min(HELD_MAX));
        }
    }

    /// Whether [`Ledger::advance`] would change more than the turn and what is said of speed.
    #[must_use]
    pub fn would_change(&self, session: SessionId, request: &Advance) -> bool {
        let mut then = self.clone();
        then.advance(session, request);
        let default = Holder::default();
        let now = self.holder(session).unwrap_or(&default);
        let then_one = then.holder(session).unwrap_or(&default);
        let same = (&then_one.started, &then_one.ahead) == (&now.started, &now.ahead);
        !same || then_one.done != now.done || then.pass != self.pass
    }

    fn grant(&mut self, session: SessionId, started: u32, ahead: u32) {
        let mut out = self.holders.values().map(Holder::held).sum();
        while self.count(session, |holder| &holder.started) < started {
            let own = self.holders.get_mut(&session).and_then(|holder| holder.ahead.pop_first());
            let Some(position) =
                own.or_else(|| self.take(&mut out)).or_else(|| self.steal(session))
            else {
                break;
            };
            self.holders.entry(session).or_default().started.insert(position);
        }
        while self.count(session, |holder| &holder.ahead) < ahead {
            let Some(position) = self.take(&mut out) else { break };
            self.holders.entry(session).or_default().ahead.insert(position);
        }
    }

    fn count(&self, session: SessionId, of: impl Fn(&Holder) -> &BTreeSet<u32>) -> u32 {
        self.holders.get(&session).map_or(0, |holder| of(holder).len() as u32)
    }

    /// A task that nobody has, where `out` are leased.
    fn take(&mut self, out: &mut usize) -> Option<u32> {
        let position = self.returned.pop_first().or_else(|| {
            let new = self.next < self.plan.tasks && *out < OUT_MAX;
            self.next += u32::from(new);
            new.then(|| self.next - 1)
        })?;
        *out += 1;
        Some(position)
    }

    /// For who has nothing at all: a task that another has not started, from whom it would wait the longest.
    fn steal(&mut self, session: SessionId) -> Option<u32> {
        if self.count(session, |holder| &holder.started) > 0 {
            return None;
        }
        let waits = |holder: &Holder| holder.step_us.max(1).saturating_mul(holder.held() as u64);
        let others = self.holders.iter().filter(|(id, _)| **id != session);
        let (&from, _) = others
            .filter(|(_, holder)| !holder.ahead.is_empty())
            .max_by_key(|(id, holder)| (waits(holder), **id))?;
        self.holders.get_mut(&from)?.ahead.pop_last()
    }

    /// Whether a session's steps take much longer than those of the others: it is to start a task only when it has nothing else to do.
    #[must_use]
    pub fn is_slow(&self, session: SessionId) -> bool {
        let mine = self.holder(session).map_or(0, |holder| holder.step_us);
        let others = self.holders.iter().filter(|(id, _)| **id != session);
        let mut others: Vec<u64> =
            others.map(|(_, holder)| holder.step_us).filter(|&step_us| step_us > 0).collect();
        others.sort_unstable();
        let median = others.get(others.len().saturating_sub(1) / 2);
        median.is_some_and(|&median| mine > median.saturating_mul(SLOW))
    }

    /// A session has ended: what it held is for others.
    pub fn give_back(&mut self, session: SessionId) {
        if let Some(mut holder) = self.holders.remove(&session) {
            self.returned.append(&mut holder.started);
            self.returned.append(&mut holder.ahead);
        }
    }

    /// As a checkpoint holds it, and as a job goes on from it: done is done, and what was held is trained again.
    #[must_use]
    pub fn without_holders(&self, generation: u64) -> Ledger {
        let mut ledger = self.clone();
        let sessions: Vec<SessionId> = ledger.holders.keys().copied().collect();
        sessions.into_iter().for_each(|session| ledger.give_back(session));
        Ledger { generation, finished_by: None, ..ledger }
    }

    /// To be encoded.
    #[must_use]
    pub fn to_parts(&self) -> Parts {
        let Ledger { plan, generation, pass, next, returned, holders, totals, finished_by } =
            self.clone();
        Parts { plan, generation, pass, next, returned, holders, totals, finished_by }
    }

    /// What was encoded.
    ///
    /// # Errors
    /// No ledger can be like this.
    pub fn from_parts(parts: Parts) -> Result<Ledger, InvalidSpec> {
        let Parts { plan, generation, pass, next, returned, holders, totals, finished_by } = parts;
        plan.validate()?;
        check_range("pass", pass, 0, plan.passes)?;
        check_range("next", next.into(), 0, plan.tasks.into())?;
        let out = holders.values().flat_map(|holder| holder.started.iter().chain(&holder.ahead));
        let mut seen = returned.clone();
        let (mut count, mut last) = (returned.len(), returned.last().copied());
        for &position in out {
            count += 1;
            last = last.max(Some(position));
            seen.insert(position);
        }
        if seen.len() != count || last.is_some_and(|last| last >= next) {
            let problem = "a task is held twice, or was never given out";
            return Err(InvalidSpec::new("returned", problem));
        }
        check_range("returned", count as u64, 0, OUT_MAX as u64)?;
        Ok(Ledger { plan, generation, pass, next, returned, holders, totals, finished_by })
    }
}
