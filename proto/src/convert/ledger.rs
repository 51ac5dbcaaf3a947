use std::collections::{BTreeMap, BTreeSet};

use downpour_core::id::SessionId;
use downpour_core::ledger::{
    Advance, Done, HELD_MAX, Holder, Ledger, OUT_MAX, Parts, Plan, TASKS_MAX, Totals,
};
use downpour_core::spec::check_range;

use super::given;
use crate::{Invalid, v1};

/// Longest wait of an answer that has nothing to tell.
const WAIT_MS_MAX: u64 = 1000;

impl From<&Plan> for v1::LedgerPlan {
    fn from(plan: &Plan) -> Self {
        let Plan { data, tasks, passes, seed, shuffled } = plan.clone();
        v1::LedgerPlan { data, tasks, passes, seed, shuffled }
    }
}

impl TryFrom<v1::LedgerPlan> for Plan {
    type Error = Invalid;

    fn try_from(plan: v1::LedgerPlan) -> Result<Self, Invalid> {
        let v1::LedgerPlan { data, tasks, passes, seed, shuffled } = plan;
        let plan = Plan { data, tasks, passes, seed, shuffled };
        plan.validate()?;
        Ok(plan)
    }
}

impl TryFrom<v1::AdvanceLedgerRequest> for Advance {
    type Error = Invalid;

    fn try_from(request: v1::AdvanceLedgerRequest) -> Result<Self, Invalid> {
        check_range("turn", request.turn, 1, u64::MAX)?;
        check_range("done", request.done.len() as u64, 0, HELD_MAX.into())?;
        check_range("back", request.back.len() as u64, 0, HELD_MAX.into())?;
        check_range("wait_ms", request.wait_ms, 0, WAIT_MS_MAX)?;
        let done = |done: v1::TaskDone| {
            let v1::TaskDone { position, clock, rows } = done;
            Done { position, clock, rows }
        };
        Ok(Advance {
            turn: request.turn,
            pass: request.pass,
            done: request.done.into_iter().map(done).collect(),
            back: request.back,
            started: request.started,
            ahead: request.ahead,
            step_us: request.step_us,
            leave: request.leave,
        })
    }
}

impl From<&Ledger> for v1::LedgerView {
    fn from(ledger: &Ledger) -> Self {
        let (leased, pending) = ledger.leased_and_pending();
        let Totals { tasks, samples, clock } = ledger.totals();
        v1::LedgerView {
            generation: ledger.generation(),
            plan: Some(ledger.plan().into()),
            pass: ledger.pass(),
            done: ledger.done(),
            leased,
            pending,
            tasks_done: tasks,
            samples,
            clock,
            finished_by: ledger.finished_by().map_or(0, |session| session.0),
        }
    }
}

impl From<&Ledger> for v1::LedgerRecord {
    fn from(ledger: &Ledger) -> Self {
        let Parts { plan, generation, pass, next, returned, holders, totals, finished_by } =
            ledger.to_parts();
        let holder = |(session, holder): (SessionId, Holder)| v1::LedgerHolder {
            session: session.0,
            turn: holder.turn,
            step_us: holder.step_us,
            started: ranges(&holder.started),
            ahead: ranges(&holder.ahead),
            done: holder.done,
        };
        v1::LedgerRecord {
            plan: Some((&plan).into()),
            generation,
            pass,
            next,
            returned: ranges(&returned),
            holders: holders.into_iter().map(holder).collect(),
            tasks_done: totals.tasks,
            samples: totals.samples,
            clock: totals.clock,
            finished_by: finished_by.map_or(0, |session| session.0),
        }
    }
}

impl TryFrom<v1::LedgerRecord> for Ledger {
    type Error = Invalid;

    fn try_from(record: v1::LedgerRecord) -> Result<Self, Invalid> {
        let mut holders = BTreeMap::new();
        for holder in record.holders {
            let v1::LedgerHolder { session, turn, step_us, started, ahead, done } = holder;
            let (started, ahead) = (positions("started", started)?, positions("ahead", ahead)?);
            let holder = Holder { turn, step_us, started, ahead, done };
            if holders.insert(SessionId(session), holder).is_some() {
                return Err(Invalid::new("holders", format!("names session {session} twice")));
            }
        }
        let totals =
            Totals { tasks: record.tasks_done, samples: record.samples, clock: record.clock };
        Ok(Ledger::from_parts(Parts {
            plan: given("plan", record.plan)?.try_into()?,
            generation: record.generation,
            pass: record.pass,
            next: record.next,
            returned: positions("returned", record.returned)?,
            holders,
            totals,
            finished_by: Some(record.finished_by).filter(|&session| session > 0).map(SessionId),
        })?)
    }
}

fn ranges(positions: &BTreeSet<u32>) -> Vec<v1::PositionRange> {
    let mut ranges: Vec<v1::PositionRange> = Vec::new();
    for &position in positions {
        match ranges.last_mut() {
            Some(range) if range.last + 1 == position => range.last = position,
            _ => ranges.push(v1::PositionRange { first: position, last: position }),
        }
    }
    ranges
}

/// Bounded before anything is made of them.
fn positions(
    field: &'static str,
    ranges: Vec<v1::PositionRange>,
) -> Result<BTreeSet<u32>, Invalid> {
    let (mut end, mut count) = (0, 0);
    for range in &ranges {
        if range.first < end || range.last < range.first || range.last >= TASKS_MAX {
            return Err(Invalid::new(field, "must be ranges of positions by rising position"));
        }
        end = range.last + 1;
        count += u64::from(end - range.first);
    }
    check_range(field, count, 0, OUT_MAX as u64)?;
    Ok(ranges.into_iter().flat_map(|range| range.first..=range.last).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        let plan = Plan { data: "d".into(), tasks: 99, passes: 2, seed: 3, shuffled: true };
        let mut ledger = Ledger::new(plan, 4);
        for session in [5, 6, 7] {
            let request = Advance { turn: 1, started: 3, ahead: 2, ..Advance::default() };
            ledger.advance(SessionId(session), &request);
        }
        let done = vec![Done { position: 6, clock: 8, rows: 100 }];
        ledger.advance(SessionId(6), &Advance { turn: 2, done, step_us: 9, ..Advance::default() });
        ledger.give_back(SessionId(5));
        ledger
    }

    #[test]
    fn a_ledger_survives_the_wire() {
        let ledger = ledger();
        let record = v1::LedgerRecord::from(&ledger);
        assert_eq!(record.returned.len(), 1, "a range");
        assert_eq!(Ledger::try_from(record), Ok(ledger.clone()));
        let view = v1::LedgerView::from(&ledger);
        assert_eq!((view.done, view.leased, view.pending), (1, 9, 89));
        assert_eq!((view.tasks_done, view.samples, view.clock), (1, 100, 9));
    }

    #[test]
    fn what_is_not_a_ledger_or_a_request_is_refused_by_field() {
        let refused = |change: fn(&mut v1::LedgerRecord)| {
            let mut record = v1::LedgerRecord::from(&ledger());
            change(&mut record);
            Ledger::try_from(record).unwrap_err().field
        };
        assert_eq!(refused(|record| record.plan = None), "plan");
        let range = |first, last| vec![v1::PositionRange { first, last }];
        let huge = range(0, u32::MAX);
        let many = range(0, OUT_MAX as u32);
        assert_eq!(refused(|record| record.returned[0].last = u32::MAX), "returned");
        assert_eq!(positions("ahead", huge).unwrap_err().field, "ahead");
        assert_eq!(positions("ahead", many).unwrap_err().field, "ahead");
        assert_eq!(positions("ahead", range(3, 2)).unwrap_err().field, "ahead");
        let twice = |record: &mut v1::LedgerRecord| record.holders.push(record.holders[0].clone());
        assert_eq!(refused(twice), "holders");

        let request = v1::AdvanceLedgerRequest { turn: 1, ..Default::default() };
        assert!(Advance::try_from(request.clone()).is_ok());
        let refused = |change: fn(&mut v1::AdvanceLedgerRequest)| {
            let mut request = request.clone();
            change(&mut request);
            Advance::try_from(request).unwrap_err().field
        };
        assert_eq!(refused(|request| request.turn = 0), "turn");
        assert_eq!(refused(|request| request.wait_ms = 1001), "wait_ms");
        assert_eq!(refused(|request| request.back = vec![0; 5000]), "back");
        assert_eq!(refused(|request| request.done = vec![Default::default(); 5000]), "done");
    }
}
