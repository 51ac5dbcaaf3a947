//! Tasks of a job's data: who may have them, that they come back, and what a checkpoint takes of them (protocol 7.2, 8.1).

use downpour_core::ledger::{Advance, Done, Ledger, Plan};

use super::checkpoints::{ended, saved, start};
use super::*;
use crate::command::Command;

pub(crate) fn plan(tasks: u32, passes: u64) -> Plan {
    Plan { data: "d".into(), tasks, passes, seed: 1, shuffled: true }
}

pub(crate) fn wants(started: u32, ahead: u32) -> Advance {
    Advance { started, ahead, ..Advance::default() }
}

impl Machine {
    pub(crate) fn define_tasks(&mut self, session: SessionId, plan: Plan) -> Outcome {
        self.apply(Command::DefineLedger(JOB, session, plan))
    }

    fn ledger(&self) -> &Ledger {
        &self.state.cluster().ledgers[&JOB]
    }

    /// What the session has started then.
    pub(crate) fn advance(&mut self, session: SessionId, request: Advance) -> Vec<u32> {
        let ledger = self.ledger();
        let turn = ledger.holder(session).map_or(0, |holder| holder.turn) + 1;
        let (generation, pass) = (ledger.generation(), ledger.pass());
        let request = Advance { turn, pass, ..request };
        let command = Command::AdvanceLedger(JOB, session, generation, request);
        assert_eq!(self.apply(command), Ok(Reply::Done));
        let holder = self.ledger().holder(session);
        holder.map_or_else(Vec::new, |holder| holder.started.iter().copied().collect())
    }

    pub(crate) fn finish_task(&mut self, session: SessionId, position: u32) -> Vec<u32> {
        let done = vec![Done { position, clock: 1, rows: 5 }];
        self.advance(session, Advance { done, ..wants(1, 1) })
    }
}

#[test]
fn what_a_session_held_when_it_was_closed_is_for_others() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let (one, other) = (machine.open(JOB), machine.open(JOB));
    machine.define_tasks(one, plan(3, 1)).unwrap();
    machine.define_tasks(other, plan(3, 1)).unwrap();
    assert_eq!(machine.advance(one, wants(2, 1)), [0, 1]);
    assert_eq!(machine.advance(other, wants(0, 0)), [] as [u32; 0]);
    machine.close(JOB, one);
    assert_eq!(machine.advance(other, wants(3, 0)), [0, 1, 2]);
    let late = Command::AdvanceLedger(JOB, one, machine.ledger().generation(), wants(1, 0));
    assert!(matches!(machine.apply(late), Err(Refused::NotFound(_))), "its session is closed");
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);
}

#[test]
fn only_workers_hold_tasks() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let kind = v1::SessionKind::Evaluator;
    let opening = Opening { name: "e".into(), kind, request_id: "r".into() };
    let Ok(Reply::Opened(evaluator)) = machine.apply(Command::OpenSession(JOB, opening)) else {
        panic!("not opened");
    };
    let refused = machine.define_tasks(evaluator, plan(3, 1));
    assert!(matches!(refused, Err(Refused::FailedPrecondition(_))));
    let refused = machine.define_tasks(SessionId(99), plan(3, 1));
    assert!(matches!(refused, Err(Refused::NotFound(_))));
}

#[test]
fn another_dataset_waits_for_the_end_of_the_first_and_takes_its_place() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let worker = machine.open(JOB);
    let other = || Plan { data: "e".into(), ..plan(1, 1) };
    machine.define_tasks(worker, plan(2, 1)).unwrap();
    machine.define_tasks(worker, other()).unwrap();
    assert_eq!(machine.ledger().plan().data, "e", "nothing of the first was trained");
    machine.define_tasks(worker, plan(2, 1)).unwrap();
    let generation = machine.ledger().generation();
    machine.advance(worker, wants(1, 0));
    let refused = machine.define_tasks(worker, other());
    let Err(Refused::AlreadyExists(text)) = refused else { panic!("{refused:?}") };
    assert!(text.contains("pass 1 of 1") && text.contains("other files"), "{text}");
    machine.finish_task(worker, 0);
    machine.finish_task(worker, 1);
    assert!(machine.ledger().is_over());
    machine.define_tasks(worker, plan(2, 3)).unwrap();
    assert!(!machine.ledger().is_over(), "more passes");
    assert_eq!(machine.ledger().generation(), generation, "it is the same ledger");
    machine.define_tasks(worker, plan(2, 1)).unwrap();
    assert_eq!(machine.ledger().plan().passes, 3, "fewer passes are none less");
    machine.advance(worker, Advance { leave: true, ..wants(0, 0) });
    assert!(machine.define_tasks(worker, other()).is_err(), "two passes are left");
}

/// A checkpoint that begins now, with all that comes back from its manifest.
fn captured(machine: &mut Machine, name: &str, while_open: impl FnOnce(&mut Machine)) -> Ledger {
    machine.apply(start(name)).unwrap();
    while_open(machine);
    machine.apply(saved(name, 1, 9)).unwrap();
    let manifest = machine.state.cluster().job(JOB).unwrap().manifest().unwrap();
    machine.apply(ended(name, "")).unwrap();
    manifest.ledger.unwrap()
}

#[test]
fn a_checkpoint_has_the_tasks_as_they_were_when_it_began_and_nobody_holds_them() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let worker = machine.open(JOB);
    machine.define_tasks(worker, plan(5, 2)).unwrap();
    machine.advance(worker, wants(2, 1));
    machine.finish_task(worker, 0);
    let ledger = captured(&mut machine, "a", |machine| {
        machine.finish_task(worker, 1);
    });
    assert_eq!(ledger.done(), 1, "what was done later may not be in the rows");
    assert_eq!(ledger.leased_and_pending(), (0, 4));
    assert_eq!(machine.ledger().done(), 2);
}

#[test]
fn a_job_that_is_set_back_or_restored_has_the_tasks_of_the_checkpoint_and_old_requests_change_nothing()
 {
    use downpour_core::checkpoint::SetBack;

    use crate::state::lost::{SettingBack, lost, place};
    let name = "19700101T000000-000-00000001";
    let (mut machine, _) = Machine::with_job(2, 1);
    let worker = machine.open(JOB);
    machine.define_tasks(worker, plan(5, 2)).unwrap();
    machine.advance(worker, wants(2, 1));
    machine.finish_task(worker, 0);
    let captured = captured(&mut machine, name, |_| ());
    machine.finish_task(worker, 1);
    let generation = machine.ledger().generation();
    let last = machine.route().primary.unwrap();
    machine.restart(last);
    let shards = place(machine.state.cluster(), &lost(machine.state.cluster()));
    let (uri, job, checkpoint) = ("file:///x".into(), "ctr".into(), name.into());
    let setting = SettingBack {
        job: JOB,
        from: SetBack { uri, job, checkpoint, shards: BTreeMap::new() },
        epoch_min: Epoch(5),
        shards,
        labels: BTreeMap::new(),
        initialized: Vec::new(),
        ledger: Some(captured.clone()),
    };
    machine.apply(Command::SetBack(setting)).unwrap();
    assert_eq!(machine.ledger().done(), 1);
    assert!(machine.ledger().generation() > generation);
    let late =
        Advance { turn: 9, done: vec![Done { position: 1, clock: 1, rows: 1 }], ..wants(3, 0) };
    machine.apply(Command::AdvanceLedger(JOB, worker, generation, late)).unwrap();
    assert_eq!(machine.ledger().done(), 1, "it was trained in rows that are gone");
    assert_eq!(machine.advance(worker, wants(2, 0)), [1, 2], "the session goes on");

    machine.pin("a");
    let mut restoring = super::checkpoints::restoring("again", false);
    if let Command::RestoreJob(restoring) = &mut restoring {
        restoring.ledger = Some(captured);
    }
    let Ok(Reply::Created { job, .. }) = machine.apply(restoring) else { panic!("not restored") };
    assert_eq!(machine.state.cluster().ledgers[&job].done(), 1);
    machine.apply(Command::DeleteJob(job, None)).unwrap();
    assert!(!machine.state.cluster().ledgers.contains_key(&job));
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);
}

#[test]
fn a_shard_that_is_lost_after_all_were_set_back_takes_no_tasks_with_it_until_all_were_again() {
    use downpour_core::checkpoint::SetBack;

    use crate::state::lost::{SettingBack, lost, place};
    let name = "19700101T000000-000-00000001";
    let mut machine = Machine::default();
    (0..4).for_each(|number| _ = machine.register(number));
    machine.apply(Command::CreateJob(job_spec("ctr", 2, 1))).unwrap();
    let worker = machine.open(JOB);
    machine.define_tasks(worker, plan(5, 1)).unwrap();
    let captured = machine.ledger().clone();
    machine.apply(start(name)).unwrap();
    machine.apply(ended(name, "")).unwrap();
    let lose = |machine: &mut Machine, shards: &[usize]| {
        for &shard in shards {
            let routes = &machine.state.cluster().job(JOB).unwrap().view.shards;
            let primary = routes[shard].primary.unwrap();
            machine.restart(primary);
        }
        let lost = lost(machine.state.cluster());
        assert_eq!(lost.len(), shards.len());
        let (uri, job, checkpoint) = ("file:///x".into(), "ctr".into(), name.into());
        let from = SetBack { uri, job, checkpoint, shards: BTreeMap::new() };
        let setting = SettingBack {
            job: JOB,
            from,
            epoch_min: Epoch(5),
            shards: place(machine.state.cluster(), &lost),
            labels: BTreeMap::new(),
            initialized: Vec::new(),
            ledger: Some(captured.clone()),
        };
        machine.apply(Command::SetBack(setting)).unwrap();
        *machine = Machine {
            state: State::restore(&machine.state.snapshot()).unwrap(),
            ..machine.clone()
        };
        machine.ledger().done()
    };
    let train = |machine: &mut Machine| {
        let first = machine.advance(worker, wants(1, 0))[0];
        machine.finish_task(worker, first);
    };
    train(&mut machine);
    assert_eq!(lose(&mut machine, &[0, 1]), 0);
    train(&mut machine);
    assert_eq!(lose(&mut machine, &[1]), 1, "what was trained since is in the other shard");
    assert_eq!(lose(&mut machine, &[1]), 1, "again");
    train(&mut machine);
    assert_eq!(lose(&mut machine, &[0]), 0, "now all were set back once more");
}
