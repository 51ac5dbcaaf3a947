//! A member is added while pushes go on (docs/protocol.md 3.2, 3.4 and 6).

use downpour_core::id::Lsn;
use downpour_proto::v1::RetryReason;

use super::*;
use crate::cut::Loader;
use crate::shard::{Copy, Proposal};

fn joining(mut route: ShardRoute, node: u32) -> ShardRoute {
    route.joining = Some(server(node));
    route
}

/// Reads a cut to its end, with `between` after each piece.
fn read(primary: &mut Shard, copy: Copy, mut between: impl FnMut(&mut Shard)) -> ShardState {
    let mut loader = Loader::new(primary.state().identity());
    loop {
        let piece = primary.read_cut(copy.cut, 64).expect("it is open");
        if loader.take(piece).expect("it fits") {
            return loader.finish().expect("whole");
        }
        between(primary);
    }
}

fn hosted(copy: Copy, view: &Arc<JobView>, state: ShardState) -> Shard {
    let tenure = (copy.epoch, copy.set_version);
    Shard::joining(copy.server, LOG_BYTES_MAX, Arc::clone(view), state, tenure)
}

/// A primary, alone, that has pushes and is to copy the shard to server 2; with version 3 of the set.
fn alone() -> (Shard, Arc<JobView>) {
    let [mut primary] = cluster();
    let values = Change::Values(blocks(&[0, 1, 2], 21, 2.0));
    ticket(push(&mut primary, push_of(SessionId(9), 1, vec![update(DENSE, values)])));
    for sequence in 1..=20 {
        ticket(push(&mut primary, counting(sequence, &[5, sequence + 100])));
    }
    let view = view(2, joining(route(1, 3, 1, &[1]), 2));
    primary.on_view(Arc::clone(&view));
    (primary, view)
}

/// The same, and the copy is there.
fn with_copy() -> (Shard, Shard, Arc<JobView>) {
    let (mut primary, view) = alone();
    let copy = primary.begin_copy().expect("it is wanted");
    let state = read(&mut primary, copy, |_| ());
    let learner = hosted(copy, &view, state);
    primary.copied(copy.cut);
    (primary, learner, view)
}

fn proposed() -> Option<Proposal> {
    Some(Proposal { epoch: Epoch(1), set_version: 3, server: server(2) })
}

#[test]
fn a_new_member_gets_a_cut_and_the_log_after_it_and_pushes_wait_for_neither() {
    let (mut primary, view) = alone();
    assert!(primary.take_effects().copy);
    let copy = primary.begin_copy().expect("it is wanted");
    assert_eq!(primary.begin_copy(), None, "once");
    let mut sequence = 20;
    let state = read(&mut primary, copy, |primary| {
        sequence += 1;
        let pushed = ticket(push(primary, counting(sequence, &[5, sequence])));
        assert!(acknowledged(primary, &pushed));
    });
    assert!(sequence > 30);
    let mut learner = hosted(copy, &view, state);
    assert!(matches!(learner.role(), Role::Joining));
    assert!(learner.last() < primary.last());
    primary.copied(copy.cut);
    replicate(&mut primary, &mut learner);
    assert_eq!(encoded(&primary), encoded(&learner));
    assert!(primary.take_effects().propose);
    assert_eq!(primary.proposal(), proposed());
    // Committed, and read back here and there.
    let with_it = view_of(&view, route(1, 4, 1, &[1, 2]));
    primary.on_view(Arc::clone(&with_it));
    learner.on_view(with_it);
    assert!(matches!(learner.role(), Role::Backup) && primary.learner().is_none());
    let pushed = ticket(push(&mut primary, counting(sequence + 1, &[5])));
    assert_eq!(primary.settle(&pushed, Contact::Late), Settled::Pending, "and it needs no lease");
    replicate(&mut primary, &mut learner);
    assert_eq!(primary.settle(&pushed, Contact::Late), Settled::Acknowledged);
    // It can lead: it knows the session.
    learner
        .on_view(changed(&view, |view| (view.version, view.shards[0]) = (9, route(2, 5, 2, &[2]))));
    assert!(ticket(push(&mut learner, counting(sequence + 1, &[5]))).repeated);
}

fn view_of(view: &Arc<JobView>, route: ShardRoute) -> Arc<JobView> {
    changed(view, |view| (view.version, view.shards[0]) = (view.version + 1, route))
}

#[test]
fn from_its_proposal_a_member_is_waited_for_until_the_outcome_is_read_back() {
    let (mut primary, mut learner, _) = with_copy();
    assert_eq!(primary.proposal(), proposed());
    let pushed = ticket(push(&mut primary, counting(21, &[5])));
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending, "it may be a member");
    primary.drop_learner(|_| true);
    primary.on_route(&joining(route(1, 3, 1, &[1]), 2));
    primary.on_route(&route(1, 2, 1, &[1]));
    assert_eq!(
        primary.settle(&pushed, Contact::Leased),
        Settled::Pending,
        "what is known is as old as the proposal"
    );
    assert_eq!(primary.proposal(), proposed(), "asked for again");
    // A newer set without it: the proposal can no longer succeed.
    primary.on_route(&route(1, 4, 1, &[1]));
    assert!(acknowledged(&primary, &pushed));
    assert_eq!(primary.proposal(), None);
    replicate(&mut primary, &mut learner);
    assert_eq!(count(&learner, 5), 20.0, "and nothing is sent to it");
}

#[test]
fn a_proposal_on_a_set_that_changed_is_made_again_on_the_new_one() {
    let [mut primary, mut second] = cluster();
    primary.on_route(&joining(route(1, 2, 1, &[1, 2]), 3));
    let copy = primary.begin_copy().expect("it is wanted");
    read(&mut primary, copy, |_| ());
    primary.copied(copy.cut);
    assert_eq!(primary.proposal().map(|one| one.set_version), Some(2));
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    replicate(&mut primary, &mut second);
    primary.on_route(&joining(route(1, 3, 1, &[1]), 3));
    assert_eq!(
        primary.settle(&pushed, Contact::Leased),
        Settled::Pending,
        "it is still waited for"
    );
    assert_eq!(primary.proposal().map(|one| one.set_version), Some(3));
}

#[test]
fn a_copy_is_made_again_after_a_set_that_was_not_seen_here_for_it_may_have_been_dropped_there() {
    let (mut primary, mut learner, view) = with_copy();
    // The server is not heard, and then it is again: versions 4 and 5 of the set. The server is told both, the primary only the second.
    learner.on_view(view_of(&view, route(1, 4, 1, &[1])));
    assert!(matches!(learner.role(), Role::Removed));
    primary.take_effects();
    primary.on_route(&joining(route(1, 5, 1, &[1]), 2));
    assert_eq!(primary.proposal(), None, "it has nothing");
    assert!(primary.take_effects().copy && primary.begin_copy().is_some());
}

#[test]
fn a_member_that_may_not_be_committed_counts_neither_for_the_lease_nor_for_min_in_sync() {
    let (mut primary, mut learner, view) = with_copy();
    assert_eq!(primary.proposal(), proposed());
    let pushed = ticket(push(&mut primary, counting(21, &[5])));
    replicate(&mut primary, &mut learner);
    let without = Declined::Retry(RetryReason::NoLease);
    assert_eq!(primary.settle(&pushed, Contact::Late), Settled::Declined(without));
    assert!(acknowledged(&primary, &pushed));
    let strict = changed(&view, |view| view.spec.min_in_sync = 2);
    primary.on_view(Arc::clone(&strict));
    assert_eq!(push(&mut primary, counting(22, &[5])), retry(RetryReason::TooFewInSync));
    primary.on_view(view_of(&strict, route(1, 4, 1, &[1, 2])));
    ticket(push(&mut primary, counting(22, &[5])));
}

#[test]
fn a_member_is_proposed_only_when_it_has_what_the_primary_had_when_it_began_to_wait() {
    let (mut primary, view) = alone();
    let copy = primary.begin_copy().expect("it is wanted");
    let state = read(&mut primary, copy, |_| ());
    let mut learner = hosted(copy, &view, state);
    ticket(push(&mut primary, counting(21, &[5])));
    primary.copied(copy.cut);
    let pushed = ticket(push(&mut primary, counting(22, &[5])));
    assert_eq!(
        primary.settle(&pushed, Contact::Leased),
        Settled::Pending,
        "nearly level: waited for"
    );
    assert_eq!(primary.proposal(), None);
    replicate(&mut primary, &mut learner);
    assert_eq!(primary.proposal(), proposed());
}

#[test]
fn a_member_is_not_proposed_before_the_others_have_what_was_cut() {
    // They could not get it from the new member, whose log begins there.
    let [mut primary, mut second] = cluster();
    ticket(push(&mut primary, counting(1, &[5])));
    primary.on_route(&joining(route(1, 2, 1, &[1, 2]), 3));
    let copy = primary.begin_copy().expect("it is wanted");
    read(&mut primary, copy, |_| ());
    primary.copied(copy.cut);
    assert_eq!(primary.proposal(), None);
    replicate(&mut primary, &mut second);
    assert!(primary.proposal().is_some());
}

#[test]
fn a_copy_that_lacks_too_much_is_dropped_and_begun_again_and_no_member_waits_for_it() {
    let [mut primary, mut second] = cluster();
    primary.on_route(&joining(route(1, 2, 1, &[1, 2]), 3));
    let copy = primary.begin_copy().expect("it is wanted");
    primary.take_effects();
    let keys: Vec<u64> = (0..LOG_BYTES_MAX as u64 / 16).collect();
    let mut sequence = 0;
    while primary.learner().is_some() {
        sequence += 1;
        let pushed = ticket(push(&mut primary, counting(sequence, &keys)));
        replicate(&mut primary, &mut second);
        assert!(acknowledged(&primary, &pushed));
    }
    assert!(sequence > 3);
    assert_eq!(primary.read_cut(copy.cut, 100), Err(crate::cut::CutGone));
    assert_eq!(primary.log_size(), (0, 0));
    assert!(primary.take_effects().copy && primary.begin_copy().is_some());
}

#[test]
fn who_is_joining_serves_nobody_and_no_candidate_counts_on_it() {
    let (_, mut learner, view) = with_copy();
    assert!(matches!(push(&mut learner, counting(21, &[5])), Pushed::Declined(_)));
    assert!(learner.read(Epoch(1), Contact::Leased).is_err());
    assert!(learner.fence(Epoch(2), server(3)).not_ready);
    assert!(learner.fetch(Epoch(2), Lsn::ZERO, 100).is_err());
    // It adopted the epoch, and is what a committed set of it says.
    learner.on_view(view_of(&view, route(2, 4, 3, &[2, 3])));
    assert!(!learner.fence(Epoch(2), server(3)).not_ready);
}

#[test]
fn an_old_view_does_not_end_a_join_and_a_newer_one_without_it_does() {
    let (_, mut learner, view) = with_copy();
    learner.on_view(view_of(&view, route(1, 2, 1, &[1])));
    assert!(matches!(learner.role(), Role::Joining));
    learner.on_view(view_of(&view, route(1, 4, 1, &[1])));
    assert!(matches!(learner.role(), Role::Removed) && learner.take_effects().removed);
}

#[test]
fn a_join_ends_with_the_tenure() {
    let (mut primary, learner, _) = with_copy();
    primary.fence(Epoch(2), server(3));
    assert!(primary.learner().is_none() && !primary.wants_copy());
    assert!(matches!(learner.role(), Role::Joining));
    let (mut primary, _) = alone();
    let copy = primary.begin_copy().expect("it is wanted");
    primary.fence(Epoch(2), server(3));
    assert_eq!(primary.read_cut(copy.cut, 100), Err(crate::cut::CutGone));
    primary.copied(copy.cut);
    assert!(primary.learner().is_none());
}
