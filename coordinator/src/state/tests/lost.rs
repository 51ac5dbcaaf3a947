//! Lost shards that go on from a checkpoint.

use downpour_checkpoint::name::CheckpointName;
use downpour_core::checkpoint::SetBack;
use downpour_core::id::{Epoch, VariableId};

use super::checkpoints::{end, saved, start};
use super::*;
use crate::state::checkpoints::checkpoints_in_use;
use crate::state::lost::{Again, Lost, SettingBack, lost, place};

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
    Command::SetBack(SettingBack { job: JOB, from, epoch_min, shards, labels, initialized })
}

impl Machine {
    /// A checkpoint of the only shard, in epoch 1, is whole.
    fn checkpoint(&mut self, name: &str) {
        for command in [start(name), saved(name, 1, 9), end(name, "")] {
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

    /// As a worker that read its label at this version of the job's view.
    fn label(&mut self, since: u64, value: &str, expected: &str) -> (bool, String) {
        let (key, value) = ("position".into(), value.into());
        let change =
            LabelChange { key, value, expected: Some(expected.into()), since: Some(since) };
        match self.apply(Command::LabelJob(JOB, change)) {
            Ok(Reply::Labelled { changed, value }) => (changed, value),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_shard_whose_last_copy_is_gone_begins_again_elsewhere_in_an_epoch_above_all() {
    let (mut machine, members) = Machine::with_job(2, 1);
    machine.checkpoint(A);
    let last = machine.route().primary.unwrap();
    assert!(lost(machine.state.cluster()).is_empty());
    machine.judge(last);
    let unreachable = Lost { job: JOB, shard: ShardId(0), epoch: Epoch(1), known: false };
    assert_eq!(lost(machine.state.cluster()), [unreachable], "it may come back");
    let again = place(machine.state.cluster(), &[unreachable]);
    assert_ne!(again[0].server, last);
    let held = Again { server: last, ..again[0] };
    machine.apply(setting(1, vec![held])).unwrap();
    assert_eq!(machine.route().epoch, Epoch(1), "never where what was lost may still be");

    let life = machine.restart(last);
    assert_eq!(lost(machine.state.cluster()), [Lost { known: true, ..unreachable }]);
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
    machine.apply(end(B, "")).unwrap();
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
    machine.apply(end(B, "")).unwrap();
    let cluster = machine.state.cluster();
    let whole = cluster.job(JOB).unwrap().checkpoints.whole.as_ref();
    assert_eq!(whole.map(|whole| whole.checkpoint.as_str()), Some(A));
    let used = checkpoints_in_use(cluster, "file:///x", "ctr");
    assert!(used.contains(&CheckpointName::new(A).unwrap()), "{used:?}");
    assert!(checkpoints_in_use(cluster, "file:///y", "ctr").is_empty());
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
fn a_worker_that_slept_finds_its_label_set_back_although_it_says_the_same() {
    let (mut machine, _) = Machine::with_job(2, 1);
    assert!(machine.label(1, "7", "").0);
    machine.checkpoint(A);
    let since = machine.state.cluster().job(JOB).unwrap().view.version;
    let setting = machine.lose();
    machine.apply(setting).unwrap();
    assert_eq!(machine.label(since, "9", "7"), (false, "7".into()), "8 and 9 were rolled back");
    let since = machine.state.cluster().job(JOB).unwrap().view.version;
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);
    assert_eq!(machine.label(since, "8", "7"), (true, "8".into()));
}
