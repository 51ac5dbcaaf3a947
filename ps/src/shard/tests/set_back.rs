//! A shard that goes on from a checkpoint while its sessions do (docs/protocol.md 8.5).

use downpour_core::checkpoint::SetBack;
use downpour_core::id::Epoch;
use downpour_proto::v1::cut_piece::Piece;

use super::fixture::*;
use super::*;
use crate::cut::Loader;
use crate::shard::Basis;

/// What a cut of `shard` holds now.
pub(super) fn saved(shard: &mut Shard) -> ShardState {
    let cut = shard.open_cut(Lsn::ZERO).expect("it serves");
    let mut loader = Loader::new(shard.state().identity());
    loop {
        let piece = shard.read_cut(cut, 1 << 20).expect("open");
        let end = matches!(piece, Piece::End(_));
        loader.take(piece).expect("in turn");
        if end {
            shard.close_cut(cut);
            return loader.finish().expect("whole");
        }
    }
}

#[test]
fn numbers_given_before_a_shard_was_set_back_are_void_also_where_they_fit() {
    let [mut old] = cluster::<1>();
    for sequence in 1..=2 {
        ticket(push(&mut old, counting(sequence, &[5])));
    }
    let checkpoint = saved(&mut old);
    for sequence in 3..=4 {
        ticket(push(&mut old, counting(sequence, &[5])));
    }
    let view = changed(&view(2, route(3, 2, 2, &[2])), |view| {
        let (uri, job, checkpoint) = ("file:///x".into(), "job".into(), "a".into());
        let shards = [(ShardId(0), Epoch(3))].into();
        view.orders.set_back(SetBack { uri, job, checkpoint, shards });
    });
    let mut shard =
        Shard::restored(server(2), ShardId(0), LOG_BYTES_MAX, Arc::clone(&view), checkpoint);
    assert!(matches!(shard.role(), Role::Primary(_)));
    assert_eq!(shard.state().numbering(), Epoch(3));
    assert_eq!(shard.last(), Lsn::new(Epoch(3), 1), "the first record says so");

    let (epoch, numbering) = (Epoch(3), Epoch(3));
    let void = Basis { epoch, view_version: 1, numbering: Epoch(0), read: None };
    for sequence in [1, 3, 5] {
        let answer = shard.push(void, counting(sequence, &[5]), Contact::Leased, u64::MAX);
        assert_eq!(answer, Pushed::Gap { expected: 3, numbering }, "{sequence}");
    }
    let now = Basis { numbering, ..void };
    ticket(shard.push(now, counting(3, &[5]), Contact::Leased, u64::MAX));
    assert!(ticket(shard.push(now, counting(2, &[5]), Contact::Leased, u64::MAX)).repeated);

    let copy = saved(&mut shard);
    assert_eq!(copy.numbering(), numbering, "who is copied from here knows it");
    assert_eq!(copy.digest(), shard.state().digest());

    // The same view where something older is still in memory: it is not what the epoch begins with.
    let named_again = changed(&view, |view| {
        view.shards[0].primary = Some(server(1));
        view.shards[0].in_sync = vec![server(1)];
    });
    // It had asked for a change when it was cut off, and reads the route before the view.
    let read_back = named_again.shards[0].clone();
    old.on_route(&read_back);
    assert_eq!(old.epoch(), Epoch(1), "it serves the new epoch with nothing but the checkpoint");
    old.on_view(named_again);
    assert!(matches!(old.role(), Role::Removed));
}
