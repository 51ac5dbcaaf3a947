//! Lost shards that go on from a checkpoint.

use downpour_core::checkpoint::SetBack;
use downpour_core::id::Epoch;

use super::checkpoints::start;
use super::*;
use crate::state::lost::{Again, Lost, SettingBack, lost, place};

fn setting(epoch_min: u64, shards: Vec<Again>) -> Command {
    let from = SetBack {
        uri: "file:///x".into(),
        job: "ctr".into(),
        checkpoint: "a".into(),
        shards: [].into(),
    };
    let labels = [("position".to_owned(), "7".to_owned())].into();
    Command::SetBack(SettingBack { job: JOB, from, epoch_min: Epoch(epoch_min), shards, labels })
}

#[test]
fn a_shard_whose_last_copy_is_gone_begins_again_elsewhere_in_an_epoch_above_all() {
    let (mut machine, members) = Machine::with_job(2, 1);
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
    machine.apply(start("b")).unwrap();
    machine.apply(setting(5, again.clone())).unwrap();
    let job = machine.state.cluster().job(JOB).unwrap();
    let route = &job.view.shards[0];
    assert_eq!((route.epoch, route.primary), (Epoch(5), Some(again[0].server)));
    assert_eq!(route.in_sync, [again[0].server], "nobody else has it");
    assert_eq!(job.view.orders.set_back_in(ShardId(0)), Some(Epoch(5)));
    assert_eq!(job.view.orders.restore_of(ShardId(0)).unwrap().checkpoint, "a");
    assert_eq!(job.labels["position"], "7", "all of it is at the checkpoint");
    assert!(job.view.orders.checkpoint.is_none(), "it may hold what is rolled back");
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);

    // The same wish comes late, or again.
    machine.apply(setting(5, again)).unwrap();
    assert_eq!(machine.route().epoch, Epoch(5));
}
