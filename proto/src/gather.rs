//! Messages with bulk data as lists of buffers, for vectored writes: the tensors in them are not copied.
//!
//! The bytes are those that the generated code writes (a property test compares them); only `bytes` fields of some size stay where they are.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use crate::frame::{self, HEADER_BYTES, Kind};
use crate::v1::{self, contribution, pull_part_reply, record, update};

/// A tensor shorter than this is cheaper to copy than to send as a buffer of its own.
const OWN_BUFFER_BYTES: usize = 2048;

/// Bytes on their way to a socket.
#[derive(Debug, Default)]
pub struct Segments {
    sealed: Outgoing,
    open: BytesMut,
}

/// Buffers that are written one after the other, several with one call of the system.
#[derive(Debug, Default)]
pub struct Outgoing {
    buffers: VecDeque<Bytes>,
    remaining: usize,
}

impl Outgoing {
    fn push(&mut self, buffer: Bytes) {
        self.remaining += buffer.len();
        self.buffers.push_back(buffer);
    }
}

impl Buf for Outgoing {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        self.buffers.front().map_or(&[], |buffer| buffer)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let buffers = self.buffers.iter().zip(slices);
        buffers.map(|(buffer, slice)| *slice = IoSlice::new(buffer)).count()
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.remaining, "{count} of {} bytes", self.remaining);
        self.remaining -= count;
        while count > 0
            && let Some(front) = self.buffers.front_mut()
        {
            let step = count.min(front.len());
            front.advance(step);
            count -= step;
            if front.is_empty() {
                self.buffers.pop_front();
            }
        }
    }
}

impl Segments {
    /// Appends a whole frame.
    ///
    /// # Panics
    /// If the message is larger than a frame may be; who builds a message checks that.
    pub fn frame(&mut self, kind: Kind, request: u64, message: &impl Gather) {
        let len = message.encoded_len();
        self.open.reserve(HEADER_BYTES);
        frame::put_header(&mut self.open, kind, request, len);
        message.gather(self);
    }

    /// Appends bytes that are no frame.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.open.put_slice(bytes);
    }

    /// Everything that was appended, as a buffer to write from.
    pub fn outgoing(&mut self) -> &mut Outgoing {
        self.seal();
        &mut self.sealed
    }

    fn seal(&mut self) {
        if !self.open.is_empty() {
            self.sealed.push(self.open.split().freeze());
        }
    }

    fn key(&mut self, tag: u32) {
        encode_key(tag, WireType::LengthDelimited, &mut self.open);
    }

    fn len(&mut self, len: usize) {
        encode_varint(len as u64, &mut self.open);
    }

    fn uint(&mut self, tag: u32, value: impl Into<u64>) {
        let value = value.into();
        if value != 0 {
            encode_key(tag, WireType::Varint, &mut self.open);
            encode_varint(value, &mut self.open);
        }
    }

    /// A `bytes` field, left out when empty.
    fn bytes(&mut self, tag: u32, bytes: &Bytes) {
        if !bytes.is_empty() {
            self.element(tag, bytes);
        }
    }

    /// An element of a `repeated bytes` field.
    fn element(&mut self, tag: u32, bytes: &Bytes) {
        self.key(tag);
        self.len(bytes.len());
        if bytes.len() < OWN_BUFFER_BYTES {
            self.open.put_slice(bytes);
        } else {
            self.seal();
            self.sealed.push(bytes.clone());
        }
    }

    /// A `repeated uint32` field, packed.
    fn packed(&mut self, tag: u32, numbers: &[u32]) {
        if !numbers.is_empty() {
            self.key(tag);
            self.len(numbers.iter().map(|&n| encoded_len_varint(n.into())).sum());
            numbers.iter().for_each(|&number| encode_varint(number.into(), &mut self.open));
        }
    }

    fn message(&mut self, tag: u32, message: &impl Gather) {
        self.key(tag);
        self.len(message.encoded_len());
        message.gather(self);
    }

    fn float(&mut self, tag: u32, value: f32) {
        if value != 0.0 {
            prost::encoding::float::encode(tag, &value, &mut self.open);
        }
    }

    fn double(&mut self, tag: u32, value: f64) {
        if value != 0.0 {
            prost::encoding::double::encode(tag, &value, &mut self.open);
        }
    }

    /// A message without bulk data, if it is there.
    fn optional(&mut self, tag: u32, message: Option<&impl Message>) {
        if let Some(message) = message {
            self.small(tag, message);
        }
    }

    /// A message without bulk data.
    fn small(&mut self, tag: u32, message: &impl Message) {
        self.key(tag);
        self.len(message.encoded_len());
        message.encode_raw(&mut self.open);
    }
}

/// A message that can be appended to [`Segments`]. Fields in the order of their numbers, as the generated code writes them.
pub trait Gather: Message {
    /// Appends the message without its length.
    fn gather(&self, out: &mut Segments);
}

impl Gather for v1::PullRequest {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.job);
        out.uint(2, self.incarnation);
        self.parts.iter().for_each(|part| out.message(3, part));
    }
}

impl Gather for v1::PullPart {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.shard);
        out.uint(2, self.epoch);
        self.rows.iter().for_each(|rows| out.message(3, rows));
        self.dense.iter().for_each(|dense| out.small(4, dense));
    }
}

impl Gather for v1::PullRows {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.variable);
        out.bytes(2, &self.keys);
    }
}

impl Gather for v1::PullReply {
    fn gather(&self, out: &mut Segments) {
        self.parts.iter().for_each(|part| out.message(1, part));
    }
}

impl Gather for v1::PullPartReply {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.shard);
        match &self.result {
            Some(pull_part_reply::Result::Pulled(pulled)) => out.message(2, pulled),
            Some(pull_part_reply::Result::Redirect(redirect)) => out.small(3, redirect),
            Some(pull_part_reply::Result::Retry(retry)) => out.small(4, retry),
            None => {}
        }
    }
}

impl Gather for v1::PulledPart {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.lsn);
        self.rows.iter().for_each(|rows| out.element(2, rows));
        self.dense.iter().for_each(|dense| out.message(3, dense));
        out.uint(110, self.clock);
    }
}

impl Gather for v1::PulledDense {
    fn gather(&self, out: &mut Segments) {
        out.packed(1, &self.blocks);
        out.bytes(2, &self.values);
        out.uint(3, self.uninitialized);
    }
}

impl Gather for v1::PushRequest {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.request);
        out.uint(2, self.job);
        out.uint(3, self.session);
        out.uint(4, self.incarnation);
        out.uint(5, self.view_version);
        out.uint(6, self.clock);
        self.parts.iter().for_each(|part| out.message(7, part));
    }
}

impl Gather for v1::PushPart {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.shard);
        out.uint(2, self.epoch);
        out.uint(3, self.sequence);
        self.updates.iter().for_each(|update| out.message(4, update));
        out.uint(5, self.numbering);
        out.optional(110, self.read.as_ref());
    }
}

impl Gather for v1::Update {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.variable);
        match &self.body {
            Some(update::Body::Rows(rows)) => out.message(2, rows),
            Some(update::Body::Gradients(blocks)) => out.message(3, blocks),
            Some(update::Body::Values(blocks)) => out.message(4, blocks),
            Some(update::Body::Contribution(contribution)) => out.message(70, contribution),
            None => {}
        }
    }
}

impl Gather for v1::Contribution {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.round);
        match &self.body {
            Some(contribution::Body::Rows(rows)) => out.message(2, rows),
            Some(contribution::Body::Gradients(blocks)) => out.message(3, blocks),
            None => {}
        }
    }
}

impl Gather for v1::RowGradients {
    fn gather(&self, out: &mut Segments) {
        out.bytes(1, &self.keys);
        out.bytes(2, &self.gradients);
    }
}

impl Gather for v1::DenseBlocks {
    fn gather(&self, out: &mut Segments) {
        out.packed(1, &self.blocks);
        out.bytes(2, &self.values);
    }
}

impl Gather for v1::ReplicateRequest {
    fn gather(&self, out: &mut Segments) {
        out.optional(1, self.source.as_ref());
        out.uint(2, self.incarnation);
        self.shards.iter().for_each(|shard| out.message(3, shard));
    }
}

impl Gather for v1::ShardRecords {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.job);
        out.uint(2, self.shard);
        out.uint(3, self.epoch);
        out.uint(4, self.commit_lsn);
        self.records.iter().for_each(|record| out.message(5, record));
        out.optional(6, self.check.as_ref());
    }
}

impl Gather for v1::Record {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.lsn);
        out.uint(2, self.previous_lsn);
        match &self.body {
            Some(record::Body::Push(push)) => out.message(3, push),
            Some(other) => other.encode(&mut out.open),
            None => {}
        }
    }
}

impl Gather for v1::PushRecord {
    fn gather(&self, out: &mut Segments) {
        out.uint(1, self.session);
        out.uint(2, self.sequence);
        out.uint(3, self.clock);
        out.optional(4, self.refusal.as_ref());
        self.updates.iter().for_each(|update| out.message(5, update));
    }
}

impl Gather for v1::ResolvedUpdate {
    fn gather(&self, out: &mut Segments) {
        if let Some(update) = &self.update {
            out.message(1, update);
        }
        out.float(2, self.learning_rate);
        out.uint(3, self.step);
        out.double(4, self.beta1_power);
        out.double(5, self.beta2_power);
    }
}

/// Small messages are copied.
macro_rules! copied {
    ($($message:ty),*) => {
        $(impl Gather for $message {
            fn gather(&self, out: &mut Segments) {
                self.encode_raw(&mut out.open);
            }
        })*
    };
}

copied!(v1::PushReply, v1::ReplicateReply, v1::Failure);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::push_part_reply;
    use proptest::prelude::*;

    /// Tensors on both sides of the limit for a buffer of their own.
    fn tensor() -> impl Strategy<Value = Bytes> {
        prop_oneof![Just(0usize), 1usize..100, OWN_BUFFER_BYTES - 1..OWN_BUFFER_BYTES + 2]
            .prop_map(|len| (0..len).map(|at| at as u8).collect())
    }

    fn blocks() -> impl Strategy<Value = v1::DenseBlocks> {
        (any::<Vec<u32>>(), tensor())
            .prop_map(|(blocks, values)| v1::DenseBlocks { blocks, values })
    }

    fn body() -> impl Strategy<Value = Option<update::Body>> {
        prop_oneof![
            Just(None),
            (tensor(), tensor()).prop_map(|(keys, gradients)| {
                Some(update::Body::Rows(v1::RowGradients { keys, gradients }))
            }),
            blocks().prop_map(|blocks| Some(update::Body::Gradients(blocks))),
            blocks().prop_map(|blocks| Some(update::Body::Values(blocks))),
        ]
    }

    fn pulled() -> impl Strategy<Value = Option<pull_part_reply::Result>> {
        let dense = (blocks(), any::<u32>()).prop_map(|(blocks, uninitialized)| v1::PulledDense {
            blocks: blocks.blocks,
            values: blocks.values,
            uninitialized,
        });
        let lists = (prop::collection::vec(tensor(), 0..4), prop::collection::vec(dense, 0..3));
        prop_oneof![
            Just(None),
            any::<i32>()
                .prop_map(|reason| Some(pull_part_reply::Result::Retry(v1::Retry { reason }))),
            any::<u64>().prop_map(|epoch| {
                let primary = Some(v1::ServerRef { node: 1, incarnation: epoch });
                Some(pull_part_reply::Result::Redirect(v1::Redirect { epoch, primary }))
            }),
            (any::<u64>(), lists).prop_map(|(lsn, (rows, dense))| {
                let clock = lsn.rotate_left(9);
                Some(pull_part_reply::Result::Pulled(v1::PulledPart { lsn, rows, dense, clock }))
            }),
        ]
    }

    fn same(message: &impl Gather) -> Result<(), TestCaseError> {
        let mut segments = Segments::default();
        segments.frame(Kind::Pull, 7, message);
        let outgoing = segments.outgoing();
        let mut slices = [IoSlice::new(&[]); 64];
        let count = outgoing.chunks_vectored(&mut slices);
        let listed: usize = slices[..count].iter().map(|slice| slice.len()).sum();
        prop_assert!(listed == outgoing.remaining() || count == slices.len());
        let mut wire = BytesMut::new();
        while outgoing.has_remaining() {
            // Sockets take pieces that end anywhere.
            let piece = outgoing.chunk().len().min(1000);
            wire.extend_from_slice(&outgoing.chunk()[..piece]);
            outgoing.advance(piece);
        }
        let frame = frame::take(&mut wire).unwrap().unwrap();
        prop_assert_eq!((frame.kind, frame.request), (Kind::Pull, 7));
        prop_assert_eq!(&frame.body[..], &message.encode_to_vec()[..]);
        prop_assert!(wire.is_empty());
        Ok(())
    }

    proptest! {
        #[test]
        fn gathered_requests_are_what_the_generated_code_writes(
            numbers: [u64; 6],
            updates in prop::collection::vec((any::<u32>(), body()), 0..4),
            tensors in prop::collection::vec((any::<u32>(), tensor()), 0..4),
            shard: u32,
        ) {
            let [request, job, session, incarnation, view_version, clock] = numbers;
            let updates = updates.into_iter().map(|(variable, body)| v1::Update { variable, body });
            let part = v1::PushPart { shard, epoch: clock, sequence: job, updates: updates.collect(), numbering: job, read: Some(v1::Read { lsn: clock, clock: job }) };
            let parts = vec![part, v1::PushPart::default()];
            same(&v1::PushRequest { request, job, session, incarnation, view_version, clock, parts })?;
            let rows = tensors.into_iter().map(|(variable, keys)| v1::PullRows { variable, keys });
            let dense = vec![v1::PullDense { variable: shard, have_lsn: clock }; 2];
            let part = v1::PullPart { shard, epoch: clock, rows: rows.collect(), dense };
            same(&v1::PullRequest { job, incarnation, parts: vec![part, v1::PullPart::default()] })?;
        }

        #[test]
        fn gathered_replies_are_what_the_generated_code_writes(
            parts in prop::collection::vec((any::<u32>(), pulled()), 0..4), lsn: u64,
        ) {
            let parts = parts.into_iter().map(|(shard, result)| v1::PullPartReply { shard, result });
            same(&v1::PullReply { parts: parts.collect() })?;
            let done = v1::PushOutcome { lsn, repeated: true, refusal: None, stale_clocks: Some(lsn) };
            let result = Some(push_part_reply::Result::Done(done));
            let part = v1::PushPartReply { shard: 1, sequence: lsn, result };
            same(&v1::PushReply { request: lsn, parts: vec![part] })?;
            same(&v1::Failure { code: 3, message: "no".into() })?;
        }

        #[test]
        fn gathered_records_are_what_the_generated_code_writes(
            numbers: [u64; 4],
            powers: (f32, f64, f64),
            updates in prop::collection::vec((any::<u32>(), body()), 0..4),
            refused: bool,
        ) {
            let [lsn, previous_lsn, session, clock] = numbers;
            let (learning_rate, beta1_power, beta2_power) = powers;
            let updates = updates.into_iter().map(|(variable, body)| {
                let update = Some(v1::Update { variable, body });
                v1::ResolvedUpdate { update, learning_rate, step: clock, beta1_power, beta2_power }
            });
            let refusal = refused.then_some(v1::Refusal { reason: 3, variable: 1 });
            let updates = updates.chain([v1::ResolvedUpdate::default()]).collect();
            let push = v1::PushRecord { session, sequence: lsn, clock, refusal, updates };
            let bodies = [
                None,
                Some(record::Body::Push(push)),
                Some(record::Body::Left(v1::Left { session, seat: clock })),
                Some(record::Body::RolledBack(v1::RolledBack {})),
            ];
            let records = bodies.map(|body| v1::Record { lsn, previous_lsn, body }).to_vec();
            let check = refused.then_some(v1::Check { lsn, digest: clock });
            let shard = v1::ShardRecords { job: clock, shard: 3, epoch: lsn, commit_lsn: lsn, records, check };
            let source = Some(v1::ServerRef { node: 1, incarnation: clock });
            let shards = vec![shard, v1::ShardRecords::default()];
            same(&v1::ReplicateRequest { source, incarnation: lsn, shards })?;
            let ack = v1::ShardAck { job: 1, shard: 2, epoch: clock, last_lsn: lsn, not_ready: refused, differs: !refused };
            same(&v1::ReplicateReply { shards: vec![ack; 2] })?;
        }
    }
}
