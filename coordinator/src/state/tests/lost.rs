//! Lost shards that go on from a checkpoint.

use downpour_core::checkpoint::SetBack;
use downpour_core::id::{Epoch, VariableId};
use downpour_core::view::Admission;

use super::checkpoints::{ended, saved, start};
use super::*;
use crate::command::Restoring;
use crate::state::deletions::Filed;
use crate::state::lost::{Again, Last, Lost, SettingBack, lost, place};

const A: &str = "19700101T000000-000-00000001";
const B: &str = "19700101T000000-001-00000002";

fn setting(epoch_min: u64, shards: Vec<Again>) -> Command {
    let from = SetBack {
        uri: "file:///x".into(),
        job: "ctr".into(),
        checkpoint: A.into(),
        shards: [].into(),
    };
    let labels = [("position".to_owned(), "7".to_owned())].into();
    let (epoch_min, initialized) = (Epoch(epoch_min), Vec::new());
    let ledger = None;
    Command::SetBack(SettingBack { job: JOB, from, epoch_min, shards, labels, initialized, ledger })
}

impl Machine {
    /// A checkpoint of the only shard, in epoch 1, is whole.
    fn checkpoint(&mut self, name: &str) {
        for command in [start(name), saved(name, 1, 9), ended(name, "")] {
            assert_eq!(self.apply(command), Ok(Reply::Done));
        }
    }

    /// The only shard is lost, and what would set it back to [`A`].
    fn lose(&mut self) -> Command {
        let last = self.route().primary.unwrap();
        self.restart(last);
        let again = place(self.state.cluster(), &lost(self.state.cluster()));
        assert_eq!(again.len(), 1);
        setting(5, again)
    }

    fn is_set_back(&self) -> bool {
        self.state.cluster().job(JOB).unwrap().view.orders.set_back_in(ShardId(0)).is_some()
    }
}

#[test]
fn no_shard_begins_again_on_a_server_that_was_cordoned_meanwhile() {
    let (mut machine, _) = Machine::with_job(2, 1);
    machine.checkpoint(A);
    let setting = machine.lose();
    let Command::SetBack(SettingBack { ref shards, .. }) = setting else { panic!() };
    let cordoned = shards[0].server.node;
    machine.apply(Command::Admit(cordoned, Admission::Cordoned)).unwrap();
    machine.apply(setting.clone()).unwrap();
    assert!(!machine.is_set_back(), "it is about to end");
    machine.apply(Command::Admit(cordoned, Admission::Open)).unwrap();
    machine.apply(setting).unwrap();
    assert!(machine.is_set_back());
}

#[test]
fn a_shard_whose_last_copy_is_gone_begins_again_elsewhere_in_an_epoch_above_all() {
    let (mut machine, members) = Machine::with_job(2, 1);
    machine.checkpoint(A);
    let last = machine.route().primary.unwrap();
    assert!(lost(machine.state.cluster()).is_empty());
    machine.judge(last);
    let judged = machine.state.cluster().version;
    let unreachable = Lost {
        job: JOB,
        shard: ShardId(0),
        epoch: Epoch(1),
        last: Some(Last { server: last, judged, isolation_ms: 60_000 }),
    };
    assert_eq!(lost(machine.state.cluster()), [unreachable], "it may come back");
    let again = place(machine.state.cluster(), &[unreachable]);
    assert_ne!(again[0].server, last);
    let held = Again { server: last, ..again[0] };
    machine.apply(setting(1, vec![held])).unwrap();
    assert_eq!(machine.route().epoch, Epoch(1), "never where what was lost may still be");

    let life = machine.restart(last);
    assert_eq!(lost(machine.state.cluster()), [Lost { last: None, ..unreachable }]);
    assert!(members.contains(&last) && life != last);
    machine.apply(start(B)).unwrap();
    machine.apply(setting(5, again.clone())).unwrap();
    let job = machine.state.cluster().job(JOB).unwrap();
    let route = &job.view.shards[0];
    assert_eq!((route.epoch, route.primary), (Epoch(5), Some(again[0].server)));
    assert_eq!(route.in_sync, [again[0].server], "nobody else has it");
    assert_eq!(job.view.orders.set_back_in(ShardId(0)), Some(Epoch(5)));
    assert_eq!(job.view.orders.restore_of(ShardId(0)).unwrap().checkpoint, A);
    assert_eq!(job.labels["position"], "7", "all of it is at the checkpoint");
    assert!(job.view.orders.checkpoint.is_none(), "it may hold what is rolled back");
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);

    // The same wish comes late, or again.
    machine.apply(setting(5, again)).unwrap();
    assert_eq!(machine.route().epoch, Epoch(5));
}

#[test]
fn a_checkpoint_that_is_not_the_newest_any_more_sets_nothing_back_for_it_may_be_deleted() {
    let (mut machine, _) = Machine::with_job(2, 1);
    machine.checkpoint(A);
    machine.apply(start(B)).unwrap();
    machine.apply(saved(B, 1, 10)).unwrap();
    let setting = machine.lose();
    // The leader was reading the manifest of the first when the second became whole.
    machine.apply(ended(B, "")).unwrap();
    machine.apply(setting).unwrap();
    assert!(!machine.is_set_back());
    assert_eq!(lost(machine.state.cluster()).len(), 1, "the next round takes the newest");
}

#[test]
fn what_shards_were_set_back_to_is_in_use_also_where_a_newer_one_has_a_manifest() {
    let (mut machine, _) = Machine::with_job(2, 1);
    machine.checkpoint(A);
    machine.apply(start(B)).unwrap();
    machine.apply(saved(B, 1, 10)).unwrap();
    let setting = machine.lose();
    machine.apply(setting).unwrap();
    assert!(machine.is_set_back());
    // Its manifest may be written, but it was given up.
    machine.apply(ended(B, "")).unwrap();
    let cluster = machine.state.cluster();
    let whole = cluster.job(JOB).unwrap().checkpoints.whole.as_ref();
    assert_eq!(whole.map(|whole| whole.checkpoint.as_str()), Some(A));
    let used = cluster.checkpoints_in_use();
    assert_eq!(used, [Filed::new("file:///x/", "ctr", A)].into());
}

#[test]
fn first_values_that_a_checkpoint_lacks_are_never_said_to_be_there_after_a_set_back() {
    let (mut machine, _) = Machine::with_job(2, 1);
    let session = machine.open(JOB);
    assert_eq!(machine.define(session, dense("net")), (session, false));
    let mark = Command::MarkInitialized(JOB, session, vec![VariableId(1)]);
    machine.checkpoint(A);
    let setting = machine.lose();

    let mut marked = machine.clone();
    marked.apply(mark.clone()).unwrap();
    marked.apply(setting.clone()).unwrap();
    assert!(!marked.is_set_back(), "it would be half there");

    machine.apply(setting).unwrap();
    assert!(machine.is_set_back());
    assert!(
        matches!(machine.apply(mark), Err(Refused::FailedPrecondition(_))),
        "acknowledged before"
    );
    assert_eq!(machine.define(session, dense("net")), (session, false), "they are given again");
}

#[test]
fn a_name_says_nothing_of_the_old_process_while_that_has_the_last_copy() {
    let (mut machine, members) = Machine::with_job(3, 2);
    let (first, second) = (members[0], members[1]);
    let number = |server: ServerRef| server.node.0 - 1;
    // Another member has all that the old process can still acknowledge.
    assert!(machine.register_from(number(first), "elsewhere", false).is_ok());
    assert_eq!(machine.route().in_sync, [second]);
    let refused = |outcome: Outcome| matches!(outcome, Err(Refused::Later(_)));
    assert!(refused(machine.register_from(number(second), "elsewhere", false)));
    machine.judge(second);
    assert!(refused(machine.register_from(number(second), "elsewhere", false)));
    assert!(refused(machine.register_from(number(second), "", false)), "no proof either");
    assert_eq!(machine.route().primary, Some(second), "it may go on somewhere");
    machine.apply(Command::Revive(second)).unwrap();
    assert!(lost(machine.state.cluster()).is_empty(), "it did");

    let mut proven = machine.clone();
    assert!(proven.register_from(number(second), "here", false).is_ok(), "it listens there now");
    assert_eq!(lost(proven.state.cluster())[0].last, None);
    assert!(machine.register_from(number(second), "elsewhere", true).is_ok(), "the operator knows");
    assert_eq!(lost(machine.state.cluster())[0].last, None);
}

#[test]
fn a_last_copy_that_was_heard_in_between_is_waited_for_anew() {
    let (mut machine, _) = Machine::with_job(2, 1);
    machine.checkpoint(A);
    let last = machine.route().primary.unwrap();
    machine.judge(last);
    let before = lost(machine.state.cluster());
    let late = setting(5, place(machine.state.cluster(), &before));
    machine.apply(Command::Revive(last)).unwrap();
    machine.judge(last);
    assert_ne!(lost(machine.state.cluster()), before);
    machine.apply(late).unwrap();
    assert!(!machine.is_set_back(), "it may have acknowledged since");
    let again = place(machine.state.cluster(), &lost(machine.state.cluster()));
    machine.apply(setting(5, again)).unwrap();
    assert!(machine.is_set_back());
}

#[test]
fn whoever_saw_a_job_lost_neither_deletes_nor_replaces_what_was_set_back_since() {
    let (mut machine, _) = Machine::with_job(2, 1);
    machine.checkpoint(A);
    machine.pin("a");
    let setting = machine.lose();
    let seen = machine.state.cluster().job(JOB).unwrap().view.version;
    let delete = Command::DeleteJob(JOB, Some(seen));
    let Command::RestoreJob(restore) = super::checkpoints::restoring("ctr", true) else { panic!() };
    let restore = |if_version| Command::RestoreJob(Restoring { if_version, ..restore.clone() });

    assert_eq!(machine.clone().apply(delete.clone()), Ok(Reply::Done), "nothing happened since");
    let replaced = machine.clone().apply(restore(Some(seen)));
    assert!(matches!(replaced, Ok(Reply::Created { created: true, .. })), "{replaced:?}");

    machine.apply(setting).unwrap();
    let refused = |outcome: Outcome| matches!(outcome, Err(Refused::Conflict(_)));
    assert!(refused(machine.apply(delete)) && refused(machine.apply(restore(Some(seen)))));
    assert!(machine.is_set_back(), "it is as it was");
    let replaced = machine.apply(restore(None));
    assert!(matches!(replaced, Ok(Reply::Created { created: true, .. })), "{replaced:?}");
}
