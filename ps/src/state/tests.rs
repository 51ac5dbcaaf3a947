use downpour_core::id::{Epoch, SessionId};
use downpour_core::init::Init;
use downpour_core::optimizer::{
    Course, OptimizerSpec, Scaling, Schedule, Sgd, Staleness, StepScalars,
};
use downpour_core::spec::{TableSpec, VariableSpec};
use downpour_proto::v1;

use super::*;
use crate::record::Read;

/// A shard with a table whose learning rate is 1, and half of it after every 10 steps.
fn halving() -> ShardState {
    let schedule = Schedule { warm_up_steps: 0, then: Course::Step { every: 10, factor: 0.5 } };
    let optimizer = OptimizerSpec { schedule, ..Sgd { learning_rate: 1.0 }.into() };
    let table = TableSpec::new(1, Init::Zeros, "t");
    let spec = VariableSpec { name: "t".into(), optimizer, shape: Shape::Table(table) };
    let mut state = ShardState::new(Identity { shard: ShardId(0), shards: 1, seed: 1 });
    log(&mut state, Body::Define(Variable { id: VariableId(1), spec }));
    state
}

fn log(state: &mut ShardState, body: Body) {
    let previous = state.last();
    let record = Record { lsn: previous.next_in(Epoch(1)), previous, body };
    state.apply(&record).expect("the next record");
}

/// A push of one gradient, resolved: the learning rate that it gets, if it is not refused.
fn push(state: &mut ShardState, session: u64, clock: u64, gradient: f32) -> Option<f32> {
    let session = SessionId(session);
    let sequence = (1..).find(|&next| state.cells.check(session, next) == Verdict::Apply)?;
    let keys = 5u64.to_le_bytes().to_vec().into();
    let gradients = gradient.to_le_bytes().to_vec().into();
    let update = v1::RowGradients { keys, gradients };
    let body = Some(v1::update::Body::Rows(update));
    let update = Update::unresolved(v1::Update { variable: 1, body }).expect("a body");
    let push = Push { session, sequence, clock, refusal: None, updates: vec![update] };
    let (push, _) = state.resolve(push, Staleness::default(), u64::MAX);
    let learning_rate = push.updates.first().map(|update| update.scalars.learning_rate);
    log(state, Body::Push(push));
    learning_rate
}

#[test]
fn a_learning_rate_goes_by_the_furthest_clock_and_never_back() {
    let mut state = halving();
    assert_eq!(push(&mut state, 1, 9, 1.0), Some(1.0));
    assert_eq!(push(&mut state, 1, 10, 1.0), Some(0.5), "its own clock counts");
    assert_eq!(push(&mut state, 2, 0, 1.0), Some(0.5), "one that joins late");
    assert_eq!(push(&mut state, 2, 1_000, f32::NAN), None);
    assert_eq!(push(&mut state, 2, 20, 1.0), Some(0.25), "what was refused moved nothing");
}

#[test]
fn a_clock_that_cannot_be_takes_the_job_only_a_bounded_way() {
    let mut state = halving();
    push(&mut state, 1, 7, 1.0);
    push(&mut state, 2, 1 << 56, 1.0);
    assert_eq!(state.clock(), 7 + (1 << 16), "and not to the end of every schedule");
    push(&mut state, 1, 8, 1.0);
    push(&mut state, 1, 80_000, 1.0);
    assert_eq!(state.clock(), 80_000, "a shard that was not needed for long catches up");
}

#[test]
fn a_stale_gradient_takes_a_smaller_step_and_one_that_says_nothing_the_whole() {
    let define = |state: &mut ShardState, id, staleness| {
        let optimizer = OptimizerSpec { staleness, ..Sgd { learning_rate: 1.0 }.into() };
        let table = TableSpec::new(1, Init::Zeros, "t");
        let spec = VariableSpec { name: format!("t{id}"), optimizer, shape: Shape::Table(table) };
        log(state, Body::Define(Variable { id: VariableId(id), spec }));
    };
    let mut state = ShardState::new(Identity { shard: ShardId(0), shards: 1, seed: 1 });
    define(&mut state, 1, Scaling::Clocks { per: 1.0 });
    define(&mut state, 2, Scaling::Records { per: 2.0 });
    define(&mut state, 3, Scaling::None);
    let read = Read { lsn: state.last(), clock: state.clock() };
    // Two others were faster.
    (1..=2).for_each(|session| _ = push(&mut state, session, 3, 1.0));
    let staleness = state.staleness(read);
    assert_eq!(staleness, Staleness { clocks: 3, records: Some(2) });
    let rows = |id| {
        let change = Change::Rows {
            keys: 5u64.to_le_bytes().to_vec().into(),
            gradients: 1f32.to_le_bytes().to_vec().into(),
        };
        let scalars = StepScalars { learning_rate: 0.0, beta1_power: 0.0, beta2_power: 0.0 };
        Update { variable: VariableId(id), change, step: 0, scalars }
    };
    let slow = Push {
        session: SessionId(9),
        sequence: 1,
        clock: 1,
        refusal: None,
        updates: (1..=3).map(rows).collect(),
    };
    let rates = |staleness| {
        let (resolved, _) = state.resolve(slow.clone(), staleness, u64::MAX);
        resolved.updates.iter().map(|update| update.scalars.learning_rate).collect::<Vec<_>>()
    };
    assert_eq!(rates(staleness), [0.25, 0.5, 1.0]);
    assert_eq!(rates(Staleness::default()), [1.0; 3]);
    let elsewhere = Read { lsn: Lsn::new(Epoch(9), 1), clock: 99 };
    let unknown = state.staleness(elsewhere);
    assert_eq!(unknown, Staleness { clocks: 0, records: None }, "of another history, and ahead");
    assert_eq!(rates(unknown), [1.0; 3]);
}

#[test]
fn the_clock_is_part_of_what_members_compare() {
    let [mut near, mut far] = [halving(), halving()];
    // Both learning rates are 1, so only the clocks differ.
    push(&mut near, 1, 0, 1.0);
    push(&mut far, 1, 5, 1.0);
    assert_ne!(near.digest(), far.digest());
}

#[test]
fn rows_of_a_bf16_table_travel_in_two_bytes_a_float_and_are_kept_in_four() {
    let table = TableSpec { row_format: RowFormat::Bf16, ..TableSpec::new(2, Init::Zeros, "t") };
    let optimizer = Sgd { learning_rate: -1.0 }.into();
    let spec = VariableSpec { name: "t".into(), optimizer, shape: Shape::Table(table) };
    let mut state = ShardState::new(Identity { shard: ShardId(0), shards: 1, seed: 1 });
    let id = VariableId(1);
    log(&mut state, Body::Define(Variable { id, spec }));
    let push = |sequence, gradients: Vec<u8>| {
        let keys = 5u64.to_le_bytes().to_vec().into();
        let change = Change::Rows { keys, gradients: gradients.into() };
        let scalars = StepScalars { learning_rate: 0.0, beta1_power: 0.0, beta2_power: 0.0 };
        let update = Update { variable: id, change, step: 0, scalars };
        let session = SessionId(1);
        Push { session, sequence, clock: 0, refusal: None, updates: vec![update] }
    };
    // 1 and 2⁻⁹: their sum has more digits than a bfloat16.
    for (sequence, bits) in [(1, 0x3F80u16), (2, 0x3B00)] {
        let gradients = [bits, bits].into_iter().flat_map(u16::to_le_bytes).collect();
        let (resolved, _) =
            state.resolve(push(sequence, gradients), Staleness::default(), u64::MAX);
        assert_eq!(resolved.refusal, None);
        log(&mut state, Body::Push(resolved));
    }
    let mut words = Vec::new();
    state.encode(&mut |word| words.push(word));
    assert_eq!(words.last(), Some(&u64::from((1.0f32 + 1.0 / 512.0).to_bits())));
    let mut rows = BytesMut::new();
    state.pull_rows(id, Keys::trusted(&5u64.to_le_bytes()), &mut rows).expect("a table");
    assert_eq!((&rows[..], state.row_bytes(id)), (&[0x80, 0x3F, 0x80, 0x3F][..], Ok(4)));

    let refused = |gradients| {
        let (resolved, _) = state.resolve(push(3, gradients), Staleness::default(), u64::MAX);
        resolved.refusal.map(|why| why.reason)
    };
    assert_eq!(refused(vec![0; 8]), Some(RefusalReason::WrongShape), "rows of f32");
    assert_eq!(refused(vec![0, 0, 0x80, 0x7F]), Some(RefusalReason::NotFinite));
}
