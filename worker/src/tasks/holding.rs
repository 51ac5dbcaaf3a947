//! What this worker knows of the tasks that it holds: what to ask for next, and what its reader may read.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use downpour_core::ledger::HELD_MAX;
use downpour_proto::v1;

/// Tasks that are started beyond the one that is read: the worker goes on with them while no coordinator leads (docs/protocol.md 9).
const STARTED_AHEAD: u32 = 2;
/// Tasks that are leased beyond these, so that it gets what follows in the order of the data, unless somebody who has nothing takes them.
const LEASED_AHEAD: u32 = 2;

/// The state of one worker.
#[derive(Debug)]
pub(super) struct Holding {
    generation: u64,
    pass: u64,
    passes: u64,
    /// Of the newest request of the session, in whatever loop.
    turns: Arc<AtomicU64>,
    /// Of the newest request, and of the newest one that was answered.
    turn: u64,
    answered: u64,
    /// Started, and not taken by the reader.
    queue: BTreeSet<u32>,
    /// Taken by the reader, and not all rows trained.
    open: BTreeSet<u32>,
    /// Trained, and not yet known to be noted.
    done: Vec<v1::TaskDone>,
    /// How many of these the newest request has told.
    told: usize,
    leased: bool,
    slow: bool,
    /// Since which turn the reader waits.
    hungry_since: Option<u64>,
    /// The newest answer brought nothing to read.
    nothing: bool,
}

/// What the reader gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grant {
    /// This task, of this pass.
    Task { pass: u64, position: u32 },
    /// Others have what is left of the pass, or this worker does.
    NothingNow,
    /// It is to ask again later.
    Wait,
    /// All passes are over.
    Over,
}

/// An answer was not what a worker can go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AnotherLedger;

impl Holding {
    /// The coordinators heed no request of a session with a number that is not above those before: `turns` goes on from loop to loop.
    pub(super) fn new(view: &v1::LedgerView, turns: &Arc<AtomicU64>) -> Self {
        let turn = turns.load(Ordering::Relaxed);
        Self {
            turns: turns.clone(),
            generation: view.generation,
            pass: view.pass,
            passes: view.plan.as_ref().map_or(0, |plan| plan.passes),
            turn,
            answered: turn,
            queue: BTreeSet::new(),
            open: BTreeSet::new(),
            done: Vec::new(),
            told: 0,
            leased: false,
            slow: false,
            hungry_since: None,
            nothing: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.pass >= self.passes
    }

    /// The next task for the reader. Where it waits, the next request asks for it.
    pub(super) fn take(&mut self) -> Grant {
        if self.is_over() {
            return Grant::Over;
        }
        if let Some(position) = self.queue.pop_first() {
            self.hungry_since = None;
            self.open.insert(position);
            return Grant::Task { pass: self.pass, position };
        }
        let since = *self.hungry_since.get_or_insert(self.turn);
        // Asked after it began to wait.
        if self.nothing && self.answered > since { Grant::NothingNow } else { Grant::Wait }
    }

    /// Every push of the steps of a task is acknowledged.
    pub(super) fn done(&mut self, task: v1::TaskDone) {
        if self.open.remove(&task.position) {
            self.done.push(task);
        }
    }

    /// Something is to be told.
    pub(super) fn has_news(&self) -> bool {
        !self.done.is_empty()
    }

    /// The reader waits, and may get something.
    pub(super) fn is_waited_for(&self) -> bool {
        self.hungry_since.is_some()
    }

    /// That tasks are taken from.
    pub(super) fn pass(&self) -> u64 {
        self.pass
    }

    /// Soon there is nothing to read.
    pub(super) fn is_short(&self) -> bool {
        !self.is_over()
            && !self.slow
            && (self.queue.len() as u32) < STARTED_AHEAD
            && (self.leased || !self.nothing)
    }

    /// Nothing can be done but wait: for others, or for steps that are under way.
    pub(super) fn is_idle(&self) -> bool {
        let knows = self.hungry_since.is_some_and(|since| self.answered > since);
        knows && self.nothing && self.done.is_empty()
    }

    /// What it did, and what it wants.
    pub(super) fn request(&mut self, step_us: u64, leave: bool) -> v1::AdvanceLedgerRequest {
        self.turn = self.turns.fetch_add(1, Ordering::Relaxed) + 1;
        self.told = self.done.len().min(HELD_MAX as usize);
        let beyond = match (self.slow, self.hungry_since) {
            (false, _) => STARTED_AHEAD,
            (true, Some(_)) => 1,
            (true, None) => 0,
        };
        v1::AdvanceLedgerRequest {
            generation: self.generation,
            turn: self.turn,
            pass: self.pass,
            done: self.done[..self.told].to_vec(),
            started: self.open.len() as u32 + beyond,
            ahead: if self.slow { 0 } else { LEASED_AHEAD },
            step_us,
            leave,
            ..v1::AdvanceLedgerRequest::default()
        }
    }

    /// The answer to the newest request.
    pub(super) fn answered(&mut self, reply: &v1::AdvanceLedgerReply) -> Result<(), AnotherLedger> {
        let view = reply.ledger.as_ref().filter(|view| view.generation == self.generation);
        let view = view.ok_or(AnotherLedger)?;
        self.done.drain(..self.told);
        (self.told, self.answered) = (0, self.turn);
        if view.pass != self.pass {
            // It ended, so everything of it was done.
            self.open.clear();
            self.done.clear();
        }
        self.pass = view.pass;
        self.passes = view.plan.as_ref().map_or(0, |plan| plan.passes);
        let untrained = |position: &u32| {
            !self.open.contains(position) && self.done.iter().all(|done| done.position != *position)
        };
        self.queue = reply.started.iter().copied().filter(untrained).collect();
        self.leased = !reply.ahead.is_empty();
        self.slow = reply.slow;
        self.nothing = self.queue.is_empty() && !self.leased;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(pass: u64, pending: u32) -> v1::LedgerView {
        let plan = v1::LedgerPlan { tasks: 9, passes: 2, ..Default::default() };
        v1::LedgerView { generation: 7, plan: Some(plan), pass, pending, ..Default::default() }
    }

    fn reply(pass: u64, pending: u32, started: &[u32], ahead: &[u32]) -> v1::AdvanceLedgerReply {
        let (started, ahead) = (started.to_vec(), ahead.to_vec());
        v1::AdvanceLedgerReply { ledger: Some(view(pass, pending)), started, ahead, slow: false }
    }

    fn done(position: u32) -> v1::TaskDone {
        v1::TaskDone { position, clock: 1, rows: 1 }
    }

    fn task(position: u32) -> Grant {
        Grant::Task { pass: 0, position }
    }

    #[test]
    fn only_what_an_answer_says_is_started_is_read_and_once() {
        let mut holding = Holding::new(&view(0, 9), &Arc::default());
        assert_eq!(holding.take(), Grant::Wait);
        let request = holding.request(0, false);
        assert_eq!((request.turn, request.started, request.ahead), (1, 2, 2));
        holding.answered(&reply(0, 5, &[0, 1], &[2, 3])).unwrap();
        assert_eq!(
            (holding.take(), holding.take(), holding.take()),
            (task(0), task(1), Grant::Wait)
        );
        assert_eq!(holding.request(0, false).started, 4, "two are open");
        holding.answered(&reply(0, 5, &[0, 1, 2, 3], &[])).unwrap();
        holding.done(done(0));
        assert_eq!(holding.take(), task(2));
        // The answer to a request that was asked before the task was done still has it.
        let request = holding.request(0, false);
        assert_eq!((request.done.len(), request.started), (1, 4));
        holding.done(done(1));
        holding.answered(&reply(0, 5, &[1, 2, 3], &[])).unwrap();
        assert_eq!((holding.take(), holding.take()), (task(3), Grant::Wait));
        assert_eq!(holding.request(0, false).done, [done(1)]);
    }

    #[test]
    fn who_waits_is_told_that_there_is_nothing_by_an_answer_that_was_asked_for_later() {
        let mut holding = Holding::new(&view(0, 9), &Arc::default());
        holding.request(0, false);
        holding.answered(&reply(0, 0, &[], &[])).unwrap();
        assert_eq!(holding.take(), Grant::Wait, "that was before");
        assert!(holding.is_waited_for() && !holding.is_idle(), "it is to be told at once");
        holding.request(0, false);
        holding.answered(&reply(0, 0, &[], &[])).unwrap();
        assert!(holding.is_idle());
        assert_eq!((holding.take(), holding.take()), (Grant::NothingNow, Grant::NothingNow));
        holding.request(0, false);
        holding.answered(&reply(1, 7, &[0, 1], &[])).unwrap();
        assert_eq!(holding.take(), Grant::Task { pass: 1, position: 0 });
        holding.answered(&reply(2, 0, &[], &[])).unwrap();
        assert_eq!(holding.take(), Grant::Over);
    }

    #[test]
    fn a_lost_answer_loses_no_task_and_tells_nothing_twice_as_new() {
        let mut holding = Holding::new(&view(0, 9), &Arc::default());
        holding.request(0, false);
        holding.answered(&reply(0, 5, &[0, 1], &[])).unwrap();
        holding.take();
        holding.done(done(0));
        assert_eq!(holding.request(0, false).done.len(), 1);
        // No answer came.
        let again = holding.request(0, false);
        assert_eq!((again.done, again.turn), (vec![done(0)], 3));
        holding.answered(&reply(0, 5, &[1], &[])).unwrap();
        assert!(!holding.has_news());
        holding.done(done(0));
        assert!(!holding.has_news(), "it is no more open");
    }

    #[test]
    fn a_straggler_starts_a_task_when_it_has_none() {
        let mut holding = Holding::new(&view(0, 9), &Arc::default());
        holding.request(0, false);
        let slow = v1::AdvanceLedgerReply { slow: true, ..reply(0, 5, &[0], &[]) };
        holding.answered(&slow).unwrap();
        holding.take();
        assert!(!holding.is_short());
        let request = holding.request(0, false);
        assert_eq!((request.started, request.ahead), (1, 0));
        holding.answered(&slow).unwrap();
        holding.take();
        assert_eq!(holding.request(0, false).started, 2);
    }

    #[test]
    fn a_second_loop_of_a_session_asks_with_numbers_above_the_first_ones() {
        let turns = Arc::default();
        let mut first = Holding::new(&view(0, 9), &turns);
        assert_eq!((first.request(0, false).turn, first.request(0, true).turn), (1, 2));
        let mut second = Holding::new(&view(0, 9), &turns);
        assert_eq!(second.take(), Grant::Wait);
        assert_eq!(second.request(0, false).turn, 3);
        second.answered(&reply(0, 0, &[], &[])).unwrap();
        assert_eq!(second.take(), Grant::NothingNow);
    }

    #[test]
    fn another_ledger_ends_it() {
        let mut holding = Holding::new(&view(0, 9), &Arc::default());
        holding.request(0, false);
        let mut other = reply(0, 9, &[0], &[]);
        other.ledger.as_mut().unwrap().generation = 8;
        assert_eq!(holding.answered(&other), Err(AnotherLedger));
        assert_eq!(holding.answered(&Default::default()), Err(AnotherLedger));
    }
}
