use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

fn plan(tasks: u32, passes: u64) -> Plan {
    Plan { data: "d".into(), tasks, passes, seed: 1, shuffled: true }
}

fn session(number: u64) -> SessionId {
    SessionId(number)
}

fn done(positions: impl IntoIterator<Item = u32>) -> Vec<Done> {
    positions.into_iter().map(|position| Done { position, clock: 4, rows: 10 }).collect()
}

/// A request that comes after all others of the session.
fn next(ledger: &Ledger, number: u64, request: Advance) -> Advance {
    let turn = ledger.holder(session(number)).map_or(0, |holder| holder.turn) + 1;
    Advance { turn, pass: ledger.pass(), ..request }
}

fn advance(ledger: &mut Ledger, number: u64, request: Advance) -> Holder {
    let request = next(ledger, number, request);
    ledger.advance(session(number), &request);
    ledger.holder(session(number)).cloned().unwrap_or_default()
}

fn wants(started: u32, ahead: u32) -> Advance {
    Advance { started, ahead, ..Advance::default() }
}

#[test]
fn one_worker_gets_the_tasks_in_order_and_passes_end_exactly() {
    let mut ledger = Ledger::new(plan(5, 2), 1);
    for pass in 0..2 {
        assert_eq!(ledger.pass(), pass);
        let mut order: Vec<u32> = Vec::new();
        let mut told: Vec<u32> = Vec::new();
        while ledger.pass() == pass {
            let tell = done(told.drain(..));
            let holder = advance(&mut ledger, 1, Advance { done: tell, ..wants(2, 1) });
            if ledger.pass() == pass {
                told = holder.started.iter().copied().take(1).collect();
                order.extend(&told);
            }
        }
        assert_eq!(order, [0, 1, 2, 3, 4]);
    }
    assert!(ledger.is_over());
    assert_eq!(ledger.finished_by(), Some(session(1)));
    assert_eq!(ledger.totals(), Totals { tasks: 10, samples: 100, clock: 5 });
    assert_eq!((ledger.done(), ledger.leased_and_pending()), (5, (0, 0)));
}

#[test]
fn the_next_pass_waits_for_the_last_task_of_this_one() {
    let mut ledger = Ledger::new(plan(2, 2), 1);
    advance(&mut ledger, 1, wants(1, 0));
    advance(&mut ledger, 2, wants(1, 0));
    let idle = advance(&mut ledger, 1, Advance { done: done([0]), ..wants(1, 1) });
    assert_eq!((ledger.pass(), idle.held()), (0, 0), "the other one still has a task");
    advance(&mut ledger, 2, Advance { done: done([1]), ..wants(1, 0) });
    assert_eq!(ledger.pass(), 1);
}

#[test]
fn what_ended_sessions_held_goes_to_others_first() {
    let mut ledger = Ledger::new(plan(9, 1), 1);
    advance(&mut ledger, 1, wants(2, 2));
    advance(&mut ledger, 1, Advance { done: done([0]), ..wants(1, 2) });
    ledger.give_back(session(1));
    let other = advance(&mut ledger, 2, wants(4, 0));
    assert_eq!(Vec::from_iter(other.started), [1, 2, 3, 4]);
}

#[test]
fn only_what_is_not_started_is_given_to_another_and_only_to_who_has_nothing() {
    let mut ledger = Ledger::new(plan(4, 1), 1);
    advance(&mut ledger, 1, Advance { step_us: 100, ..wants(1, 2) });
    advance(&mut ledger, 2, wants(1, 0));
    assert_eq!(advance(&mut ledger, 2, wants(2, 2)).started.len(), 1, "it has something to do");
    let got = advance(&mut ledger, 2, Advance { done: done([3]), ..wants(3, 3) });
    assert_eq!((Vec::from_iter(got.started), got.ahead.len()), (vec![2], 0), "one, the last");
    let left = ledger.holder(session(1)).unwrap();
    assert_eq!((left.started.len(), left.ahead.len()), (1, 1));
    // Who would be waited for the longest gives first.
    let mut ledger = Ledger::new(plan(4, 1), 1);
    advance(&mut ledger, 1, Advance { step_us: 10, ..wants(1, 1) });
    advance(&mut ledger, 2, Advance { step_us: 90, ..wants(1, 1) });
    assert_eq!(Vec::from_iter(advance(&mut ledger, 3, wants(1, 0)).started), [3]);
}

#[test]
fn a_straggler_is_told_that_it_is_one() {
    let mut ledger = Ledger::new(plan(9, 1), 1);
    advance(&mut ledger, 1, Advance { step_us: 500, ..Advance::default() });
    assert!(!ledger.is_slow(session(1)), "alone, nobody is slow");
    advance(&mut ledger, 2, Advance { step_us: 100, ..Advance::default() });
    advance(&mut ledger, 3, Advance { step_us: 110, ..Advance::default() });
    advance(&mut ledger, 4, Advance::default());
    let slow: Vec<bool> = (1..5).map(|number| ledger.is_slow(session(number))).collect();
    assert_eq!(slow, [true, false, false, false]);
}

#[test]
fn more_passes_go_on_and_another_dataset_is_told_by_what_differs() {
    let mut ledger = Ledger::new(plan(1, 1), 1);
    advance(&mut ledger, 1, wants(1, 0));
    advance(&mut ledger, 1, Advance { done: done([0]), ..wants(1, 0) });
    assert!(ledger.is_over());
    ledger.extend(1);
    assert!(ledger.is_over());
    ledger.extend(2);
    assert_eq!((ledger.is_over(), ledger.finished_by()), (false, None));
    assert_eq!(advance(&mut ledger, 1, wants(1, 0)).started.len(), 1);

    let was = plan(3, 1);
    assert!(was.differences(&Plan { passes: 9, ..was.clone() }).is_empty());
    for (now, word) in [
        (Plan { data: "e".into(), ..was.clone() }, "other files"),
        (Plan { seed: 2, ..was.clone() }, "the seed was 1 and is 2"),
        (Plan { shuffled: false, ..was.clone() }, "were shuffled"),
    ] {
        assert!(was.differences(&now).concat().contains(word));
    }
    let unshuffled = Plan { shuffled: false, ..was };
    let reseeded = Plan { seed: 9, ..unshuffled.clone() };
    assert!(unshuffled.differences(&reseeded).is_empty(), "the seed orders nothing");
}

#[test]
fn tasks_that_are_out_are_bounded() {
    let mut ledger = Ledger::new(plan(2 * OUT_MAX as u32, 1), 1);
    for number in 0..9 {
        advance(&mut ledger, number, wants(u32::MAX, u32::MAX));
    }
    assert_eq!(ledger.leased_and_pending().0 as usize, OUT_MAX);
    assert_eq!(ledger.holder(session(0)).unwrap().started.len() as u32, HELD_MAX);
    let held = ledger.without_holders(2);
    assert_eq!(Ledger::from_parts(held.to_parts()), Ok(held));
}

#[test]
fn what_no_ledger_can_be_is_refused_by_field() {
    let mut ledger = Ledger::new(plan(9, 3), 1);
    advance(&mut ledger, 1, wants(2, 1));
    advance(&mut ledger, 2, wants(1, 1));
    ledger.give_back(session(2));
    let good = ledger.to_parts();
    assert_eq!(Ledger::from_parts(good.clone()), Ok(ledger));
    let broken = |change: fn(&mut Parts)| {
        let mut parts = good.clone();
        change(&mut parts);
        Ledger::from_parts(parts).unwrap_err().field
    };
    assert_eq!(broken(|parts| parts.plan.tasks = 0), "tasks");
    assert_eq!(broken(|parts| parts.plan.tasks = TASKS_MAX + 1), "tasks");
    assert_eq!(broken(|parts| parts.plan.passes = 0), "passes");
    assert_eq!(broken(|parts| parts.plan.data.clear()), "data");
    assert_eq!(broken(|parts| parts.pass = 4), "pass");
    assert_eq!(broken(|parts| parts.next = 10), "next");
    assert_eq!(broken(|parts| parts.next = 4), "returned");
    assert_eq!(broken(|parts| _ = parts.returned.insert(0)), "returned");
    let twice = |parts: &mut Parts| {
        parts.holders.entry(SessionId(1)).and_modify(|one| _ = one.ahead.insert(0));
    };
    assert_eq!(broken(twice), "returned");
}

/// What really happened, beside the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Truth {
    done: BTreeSet<(u64, u32)>,
    /// How often each was started, less how often that was undone: by its session's end, or because it was given back.
    starts: BTreeMap<(u64, u32), u32>,
    ends: u32,
    restores: u32,
    sessions: Vec<u64>,
}

impl Truth {
    /// Every task is in one place, nothing done is given out again, and a pass ends when all of it is done.
    fn check(&self, ledger: &Ledger) {
        let pass = ledger.pass();
        for before in 0..pass {
            let whole =
                (0..ledger.plan.tasks).all(|position| self.done.contains(&(before, position)));
            assert!(whole, "pass {before} ended early: {ledger:?}");
        }
        if ledger.is_over() {
            return;
        }
        for position in 0..ledger.plan.tasks {
            let held = ledger.holders.values();
            let held =
                held.filter(|one| one.started.contains(&position) || one.ahead.contains(&position));
            let places = held.count()
                + usize::from(ledger.returned.contains(&position))
                + usize::from(position >= ledger.next)
                + usize::from(self.done.contains(&(pass, position)));
            assert_eq!(places, 1, "{position} of {ledger:?}, {self:?}");
        }
        assert!(self.starts.values().all(|&starts| starts <= 1), "trained by two: {self:?}");
    }

    fn undo(&mut self, pass: u64, positions: impl IntoIterator<Item = u32>) {
        for position in positions {
            self.starts.remove(&(pass, position));
        }
    }

    fn advance(&mut self, ledger: &mut Ledger, number: u64, request: Advance) {
        let before = ledger.holder(session(number)).cloned().unwrap_or_default();
        let pass = ledger.pass();
        let request = next(ledger, number, request);
        self.done.extend(request.done.iter().map(|done| (pass, done.position)));
        if request.leave {
            let done: BTreeSet<u32> = request.done.iter().map(|done| done.position).collect();
            self.undo(pass, before.started.difference(&done).copied());
        }
        self.undo(pass, request.back.iter().copied());
        ledger.advance(session(number), &request);
        for position in &ledger.holder(session(number)).unwrap().started {
            let same = ledger.pass() == pass;
            if !(same && before.started.contains(position) && !request.back.contains(position)) {
                *self.starts.entry((ledger.pass(), *position)).or_default() += 1;
            }
        }
    }

    fn end(&mut self, ledger: &mut Ledger, number: u64) {
        let held = ledger.holder(session(number)).cloned().unwrap_or_default();
        self.undo(ledger.pass(), held.started);
        ledger.give_back(session(number));
        self.sessions.retain(|one| *one != number);
        self.sessions.push(number + 2);
        self.ends += 1;
    }
}

/// Everything that two workers, of which two may die, and one restore can do with a few tasks.
#[test]
fn in_every_schedule_each_task_is_in_one_place() {
    let start = Truth { sessions: vec![1, 2], ..Truth::default() };
    let mut queue = VecDeque::from([(Ledger::new(plan(3, 2), 1), start)]);
    let mut seen = HashSet::new();
    let mut over = 0;
    while let Some((ledger, truth)) = queue.pop_front() {
        truth.check(&ledger);
        let mut key = ledger.clone();
        key.totals = Totals::default();
        key.holders.values_mut().for_each(|holder| (holder.turn, holder.done) = (0, 0));
        key.holders.retain(|_, holder| holder.held() > 0);
        if !seen.insert((key, truth.ends, truth.restores, truth.sessions.clone())) {
            continue;
        }
        over += u32::from(ledger.is_over());
        for &number in &truth.sessions {
            let held = ledger.holder(session(number)).cloned().unwrap_or_default();
            let mut requests = vec![Advance { leave: true, ..wants(0, 0) }];
            for (started, ahead) in [(0, 0), (1, 0), (1, 1), (2, 1), (3, 0)] {
                for count in 0..=held.started.len() {
                    let tell = done(held.started.iter().copied().take(count));
                    let back = held.started.iter().copied().skip(count).take(1).collect();
                    let plain = Advance { done: tell, ..wants(started, ahead) };
                    requests.push(Advance { back, ..plain.clone() });
                    requests.push(plain);
                }
            }
            for request in requests {
                let (mut ledger, mut truth) = (ledger.clone(), truth.clone());
                truth.advance(&mut ledger, number, request);
                queue.push_back((ledger, truth));
            }
            if truth.ends < 2 {
                let (mut ledger, mut truth) = (ledger.clone(), truth.clone());
                truth.end(&mut ledger, number);
                queue.push_back((ledger, truth));
            }
        }
        if truth.restores == 0 {
            let mut truth = truth.clone();
            for holder in ledger.holders.values() {
                truth.undo(ledger.pass(), holder.started.iter().copied());
            }
            truth.restores = 1;
            let parts = ledger.without_holders(2).to_parts();
            queue.push_back((Ledger::from_parts(parts).unwrap(), truth));
        }
    }
    assert!(over > 0 && seen.len() > 1000, "{over} of {}", seen.len());
}

/// A worker that knows only what it was answered.
#[derive(Clone, Debug, Default)]
struct Worker {
    number: u64,
    turn: u64,
    /// Started, as it was told, and not yet trained.
    todo: BTreeSet<u32>,
    /// Trained, and not yet known to be noted.
    trained: BTreeSet<u32>,
    pass: u64,
}

proptest! {
    /// Requests come twice, late or never, answers get lost, workers die: every task is trained, and without deaths once.
    #[test]
    fn each_task_is_trained_and_once_where_nobody_died(
        tasks in 1u32..12,
        passes in 1u64..3,
        workers in 1u64..4,
        deaths: bool,
        steps in prop::collection::vec((any::<u32>(), any::<u32>()), 600),
    ) {
        let mut ledger = Ledger::new(plan(tasks, passes), 1);
        let mut workers: Vec<Worker> =
            (1..=workers).map(|number| Worker { number, ..Worker::default() }).collect();
        let mut trained: BTreeMap<(u64, u32), u32> = BTreeMap::new();
        let mut late: Vec<(u64, Advance)> = Vec::new();
        let mut born = 100;
        let calm = (0..).map(|i| (i, 9));
        let mut steps = steps.into_iter().chain(calm);
        let mut count = 0;
        while !ledger.is_over() {
            count += 1;
            prop_assert!(count < 10_000, "does not end: {ledger:?}");
            let (which, how) = steps.next().unwrap();
            let at = which as usize % workers.len();
            if how % 16 == 0 && deaths {
                ledger.give_back(session(workers[at].number));
                born += 1;
                let number = workers[at].number;
                late.retain(|(of, _)| *of != number);
                workers[at] = Worker { number: born, pass: ledger.pass(), ..Worker::default() };
                continue;
            }
            let worker = &mut workers[at];
            if how % 4 == 1 && let Some(position) = worker.todo.pop_first() {
                *trained.entry((worker.pass, position)).or_default() += 1;
                worker.trained.insert(position);
                continue;
            }
            worker.turn += 1;
            // What is not known to be noted is told again and again.
            let tell = done(worker.trained.iter().copied());
            let started = 1 + worker.todo.len().min(1) as u32;
            let ahead = how / 4 % 3;
            let request = Advance { turn: worker.turn, pass: worker.pass, done: tell, ..wants(started, ahead) };
            late.push((worker.number, request.clone()));
            if how % 16 == 5 {
                continue; // Lost on its way; may still come.
            }
            ledger.advance(session(worker.number), &request);
            if how % 16 == 7 {
                continue; // The answer is lost.
            }
            let holder = ledger.holder(session(worker.number)).cloned().unwrap_or_default();
            if ledger.pass() != worker.pass {
                prop_assert!(worker.todo.is_empty(), "a pass ended without this worker");
                (worker.pass, worker.trained) = (ledger.pass(), BTreeSet::new());
            }
            worker.trained.retain(|position| holder.started.contains(position));
            worker.todo = holder.started.difference(&worker.trained).copied().collect();
            if how % 3 == 0 && !late.is_empty() {
                let (number, request) = late[which as usize / 7 % late.len()].clone();
                ledger.advance(session(number), &request);
            }
        }
        for pass in 0..passes {
            for position in 0..tasks {
                let times = trained.get(&(pass, position)).copied().unwrap_or(0);
                prop_assert!(times >= 1 && (deaths || times == 1), "{position} of pass {pass}: {times}");
            }
        }
    }
}
