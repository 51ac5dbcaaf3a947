//! One entry of a shard's log. It is closed (docs/protocol.md 2.3): applying it reads the record and the rows it names, and nothing else.

use bytes::Bytes;
use downpour_core::cells::{ClosedSessions, Refusal};
use downpour_core::clocks::{Regime, Round, Seat};
use downpour_core::id::{Lsn, SessionId, VariableId};
use downpour_core::optimizer::StepScalars;
use downpour_core::spec::Variable;
use downpour_proto::tensor::KEY_BYTES;
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::{Invalid, clock, v1, validate};
use prost::Message;

/// One entry of a shard's log.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its position.
    pub lsn: Lsn,
    /// Position of the record before it.
    pub previous: Lsn,
    /// What it does.
    pub body: Body,
}

/// What a record does.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Consumes a session's sequence number and applies its updates.
    Push(Push),
    /// The shard learns of a variable.
    Define(Variable),
    /// Sessions that are closed from here on.
    Close(ClosedSessions),
    /// The shard was set back to a checkpoint: the numbers of its pushes count anew.
    RolledBack,
    /// Shard 0: what is known of a session from here on.
    Tick(SessionId, Seat),
    /// Shard 0: a session gave back its seat of this number.
    Leave(SessionId, u64),
    /// Shard 0: other modes hold from a clock on.
    Regime(Regime),
    /// A round is over.
    EndRound(EndRound),
}

/// The end of a round as the primary resolved it: each variable that a member contributed to takes one step.
#[derive(Clone, Debug, PartialEq)]
pub struct EndRound {
    /// As shard 0 decided it.
    pub round: Round,
    /// Rising by variable.
    pub steps: Vec<RoundStep>,
}

/// One variable's step at the end of a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundStep {
    /// Of what.
    pub variable: VariableId,
    /// Count of the variable's updates on this shard, this one included.
    pub step: u64,
    /// Learning rate and powers.
    pub scalars: StepScalars,
}

/// A push as the primary resolved it.
#[derive(Clone, Debug, PartialEq)]
pub struct Push {
    /// Whose.
    pub session: SessionId,
    /// Which of the session's pushes to this shard.
    pub sequence: u64,
    /// Steps that the session had finished.
    pub clock: u64,
    /// Given: nothing changes but the session's cell; or, if it is partial, what was admitted is in `updates`.
    pub refusal: Option<Refusal>,
    /// Rising by variable.
    pub updates: Vec<Update>,
}

/// What a pull had answered, as a client says of the gradients that it computed with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// The values had every record up to here.
    pub lsn: Lsn,
    /// The shard's clock.
    pub clock: u64,
}

impl From<v1::Read> for Read {
    fn from(read: v1::Read) -> Self {
        Read { lsn: Lsn(read.lsn), clock: read.clock }
    }
}

/// An update of one variable with every number that the primary decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// Of what.
    pub variable: VariableId,
    /// To what.
    pub change: Change,
    /// Count of the variable's updates on this shard, this one included. First values do not count.
    pub step: u64,
    /// Learning rate and powers.
    pub scalars: StepScalars,
}

/// What an update changes. The bytes are those of the request that brought them.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Gradients of a table's rows.
    Rows {
        /// Raw, strictly increasing.
        keys: Bytes,
        /// Raw, keys × dim.
        gradients: Bytes,
    },
    /// Gradients of dense blocks.
    Gradients(Blocks),
    /// First values of dense blocks.
    Values(Blocks),
    /// Gradients that are kept until their round is over.
    Contribution {
        /// Which.
        round: u64,
        /// Of rows or blocks.
        gradients: Box<Change>,
    },
}

/// Numbers of dense blocks with their floats.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Strictly increasing.
    pub numbers: Vec<u32>,
    /// Raw, one block after the other.
    pub floats: Bytes,
}

/// Bytes that the record of a push adds to the part that it came in, alone in a message to a backup: the headers of six messages, and
/// their ten numbers of up to 11 bytes.
const ENVELOPE_BYTES: usize = 160;
/// Bytes that it adds for each update: a header of up to 6, and the numbers that the primary decides.
const RESOLVED_BYTES: usize = 6 + 5 + 11 + 2 * 9;

/// Whether the record of this part will fit into a message to a backup.
///
/// # Errors
/// It will not: no backup could ever have it.
pub(crate) fn fits_message(part: &v1::PushPart) -> Result<(), Invalid> {
    let bytes = part.encoded_len() + part.updates.len() * RESOLVED_BYTES + ENVELOPE_BYTES;
    if bytes > MESSAGE_BYTES_MAX {
        let problem = format!(
            "are {bytes} bytes as a record, at most {MESSAGE_BYTES_MAX} fit into a message: push less at once"
        );
        return Err(Invalid::new("parts.updates", problem));
    }
    Ok(())
}

/// Bytes that a record occupies beside its tensors, about.
const RECORD_BYTES: usize = 128;

impl Record {
    /// Bytes that keeping this record costs, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let body = match &self.body {
            Body::Push(push) => push.updates.iter().map(Update::bytes).sum(),
            Body::Define(_) => RECORD_BYTES,
            Body::RolledBack => 0,
            Body::Close(closed) => closed.open.len() * size_of::<SessionId>(),
            Body::Tick(..) | Body::Leave(..) => 0,
            Body::Regime(regime) => RECORD_BYTES * (1 + regime.consistency.variables.len()),
            Body::EndRound(end) => {
                end.round.members.len() * size_of::<SessionId>()
                    + end.steps.len() * size_of::<RoundStep>()
            }
        };
        RECORD_BYTES + body
    }

    /// Rows and blocks that it names.
    #[must_use]
    pub fn rows(&self) -> u64 {
        let Body::Push(push) = &self.body else { return 0 };
        push.updates.iter().map(|update| update.change.items()).sum::<usize>() as u64
    }
}

impl Update {
    /// An update as a client sent it, before the primary decided its numbers.
    ///
    /// # Errors
    /// It has no body.
    pub fn unresolved(update: v1::Update) -> Result<Self, Invalid> {
        Ok(Update {
            variable: VariableId(update.variable),
            change: given("updates.body", update.body)?.try_into()?,
            step: 0,
            scalars: StepScalars { learning_rate: 0.0, beta1_power: 0.0, beta2_power: 0.0 },
        })
    }

    fn bytes(&self) -> usize {
        size_of::<Update>() + self.change.bytes()
    }
}

impl Change {
    /// Rows or blocks that it names.
    fn items(&self) -> usize {
        match self {
            Change::Rows { keys, .. } => keys.len() / KEY_BYTES,
            Change::Gradients(blocks) | Change::Values(blocks) => blocks.numbers.len(),
            Change::Contribution { gradients, .. } => gradients.items(),
        }
    }

    /// It names no row and no block.
    pub(crate) fn is_empty(&self) -> bool {
        self.items() == 0
    }

    /// The same in memory of its own: its bytes are parts of the message that brought them, and hold all of that.
    pub(crate) fn detached(&self) -> Change {
        let copy = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        let blocks = |of: &Blocks| Blocks { numbers: of.numbers.clone(), floats: copy(&of.floats) };
        match self {
            Change::Rows { keys, gradients } => {
                Change::Rows { keys: copy(keys), gradients: copy(gradients) }
            }
            Change::Gradients(of) => Change::Gradients(blocks(of)),
            Change::Values(of) => Change::Values(blocks(of)),
            Change::Contribution { round, gradients } => {
                Change::Contribution { round: *round, gradients: Box::new(gradients.detached()) }
            }
        }
    }

    /// Bytes of its tensors.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Change::Rows { keys, gradients } => keys.len() + gradients.len(),
            Change::Gradients(blocks) | Change::Values(blocks) => {
                blocks.numbers.len() * size_of::<u32>() + blocks.floats.len()
            }
            Change::Contribution { gradients, .. } => gradients.bytes(),
        }
    }

    /// Keys and gradients of rows, now or at the end of a round.
    pub(crate) fn rows(&self) -> Option<(&Bytes, &Bytes)> {
        match self {
            Change::Rows { keys, gradients } => Some((keys, gradients)),
            Change::Contribution { gradients, .. } => gradients.rows(),
            Change::Gradients(_) | Change::Values(_) => None,
        }
    }

    /// The same, to be changed.
    pub(crate) fn rows_mut(&mut self) -> Option<(&mut Bytes, &mut Bytes)> {
        match self {
            Change::Rows { keys, gradients } => Some((keys, gradients)),
            Change::Contribution { gradients, .. } => gradients.rows_mut(),
            Change::Gradients(_) | Change::Values(_) => None,
        }
    }

    /// Hands it to `sink`, word by word.
    pub(crate) fn encode(&self, sink: &mut impl FnMut(u64)) {
        let mut bytes = |bytes: &[u8]| {
            sink(bytes.len() as u64);
            bytes.iter().for_each(|byte| sink((*byte).into()));
        };
        match self {
            Change::Rows { keys, gradients } => {
                [keys, gradients].into_iter().for_each(|one| bytes(one));
            }
            Change::Gradients(blocks) | Change::Values(blocks) => {
                bytes(&blocks.floats);
                blocks.numbers.iter().for_each(|number| sink((*number).into()));
            }
            Change::Contribution { round, gradients } => {
                sink(*round);
                gradients.encode(sink);
            }
        }
    }
}

impl From<v1::DenseBlocks> for Blocks {
    fn from(blocks: v1::DenseBlocks) -> Self {
        Blocks { numbers: blocks.blocks, floats: blocks.values }
    }
}

impl From<&Blocks> for v1::DenseBlocks {
    fn from(blocks: &Blocks) -> Self {
        v1::DenseBlocks { blocks: blocks.numbers.clone(), values: blocks.floats.clone() }
    }
}

impl TryFrom<v1::update::Body> for Change {
    type Error = Invalid;

    fn try_from(body: v1::update::Body) -> Result<Self, Invalid> {
        Ok(match body {
            v1::update::Body::Rows(rows) => rows.into(),
            v1::update::Body::Gradients(blocks) => Change::Gradients(blocks.into()),
            v1::update::Body::Values(blocks) => Change::Values(blocks.into()),
            v1::update::Body::Contribution(v1::Contribution { round, body }) => {
                let gradients = match given("updates.contribution.body", body)? {
                    v1::contribution::Body::Rows(rows) => rows.into(),
                    v1::contribution::Body::Gradients(blocks) => Change::Gradients(blocks.into()),
                };
                Change::Contribution { round, gradients: Box::new(gradients) }
            }
        })
    }
}

impl From<v1::RowGradients> for Change {
    fn from(rows: v1::RowGradients) -> Self {
        Change::Rows { keys: rows.keys, gradients: rows.gradients }
    }
}

impl From<&Change> for v1::update::Body {
    fn from(change: &Change) -> Self {
        match change {
            Change::Rows { keys, gradients } => v1::update::Body::Rows(v1::RowGradients {
                keys: keys.clone(),
                gradients: gradients.clone(),
            }),
            Change::Gradients(blocks) => v1::update::Body::Gradients(blocks.into()),
            Change::Values(blocks) => v1::update::Body::Values(blocks.into()),
            Change::Contribution { round, gradients } => {
                let body = match v1::update::Body::from(&**gradients) {
                    v1::update::Body::Rows(rows) => Some(v1::contribution::Body::Rows(rows)),
                    v1::update::Body::Gradients(blocks) => {
                        Some(v1::contribution::Body::Gradients(blocks))
                    }
                    // Nobody makes one of these: the receiver would name the field.
                    v1::update::Body::Values(_) | v1::update::Body::Contribution(_) => None,
                };
                v1::update::Body::Contribution(v1::Contribution { round: *round, body })
            }
        }
    }
}

impl From<&EndRound> for v1::EndRound {
    fn from(end: &EndRound) -> Self {
        let step = |of: &RoundStep| v1::RoundStep {
            variable: of.variable.0,
            learning_rate: of.scalars.learning_rate,
            step: of.step,
            beta1_power: of.scalars.beta1_power,
            beta2_power: of.scalars.beta2_power,
        };
        v1::EndRound {
            round: Some((&end.round).into()),
            steps: end.steps.iter().map(step).collect(),
        }
    }
}

impl TryFrom<v1::EndRound> for EndRound {
    type Error = Invalid;

    fn try_from(end: v1::EndRound) -> Result<Self, Invalid> {
        let step = |of: v1::RoundStep| {
            let scalars = scalars(of.learning_rate, of.beta1_power, of.beta2_power)?;
            Ok(RoundStep { variable: VariableId(of.variable), step: of.step, scalars })
        };
        let steps = end.steps.into_iter().map(step).collect::<Result<Vec<_>, Invalid>>()?;
        if !steps.is_sorted_by(|one, next| one.variable < next.variable) {
            return Err(Invalid::new("record.end_round.steps", "do not strictly increase"));
        }
        Ok(EndRound { round: given("record.end_round.round", end.round)?.try_into()?, steps })
    }
}

impl From<&Record> for v1::Record {
    fn from(record: &Record) -> Self {
        let body = match &record.body {
            Body::Push(push) => v1::record::Body::Push(push.into()),
            Body::Define(variable) => v1::record::Body::Define(variable.into()),
            Body::Close(closed) => v1::record::Body::Close(closed.into()),
            Body::RolledBack => v1::record::Body::RolledBack(v1::RolledBack {}),
            Body::Tick(session, seat) => v1::record::Body::Tick(clock::tick(*session, *seat)),
            Body::Leave(session, seat) => {
                v1::record::Body::Left(v1::Left { session: session.0, seat: *seat })
            }
            Body::Regime(regime) => v1::record::Body::Regime(regime.into()),
            Body::EndRound(end) => v1::record::Body::EndRound(end.into()),
        };
        v1::Record { lsn: record.lsn.0, previous_lsn: record.previous.0, body: Some(body) }
    }
}

impl From<&Push> for v1::PushRecord {
    fn from(push: &Push) -> Self {
        v1::PushRecord {
            session: push.session.0,
            sequence: push.sequence,
            clock: push.clock,
            refusal: push.refusal.map(Into::into),
            updates: push.updates.iter().map(Into::into).collect(),
        }
    }
}

impl From<&Update> for v1::ResolvedUpdate {
    fn from(update: &Update) -> Self {
        v1::ResolvedUpdate {
            update: Some(v1::Update {
                variable: update.variable.0,
                body: Some((&update.change).into()),
            }),
            learning_rate: update.scalars.learning_rate,
            step: update.step,
            beta1_power: update.scalars.beta1_power,
            beta2_power: update.scalars.beta2_power,
        }
    }
}

impl TryFrom<v1::Record> for Record {
    type Error = Invalid;

    fn try_from(record: v1::Record) -> Result<Self, Invalid> {
        let body = match given("record.body", record.body)? {
            v1::record::Body::Push(push) => Body::Push(push.try_into()?),
            v1::record::Body::Define(variable) => Body::Define(variable.try_into()?),
            v1::record::Body::Close(closed) => Body::Close(closed.try_into()?),
            v1::record::Body::RolledBack(_) => Body::RolledBack,
            v1::record::Body::Tick(tick) => {
                let (session, seat) = clock::seat(tick)?;
                Body::Tick(session, seat)
            }
            v1::record::Body::Left(left) => {
                let (session, seat) = clock::left(left)?;
                Body::Leave(session, seat)
            }
            v1::record::Body::Regime(regime) => Body::Regime(regime.try_into()?),
            v1::record::Body::EndRound(end) => Body::EndRound(end.try_into()?),
        };
        let (lsn, previous) = (Lsn(record.lsn), Lsn(record.previous_lsn));
        let first = lsn.count() == 1 && previous.epoch() < lsn.epoch();
        if lsn.epoch().0 == 0 || !(first || (lsn.count() > 1 && previous.0 == lsn.0 - 1)) {
            let problem = format!("{lsn} does not follow {previous}");
            return Err(Invalid::new("record.lsn", problem));
        }
        Ok(Record { lsn, previous, body })
    }
}

impl TryFrom<v1::PushRecord> for Push {
    type Error = Invalid;

    fn try_from(push: v1::PushRecord) -> Result<Self, Invalid> {
        if push.session == 0 || push.sequence == 0 {
            return Err(Invalid::new("record.push.sequence", "names no session or no number"));
        }
        let updates =
            push.updates.into_iter().map(Update::try_from).collect::<Result<Vec<_>, _>>()?;
        if !updates.is_sorted_by(|a, b| a.variable < b.variable) {
            return Err(Invalid::new("record.push.updates", "do not strictly increase"));
        }
        let refusal = push.refusal.map(Refusal::try_from).transpose()?;
        if refusal.is_some_and(|refusal| !refusal.partial()) && !updates.is_empty() {
            return Err(Invalid::new("record.push.updates", "are given although it was refused"));
        }
        Ok(Push {
            session: SessionId(push.session),
            sequence: push.sequence,
            clock: push.clock,
            refusal,
            updates,
        })
    }
}

impl TryFrom<v1::ResolvedUpdate> for Update {
    type Error = Invalid;

    fn try_from(resolved: v1::ResolvedUpdate) -> Result<Self, Invalid> {
        let update = given("record.update", resolved.update)?;
        validate::update(&update)?;
        Ok(Update {
            variable: VariableId(update.variable),
            change: given("record.update.body", update.body)?.try_into()?,
            step: resolved.step,
            scalars: scalars(resolved.learning_rate, resolved.beta1_power, resolved.beta2_power)?,
        })
    }
}

fn scalars(learning_rate: f32, beta1_power: f64, beta2_power: f64) -> Result<StepScalars, Invalid> {
    if !learning_rate.is_finite()
        || ![beta1_power, beta2_power].iter().all(|power| power.is_finite())
    {
        return Err(Invalid::new("record.learning_rate", "or a power is not finite"));
    }
    Ok(StepScalars { learning_rate, beta1_power, beta2_power })
}

fn given<T>(field: &'static str, value: Option<T>) -> Result<T, Invalid> {
    value.ok_or_else(|| Invalid::new(field, "is not given"))
}

#[cfg(test)]
mod tests {
    use downpour_core::id::Epoch;

    use super::*;

    #[test]
    fn a_record_survives_the_wire() {
        let scalars = StepScalars { learning_rate: 0.5, beta1_power: 0.9, beta2_power: 0.999 };
        let change = Change::Rows {
            keys: Bytes::copy_from_slice(&7u64.to_le_bytes()),
            gradients: Bytes::copy_from_slice(&1f32.to_le_bytes()),
        };
        let update = Update { variable: VariableId(3), change, step: 9, scalars };
        let push = Push {
            session: SessionId(4),
            sequence: 5,
            clock: 6,
            refusal: None,
            updates: vec![update],
        };
        let record = Record {
            lsn: Lsn::new(Epoch(2), 1),
            previous: Lsn::new(Epoch(1), 8),
            body: Body::Push(push),
        };
        let survives = |record: Record| {
            assert_eq!(Record::try_from(v1::Record::from(&record)), Ok(record));
        };
        survives(record.clone());
        let rows = |round| Change::Contribution {
            round,
            gradients: Box::new(Change::Rows {
                keys: vec![1; 8].into(),
                gradients: vec![2; 4].into(),
            }),
        };
        let blocks = Blocks { numbers: vec![4], floats: vec![2; 4].into() };
        let gradients = Box::new(Change::Gradients(blocks));
        let contributed = [rows(3), Change::Contribution { round: 3, gradients }];
        let update = |(variable, change)| Update { variable, change, step: 0, scalars };
        let push = Push {
            session: SessionId(4),
            sequence: 6,
            clock: 2,
            refusal: None,
            updates: (1..).map(VariableId).zip(contributed).map(update).collect(),
        };
        let round = Round { number: 3, members: [SessionId(4), SessionId(9)].into() };
        let steps = vec![RoundStep { variable: VariableId(2), step: 5, scalars }];
        let consistency = downpour_core::consistency::Consistency::hybrid(1);
        let bodies = [
            Body::Push(push),
            Body::Tick(SessionId(4), Seat { number: 2, clock: 3, contributed: 3, counted: 2 }),
            Body::Leave(SessionId(4), 2),
            Body::Regime(Regime { since: 4, consistency }),
            Body::EndRound(EndRound { round, steps }),
        ];
        bodies.into_iter().for_each(|body| survives(Record { body, ..record.clone() }));
    }

    #[test]
    fn a_push_that_is_accepted_fits_into_a_message_to_a_backup() {
        let max = u64::MAX;
        let updates = |count, bytes| -> Vec<v1::Update> {
            let blocks = v1::DenseBlocks { blocks: vec![0], values: vec![0; bytes].into() };
            let body = Some(v1::update::Body::Values(blocks));
            (0..count)
                .map(|at| v1::Update { variable: u32::MAX - at, body: body.clone() })
                .collect()
        };
        for updates in [updates(0, 0), updates(1, 0), updates(300, 4), updates(2, 1 << 22)] {
            let (shard, epoch, sequence, numbering) = (u32::MAX, max, max, max);
            let read = Some(v1::Read::default());
            let part = v1::PushPart { shard, epoch, sequence, updates, numbering, read };
            let resolved = part.updates.iter().map(|update| v1::ResolvedUpdate {
                update: Some(update.clone()),
                learning_rate: 1.0,
                step: max,
                beta1_power: 1.0,
                beta2_power: 1.0,
            });
            let push = v1::PushRecord {
                session: max,
                sequence: max,
                clock: max,
                refusal: None,
                updates: resolved.collect(),
            };
            let body = Some(v1::record::Body::Push(push));
            let shard = v1::ShardRecords {
                job: max,
                shard: part.shard,
                epoch: max,
                commit_lsn: max,
                records: vec![v1::Record { lsn: max, previous_lsn: max, body }],
                check: Some(v1::Check { lsn: max, digest: max }),
            };
            let message = v1::ReplicateRequest {
                source: Some(v1::ServerRef { node: u32::MAX, incarnation: max }),
                incarnation: max,
                shards: vec![shard],
            };
            let bound = part.encoded_len() + part.updates.len() * RESOLVED_BYTES + ENVELOPE_BYTES;
            assert!(message.encoded_len() <= bound, "{} > {bound}", message.encoded_len());
        }
        // The largest part that clients send, and one that fits into a message only without its record's numbers.
        let of = |bytes| v1::PushPart { updates: updates(1, bytes), ..Default::default() };
        assert_eq!(fits_message(&of(MESSAGE_BYTES_MAX - (1 << 16))), Ok(()));
        let refused = fits_message(&of(MESSAGE_BYTES_MAX - 100)).map_err(|invalid| invalid.field);
        assert_eq!(refused, Err("parts.updates"));
    }

    #[test]
    fn a_record_that_cannot_follow_its_predecessor_is_refused() {
        let record = |lsn: (u64, u64), previous: (u64, u64)| {
            let lsn_of = |(epoch, count)| Lsn(epoch << 40 | count).0;
            let body = Some(v1::record::Body::Close(v1::ClosedSessions::default()));
            Record::try_from(v1::Record { lsn: lsn_of(lsn), previous_lsn: lsn_of(previous), body })
        };
        assert!(record((1, 1), (0, 0)).is_ok());
        assert!(record((3, 1), (1, 7)).is_ok());
        assert!(record((1, 2), (1, 1)).is_ok());
        for (lsn, previous) in [
            ((1, 0), (0, 0)),
            ((1, 3), (1, 1)),
            ((0, 1), (0, 0)),
            ((2, 1), (2, 0)),
            ((2, 2), (1, 1)),
        ] {
            let refused = record(lsn, previous).map_err(|invalid| invalid.field);
            assert_eq!(refused, Err("record.lsn"), "{lsn:?} after {previous:?}");
        }
    }
}
