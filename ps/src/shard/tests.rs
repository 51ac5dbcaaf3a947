//! Each test is named after the rule of docs/protocol.md that it defends.

mod clocks;
pub(crate) mod fixture;
mod identity;
mod joining;
mod set_back;
mod simulation;

use downpour_core::cells::{CELLS_MAX, ClosedSessions, Refusal, RefusalReason};
use downpour_core::id::{Epoch, Lsn, SessionId, VariableId};
use downpour_proto::v1::RetryReason;
use fixture::*;

use super::*;
use crate::record::Change;
use crate::state::CannotApply;

fn retry(reason: RetryReason) -> Pushed {
    Pushed::Declined(Declined::Retry(reason))
}

fn redirect(epoch: u64, primary: u32) -> Declined {
    Declined::Redirect(Redirect { epoch: Epoch(epoch), primary: Some(server(primary)) })
}

#[test]
fn a_push_is_acknowledged_when_every_member_has_it() {
    let [mut primary, mut second, mut third] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending);
    replicate(&mut primary, &mut second);
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending);
    replicate(&mut primary, &mut third);
    assert!(acknowledged(&primary, &pushed));
    assert_eq!((count(&primary, 5), count(&third, 5)), (1.0, 1.0));
}

#[test]
fn a_repeat_is_acknowledged_only_when_its_commit_lsn_is_reached() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    let repeat = ticket(push(&mut primary, counting(1, &[5])));
    assert!(repeat.repeated);
    assert_eq!(primary.settle(&repeat, Contact::Leased), Settled::Pending);
    replicate(&mut primary, &mut backup);
    assert!(acknowledged(&primary, &repeat));
    assert_eq!(count(&primary, 5), 1.0);
}

#[test]
fn a_gap_is_refused_and_names_the_expected_number() {
    let [mut primary] = cluster();
    assert_eq!(
        push(&mut primary, counting(2, &[5])),
        Pushed::Gap { expected: 1, numbering: Epoch(0) }
    );
    push(&mut primary, counting(1, &[5]));
    assert_eq!(
        push(&mut primary, counting(3, &[5])),
        Pushed::Gap { expected: 2, numbering: Epoch(0) }
    );
}

#[test]
fn without_room_new_keys_are_left_out_on_every_member_and_known_keys_are_trained() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5, 9]));
    let room =
        |shard: &mut Shard, push, room| shard.push(basis(Epoch(1), 1), push, Contact::Leased, room);
    // Room for one of the four new keys; the table before it has none of them to refuse.
    let embedding = rows(EMBEDDING, 3, &[5], 0.5);
    let both = vec![rows(COUNTS, 1, &[1, 5, 7, 9, 11], 1.0), embedding];
    let cost = 16 + 4 + 8;
    let pushed = ticket(room(&mut primary, push_of(SESSION, 2, both), cost));
    let refusal = Refusal { reason: RefusalReason::MemoryLimit, variable: COUNTS };
    assert_eq!(pushed.refusal, Some(refusal));
    let told = primary.take_effects().without_room;
    assert_eq!(told, Some(WithoutRoom { keys: 3, first: (COUNTS, 7) }));
    let none = ticket(room(&mut primary, counting(3, &[12]), 0));
    assert_eq!(none.refusal, Some(refusal), "a push of which nothing is left is consumed too");
    let known = ticket(room(&mut primary, counting(4, &[1, 5]), 0));
    assert_eq!(known.refusal, None);
    let counts = |shard: &Shard| [1, 5, 7, 9, 11, 12].map(|key| count(shard, key));
    assert_eq!(counts(&primary), [2.0, 3.0, 0.0, 2.0, 0.0, 0.0]);
    replicate(&mut primary, &mut backup);
    assert_eq!(encoded(&primary), encoded(&backup));
    let repeat = ticket(push(&mut primary, counting(2, &[7])));
    assert_eq!((repeat.repeated, repeat.refusal), (true, Some(refusal)));
    assert_eq!(primary.state().rows(), 3, "and nothing was made for the others");
}

#[test]
fn a_refused_push_consumes_its_number_on_every_member() {
    let [mut primary, mut backup] = cluster();
    let nan = push_of(SESSION, 1, vec![rows(COUNTS, 1, &[5], f32::NAN)]);
    let unknown = push_of(SESSION, 2, vec![rows(VariableId(9), 1, &[5], 1.0)]);
    let wide = push_of(SESSION, 3, vec![rows(COUNTS, 2, &[5], 1.0)]);
    // A part is refused as a whole, the update that fits included.
    let half = vec![rows(COUNTS, 1, &[5], 1.0), rows(EMBEDDING, 3, &[5], f32::INFINITY)];
    let pushes = [
        (nan, RefusalReason::NotFinite, COUNTS),
        (unknown, RefusalReason::UnknownVariable, VariableId(9)),
        (wide, RefusalReason::WrongShape, COUNTS),
        (push_of(SESSION, 4, half), RefusalReason::NotFinite, EMBEDDING),
    ];
    for (refused, reason, variable) in pushes {
        let pushed = ticket(push(&mut primary, refused));
        assert_eq!(pushed.refusal, Some(Refusal { reason, variable }));
        replicate(&mut primary, &mut backup);
        assert!(acknowledged(&primary, &pushed));
    }
    assert!(matches!(push(&mut primary, counting(5, &[5])), Pushed::Logged(_)));
    replicate(&mut primary, &mut backup);
    assert_eq!((count(&primary, 5), count(&backup, 5)), (1.0, 1.0));
    assert_eq!(encoded(&primary), encoded(&backup));
    let repeat = ticket(push(&mut primary, counting(1, &[5])));
    assert_eq!(repeat.refusal.map(|refusal| refusal.reason), Some(RefusalReason::NotFinite));
}

#[test]
fn a_gradient_for_a_block_without_values_is_refused_and_first_values_win() {
    let [mut primary] = cluster();
    let gradient = |sequence| {
        let change = Change::Gradients(blocks(&[1], 8, 1.0));
        push_of(SESSION, sequence, vec![update(DENSE, change)])
    };
    let values = |sequence, value| {
        let change = Change::Values(blocks(&[0, 1, 2], 21, value));
        push_of(SESSION, sequence, vec![update(DENSE, change)])
    };
    let refused = ticket(push(&mut primary, gradient(1)));
    assert_eq!(refused.refusal.map(|refusal| refusal.reason), Some(RefusalReason::WrongShape));
    push(&mut primary, values(2, 4.0));
    push(&mut primary, values(3, 5.0));
    let mut out = bytes::BytesMut::new();
    let pulled = primary.state().pull_dense(DENSE, Lsn::ZERO, &mut out).expect("defined");
    assert_eq!((pulled.numbers, pulled.uninitialized), (vec![0, 1, 2], 0));
    assert!(downpour_core::tensor_bytes::floats(&out).all(|value| value == 4.0));
    assert_eq!(ticket(push(&mut primary, gradient(4))).refusal, None);
}

#[test]
fn a_push_below_min_in_sync_does_not_consume_its_number() {
    let needs_two = changed(&view(1, route(1, 1, 1, &[1])), |view| view.spec.min_in_sync = 2);
    let mut primary = replica(server(1), &needs_two);
    let before = encoded(&primary);
    assert_eq!(push(&mut primary, counting(1, &[5])), retry(RetryReason::TooFewInSync));
    assert_eq!(encoded(&primary), before);
    let [mut again] = cluster();
    assert!(matches!(push(&mut again, counting(1, &[5])), Pushed::Logged(_)));
}

#[test]
fn a_push_is_not_acknowledged_by_fewer_members_than_min_in_sync_nor_is_its_repeat() {
    let two = changed(&view(1, route(1, 1, 1, &[1, 2])), |view| view.spec.min_in_sync = 2);
    let (mut primary, mut backup) = (replica(server(1), &two), replica(server(2), &two));
    promote(&mut primary, std::slice::from_mut(&mut backup));
    let had_by_two = ticket(push(&mut primary, counting(1, &[5])));
    replicate(&mut primary, &mut backup);
    assert!(acknowledged(&primary, &had_by_two));
    let had_by_one = ticket(push(&mut primary, counting(2, &[5])));
    primary.on_route(&route(1, 2, 1, &[1]));
    let too_few = Settled::Declined(Declined::Retry(RetryReason::TooFewInSync));
    assert_eq!(primary.settle(&had_by_one, Contact::Leased), too_few);
    let repeat = ticket(push(&mut primary, counting(2, &[5])));
    assert!(repeat.repeated);
    assert_eq!(primary.settle(&repeat, Contact::Leased), too_few);
    assert_eq!(count(&primary, 5), 2.0);
}

#[test]
fn a_primary_that_is_alone_neither_applies_nor_acknowledges_nor_answers_pulls_without_a_lease() {
    let [mut primary] = cluster();
    let epoch = primary.epoch();
    let declined = primary.push(basis(epoch, 1), counting(1, &[5]), Contact::Late, u64::MAX);
    assert_eq!(declined, retry(RetryReason::NoLease));
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    let without = Declined::Retry(RetryReason::NoLease);
    assert_eq!(primary.settle(&pushed, Contact::Late), Settled::Declined(without));
    assert_eq!(primary.read(epoch, Contact::Late).err(), Some(without));
    assert!(acknowledged(&primary, &pushed) && primary.read(epoch, Contact::Leased).is_ok());
}

#[test]
fn who_is_isolated_acknowledges_nothing_as_a_primary_with_members_or_as_one_of_them() {
    let [mut primary, mut backup] = cluster();
    let epoch = primary.epoch();
    let without = Declined::Retry(RetryReason::NoLease);
    let late = ticket(primary.push(basis(epoch, 1), counting(1, &[5]), Contact::Late, u64::MAX));
    let batch = primary.batch(server(2), Room::Whole(usize::MAX)).unwrap();
    let incoming = |records: &[Arc<Record>]| Incoming {
        epoch,
        source: server(1),
        commit: Lsn::ZERO,
        records: records.iter().map(|record| Record::clone(record)).collect(),
        check: None,
    };
    let before = backup.last();
    let (ack, _) = backup.replicate(incoming(&batch.records), Contact::Isolated);
    assert!(ack.not_ready && backup.last() == before, "{ack:?}");
    let (ack, _) = backup.replicate(incoming(&batch.records), Contact::Late);
    assert!(!ack.not_ready && ack.last == late.lsn);
    primary.acked(server(2), ack).unwrap();
    assert_eq!(primary.settle(&late, Contact::Isolated), Settled::Declined(without));
    assert_eq!(primary.read(epoch, Contact::Isolated).err(), Some(without));
    let declined = primary.push(basis(epoch, 1), counting(2, &[5]), Contact::Isolated, u64::MAX);
    assert_eq!(declined, Pushed::Declined(without));
    assert_eq!(primary.settle(&late, Contact::Late), Settled::Acknowledged);
}

#[test]
fn a_primary_with_a_backup_needs_no_lease() {
    let [mut primary, mut backup] = cluster();
    let pushed =
        ticket(primary.push(basis(Epoch(1), 1), counting(1, &[5]), Contact::Late, u64::MAX));
    replicate(&mut primary, &mut backup);
    assert_eq!(primary.settle(&pushed, Contact::Late), Settled::Acknowledged);
}

#[test]
fn a_new_session_waits_while_the_cells_are_full_and_nothing_is_consumed() {
    let [mut primary] = cluster();
    for session in 1..=CELLS_MAX as u64 {
        ticket(push(&mut primary, push_of(SessionId(session), 1, Vec::new())));
    }
    let last = primary.last();
    let stranger = || push_of(SessionId(u64::MAX), 1, Vec::new());
    assert_eq!(push(&mut primary, stranger()), retry(RetryReason::Overloaded));
    assert_eq!(primary.last(), last);
    ticket(push(&mut primary, counting(2, &[5])));
    primary.on_view(changed(&primary.view, |view| {
        view.version = 2;
        view.sessions = ClosedSessions { high_water: CELLS_MAX as u64, open: [].into() };
    }));
    ticket(push(&mut primary, stranger()));
}

#[test]
fn a_full_log_asks_to_come_later_and_drains() {
    let [mut primary, mut backup] = cluster();
    let keys: Vec<u64> = (0..LOG_BYTES_MAX as u64 / 12 + 1).collect();
    assert!(matches!(push(&mut primary, counting(1, &keys)), Pushed::Logged(_)));
    assert_eq!(push(&mut primary, counting(2, &[5])), retry(RetryReason::Overloaded));
    replicate(&mut primary, &mut backup);
    assert!(matches!(push(&mut primary, counting(2, &[5])), Pushed::Logged(_)));
}

#[test]
fn nothing_is_kept_of_a_log_that_every_member_has() {
    let [mut alone] = cluster();
    push(&mut alone, counting(1, &[5]));
    assert_eq!(alone.log_size(), (0, 0));
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    assert_eq!(primary.log_size().0, 1);
    replicate(&mut primary, &mut backup);
    assert_eq!(primary.log_size(), (0, 0));
    // The backup hears of the commit by the next message.
    push(&mut primary, counting(2, &[5]));
    replicate(&mut primary, &mut backup);
    replicate(&mut primary, &mut backup);
    assert_eq!(backup.log_size(), (0, 0));
}

#[test]
fn a_closed_session_is_refused_for_ever_also_by_the_next_primary() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    let closing = changed(&primary.view, |view| {
        view.version = 2;
        view.sessions = ClosedSessions { high_water: SESSION.0, open: [].into() };
    });
    primary.on_view(closing.clone());
    assert_eq!(push(&mut primary, counting(2, &[5])), Pushed::SessionClosed);
    replicate(&mut primary, &mut backup);
    // A view that went back is no reason to open it again.
    primary.on_view(changed(&closing, |view| view.sessions = ClosedSessions::default()));
    assert_eq!(push(&mut primary, counting(2, &[5])), Pushed::SessionClosed);
    backup.on_view(changed(&closing, |view| view.shards[0] = route(2, 2, 2, &[2])));
    assert!(matches!(backup.role(), Role::Primary(_)));
    assert_eq!(push(&mut backup, counting(2, &[5])), Pushed::SessionClosed);
    assert_eq!(push(&mut backup, counting(1, &[5])), Pushed::SessionClosed, "not a repeat either");
}

#[test]
fn a_request_of_a_newer_view_or_epoch_waits_until_the_server_heard_of_it() {
    let [mut primary] = cluster();
    let ahead = primary.push(basis(Epoch(1), 2), counting(1, &[5]), Contact::Leased, u64::MAX);
    assert_eq!(ahead, retry(RetryReason::NotReady));
    let ahead = primary.push(basis(Epoch(2), 1), counting(1, &[5]), Contact::Leased, u64::MAX);
    assert_eq!(ahead, retry(RetryReason::NotReady));
    assert!(matches!(push(&mut primary, counting(1, &[5])), Pushed::Logged(_)));
}

#[test]
fn a_candidate_serves_nobody_before_it_has_fenced_every_member() {
    let view = view(1, route(1, 1, 1, &[1, 2]));
    let (mut candidate, mut backup) = (replica(server(1), &view), replica(server(2), &view));
    assert_eq!(candidate.promotion(), Promotion::Fence(vec![server(2)]));
    assert_eq!(push(&mut candidate, counting(1, &[5])), retry(RetryReason::NotReady));
    assert!(candidate.read(Epoch(1), Contact::Leased).is_err());
    assert!(
        candidate.batch(server(2), Room::Whole(1000)).is_none(),
        "nothing is sent before the fence"
    );
    let not_yet = Fenced { epoch: Epoch(1), last: Lsn::ZERO, not_ready: true };
    candidate.fenced(Epoch(1), server(2), not_yet).expect("no contradiction");
    assert_eq!(candidate.promotion(), Promotion::Fence(vec![server(2)]));
    promote(&mut candidate, std::slice::from_mut(&mut backup));
    assert_eq!(candidate.promotion(), Promotion::Over);
    assert!(matches!(push(&mut candidate, counting(1, &[5])), Pushed::Logged(_)));
}

#[test]
fn a_fenced_backup_refuses_the_old_epoch() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    let batch = primary.batch(server(2), Room::Whole(1000)).expect("something to send");
    let before = encoded(&backup);
    assert_eq!(backup.fence(Epoch(2), server(3)).epoch, Epoch(2));
    let incoming = Incoming {
        epoch: batch.epoch,
        source: server(1),
        commit: batch.commit,
        records: owned(&batch.records),
        check: None,
    };
    let (ack, _) = backup.replicate(incoming, Contact::Leased);
    assert_eq!(ack.epoch, Epoch(2));
    assert_eq!(encoded(&backup), before);
    assert_eq!(backup.fence(Epoch(1), server(1)).epoch, Epoch(2), "and the old candidate");
}

#[test]
fn an_old_primary_cannot_acknowledge_after_its_backup_was_fenced() {
    let [mut primary, mut backup] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    backup.fence(Epoch(2), server(3));
    replicate(&mut primary, &mut backup);
    assert_eq!(
        primary.settle(&pushed, Contact::Leased),
        Settled::Declined(Declined::Redirect(Redirect { epoch: Epoch(2), primary: None }))
    );
    assert!(matches!(primary.role(), Role::Backup), "it learned of the higher epoch");
    assert!(matches!(push(&mut primary, counting(2, &[5])), Pushed::Declined(_)));
}

#[test]
fn a_fenced_primary_sends_its_clients_to_the_candidate() {
    let [mut primary, _] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    primary.fence(Epoch(2), server(2));
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Declined(redirect(2, 2)));
    let late = primary.push(basis(Epoch(1), 1), counting(2, &[5]), Contact::Leased, u64::MAX);
    assert_eq!(late, Pushed::Declined(redirect(2, 2)));
}

#[test]
fn a_promoted_replica_levels_a_member_that_was_ahead() {
    let [mut primary, mut second, mut third] = cluster();
    for sequence in 1..=3 {
        push(&mut primary, counting(sequence, &[5]));
    }
    // Only the third has them when the primary dies.
    replicate(&mut primary, &mut third);
    let next = view(2, route(2, 2, 2, &[2, 3]));
    second.on_view(next.clone());
    third.on_view(next);
    let answer = third.fence(Epoch(2), server(2));
    second.fenced(Epoch(2), server(3), answer).expect("one history");
    let after = second.last();
    assert_eq!(second.promotion(), Promotion::Fetch { from: server(3), after });
    let records = third.fetch(Epoch(2), after, usize::MAX).expect("kept");
    second.fetched(Epoch(2), owned(&records)).expect("one history");
    assert!(matches!(second.role(), Role::Primary(_)));
    assert_eq!(count(&second, 5), 3.0);
    let repeat = ticket(push(&mut second, counting(3, &[5])));
    assert!(repeat.repeated, "the client's retry is recognised");
    replicate(&mut second, &mut third);
    assert_eq!(encoded(&second), encoded(&third));
}

#[test]
fn a_promoted_replica_levels_a_member_that_was_behind_before_it_serves() {
    let [mut primary, mut second, mut third] = cluster();
    push(&mut primary, counting(1, &[5]));
    replicate(&mut primary, &mut second);
    let next = view(2, route(2, 2, 2, &[2, 3]));
    second.on_view(next);
    let answer = third.fence(Epoch(2), server(2));
    second.fenced(Epoch(2), server(3), answer).expect("one history");
    assert_eq!(second.promotion(), Promotion::Level(vec![server(3)]));
    assert_eq!(push(&mut second, counting(2, &[5])), retry(RetryReason::NotReady));
    replicate(&mut second, &mut third);
    assert!(matches!(second.role(), Role::Primary(_)));
    assert_eq!((count(&second, 5), count(&third, 5)), (1.0, 1.0));
}

#[test]
fn a_planned_change_of_primary_fences_the_old_one_and_loses_nothing() {
    let [mut old, mut new] = cluster();
    push(&mut old, counting(1, &[5]));
    new.on_view(view(2, route(2, 2, 2, &[1, 2])));
    promote(&mut new, std::slice::from_mut(&mut old));
    assert!(matches!(new.role(), Role::Primary(_)) && matches!(old.role(), Role::Backup));
    assert_eq!(count(&new, 5), 1.0);
    let pushed = ticket(push(&mut new, counting(2, &[5])));
    assert_eq!(pushed.lsn, Lsn::new(Epoch(2), 1));
    replicate(&mut new, &mut old);
    assert!(acknowledged(&new, &pushed));
    assert_eq!(encoded(&new), encoded(&old));
}

#[test]
fn a_record_out_of_order_is_refused() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    push(&mut primary, counting(2, &[5]));
    let batch = primary.batch(server(2), Room::Whole(usize::MAX)).expect("something to send");
    let records = owned(&batch.records);
    let send = |backup: &mut Shard, records| {
        backup.replicate(
            Incoming {
                epoch: Epoch(1),
                source: server(1),
                commit: Lsn::ZERO,
                records,
                check: None,
            },
            Contact::Leased,
        )
    };
    let before = (backup.last(), encoded(&backup));
    let (ack, refused) = send(&mut backup, vec![records[1].clone()]);
    assert!(ack.not_ready && matches!(refused, Err(CannotApply::OutOfOrder { .. })));
    assert_eq!((backup.last(), encoded(&backup)), before);
    // A repeat and what follows it are taken.
    assert!(send(&mut backup, vec![records[0].clone()]).1.is_ok());
    let (ack, taken) = send(&mut backup, records);
    assert!(taken.is_ok() && !ack.not_ready);
    assert_eq!((ack.last, count(&backup, 5)), (primary.last(), 2.0));
}

#[test]
fn a_record_of_another_history_is_not_passed_over() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    replicate(&mut primary, &mut backup);
    backup.on_view(view(2, route(3, 2, 2, &[2])));
    push(&mut backup, counting(2, &[5]));
    // Epoch 2 never was; its record would lie before the last one here.
    let previous = primary.last();
    let body = Body::Push(counting(2, &[5]));
    let record = Record { lsn: Lsn::new(Epoch(2), 1), previous, body };
    backup.on_view(view(3, route(4, 3, 1, &[1, 2])));
    let (ack, refused) = backup.replicate(
        Incoming {
            epoch: Epoch(4),
            source: server(1),
            commit: Lsn::ZERO,
            records: vec![record],
            check: None,
        },
        Contact::Leased,
    );
    assert!(ack.not_ready && matches!(refused, Err(CannotApply::OutOfOrder { .. })));
}

#[test]
fn a_request_of_an_older_epoch_is_redirected_also_by_the_same_server_in_a_newer_one() {
    let [mut primary] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    primary.on_view(view(1, route(3, 2, 1, &[1])));
    let declined = redirect(3, 1);
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Declined(declined));
    let late = primary.push(basis(Epoch(1), 1), counting(2, &[5]), Contact::Leased, u64::MAX);
    assert_eq!(late, Pushed::Declined(declined));
    assert_eq!(primary.read(Epoch(1), Contact::Leased).err(), Some(declined));
}

#[test]
fn a_record_that_does_not_apply_changes_nothing_and_is_not_acknowledged() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    let batch = primary.batch(server(2), Room::Whole(usize::MAX)).expect("something to send");
    let good = Record::clone(&batch.records[0]);
    let Body::Push(push) = good.body.clone() else { panic!("a push") };
    let spoilt = [
        Push { sequence: 2, ..push.clone() },
        Push { updates: vec![rows(VariableId(9), 1, &[5], 1.0)], ..push.clone() },
        Push { updates: vec![rows(COUNTS, 2, &[5], 1.0)], ..push.clone() },
        Push { updates: vec![rows(COUNTS, 1, &[6], 1.0), rows(DENSE, 1, &[5], 1.0)], ..push },
    ];
    let before = encoded(&backup);
    for push in spoilt {
        let record = Record { body: Body::Push(push), ..good.clone() };
        let incoming = Incoming {
            epoch: Epoch(1),
            source: server(1),
            commit: Lsn::ZERO,
            records: vec![record],
            check: None,
        };
        let (ack, refused) = backup.replicate(incoming, Contact::Leased);
        assert!(ack.not_ready && refused.is_err());
        assert_eq!(encoded(&backup), before);
    }
}

#[test]
fn a_member_is_waited_for_until_its_removal_was_read_back() {
    let [mut primary, mut second, _] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    replicate(&mut primary, &mut second);
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending);
    // A stale route, and one of an older version, change nothing.
    primary.on_route(&route(1, 0, 1, &[1, 2]));
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending);
    primary.on_route(&route(1, 2, 1, &[1, 2]));
    assert!(acknowledged(&primary, &pushed));
    primary.on_route(&route(1, 1, 1, &[1, 2, 3]));
    let next = ticket(push(&mut primary, counting(2, &[5])));
    replicate(&mut primary, &mut second);
    assert!(acknowledged(&primary, &next), "a route that went back adds nobody");
}

#[test]
fn a_candidate_goes_on_when_a_silent_member_was_removed() {
    let view = view(1, route(1, 1, 1, &[1, 2]));
    let mut candidate = replica(server(1), &view);
    assert!(matches!(candidate.role(), Role::Promoting(_)));
    candidate.on_route(&route(1, 2, 1, &[1]));
    assert!(matches!(candidate.role(), Role::Primary(_)));
}

#[test]
fn a_replica_that_the_route_does_not_list_is_dropped_and_serves_nobody() {
    let [mut primary, mut backup] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    backup.take_effects();
    backup.on_route(&route(1, 2, 1, &[1]));
    assert!(matches!(backup.role(), Role::Removed) && backup.take_effects().removed);
    assert!(backup.fence(Epoch(2), server(3)).not_ready);
    primary.on_route(&route(2, 3, 2, &[2]));
    assert!(matches!(primary.settle(&pushed, Contact::Leased), Settled::Declined(_)));
    assert!(matches!(push(&mut primary, counting(2, &[5])), Pushed::Declined(_)));
}

#[test]
fn a_member_with_another_history_is_not_counted() {
    let [mut primary, _] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    let ahead = Lsn::new(Epoch(1), 99);
    let ack = Ack { epoch: Epoch(1), last: ahead, not_ready: false, differs: false };
    let diverged = Diverged { member: server(2), last: ahead };
    assert_eq!(primary.acked(server(2), ack), Err(diverged));
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending);
    let mut candidate = replica(server(1), &view(1, route(3, 1, 1, &[1, 2])));
    let strange = Fenced { epoch: Epoch(3), last: Lsn::new(Epoch(1), 1), not_ready: false };
    candidate.fenced(Epoch(3), server(2), strange).expect("ahead: to be fetched");
    assert!(matches!(candidate.promotion(), Promotion::Fetch { .. }));
}

#[test]
fn a_candidate_takes_an_acknowledgement_from_a_member_that_is_ahead_of_it() {
    let [mut primary, mut second, mut third] = cluster();
    push(&mut primary, counting(1, &[5]));
    replicate(&mut primary, &mut third);
    second.on_view(view(2, route(2, 2, 2, &[2, 3])));
    let answer = third.fence(Epoch(2), server(2));
    second.fenced(Epoch(2), server(3), answer).expect("one history");
    let ack = Ack { epoch: Epoch(2), last: third.last(), not_ready: false, differs: false };
    second.acked(server(3), ack).expect("ahead, and not of another history");
    assert!(matches!(second.promotion(), Promotion::Fetch { .. }));
}

#[test]
fn a_member_that_was_removed_while_ahead_is_no_longer_listened_to() {
    let [mut primary, mut second, mut third] = cluster();
    push(&mut primary, counting(1, &[5]));
    replicate(&mut primary, &mut third);
    second.on_view(view(2, route(2, 2, 2, &[2, 3])));
    let answer = third.fence(Epoch(2), server(2));
    // Its answer came too late: it was removed, and the candidate serves without what it had.
    second.on_route(&route(2, 3, 2, &[2]));
    second.fenced(Epoch(2), server(3), answer).expect("not a member");
    push(&mut second, counting(1, &[5]));
    let ack = Ack { epoch: Epoch(2), last: third.last(), not_ready: false, differs: false };
    second.acked(server(3), ack).expect("not a member");
    assert_eq!(count(&second, 5), 1.0);
}

#[test]
fn an_epoch_that_nobody_can_have_minted_ends_no_tenure() {
    let [mut primary, _] = cluster();
    let absurd = Epoch(u64::MAX);
    let ack = Ack { epoch: absurd, last: Lsn::ZERO, not_ready: false, differs: false };
    primary.acked(server(2), ack).expect("ignored");
    assert_eq!(primary.fence(absurd, server(2)).epoch, Epoch(1));
    assert!(matches!(push(&mut primary, counting(1, &[5])), Pushed::Logged(_)));
}

#[test]
fn what_is_lost_on_the_way_is_sent_again() {
    let [mut primary, mut backup] = cluster();
    let pushed = ticket(push(&mut primary, counting(1, &[5])));
    primary.batch(server(2), Room::Whole(1000)).expect("sent, and lost");
    replicate(&mut primary, &mut backup);
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending);
    primary.rewind(server(2));
    replicate(&mut primary, &mut backup);
    assert!(acknowledged(&primary, &pushed));
}

#[test]
fn an_acknowledgement_of_an_older_tenure_is_ignored() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    replicate(&mut primary, &mut backup);
    let stale = Ack { epoch: Epoch(1), last: primary.last(), not_ready: false, differs: false };
    primary.on_view(view(2, route(3, 2, 1, &[1, 2])));
    primary.acked(server(2), stale).expect("no contradiction");
    assert_eq!(primary.promotion(), Promotion::Fence(vec![server(2)]));
}

#[test]
fn a_backup_whose_values_differ_says_so_acknowledges_nothing_more_and_is_no_member_to_count_on() {
    let [mut primary, mut backup] = cluster();
    push(&mut primary, counting(1, &[5]));
    let batch = primary.batch(server(2), Room::Whole(1000)).expect("something to send");
    assert_eq!(batch.check, None, "not each time");
    let mut records = owned(&batch.records);
    // As if the backup's arithmetic were another one.
    if let Body::Push(push) = &mut records[0].body {
        push.updates[0].scalars.learning_rate = -2.0;
    }
    let send = |primary: &mut Shard, backup: &mut Shard, batch: Batch, records| {
        let incoming = Incoming {
            epoch: batch.epoch,
            source: server(1),
            commit: batch.commit,
            check: batch.check,
            records,
        };
        let (ack, _) = backup.replicate(incoming, Contact::Leased);
        primary.acked(server(2), ack).expect("one history");
        ack
    };
    let ack = send(&mut primary, &mut backup, batch, records);
    assert!(!ack.differs && !ack.not_ready, "nobody looked");
    primary.check_soon();
    let pushed = ticket(push(&mut primary, counting(2, &[6])));
    let batch = primary.batch(server(2), Room::Whole(1000)).expect("something to send");
    assert_eq!(batch.check.map(|check| check.lsn), Some(pushed.lsn));
    let records = owned(&batch.records);
    let ack = send(&mut primary, &mut backup, batch, records);
    assert!(ack.differs && ack.not_ready);
    assert_eq!(primary.settle(&pushed, Contact::Leased), Settled::Pending);
    primary.rewind(server(2));
    let batch = primary.batch(server(2), Room::Whole(1000)).expect("sent again");
    let records = owned(&batch.records);
    assert!(send(&mut primary, &mut backup, batch, records).differs, "and it stays so");
    assert!(backup.fence(Epoch(2), server(3)).not_ready);
}

#[test]
fn members_that_are_equal_agree_on_every_sample_and_a_sample_sees_every_row_in_time() {
    let [mut primary, mut backup] = cluster();
    let keys: Vec<u64> = (0..20_000).collect();
    push(&mut primary, push_of(SESSION, 1, vec![rows(COUNTS, 1, &keys, 1.0)]));
    replicate(&mut primary, &mut backup);
    let [mut other, _] = cluster();
    push(&mut other, push_of(SESSION, 1, vec![rows(COUNTS, 1, &keys, 1.0)]));
    // One float of one row, and then the same pushes.
    let Body::Push(mut odd) = Body::Push(counting(2, &[77])) else { return };
    odd.updates = vec![rows(COUNTS, 1, &[77], 1.5)];
    push(&mut primary, counting(2, &[77]));
    push(&mut other, odd);
    let mut seen = 0;
    for sequence in 3..200 {
        push(&mut primary, counting(sequence, &[5]));
        push(&mut other, counting(sequence, &[5]));
        replicate(&mut primary, &mut backup);
        assert_eq!(primary.state().sample_digest(), backup.state().sample_digest());
        seen += u32::from(primary.state().sample_digest() != other.state().sample_digest());
    }
    assert!(
        (10..150).contains(&seen),
        "{seen} of 197 samples have the row: a fifth of the table each"
    );
}
