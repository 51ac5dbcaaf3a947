use downpour_core::id::{Epoch, SessionId};
use downpour_core::init::Init;
use downpour_core::optimizer::{Course, OptimizerSpec, Schedule, Sgd, StepScalars};
use downpour_core::spec::{TableSpec, VariableSpec};
use downpour_proto::v1;

use super::*;

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
    let (push, _) = state.resolve(push, u64::MAX);
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
        let (resolved, _) = state.resolve(push(sequence, gradients), u64::MAX);
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
        let (resolved, _) = state.resolve(push(3, gradients), u64::MAX);
        resolved.refusal.map(|why| why.reason)
    };
    assert_eq!(refused(vec![0; 8]), Some(RefusalReason::WrongShape), "rows of f32");
    assert_eq!(refused(vec![0, 0, 0x80, 0x7F]), Some(RefusalReason::NotFinite));
}
