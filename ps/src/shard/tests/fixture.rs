//! A job small enough to read, and hands to drive its replicas.

use std::sync::Arc;

use bytes::Bytes;
use downpour_core::cells::ClosedSessions;
use downpour_core::id::{
    Epoch, Incarnation, JobId, NodeId, ServerRef, SessionId, ShardId, VariableId,
};
use downpour_core::init::Init;
use downpour_core::optimizer::{Adam, Course, OptimizerSpec, Schedule, Sgd, StepScalars};
use downpour_core::routing::ShardRoute;
use downpour_core::spec::{DenseSpec, JobSpec, Shape, TableSpec, Variable, VariableSpec};
use downpour_core::view::JobView;

use crate::record::{Blocks, Change, Push, Record, Update};
use crate::shard::{Basis, Contact, Incoming, Pushed, Role, Room, Settled, Shard, Ticket};

/// Counts pushes: zero init, SGD at −1, gradients of 1 (docs/protocol.md 10).
pub(crate) const COUNTS: VariableId = VariableId(1);
/// A dense tensor of 21 floats in 3 blocks, Adam.
pub(crate) const DENSE: VariableId = VariableId(2);
/// A table of width 3 with normal init, Adam under all that an optimizer can have beside it.
pub(crate) const EMBEDDING: VariableId = VariableId(3);

pub(crate) const SESSION: SessionId = SessionId(7);

pub(crate) fn server(node: u32) -> ServerRef {
    ServerRef { node: NodeId(node), incarnation: Incarnation(100 + u64::from(node)) }
}

pub(crate) fn route(epoch: u64, set_version: u64, primary: u32, in_sync: &[u32]) -> ShardRoute {
    ShardRoute {
        epoch: Epoch(epoch),
        set_version,
        primary: Some(server(primary)),
        in_sync: in_sync.iter().map(|&node| server(node)).collect(),
        joining: None,
        moving: None,
    }
}

fn variables() -> Vec<Variable> {
    let adam =
        OptimizerSpec::Adam(Adam { learning_rate: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 });
    let schedule = Schedule { warm_up_steps: 2, then: Course::Cosine { steps: 5, floor: 0.001 } };
    let modified = OptimizerSpec { schedule, clip_row_norm: Some(0.5), l2_decay: 0.1, ..adam };
    let table = |name: &str, dim, init, optimizer| VariableSpec {
        name: name.into(),
        optimizer,
        shape: Shape::Table(TableSpec::new(dim, init, name)),
    };
    let counting = OptimizerSpec::Sgd(Sgd { learning_rate: -1.0 });
    let dense = VariableSpec {
        name: "dense".into(),
        optimizer: adam,
        shape: Shape::Dense(DenseSpec { shape: vec![3, 7], block_floats: 8 }),
    };
    let specs = [
        table("counts", 1, Init::Zeros, counting),
        dense,
        table("embedding", 3, Init::Normal { mean: 0.0, std: 0.1 }, modified),
    ];
    (1..).map(VariableId).zip(specs).map(|(id, spec)| Variable { id, spec }).collect()
}

/// A job of one shard with its three variables.
pub(crate) fn view(version: u64, route: ShardRoute) -> Arc<JobView> {
    let spec = JobSpec { name: "job".into(), shards: 1, replicas: 3, min_in_sync: 1, seed: 11 };
    Arc::new(JobView {
        job: JobId(1),
        spec,
        version,
        variables: variables(),
        shards: vec![route],
        sessions: ClosedSessions::default(),
        orders: downpour_core::checkpoint::Orders::default(),
        consistency: downpour_core::consistency::Consistency::default(),
    })
}

/// The same view with something else about it.
pub(crate) fn changed(view: &Arc<JobView>, change: impl FnOnce(&mut JobView)) -> Arc<JobView> {
    let mut view = JobView::clone(view);
    change(&mut view);
    Arc::new(view)
}

pub(crate) const LOG_BYTES_MAX: usize = 1 << 20;

pub(crate) fn replica(me: ServerRef, view: &Arc<JobView>) -> Shard {
    Shard::new(me, ShardId(0), LOG_BYTES_MAX, Arc::clone(view))
}

/// Replicas of servers 1, 2, … that are all in sync under primary 1, which serves.
pub(crate) fn cluster<const N: usize>() -> [Shard; N] {
    let members: Vec<u32> = (1..=N as u32).collect();
    let view = view(1, route(1, 1, 1, &members));
    let mut shards: [Shard; N] = std::array::from_fn(|i| replica(server(i as u32 + 1), &view));
    let (primary, backups) = shards.split_first_mut().expect("at least one");
    promote(primary, backups);
    assert!(matches!(primary.role(), Role::Primary(_)));
    shards
}

/// Fences and levels everybody in `others`.
pub(crate) fn promote(candidate: &mut Shard, others: &mut [Shard]) {
    let epoch = candidate.epoch();
    for other in others.iter_mut() {
        let answer = other.fence(epoch, candidate.me);
        candidate.fenced(epoch, other.me, answer).expect("one history");
    }
    for other in others.iter() {
        if other.last() > candidate.last() {
            let records = other.fetch(epoch, candidate.last(), usize::MAX).expect("kept");
            candidate.fetched(epoch, owned(&records)).expect("one history");
        }
    }
    others.iter_mut().for_each(|other| replicate(candidate, other));
}

pub(crate) fn owned(records: &[Arc<Record>]) -> Vec<Record> {
    records.iter().map(|record| Record::clone(record)).collect()
}

/// Sends everything that there is to send to one member, and takes its answers.
pub(crate) fn replicate(primary: &mut Shard, backup: &mut Shard) {
    while let Some(batch) = primary.batch(backup.me, Room::Whole(300)) {
        let incoming = Incoming {
            epoch: batch.epoch,
            source: primary.me,
            commit: batch.commit,
            records: owned(&batch.records),
            check: batch.check,
        };
        let (ack, followed) = backup.replicate(incoming, Contact::Leased);
        followed.expect("a backup can follow");
        primary.acked(backup.me, ack).expect("one history");
    }
}

pub(crate) fn raw_keys(keys: &[u64]) -> Bytes {
    keys.iter().flat_map(|key| key.to_le_bytes()).collect()
}

pub(crate) fn raw_floats(values: impl IntoIterator<Item = f32>) -> Bytes {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

pub(crate) fn update(variable: VariableId, change: Change) -> Update {
    let scalars = StepScalars { learning_rate: 0.0, beta1_power: 0.0, beta2_power: 0.0 };
    Update { variable, change, step: 0, scalars }
}

/// One update of a table with the same gradient everywhere.
pub(crate) fn rows(variable: VariableId, dim: usize, keys: &[u64], gradient: f32) -> Update {
    let gradients = raw_floats(std::iter::repeat_n(gradient, keys.len() * dim));
    update(variable, Change::Rows { keys: raw_keys(keys), gradients })
}

pub(crate) fn blocks(numbers: &[u32], len: usize, value: f32) -> Blocks {
    let floats = raw_floats(std::iter::repeat_n(value, len));
    Blocks { numbers: numbers.to_vec(), floats }
}

pub(crate) fn basis(epoch: Epoch, view_version: u64) -> Basis {
    Basis { epoch, view_version, numbering: Epoch(0), read: None }
}

pub(crate) fn push_of(session: SessionId, sequence: u64, updates: Vec<Update>) -> Push {
    Push { session, sequence, clock: sequence, refusal: None, updates }
}

/// Counts one on each of `keys`, as push `sequence` of [`SESSION`].
pub(crate) fn counting(sequence: u64, keys: &[u64]) -> Push {
    push_of(SESSION, sequence, vec![rows(COUNTS, 1, keys, 1.0)])
}

/// A push that names the epoch the replica is in, under a lease.
pub(crate) fn push(shard: &mut Shard, push: Push) -> Pushed {
    shard.push(basis(shard.epoch(), 1), push, Contact::Leased, u64::MAX)
}

pub(crate) fn ticket(pushed: Pushed) -> Ticket {
    match pushed {
        Pushed::Logged(ticket) => ticket,
        other => panic!("not logged: {other:?}"),
    }
}

pub(crate) fn acknowledged(shard: &Shard, ticket: &Ticket) -> bool {
    shard.settle(ticket, Contact::Leased) == Settled::Acknowledged
}

/// How often `key` was counted.
pub(crate) fn count(shard: &Shard, key: u64) -> f32 {
    let mut out = bytes::BytesMut::new();
    let keys = raw_keys(&[key]);
    let keys = downpour_proto::tensor::Keys::trusted(&keys);
    shard.state().pull_rows(COUNTS, keys, &mut out).expect("the table is defined");
    downpour_core::tensor_bytes::floats(&out).next().expect("one float")
}

/// The canonical encoding.
pub(crate) fn encoded(shard: &Shard) -> Vec<u64> {
    let mut words = Vec::new();
    shard.state().encode(&mut |word| words.push(word));
    words
}
