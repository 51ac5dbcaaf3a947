//! Checkpoints: who may report, what ends one, and what a job begins with that is made of one.

use downpour_core::checkpoint::{CheckpointOrder, RestoreOrder};
use downpour_core::consistency::Consistency;
use downpour_core::id::{Epoch, Lsn, VariableId};
use downpour_core::spec::Variable;
use downpour_proto::v1;

use super::*;
use crate::command::{CheckpointEnd, CheckpointStart, ConsistencyChange, Restoring};
use crate::state::deletions::Filed;

const URI: &str = "file:///x";

pub(super) fn start(name: &str) -> Command {
    begun(URI, name)
}

pub(crate) fn begun(uri: &str, name: &str) -> Command {
    let order =
        CheckpointOrder { uri: uri.into(), checkpoint: name.into(), newer_than: Vec::new() };
    Command::BeginCheckpoint(CheckpointStart {
        job: JOB,
        order,
        created_ms: 5,
        chain: Vec::new(),
        clock: 0,
    })
}

pub(crate) fn saved(name: &str, epoch: u64, lsn: u64) -> Command {
    let saved = v1::ShardSaved { shard: 0, epoch, lsn, bytes: 7, ..Default::default() };
    Command::ShardsSaved(JOB, name.into(), vec![saved])
}

pub(crate) fn ended(name: &str, error: &str) -> Command {
    let (checkpoint, error) = (name.into(), error.into());
    Command::EndCheckpoint(CheckpointEnd { job: JOB, checkpoint, error, ended_ms: 9 })
}

impl Machine {
    fn done(&mut self, command: Command) {
        assert_eq!(self.apply(command), Ok(Reply::Done));
    }

    /// A checkpoint of the job `ctr` is about to be read.
    pub(super) fn pin(&mut self, name: &str) {
        self.done(Command::Pin(filed(name)));
    }

    /// What is old by the leader's list, the newest first, each with what it builds on.
    fn condemn(&mut self, old: &[(&str, &[&str])]) {
        let entry = |&(name, chain): &(&str, &[&str])| {
            (filed(name), chain.iter().map(|base| filed(base)).collect())
        };
        self.done(Command::Condemn(old.iter().map(entry).collect()));
    }

    pub(crate) fn condemned(&self) -> Vec<&str> {
        let condemned = self.state.cluster().deletions.condemned.iter();
        condemned.map(|one| one.checkpoint.as_str()).collect()
    }

    fn job(&self) -> &crate::state::Job {
        self.state.cluster().job(JOB).unwrap()
    }
}

#[test]
fn one_checkpoint_at_a_time_is_whole_when_each_shard_is_stored() {
    let (mut machine, _) = Machine::with_job(2, 2);
    machine.done(start("a"));
    assert!(machine.job().manifest().is_none(), "no shard is stored");
    assert!(matches!(machine.apply(start("b")), Err(Refused::Conflict(_))));
    machine.done(saved("b", 1, 9));
    assert!(machine.job().manifest().is_none(), "a report of another checkpoint");
    machine.done(saved("a", 1, 9));
    let manifest = machine.job().manifest().unwrap();
    assert_eq!((manifest.files[0].lsn, manifest.files[0].bytes), (Lsn(9), 7));
    machine.done(ended("b", ""));
    assert!(machine.job().view.orders.checkpoint.is_some(), "another one ended");
    machine.done(ended("a", ""));
    assert_eq!(machine.job().view.orders.checkpoint, None);
    assert_eq!(machine.job().base(URI), Some("a"));
    assert_eq!(machine.job().base("file:///y"), None, "increments stay with their base");
    machine.done(start("b"));
    machine.done(ended("b", "no"));
    assert_eq!(machine.job().base(URI), Some("a"), "what failed is no base");
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);
}

#[test]
fn a_primary_that_was_replaced_reports_in_vain_and_the_first_file_counts() {
    let (mut machine, members) = Machine::with_job(2, 2);
    machine.done(start("a"));
    machine.judge(members[0]);
    assert_eq!(machine.route().epoch, Epoch(2));
    machine.done(saved("a", 1, 9));
    assert!(machine.job().manifest().is_none(), "the old primary's file");
    machine.done(saved("a", 2, 8));
    machine.done(saved("a", 2, 10));
    assert_eq!(machine.job().manifest().unwrap().files[0].lsn, Lsn(8));
}

fn filed(name: &str) -> Filed {
    Filed::new(URI, "ctr", name)
}

pub(super) fn restoring(name: &str, replace: bool) -> Command {
    let spec = VariableSpec {
        name: "d".into(),
        optimizer: OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 }),
        shape: Shape::Dense(DenseSpec { shape: vec![3], block_floats: 2 }),
    };
    let order = RestoreOrder {
        uri: URI.into(),
        job: "ctr".into(),
        checkpoint: "a".into(),
        epoch: Epoch(7),
    };
    Command::RestoreJob(Restoring {
        spec: job_spec(name, 1, 2),
        variables: vec![Variable { id: VariableId(1), spec }],
        initialized: vec![VariableId(1)],
        labels: [("k".into(), "v".into())].into(),
        high_water: 40,
        order,
        replace,
        if_version: None,
        ledger: None,
        consistency: Consistency::hybrid(1),
    })
}

#[test]
fn a_restored_job_begins_after_its_checkpoint_with_all_old_sessions_ended() {
    let (mut machine, _) = Machine::with_job(2, 2);
    assert!(matches!(machine.apply(restoring("ctr", false)), Err(Refused::AlreadyExists(_))));
    machine.pin("a");
    let created = machine.apply(restoring("ctr", true));
    let Ok(Reply::Created { job, created: true }) = created else { panic!("{created:?}") };
    assert!(machine.state.cluster().job(JOB).is_none(), "replaced in the same step");
    // A client that asks again after it lost the answer.
    let same = Ok(Reply::Created { job, created: false });
    assert_eq!(machine.apply(restoring("ctr", true)), same);
    let restored = machine.state.cluster().job(job).unwrap();
    let route = &restored.view.shards[0];
    assert_eq!(route.epoch, Epoch(7));
    assert_eq!(route.in_sync, route.primary.into_iter().collect::<Vec<_>>(), "nobody else has it");
    assert_eq!(restored.view.consistency, Consistency::hybrid(1), "the modes it was saved with");
    assert!(restored.view.sessions.contains(SessionId(40)));
    let opening =
        Opening { name: "w".into(), kind: v1::SessionKind::Worker, request_id: "r".into() };
    let opened = machine.apply(Command::OpenSession(job, opening));
    assert_eq!(opened, Ok(Reply::Opened(SessionId(41))), "no number comes twice");
    let defined = machine.state.cluster().job(job).unwrap();
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);
    let again =
        Command::DefineVariables(job, SessionId(41), vec![defined.view.variables[0].spec.clone()]);
    let Ok(Reply::Defined { variables, .. }) = machine.apply(again) else { panic!("not defined") };
    assert!(variables[0].initialized, "its first values are in the checkpoint");
    // Somebody worked with it: without being told to replace it, it is what was asked for before.
    assert_eq!(machine.apply(restoring("ctr", false)), same);
    let replaced = machine.apply(restoring("ctr", true));
    let Ok(Reply::Created { job: newer, created: true }) = replaced else { panic!("{replaced:?}") };
    let lost = machine.state.cluster().job(newer).unwrap().view.shards[0].primary.unwrap();
    let name = machine.state.cluster().nodes[&lost.node].view.name.clone();
    machine.register(name.trim_start_matches("ps-").parse().unwrap());
    assert_eq!(machine.state.cluster().job(newer).unwrap().view.shards[0].primary, None);
    let replaced = machine.apply(restoring("ctr", true));
    assert!(matches!(replaced, Ok(Reply::Created { created: true, .. })), "a shard was lost");
}

#[test]
fn a_checkpoint_says_of_labels_and_first_values_what_held_when_it_began() {
    let (mut machine, _) = Machine::with_job(2, 2);
    let opening =
        Opening { name: "w".into(), kind: v1::SessionKind::Worker, request_id: "r".into() };
    let Ok(Reply::Opened(session)) = machine.apply(Command::OpenSession(JOB, opening)) else {
        panic!("not opened")
    };
    let spec = |name: &str| VariableSpec {
        name: name.into(),
        optimizer: OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 }),
        shape: Shape::Dense(DenseSpec { shape: vec![3], block_floats: 2 }),
    };
    let both = Command::DefineVariables(JOB, session, vec![spec("a"), spec("b")]);
    assert!(matches!(machine.apply(both), Ok(Reply::Defined { .. })));
    machine.done(Command::MarkInitialized(JOB, session, vec![VariableId(1)]));
    let label = |value: &str| {
        let (key, value) = ("done".into(), value.into());
        Command::LabelJob(JOB, LabelChange { key, value, expected: None })
    };
    assert!(machine.apply(label("1 of 2")).is_ok());
    let mode = |consistency| Command::SetConsistency(JOB, ConsistencyChange::All(consistency));
    assert!(machine.apply(mode(Consistency::hybrid(2))).is_ok());
    machine.done(start("a"));
    assert!(machine.apply(mode(Consistency::default())).is_ok());
    machine.done(Command::MarkInitialized(JOB, session, vec![VariableId(2)]));
    assert!(machine.apply(label("2 of 2")).is_ok());
    machine.done(saved("a", 1, 9));
    let manifest = machine.job().manifest().unwrap();
    assert_eq!(manifest.initialized, [VariableId(1)]);
    assert_eq!(manifest.labels["done"], "1 of 2");
    assert_eq!(manifest.consistency, Consistency::hybrid(2));
}

#[test]
fn a_client_that_lost_the_answer_finds_the_checkpoint_that_it_began() {
    let (mut machine, _) = Machine::with_job(2, 2);
    let name = downpour_checkpoint::name::CheckpointName::at(5, 0xAB);
    machine.done(start(name.as_str()));
    assert_eq!(machine.job().begun(0xAB), Some((name.clone(), 0)));
    assert_eq!(machine.job().begun(0xAC), None, "another request");
    machine.done(ended(name.as_str(), ""));
    assert_eq!(machine.job().begun(0xAB), Some((name, 0)), "it may have ended meanwhile");
}

// Protocol 8.6.

#[test]
fn what_is_condemned_is_never_used_again_and_what_is_used_or_about_to_be_is_never_condemned() {
    let (mut machine, _) = Machine::with_job(2, 2);
    // A leader has listed what is old, and sleeps; somebody begins to restore the second of them.
    let old: [(&str, &[&str]); 4] = [("d", &["c"]), ("c", &[]), ("b", &["a"]), ("a", &[])];
    machine.pin("b");
    machine.condemn(&old);
    assert_eq!(machine.condemned(), ["c", "d"], "what it builds on stays, too");
    assert!(matches!(machine.apply(Command::Pin(filed("c"))), Err(Refused::Later(_))));
    let Command::RestoreJob(restore) = restoring("other", false) else { panic!() };
    let of = |name: &str| {
        let order = RestoreOrder { checkpoint: name.into(), ..restore.order.clone() };
        Command::RestoreJob(Restoring { order, ..restore.clone() })
    };
    for name in ["a", "c"] {
        let refused = machine.apply(of(name));
        assert!(matches!(refused, Err(Refused::Later(_))), "{name} was not pinned: {refused:?}");
    }
    assert!(machine.apply(of("b")).is_ok());
    // The job uses it now; a leader that hears of that late changes nothing.
    machine.state.tell_time(u64::MAX);
    machine.condemn(&old);
    assert_eq!(machine.condemned(), ["c", "d"]);
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);
    machine.done(Command::Forget(vec![(filed("d"), Vec::new())]));
    assert_eq!(machine.condemned(), ["c"]);
}

#[test]
fn what_is_used_where_its_place_is_written_otherwise_is_not_condemned() {
    let (mut machine, _) = Machine::with_job(2, 2);
    for (here, there) in [
        ("file:///x", "file:///x//"),
        ("file:///x/y", "file:////x/./y"),
        ("s3://bucket/x", "s3://bucket//x/"),
    ] {
        let filed = |uri| Filed::new(uri, "ctr", "a");
        machine.done(Command::Pin(filed(there)));
        machine.done(Command::Condemn(vec![(filed(here), Vec::new())]));
        assert!(machine.condemned().is_empty(), "{there} is {here}");
    }
    let other = Filed::new("file:///x/y/z", "ctr", "a");
    machine.done(Command::Condemn(vec![(other, Vec::new())]));
    assert_eq!(machine.condemned(), ["a"]);
}

#[test]
fn a_pin_that_nobody_uses_ends_and_what_was_read_under_it_counts_no_more() {
    let (mut machine, _) = Machine::with_job(2, 2);
    machine.pin("a");
    machine.state.tell_time(900_000);
    machine.condemn(&[("a", &[])]);
    assert_eq!(machine.condemned(), ["a"]);
    assert!(matches!(machine.apply(restoring("other", false)), Err(Refused::Later(_))));
    // More than there is room for.
    for name in 0..65 {
        machine.pin(&format!("p-{name}"));
    }
    machine.condemn(&[("p-1", &[]), ("p-0", &[])]);
    assert_eq!(machine.condemned(), ["a", "p-0"]);
}

#[test]
fn what_an_open_checkpoint_builds_on_stays_and_none_begins_on_what_is_condemned() {
    let (mut machine, _) = Machine::with_job(2, 2);
    let on = |base: &str| {
        let Command::BeginCheckpoint(mut begin) = start("c") else { panic!() };
        begin.chain = vec![base.into()];
        Command::BeginCheckpoint(begin)
    };
    machine.condemn(&[("a", &[])]);
    assert!(matches!(machine.apply(on("a")), Err(Refused::Later(_))));
    machine.done(on("b"));
    machine.condemn(&[("b", &[])]);
    assert_eq!(machine.condemned(), ["a"]);
    machine.done(ended("c", "no"));
    machine.condemn(&[("b", &[])]);
    assert_eq!(machine.condemned(), ["a", "b", "c"], "it was given up");
}

#[test]
fn every_checkpoint_that_is_given_up_is_condemned_and_not_only_the_last_one() {
    let (mut machine, _) = Machine::with_job(2, 1);
    for name in ["a", "b"] {
        machine.done(start(name));
        machine.done(ended(name, "no"));
    }
    assert_eq!(machine.condemned(), ["a", "b"]);
    // A leader had written its manifest, and somebody makes a job of it.
    machine.done(start("c"));
    machine.pin("c");
    machine.done(ended("c", "no"));
    assert_eq!(machine.condemned(), ["a", "b"]);
    machine.done(start("d"));
    machine.done(Command::DeleteJob(JOB, None));
    assert_eq!(machine.condemned(), ["a", "b", "d"], "it went with its job");
}
