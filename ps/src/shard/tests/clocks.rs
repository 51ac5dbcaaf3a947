//! Clocks, modes and rounds (docs/protocol.md 7).

use downpour_core::checkpoint::SetBack;
use downpour_core::clocks::Round;
use downpour_core::consistency::{Consistency, Mode};
use downpour_core::mix::{mix64, salt};
use downpour_core::routing::shard_of;
use downpour_core::view::JobView;
use proptest::prelude::*;

use super::fixture::*;
use super::set_back::saved;
use super::*;
use crate::cut::Loader;
use crate::record::{Change, Update};
use crate::shard::{Advanced, Standing, Told};
use downpour_proto::v1;

const SYNC: Mode = Mode::Sync { backup_workers: 0 };

/// The job of the fixture with two shards on the same servers, in this mode.
fn view_in(version: u64, route: ShardRoute, consistency: Consistency) -> Arc<JobView> {
    changed(&view(version, route.clone()), |view| {
        view.spec.shards = 2;
        view.shards = vec![route.clone(), route];
        view.consistency = consistency;
    })
}

/// Replicas of a shard on servers 1 and 2, the first of which serves.
fn pair(shard: u32, consistency: &Consistency) -> [Shard; 2] {
    let view = view_in(1, route(1, 1, 1, &[1, 2]), consistency.clone());
    let replica = |node| Shard::new(server(node), ShardId(shard), LOG_BYTES_MAX, Arc::clone(&view));
    let mut pair = [replica(1), replica(2)];
    let (primary, backups) = pair.split_at_mut(1);
    promote(&mut primary[0], backups);
    pair
}

/// The backup takes over.
fn fail_over([old, new]: [Shard; 2]) -> [Shard; 2] {
    let epoch = new.epoch().0 + 1;
    let view = changed(&old.view, |view| {
        let (primary, set_version) = (new.me.node.0, view.shards[0].set_version + 1);
        let both = route(epoch, set_version, primary, &[1, 2]);
        view.version += 1;
        view.shards = vec![both.clone(), both];
    });
    let mut pair = [new, old];
    pair[1].on_view(Arc::clone(&view));
    pair[0].on_view(view);
    let (primary, backups) = pair.split_at_mut(1);
    promote(&mut primary[0], backups);
    assert!(matches!(pair[0].role(), Role::Primary(_)));
    pair
}

fn sync(pair: &mut [Shard; 2]) {
    let (primary, backups) = pair.split_at_mut(1);
    replicate(&mut primary[0], &mut backups[0]);
}

fn tell(shard: &mut Shard, session: u64, clock: u64, contributes: bool) -> (Ticket, Standing) {
    let told = Told { clock, contributes, leaves: false, seat: 1 };
    match shard.advance((shard.epoch(), 1), SessionId(session), told, Contact::Leased) {
        Advanced::Seated(ticket, standing) => (ticket, standing),
        other => panic!("{other:?}"),
    }
}

fn stands(shard: &mut Shard, session: u64, clock: u64, contributes: bool) -> Standing {
    tell(shard, session, clock, contributes).1
}

/// A key of a table on a shard of two.
fn key_on(shard: u32, table: &str, mut from: u64) -> u64 {
    while shard_of(from, salt(table), 2) != ShardId(shard) {
        from += 1;
    }
    from
}

fn contribution(round: u64, update: Update) -> Update {
    let change = Change::Contribution { round, gradients: Box::new(update.change.clone()) };
    Update { change, ..update }
}

fn value(shard: &Shard, key: u64) -> f32 {
    count(shard, key)
}

#[test]
fn a_clock_is_told_to_others_when_every_member_has_it_and_outlives_the_primary() {
    let mut pair = pair(0, &Consistency::all(Mode::Ssp { bound: 1 }));
    (1..=2).for_each(|session| assert!(stands(&mut pair[0], session, 0, false).may_begin));
    let (ticket, standing) = tell(&mut pair[0], 1, 1, false);
    assert_eq!((standing.may_begin, standing.floor), (true, 0));
    assert_eq!(pair[0].settle(&ticket, Contact::Leased), Settled::Pending);
    sync(&mut pair);
    assert!(acknowledged(&pair[0], &ticket));
    assert!(!stands(&mut pair[0], 1, 2, false).may_begin);
    sync(&mut pair);
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));

    let mut pair = fail_over(pair);
    assert!(!stands(&mut pair[0], 1, 2, false).may_begin, "2 is more than 1 ahead of 0");
    let told = pair[0].take_effects();
    assert!(!told.clocks || told.serving, "telling again what is known wakes nobody");
    assert!(stands(&mut pair[0], 2, 1, false).may_begin);
    assert!(pair[0].take_effects().clocks, "who waits looks again");
    assert!(stands(&mut pair[0], 1, 2, false).may_begin);
    let last = pair[0].last();
    stands(&mut pair[0], 1, 2, false);
    assert_eq!(pair[0].last(), last, "and logs nothing");
}

#[test]
fn who_waits_is_woken_by_the_end_of_a_round_and_not_by_everybody_who_comes_to_it() {
    let [primary, _] = &mut pair(0, &Consistency::all(SYNC));
    (1..=3).for_each(|session| _ = stands(primary, session, 0, false));
    primary.take_effects();
    let woken = [1, 2, 3].map(|session| {
        stands(primary, session, 1, true);
        primary.take_effects().clocks
    });
    assert_eq!(woken, [false, false, true]);
}

#[test]
fn only_the_primary_of_the_clocks_shard_is_told_and_never_of_a_session_that_ended() {
    let told = Told { seat: 1, ..Told::default() };
    let [primary, backup] = &mut pair(0, &Consistency::all(SYNC));
    let at = (Epoch(1), 1);
    let answer = backup.advance(at, SESSION, told, Contact::Leased);
    assert_eq!(answer, Advanced::Declined(redirect(1, 1)));
    let not_ready = Advanced::Declined(Declined::Retry(RetryReason::NotReady));
    assert_eq!(primary.advance((Epoch(1), 99), SESSION, told, Contact::Leased), not_ready);
    let [other, _] = &mut pair(1, &Consistency::all(SYNC));
    assert_eq!(other.advance(at, SESSION, told, Contact::Leased), not_ready);
    stands(primary, SESSION.0, 0, false);
    let ended = changed(&primary.view, |view| {
        view.version += 1;
        view.sessions.high_water = SESSION.0;
    });
    primary.on_view(ended);
    assert_eq!(primary.advance(at, SESSION, told, Contact::Leased), Advanced::SessionClosed);
    assert!(primary.state().board().seats().is_empty(), "and nobody waits for it");
}

#[test]
fn another_mode_holds_for_everybody_from_a_clock_that_nobody_has_come_to() {
    let mut pair = pair(0, &Consistency::all(Mode::Ssp { bound: 2 }));
    (1..=2).for_each(|session| _ = stands(&mut pair[0], session, 0, false));
    stands(&mut pair[0], 1, 2, false);
    let changed = changed(&pair[0].view, |view| {
        view.version += 1;
        view.consistency = Consistency::all(SYNC);
    });
    pair[0].on_view(Arc::clone(&changed));
    pair[1].on_view(changed);
    let of = |standing: Standing| (standing.clock, standing.consistency);
    let before = Consistency::all(Mode::Ssp { bound: 2 });
    assert_eq!(of(stands(&mut pair[0], 1, 2, false)), (2, before.clone()));
    assert_eq!(of(stands(&mut pair[0], 2, 2, false)), (2, before));
    assert_eq!(of(stands(&mut pair[0], 1, 3, false)), (3, Consistency::all(SYNC)));
    assert_eq!(of(stands(&mut pair[0], 2, 3, false)), (3, Consistency::all(SYNC)));
    sync(&mut pair);
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
    let mut pair = fail_over(pair);
    assert_eq!(of(stands(&mut pair[0], 2, 3, false)), (3, Consistency::all(SYNC)));
}

#[test]
fn a_contribution_is_kept_until_its_round_is_over_and_the_mean_takes_one_step() {
    let mut pair = pair(1, &Consistency::all(SYNC));
    let [one, two] = [1, 100].map(|from| key_on(1, "counts", from));
    // In another order than that of the sessions, with keys that only one has.
    for (session, keys, gradient) in
        [(9, vec![one, two], 0.1), (3, vec![one], 0.7), (5, vec![one], 1e9)]
    {
        let update = contribution(1, rows(COUNTS, 1, &keys, gradient));
        let pushed = ticket(push(&mut pair[0], push_of(SessionId(session), 1, vec![update])));
        assert_eq!(pushed.refusal, None);
    }
    sync(&mut pair);
    assert_eq!(
        (value(&pair[0], one), pair[0].state().contributed_bytes()),
        (0.0, 3 * 128 + 4 * 12)
    );
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
    // 5 was too slow.
    let round = Round { number: 1, members: [SessionId(3), SessionId(9)].into() };
    let ended = pair[0].end_round(Epoch(1), round.clone(), Contact::Leased).expect("applied");
    assert_eq!(pair[0].settle(&ended, Contact::Leased), Settled::Pending);
    sync(&mut pair);
    assert!(acknowledged(&pair[0], &ended));
    for shard in &pair {
        assert_eq!(value(shard, one), (0.7f32 + 0.1) / 2.0);
        assert_eq!(value(shard, two), 0.1 / 2.0);
        assert_eq!(shard.state().contributed_bytes(), 0);
    }
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
    let again = pair[0].end_round(Epoch(1), round, Contact::Leased).expect("known");
    assert_eq!((again.lsn, pair[0].last()), (ended.lsn, ended.lsn), "whoever brings it later");

    // What comes now is late: it says so, also when it is asked for again, and what is in no round is applied.
    let late = vec![
        contribution(1, rows(COUNTS, 1, &[one], 5.0)),
        rows(EMBEDDING, 3, &[key_on(1, "embedding", 0)], 1.0),
    ];
    for repeated in [false, true] {
        let pushed = ticket(push(&mut pair[0], push_of(SessionId(5), 2, late.clone())));
        let refusal = Refusal { reason: RefusalReason::RoundOver, variable: COUNTS };
        assert_eq!((pushed.refusal, pushed.repeated), (Some(refusal), repeated));
    }
    sync(&mut pair);
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
    assert_eq!((value(&pair[0], one), pair[0].state().rows()), ((0.7f32 + 0.1) / 2.0, 3));
}

#[test]
fn dense_blocks_and_optimizers_with_state_take_one_step_in_a_round_too() {
    // Not of two shards: all blocks are here.
    let [mut primary, mut backup] = cluster();
    let [mut plain] = cluster();
    let first = || vec![update(DENSE, Change::Values(blocks(&[0, 1, 2], 21, 1.0)))];
    let gradient = |value| update(DENSE, Change::Gradients(blocks(&[1], 8, value)));
    let sessions = [1, 2].map(SessionId);
    for shard in [&mut primary, &mut plain] {
        ticket(push(shard, push_of(sessions[0], 1, first())));
    }
    // The same clock: learning rates go by it.
    ticket(push(&mut plain, push_of(sessions[0], 2, vec![gradient(0.25)])));
    let [one, two] = [0.125, 0.375].map(|value| vec![contribution(1, gradient(value))]);
    ticket(push(&mut primary, push_of(sessions[0], 2, one)));
    ticket(push(&mut primary, push_of(sessions[1], 1, two)));
    let sync = changed(&primary.view, |view| {
        view.version += 1;
        view.consistency = Consistency::hybrid(0);
    });
    primary.on_view(sync);
    for clock in 0..=1 {
        for session in sessions {
            stands(&mut primary, session.0, clock, clock > 0);
        }
    }
    assert_eq!(primary.state().board().last_round().number, 1);
    replicate(&mut primary, &mut backup);
    assert_eq!(encoded(&primary), encoded(&backup));
    let floats = |shard: &Shard| {
        let mut out = bytes::BytesMut::new();
        shard.state().pull_dense(DENSE, Lsn::ZERO, &mut out).expect("dense");
        downpour_core::tensor_bytes::floats(&out).map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(floats(&primary), floats(&plain), "one step of Adam by the mean");
}

#[test]
fn a_round_whose_last_clock_the_old_primary_logged_is_closed_by_the_new_one() {
    let mut pair = pair(0, &Consistency::all(SYNC));
    (1..=2).for_each(|session| _ = stands(&mut pair[0], session, 0, false));
    stands(&mut pair[0], 1, 1, true);
    sync(&mut pair);
    stands(&mut pair[0], 2, 1, true);
    // The tick goes out, the decision does not.
    let batch = pair[0].batch(server(2), Room::Whole(1)).expect("there is a tick");
    assert!(matches!(batch.records[0].body, Body::Tick(..)) && batch.more);
    let incoming = Incoming {
        epoch: batch.epoch,
        source: server(1),
        commit: batch.commit,
        records: owned(&batch.records),
        check: None,
    };
    pair[1].replicate(incoming, Contact::Leased).1.expect("applied");
    let [mut old, mut new] = pair;
    let view = changed(&old.view, |view| {
        view.version += 1;
        let alone = route(2, 2, 2, &[2]);
        view.shards = vec![alone.clone(), alone];
    });
    new.on_view(view);
    assert!(matches!(new.role(), Role::Primary(_)));
    let both = Round { number: 1, members: [SessionId(1), SessionId(2)].into() };
    assert_eq!(*new.state().board().last_round(), both);
    assert_eq!(*old.state().board().last_round(), both, "what the old one decided is the same");
    assert!(stands(&mut new, 1, 1, true).may_begin);
    old.fence(Epoch(2), server(2));
}

#[test]
fn a_session_that_ends_in_the_middle_of_a_round_holds_nobody_back_and_does_not_count() {
    let mut pair = pair(0, &Consistency::all(SYNC));
    let key = key_on(0, "counts", 7);
    (1..=3).for_each(|session| _ = stands(&mut pair[0], session, 0, false));
    for session in 1..=2 {
        let update = contribution(1, rows(COUNTS, 1, &[key], session as f32));
        ticket(push(&mut pair[0], push_of(SessionId(session), 1, vec![update])));
    }
    assert!(!stands(&mut pair[0], 1, 1, true).may_begin);
    let ended = changed(&pair[0].view, |view| {
        view.version += 1;
        view.sessions = ClosedSessions { high_water: 3, open: [SessionId(1)].into() };
    });
    pair[0].on_view(ended);
    let standing = stands(&mut pair[0], 1, 1, true);
    assert_eq!((standing.may_begin, standing.counted), (true, 1));
    sync(&mut pair);
    assert_eq!((value(&pair[0], key), value(&pair[1], key)), (1.0, 1.0));
    assert_eq!(pair[0].state().contributed_bytes(), 0);
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
}

#[test]
fn a_copy_made_in_the_middle_of_a_round_ends_it_like_the_others() {
    let [mut primary, _] = pair(1, &Consistency::all(SYNC));
    let key = key_on(1, "counts", 7);
    for session in 1..=2 {
        let update = contribution(4, rows(COUNTS, 1, &[key], session as f32));
        ticket(push(&mut primary, push_of(SessionId(session), 1, vec![update])));
    }
    let mut copy = saved(&mut primary);
    assert_eq!(copy.digest(), primary.state().digest());
    let round = Round { number: 4, members: [SessionId(1), SessionId(2)].into() };
    primary.end_round(Epoch(1), round, Contact::Leased).expect("applied");
    let record = primary.log.after(copy.last()).expect("kept").next().expect("the end");
    copy.apply(record).expect("it follows");
    assert_eq!((copy.digest(), value(&primary, key)), (primary.state().digest(), 1.5));

    // What cannot be is refused by field.
    let update = |contribution: &mut v1::CutContribution, change: &dyn Fn(&mut v1::Update)| {
        contribution.updates.iter_mut().for_each(change);
    };
    let refused = |change: &dyn Fn(&mut v1::CutContribution)| {
        let mut one = v1::CutContribution {
            session: 1,
            round: 9,
            updates: vec![v1::Update {
                variable: COUNTS.0,
                body: Some((&rows(COUNTS, 1, &[key], 1.0).change).into()),
            }],
        };
        change(&mut one);
        let identity = primary.state().identity();
        let mut loader = Loader::new(identity);
        let [mut fresh, _] = pair(1, &Consistency::all(SYNC));
        let cut = fresh.open_cut(Lsn::ZERO).expect("it serves");
        for _ in 0..2 {
            loader.take(fresh.read_cut(cut, 100).expect("open")).expect("small, cells");
        }
        let taken = loader.take(Piece::Contribution(one.clone()));
        taken.and_then(|_| loader.take(Piece::Contribution(one))).expect_err("wrong").field
    };
    assert_eq!(refused(&|_| ()), "contribution.session", "twice");
    assert_eq!(refused(&|one| one.session = 0), "contribution.session");
    assert_eq!(refused(&|one| one.round = 0), "contribution.round");
    assert_eq!(refused(&|one| update(one, &|update| update.variable = 77)), "contribution.updates");
    assert_eq!(refused(&|one| update(one, &|update| update.body = None)), "updates.body");
}

#[test]
fn a_copy_has_contributions_to_dense_blocks_whose_values_it_is_sent_later() {
    let [mut primary] = cluster();
    let first = update(DENSE, Change::Values(blocks(&[0, 1, 2], 21, 1.0)));
    let gradient = update(DENSE, Change::Gradients(blocks(&[1], 8, 0.5)));
    ticket(push(&mut primary, push_of(SESSION, 1, vec![first])));
    ticket(push(&mut primary, push_of(SESSION, 2, vec![contribution(1, gradient)])));
    let mut copy = saved(&mut primary);
    assert_eq!(copy.digest(), primary.state().digest());
    let sync = changed(&primary.view, |view| {
        view.version += 1;
        view.consistency = Consistency::hybrid(0);
    });
    primary.on_view(sync);
    (0..=1).for_each(|clock| _ = stands(&mut primary, SESSION.0, clock, clock > 0));
    assert_eq!(primary.state().board().last_round().number, 1);
    assert_eq!(primary.state().contributed_bytes(), 0);
    let round = primary.state().board().last_round().clone();
    let end = copy.resolve_round(round).expect("it is open in the copy");
    let previous = copy.last();
    let record = Record { lsn: previous.next_in(Epoch(1)), previous, body: Body::EndRound(end) };
    copy.apply(&record).expect("it follows");
    let floats = |state: &ShardState| {
        let mut out = bytes::BytesMut::new();
        state.pull_dense(DENSE, Lsn::ZERO, &mut out).expect("dense");
        out
    };
    assert_eq!(floats(&copy), floats(primary.state()));
}

#[test]
fn rounds_may_be_counted_from_an_older_one_when_nobody_is_left_who_knows_the_last() {
    let mut pair = pair(1, &Consistency::all(SYNC));
    let key = key_on(1, "counts", 7);
    let contributes = |session, number| {
        let update = contribution(number, rows(COUNTS, 1, &[key], 1.0));
        push_of(SessionId(session), 1, vec![update])
    };
    let round = |number, member| Round { number, members: [SessionId(member)].into() };
    ticket(push(&mut pair[0], contributes(1, 50)));
    pair[0].end_round(Epoch(1), round(50, 1), Contact::Leased).expect("applied");
    assert_eq!(value(&pair[0], key), 1.0);
    let ended = changed(&pair[0].view, |view| {
        view.version += 1;
        view.sessions.high_water = 1;
    });
    pair[0].on_view(ended);
    assert_eq!(ticket(push(&mut pair[0], contributes(2, 11))).refusal, None);
    pair[0].end_round(Epoch(1), round(50, 1), Contact::Leased).expect("a late copy");
    assert_eq!(value(&pair[0], key), 1.0, "nothing of it is left");
    sync(&mut pair);
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
}

#[test]
fn a_contribution_holds_no_more_memory_than_it_counts_for() {
    let [mut primary] = cluster();
    let contributes = |keys: &[u64]| contribution(1, rows(COUNTS, 1, keys, 1.0));
    let part = contributes(&[7]);
    let Change::Contribution { gradients, .. } = &part.change else { panic!("it is one") };
    let message = gradients.rows().expect("rows").1.clone();
    ticket(push(&mut primary, push_of(SESSION, 1, vec![part])));
    assert!(message.is_unique(), "what is kept is a copy, the message is freed");
    let kept = primary.state().contributed_bytes();
    // Nothing at all may come for ever.
    for sequence in 2..100 {
        ticket(push(&mut primary, push_of(SESSION, sequence, vec![contributes(&[])])));
    }
    assert_eq!(primary.state().contributed_bytes(), kept);
}

#[test]
fn a_request_that_waits_gives_no_seat_back_to_who_has_left() {
    let [primary, _] = &mut pair(0, &Consistency::all(Mode::Ssp { bound: 0 }));
    (1..=2).for_each(|session| _ = stands(primary, session, 0, false));
    assert!(!stands(primary, 1, 1, false).may_begin);
    let leaves = Told { clock: 1, contributes: false, leaves: true, seat: 1 };
    primary.advance((Epoch(1), 1), SessionId(1), leaves, Contact::Leased);
    let looked = primary.look(Epoch(1), SessionId(1), Contact::Leased);
    assert!(matches!(looked, Advanced::Seated(_, standing) if !standing.may_begin));
    assert_eq!(primary.state().board().seats().len(), 1);
    stands(primary, 2, 1, false);
    assert!(stands(primary, 2, 2, false).may_begin, "nobody else is there");
}

#[test]
fn a_late_request_of_a_seat_that_was_given_back_makes_nobody_wait_also_at_the_next_primary() {
    let mut pair = pair(0, &Consistency::all(Mode::Ssp { bound: 0 }));
    (1..=2).for_each(|session| _ = stands(&mut pair[0], session, 0, false));
    let of_seat = |shard: &mut Shard, seat, clock, leaves| {
        let told = Told { clock, contributes: false, leaves, seat };
        let at = (shard.epoch(), 1);
        shard.advance(at, SessionId(1), told, Contact::Leased);
    };
    of_seat(&mut pair[0], 1, 0, true);
    sync(&mut pair);
    let mut pair = fail_over(pair);
    of_seat(&mut pair[0], 1, 0, false);
    let seats: Vec<_> = pair[0].state().board().seats().keys().copied().collect();
    assert_eq!(seats, [SessionId(2)]);
    stands(&mut pair[0], 2, 1, false);
    assert!(stands(&mut pair[0], 2, 2, false).may_begin);
    of_seat(&mut pair[0], 2, 0, false);
    of_seat(&mut pair[0], 1, 0, true);
    assert_eq!(pair[0].state().board().seats().len(), 2, "it came back, and did not leave again");
    of_seat(&mut pair[0], 2, 0, true);
    of_seat(&mut pair[0], 3, 0, true);
    of_seat(&mut pair[0], 3, 0, false);
    assert_eq!(pair[0].state().board().seats().len(), 1, "it left before that arrived");
    sync(&mut pair);
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
}

#[test]
fn a_shard_0_that_was_set_back_waits_for_nobody_who_has_left_since() {
    let [mut old, _] = pair(0, &Consistency::all(Mode::Ssp { bound: 1 }));
    (1..=2).for_each(|session| _ = stands(&mut old, session, 0, false));
    let checkpoint = saved(&mut old);
    let view = changed(&old.view, |view| {
        let alone = route(3, 2, 2, &[2]);
        view.version += 1;
        view.shards = vec![alone.clone(), alone];
        let (uri, job, checkpoint) = ("file:///x".into(), "job".into(), "a".into());
        let shards = [(ShardId(0), Epoch(3))].into();
        view.orders.set_back(SetBack { uri, job, checkpoint, shards });
    });
    let mut shard = Shard::restored(server(2), ShardId(0), LOG_BYTES_MAX, view, checkpoint);
    assert!(matches!(shard.role(), Role::Primary(_)));
    // 2 has no task, and says nothing before 1 has trained the last one.
    assert!(stands(&mut shard, 1, 9, false).may_begin);
    assert_eq!(stands(&mut shard, 2, 8, false).clock, 9);
    let copy = saved(&mut shard);
    assert_eq!(copy.digest(), shard.state().digest());
}

#[test]
fn a_contribution_that_no_copy_could_hold_is_refused_at_once_and_the_session_goes_on() {
    let [mut primary] = cluster();
    let contributes = |sequence, count| {
        let update = contribution(1, rows(COUNTS, 1, &[7], 1.0));
        Push { updates: vec![update; count], ..push_of(SESSION, sequence, Vec::new()) }
    };
    // One after the other, until there are more than a copy holds of one session.
    let most = downpour_proto::validate::UPDATES_MAX;
    assert_eq!(ticket(push(&mut primary, contributes(1, most))).refusal, None);
    let kept = primary.state().contributed_bytes();
    let refused = ticket(push(&mut primary, contributes(2, 1)));
    let refusal = Refusal { reason: RefusalReason::RoundTooLarge, variable: COUNTS };
    assert_eq!((refused.refusal, primary.state().contributed_bytes()), (Some(refusal), kept));
    assert!(refusal.reason.to_string().contains("more shards"));
    assert_eq!(ticket(push(&mut primary, counting(3, &[9]))).refusal, None, "no gap");
    assert_eq!(count(&primary, 9), 1.0);
}

#[test]
fn only_the_primary_of_shard_0_says_which_round_it_decided() {
    let [zero, backup] = &mut pair(0, &Consistency::all(SYNC));
    (0..=1).for_each(|clock| _ = stands(zero, 1, clock, clock > 0));
    let (ticket, round) = zero.decided(Epoch(1), Contact::Leased).expect("it serves");
    assert_eq!(round, Round { number: 1, members: [SessionId(1)].into() });
    assert_eq!(zero.settle(&ticket, Contact::Leased), Settled::Pending, "the backup lacks it");
    assert_eq!(backup.decided(Epoch(1), Contact::Leased), Err(redirect(1, 1)));
    let [other, _] = &mut pair(1, &Consistency::all(SYNC));
    let not_ready = Declined::Retry(RetryReason::NotReady);
    assert_eq!(other.decided(Epoch(1), Contact::Leased), Err(not_ready));
}

#[test]
fn a_record_of_a_stale_push_holds_the_learning_rate_that_every_member_applies() {
    let mut pair = pair(0, &Consistency::default());
    let staleness = downpour_core::optimizer::Scaling::Clocks { per: 1.0 };
    let view = changed(&pair[0].view, |view| {
        view.version += 1;
        let mut last = view.variables[0].clone();
        last.id = VariableId(view.variables.len() as u32 + 1);
        last.spec.name = "slowed".into();
        last.spec.optimizer.staleness = staleness;
        view.variables.push(last);
    });
    pair.iter_mut().for_each(|shard| shard.on_view(Arc::clone(&view)));
    let (id, key) = (view.variables.last().expect("defined").id, key_on(0, "counts", 3));
    let read = Read { lsn: pair[0].last(), clock: pair[0].state().clock() };
    ticket(push(&mut pair[0], Push { clock: 3, ..counting(1, &[key]) }));
    let slow = push_of(SessionId(9), 1, vec![rows(id, 1, &[key], 1.0)]);
    let basis = Basis { read: Some(read), ..basis(pair[0].epoch(), 1) };
    let ticket = ticket(pair[0].push(basis, slow, Contact::Leased, u64::MAX));
    let staleness = downpour_core::optimizer::Staleness { clocks: 3, records: Some(1) };
    assert_eq!(ticket.staleness, Some(staleness));
    sync(&mut pair);
    assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
    let mut out = bytes::BytesMut::new();
    let keys = raw_keys(&[key]);
    let keys = downpour_proto::tensor::Keys::trusted(&keys);
    pair[1].state().pull_rows(id, keys, &mut out).expect("defined");
    let whole = count(&pair[1], key);
    let slowed = downpour_core::tensor_bytes::floats(&out).next().expect("a float");
    assert_eq!(slowed, whole / 4.0);
}

/// What one round is to give, computed plainly.
fn reference(contributions: &[(u64, f32)], members: usize) -> f32 {
    let mut sorted = contributions.to_vec();
    sorted.sort_by_key(|(session, _)| *session);
    sorted.iter().fold(0.0, |sum, (_, gradient)| sum + gradient) / members as f32
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]
    /// Four workers on two shards, one of them not waited for; primaries die, sessions end. Every round is closed once and the same on both shards, both hold the sum of
    /// the exact means, members are equal byte for byte, and somebody can always go on.
    #[test]
    fn both_shards_take_the_exact_mean_of_the_same_members_whatever_happens(seed in 0u64..1 << 30) {
        const WORKERS: usize = 4;
        let consistency = Consistency::all(Mode::Sync { backup_workers: 1 });
        let mut shards = [pair(0, &consistency), pair(1, &consistency)];
        let keys = [0, 1].map(|shard| key_on(shard, "counts", 5));
        let mut draws = 0;
        let mut draw = |below: u64| {
            draws += 1;
            mix64(seed << 32 ^ draws) % below
        };
        // Clock, what it pushed for the step under way, the next number, whether it lives.
        let mut workers = [(0u64, None::<f32>, 1u64, true); WORKERS];
        let mut contributed: Vec<(u64, u64, f32)> = Vec::new();
        let mut rounds: Vec<Round> = Vec::new();
        for _ in 0..300 {
            match draw(40) {
                0 => {
                    let at = draw(2) as usize;
                    let [zero, one] = shards;
                    shards = if at == 0 { [fail_over(zero), one] } else { [zero, fail_over(one)] };
                }
                1 if workers.iter().filter(|worker| worker.3).count() > 2 => {
                    let ends = draw(WORKERS as u64) as usize;
                    workers[ends].3 = false;
                    for pair in &mut shards {
                        let closed = changed(&pair[0].view, |view| {
                            view.version += 1;
                            let open = (1..).map(SessionId).zip(&workers);
                            let open = open.filter(|(_, worker)| worker.3).map(|(id, _)| id).collect();
                            view.sessions = ClosedSessions { high_water: WORKERS as u64, open };
                        });
                        pair[0].on_view(closed);
                    }
                }
                _ => {
                    let at = draw(WORKERS as u64) as usize;
                    let session = at as u64 + 1;
                    let (clock, pushed, sequence, lives) = workers[at];
                    if !lives {
                        continue;
                    }
                    match pushed {
                        None => {
                            let standing = stands(&mut shards[0][0], session, clock, clock > 0);
                            let round = standing.last_round.clone();
                            if round.number > 0 {
                                shards[1][0].end_round(shards[1][0].epoch(), round, Contact::Leased).expect("serves");
                            }
                            if !standing.may_begin {
                                continue;
                            }
                            let gradient = draw(1000) as f32 / 7.0;
                            for (pair, key) in shards.iter_mut().zip(keys) {
                                let update = contribution(standing.clock + 1, rows(COUNTS, 1, &[key], gradient));
                                ticket(push(&mut pair[0], push_of(SessionId(session), sequence, vec![update])));
                            }
                            contributed.push((standing.clock + 1, session, gradient));
                            workers[at] = (standing.clock, Some(gradient), sequence + 1, true);
                        }
                        Some(_) => {
                            stands(&mut shards[0][0], session, clock + 1, true);
                            workers[at] = (clock + 1, None, sequence, true);
                        }
                    }
                    let last = shards[0][0].state().board().last_round().clone();
                    if last.number > 0 && rounds.last() != Some(&last) {
                        prop_assert!(rounds.last().is_none_or(|before| before.number + 1 == last.number));
                        rounds.push(last);
                    }
                }
            }
        }
        let last = rounds.last().cloned().expect("many rounds");
        shards[1][0].end_round(shards[1][0].epoch(), last, Contact::Leased).expect("serves");
        let mut expected = 0.0f32;
        for Round { number, members } in &rounds {
            let of = contributed.iter().filter(|(round, session, _)| round == number && members.contains(&SessionId(*session)));
            let of: Vec<_> = of.map(|(_, session, gradient)| (*session, *gradient)).collect();
            prop_assert_eq!(of.len(), members.len());
            if !of.is_empty() {
                expected += reference(&of, members.len());
            }
        }
        prop_assert!(rounds.len() > 5);
        for (pair, key) in shards.iter_mut().zip(keys) {
            sync(pair);
            prop_assert_eq!(encoded(&pair[0]), encoded(&pair[1]));
            prop_assert_eq!(value(&pair[0], key), expected);
        }
    }
}
