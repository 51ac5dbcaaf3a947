//! What is replicated of a shard: the same at one LSN on every member, byte for byte.
//!
//! A primary [resolves](ShardState::resolve) a push into a closed record; primary and backups alike [apply](ShardState::apply) it.

mod resolve;
mod rounds;
#[cfg(test)]
mod tests;

use bytes::BytesMut;
use downpour_core::cells::{
    CannotRestore, Cell, ClosedSessions, RefusalReason, SessionCells, Verdict,
};
use downpour_core::clocks::{Board, Round};
use downpour_core::id::{Epoch, Lsn, SessionId, ShardId, VariableId};
use downpour_core::lineage::Lineage;
use downpour_core::mix::{mix64, salt};
use downpour_core::row_format::{RowFormat, all_finite_bf16};
use downpour_core::spec::{Shape, Variable};
use downpour_core::tensor_bytes::{FLOAT_BYTES, all_finite};
use downpour_proto::tensor::{KEY_BYTES, Keys, put_narrowed, widened};
use downpour_proto::v1::cut_piece::Piece;
use downpour_proto::{Invalid, v1};
use thiserror::Error;

use crate::cut::{self, CutGone, CutId, Cuts, SmallState, known, rows_piece};
use crate::dense::{Dense, Place};
use crate::record::{Body, Change, Push, Record, Update};
use crate::rounds::Contributions;
use crate::shard::CLOCK_SHARD;
use crate::table::{self, Table, TableRules};

/// Rows of all tables that a sample has, about.
const SAMPLED_ROWS: u64 = 4096;
/// Floats of a dense variable that a sample has, about.
const SAMPLED_FLOATS: usize = 1 << 15;

/// Which shard of which job this is: what never changes and is not in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its number.
    pub shard: ShardId,
    /// Shards of the job.
    pub shards: u32,
    /// Seed of the job's initial values.
    pub seed: u64,
}

/// The replicated state of one shard.
#[derive(Debug)]
pub struct ShardState {
    identity: Identity,
    /// Variable `id` is at `id - 1`.
    variables: Vec<VariableState>,
    cells: SessionCells,
    lineage: Lineage,
    /// The highest clock of any push that was applied: what learning rates go by.
    clock: u64,
    /// When the shard was last set back to a checkpoint: the sequence numbers that sessions gave before that are void.
    numbering: Epoch,
    /// Clocks, rounds and modes, on shard 0; on the others the last round.
    board: Board,
    /// To the round that is open.
    contributions: Contributions,
    cuts: Cuts,
}

#[derive(Debug)]
struct VariableState {
    variable: Variable,
    place: Place,
    /// Updates so far.
    steps: u64,
    parameters: Parameters,
}

#[derive(Debug)]
enum Parameters {
    Table(Table),
    Dense(Dense),
}

/// What applying a record did, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Elements left as they were because they would not be finite.
    pub not_stored: u64,
}

/// New keys of a push that found no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WithoutRoom {
    /// How many.
    pub keys: u64,
    /// The first of them, with its table.
    pub first: (VariableId, u64),
}

/// A record that does not belong here. Nothing was changed; a backup that meets one cannot follow its primary any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CannotApply {
    /// It does not follow the last one.
    #[error("record {record} follows {previous}, but the last record here is {last}")]
    OutOfOrder {
        /// The record.
        record: Lsn,
        /// What it follows.
        previous: Lsn,
        /// What is here.
        last: Lsn,
    },
    /// The sequence number is not the session's next.
    #[error("record {0} has a sequence number that is not its session's next")]
    Sequence(Lsn),
    /// It was applied, and then the values here were not those of the primary.
    #[error("at {0} the values here differ from the primary's")]
    Differs(Lsn),
    /// The update does not fit its variable.
    #[error("record {0} does not fit the variables that are defined here")]
    Fit(Lsn),
}

/// Why a pull cannot be answered.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CannotPull {
    /// The variable was not defined yet.
    #[error("variable {0} is not defined here")]
    Unknown(VariableId),
    /// Rows of a dense variable, blocks of a table, or a key of another shard.
    #[error("variable {0} is of the other kind, or a key belongs to another shard")]
    Misfit(VariableId),
}

/// The blocks of a dense variable that a pull gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DenseBlocks {
    /// Numbers of the blocks.
    pub numbers: Vec<u32>,
    /// Blocks of this shard without values.
    pub uninitialized: u32,
}

impl ShardState {
    /// Of a shard that nothing was ever logged for.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        ShardState {
            identity,
            variables: Vec::new(),
            cells: SessionCells::default(),
            lineage: Lineage::default(),
            clock: 0,
            numbering: Epoch(0),
            board: Board::default(),
            contributions: Contributions::default(),
            cuts: Cuts::default(),
        }
    }

    /// Which shard this is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// LSN of the last record.
    #[must_use]
    pub fn last(&self) -> Lsn {
        self.lineage.last()
    }

    /// Which positions belong to this history.
    #[must_use]
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// What each session last did.
    #[must_use]
    pub fn cells(&self) -> &SessionCells {
        &self.cells
    }

    /// Clocks, rounds and modes, on shard 0; on the others the last round.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Variables defined so far: those up to this number.
    #[must_use]
    pub fn defined(&self) -> u32 {
        self.variables.len() as u32
    }

    /// The highest clock of any push that was applied.
    #[must_use]
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// Rows of all tables.
    #[must_use]
    pub fn rows(&self) -> u64 {
        let rows = |variable: &VariableState| match &variable.parameters {
            Parameters::Table(table) => table.rows(),
            Parameters::Dense(_) => 0,
        };
        self.variables.iter().map(rows).sum()
    }

    /// Bytes of all rows and blocks.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes = |variable: &VariableState| match &variable.parameters {
            Parameters::Table(table) => table.bytes(),
            Parameters::Dense(dense) => dense.bytes(),
        };
        self.variables.iter().map(bytes).sum()
    }

    /// Bytes that a copy of all rows and blocks takes, about.
    #[must_use]
    pub fn copy_bytes(&self) -> u64 {
        let bytes = |variable: &VariableState| match &variable.parameters {
            Parameters::Table(table) => table.copy_bytes(),
            Parameters::Dense(dense) => dense.bytes(),
        };
        self.variables.iter().map(bytes).sum()
    }

    /// Applies the next record of the log.
    ///
    /// # Errors
    /// The record does not belong here; nothing was changed.
    pub fn apply(&mut self, record: &Record) -> Result<Applied, CannotApply> {
        let (lsn, previous, last) = (record.lsn, record.previous, self.last());
        if previous != last || lsn != last.next_in(lsn.epoch()) || lsn <= last {
            return Err(CannotApply::OutOfOrder { record: lsn, previous, last });
        }
        let applied = match &record.body {
            Body::Push(push) => self.apply_push(push, lsn)?,
            Body::Define(variable) => self.define(variable, lsn)?,
            Body::Close(closed) => self.close(closed, lsn)?,
            Body::RolledBack => {
                self.numbering = lsn.epoch();
                self.board.set_back();
                Applied::default()
            }
            Body::Tick(session, seat) => {
                if !self.board.has_room(*session) || self.cells.closed().contains(*session) {
                    return Err(CannotApply::Fit(lsn));
                }
                self.board.tick(*session, *seat);
                Applied::default()
            }
            Body::Leave(session, seat) => {
                if !self.board.has_room(*session) || self.cells.closed().contains(*session) {
                    return Err(CannotApply::Fit(lsn));
                }
                self.board.leave(*session, *seat);
                Applied::default()
            }
            Body::Regime(regime) => {
                self.board.set(regime.clone());
                Applied::default()
            }
            Body::EndRound(end) => self.end_round(end, lsn)?,
        };
        self.lineage.advance(lsn);
        Ok(applied)
    }

    /// Opens a cut at the last record, without the rows and blocks up to `newer_than`.
    pub fn open_cut(&mut self, newer_than: Lsn) -> CutId {
        let variable = |state: &VariableState| v1::CutVariable {
            variable: Some((&state.variable).into()),
            steps: state.steps,
        };
        let small = SmallState {
            lineage: &self.lineage,
            clock: self.clock,
            numbering: self.numbering,
            variables: self.variables.iter().map(variable).collect(),
            cells: &self.cells,
            board: &self.board,
            contributions: &self.contributions,
        };
        let range = self.cuts.open(newer_than, small);
        for variable in &mut self.variables {
            match &mut variable.parameters {
                Parameters::Table(table) => table.open_cut(range),
                Parameters::Dense(dense) => dense.open_cut(range),
            }
        }
        range.id
    }

    /// The next piece of a cut, of about `bytes_max`. After the last one it is always the end.
    ///
    /// # Errors
    /// The cut was closed.
    pub fn read_cut(&mut self, id: CutId, bytes_max: usize) -> Result<Piece, CutGone> {
        self.cuts.read(id, bytes_max, &mut Readable(&mut self.variables))
    }

    /// Nobody reads a cut any more.
    pub fn close_cut(&mut self, id: CutId) {
        self.cuts.close(id);
        for variable in &mut self.variables {
            match &mut variable.parameters {
                Parameters::Table(table) => table.close_cut(id),
                Parameters::Dense(dense) => dense.close_cut(id),
            }
        }
    }

    /// Nobody reads any cut any more.
    pub(crate) fn close_cuts(&mut self) {
        let ids: Vec<CutId> = self.cuts.ids().collect();
        ids.into_iter().for_each(|id| self.close_cut(id));
    }

    /// The epoch in which the shard was last set back to a checkpoint; 0: never.
    #[must_use]
    pub fn numbering(&self) -> Epoch {
        self.numbering
    }

    /// Bytes that the open cuts have saved.
    #[must_use]
    pub fn cut_bytes(&self) -> usize {
        if self.cuts.is_empty() {
            return 0;
        }
        let of_all = |id| self.variables.iter().map(move |one| one.saved_bytes(id)).sum::<usize>();
        self.cuts.ids().map(of_all).sum()
    }

    /// Puts back what a cut begins with. False if the variables are not those that are here, and then new ones.
    pub(crate) fn restore_small(
        &mut self,
        variables: Vec<(Variable, u64)>,
        cells: SessionCells,
        lineage: Lineage,
        (clock, numbering, board): (u64, Epoch, Board),
    ) -> bool {
        let known = self.variables.iter().zip(&variables);
        let same = known.into_iter().all(|(here, (variable, _))| here.variable == *variable);
        if !same || variables.len() < self.variables.len() {
            return false;
        }
        for (at, (variable, steps)) in variables.into_iter().enumerate() {
            if at == self.variables.len() {
                self.variables.push(VariableState::new(&variable, self.identity));
            }
            self.variables[at].steps = steps;
        }
        (self.cells, self.lineage) = (cells, lineage);
        (self.clock, self.numbering, self.board) = (clock, numbering, board);
        self.contributions = Contributions::default();
        true
    }

    pub(crate) fn restore_cell(
        &mut self,
        session: SessionId,
        cell: Cell,
    ) -> Result<(), CannotRestore> {
        self.cells.restore(session, cell)
    }

    /// Puts back rows over those up to `base`, and says how many.
    pub(crate) fn restore_rows(&mut self, rows: &v1::CutRows, base: Lsn) -> Result<u64, Invalid> {
        let id = VariableId(rows.variable);
        let lineage = &self.lineage;
        let variable = self.variables.get_mut((id.0 as usize).wrapping_sub(1));
        let Some(VariableState { parameters: Parameters::Table(table), place, .. }) = variable
        else {
            return Err(Invalid::new("rows.variable", format!("{id} is not a table")));
        };
        let row_bytes = table.width() * FLOAT_BYTES;
        let whole = rows.keys.len().is_multiple_of(KEY_BYTES) && rows.keys.len() == rows.lsns.len();
        if !whole || !table::fits(&rows.keys, &rows.floats, row_bytes) {
            return Err(Invalid::new(
                "rows.floats",
                "are not as many as the keys and LSNs ask for",
            ));
        }
        let (keys, lsns) = (Keys::trusted(&rows.keys).iter(), Keys::trusted(&rows.lsns).iter());
        let count = keys.len() as u64;
        for ((key, lsn), row) in keys.zip(lsns).zip(rows.floats.chunks_exact(row_bytes)) {
            known(lineage, Lsn(lsn), "rows.lsns")?;
            if !place.has(key) {
                return Err(Invalid::new("rows.keys", format!("{key} is of another shard")));
            }
            if !table.restore(key, Lsn(lsn), row, base) {
                return Err(Invalid::new("rows.keys", format!("{key} comes twice")));
            }
        }
        Ok(count)
    }

    /// Puts back blocks over those up to `base`.
    pub(crate) fn restore_blocks(
        &mut self,
        blocks: &v1::CutBlocks,
        base: Lsn,
    ) -> Result<(), Invalid> {
        let id = VariableId(blocks.variable);
        let lineage = &self.lineage;
        let variable = self.variables.get_mut((id.0 as usize).wrapping_sub(1));
        let Some(VariableState { parameters: Parameters::Dense(dense), .. }) = variable else {
            return Err(Invalid::new("blocks.variable", format!("{id} is not dense")));
        };
        if blocks.blocks.len() != blocks.lsns.len() {
            return Err(Invalid::new("blocks.lsns", "are not as many as the blocks"));
        }
        let mut raw = &blocks.floats[..];
        for (&number, &lsn) in blocks.blocks.iter().zip(&blocks.lsns) {
            known(lineage, Lsn(lsn), "blocks.lsns")?;
            raw = dense.restore(number, Lsn(lsn), raw, base).ok_or_else(|| {
                let problem = format!("{number} is not here, comes twice, or has too few floats");
                Invalid::new("blocks.blocks", problem)
            })?;
        }
        if !raw.is_empty() {
            return Err(Invalid::new("blocks.floats", "are more than the blocks have"));
        }
        Ok(())
    }

    /// Appends the weights of `keys` to `out`.
    ///
    /// # Errors
    /// The variable is not defined, or is no table; a key belongs to another shard.
    pub fn pull_rows(
        &self,
        id: VariableId,
        keys: Keys<'_>,
        out: &mut BytesMut,
    ) -> Result<(), CannotPull> {
        let variable = self.variable(id).ok_or(CannotPull::Unknown(id))?;
        match &variable.parameters {
            Parameters::Table(table) if keys.iter().all(|key| variable.place.has(key)) => {
                match variable.row_format() {
                    RowFormat::F32 => table.pull(keys, out),
                    RowFormat::Bf16 => {
                        let mut wide = BytesMut::new();
                        table.pull(keys, &mut wide);
                        put_narrowed(out, &wide);
                    }
                }
                Ok(())
            }
            _ => Err(CannotPull::Misfit(id)),
        }
    }

    /// Appends the weights of blocks newer than `have` to `out`. A position that is not of this history counts as none.
    ///
    /// # Errors
    /// The variable is not defined, or is a table.
    pub fn pull_dense(
        &self,
        id: VariableId,
        have: Lsn,
        out: &mut BytesMut,
    ) -> Result<DenseBlocks, CannotPull> {
        let (dense, have) = self.dense(id, have)?;
        let numbers = dense.pull(have, out);
        Ok(DenseBlocks { numbers, uninitialized: dense.uninitialized() })
    }

    /// Bytes that [`ShardState::pull_rows`] appends for a key.
    ///
    /// # Errors
    /// The variable is not defined, or is no table.
    pub fn row_bytes(&self, id: VariableId) -> Result<usize, CannotPull> {
        let variable = self.variable(id).ok_or(CannotPull::Unknown(id))?;
        match &variable.parameters {
            Parameters::Table(table) => Ok(variable.row_format().row_bytes(table.dim())),
            Parameters::Dense(_) => Err(CannotPull::Misfit(id)),
        }
    }

    /// Bytes that [`ShardState::pull_dense`] appends.
    ///
    /// # Errors
    /// The variable is not defined, or is a table.
    pub fn dense_bytes(&self, id: VariableId, have: Lsn) -> Result<usize, CannotPull> {
        let (dense, have) = self.dense(id, have)?;
        Ok(dense.newer_bytes(have))
    }

    /// Hands the canonical encoding to `sink`, word by word: two members at one LSN give the same words.
    pub fn encode(&self, sink: &mut impl FnMut(u64)) {
        sink(self.last().0);
        sink(self.clock);
        sink(self.numbering.0);
        // What sessions did and where epochs began is small; its text names every field in a fixed order.
        let small = format!("{:?} {:?} {:?}", self.cells, self.lineage, self.board);
        sink(small.len() as u64);
        small.bytes().for_each(|byte| sink(byte.into()));
        self.contributions.encode(sink);
        for VariableState { variable, steps, parameters, .. } in &self.variables {
            sink(variable.id.0.into());
            sink(*steps);
            match parameters {
                Parameters::Table(table) => table.encode(sink),
                Parameters::Dense(dense) => dense.encode(sink),
            }
        }
    }

    /// A hash of the canonical encoding, which members compare at an LSN.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut digest = 0u64;
        self.encode(&mut |word| digest = mix(digest, word));
        digest
    }

    /// A hash of a sample of the canonical encoding, which costs little: all that is small, some thousand rows and some blocks. Which ones follows from the
    /// position, so members at one LSN take the same, and in time everything is looked at.
    #[must_use]
    pub fn sample_digest(&self) -> u64 {
        let mut digest = 0u64;
        let mut sink = |word: u64| digest = mix(digest, word);
        sink(self.last().0);
        sink(self.clock);
        sink(self.numbering.0);
        for (session, cell) in self.cells.after(SessionId(0)) {
            let words = [session.0, cell.last, cell.lsn.0, cell.refusals.len() as u64];
            words.into_iter().for_each(&mut sink);
        }
        for (epoch, previous) in self.lineage.starts() {
            [epoch.0, previous.0].into_iter().for_each(&mut sink);
        }
        for (session, seat) in self.board.seats() {
            let words = [session.0, seat.number, seat.clock, seat.contributed, seat.counted];
            words.into_iter().for_each(&mut sink);
        }
        self.board.left().iter().for_each(|(session, seat)| sink(session.0 ^ seat << 32));
        let Round { number, members } = self.board.last_round();
        [self.board.floor(), *number].into_iter().for_each(&mut sink);
        members.iter().for_each(|member| sink(member.0));
        self.board.regimes().iter().for_each(|regime| sink(regime.since));
        self.contributions.sample(&mut sink);
        let chance = mix64(self.last().0);
        // As large a part of each table.
        let part = ((1 << 32) / self.rows().div_ceil(SAMPLED_ROWS).max(1)).max(1);
        let first = ((chance >> 32) * ((1 << 32) - part)) >> 32;
        let range = first as u32..=(first + part - 1) as u32;
        for VariableState { steps, parameters, .. } in &self.variables {
            sink(*steps);
            match parameters {
                Parameters::Table(table) => {
                    sink(table.rows());
                    table.sample(range.clone(), &mut sink);
                }
                Parameters::Dense(dense) => {
                    let first = (chance % u64::from(dense.count().max(1))) as u32;
                    dense.sample(first, SAMPLED_FLOATS, &mut sink);
                }
            }
        }
        digest
    }

    fn variable(&self, id: VariableId) -> Option<&VariableState> {
        self.variables.get((id.0 as usize).checked_sub(1)?)
    }

    fn table(&self, id: VariableId) -> Option<&Table> {
        match &self.variable(id)?.parameters {
            Parameters::Table(table) => Some(table),
            Parameters::Dense(_) => None,
        }
    }

    fn variable_mut(&mut self, id: VariableId) -> Option<&mut VariableState> {
        self.variables.get_mut((id.0 as usize).checked_sub(1)?)
    }

    fn dense(&self, id: VariableId, have: Lsn) -> Result<(&Dense, Lsn), CannotPull> {
        let have = if self.lineage.contains(have) { have } else { Lsn::ZERO };
        match &self.variable(id).ok_or(CannotPull::Unknown(id))?.parameters {
            Parameters::Dense(dense) => Ok((dense, have)),
            Parameters::Table(_) => Err(CannotPull::Misfit(id)),
        }
    }

    fn check(&self, id: VariableId, change: &Change, finite: Finite) -> Result<(), RefusalReason> {
        self.check_shape(id, change, finite, Blank::Refused)
    }

    fn check_shape(
        &self,
        id: VariableId,
        change: &Change,
        finite: Finite,
        blank: Blank,
    ) -> Result<(), RefusalReason> {
        let variable = self.variable(id).ok_or(RefusalReason::UnknownVariable)?;
        let format = variable.row_format();
        let change = match change {
            Change::Contribution { gradients, .. } => gradients,
            change => change,
        };
        let (fits, floats) = match (&variable.parameters, change) {
            (Parameters::Table(table), Change::Rows { keys, gradients }) => {
                let here = || Keys::trusted(keys).iter().all(|key| variable.place.has(key));
                let row_bytes = format.row_bytes(table.dim());
                (table::fits(keys, gradients, row_bytes) && here(), gradients)
            }
            (Parameters::Dense(dense), Change::Gradients(blocks)) => {
                let fits = dense.fits(&blocks.numbers, &blocks.floats);
                let there = blank == Blank::Allowed || dense.initialized(&blocks.numbers);
                (fits && there, &blocks.floats)
            }
            (Parameters::Dense(dense), Change::Values(blocks)) => {
                (dense.fits(&blocks.numbers, &blocks.floats), &blocks.floats)
            }
            _ => return Err(RefusalReason::WrongShape),
        };
        if !fits {
            return Err(RefusalReason::WrongShape);
        }
        let all_finite = match format {
            RowFormat::F32 => all_finite,
            RowFormat::Bf16 => all_finite_bf16,
        };
        if finite == Finite::Required && !all_finite(floats) {
            return Err(RefusalReason::NotFinite);
        }
        Ok(())
    }

    fn apply_push(&mut self, push: &Push, lsn: Lsn) -> Result<Applied, CannotApply> {
        if self.cells.check(push.session, push.sequence) != Verdict::Apply {
            return Err(CannotApply::Sequence(lsn));
        }
        for update in &push.updates {
            self.check(update.variable, &update.change, Finite::Known)
                .map_err(|_| CannotApply::Fit(lsn))?;
        }
        let mut applied = Applied::default();
        for update in &push.updates {
            if let Change::Contribution { round, gradients } = &update.change {
                self.contribute(push.session, *round, update.variable, gradients.detached());
                continue;
            }
            let Some(variable) = self.variable_mut(update.variable) else { continue };
            applied.not_stored += variable.apply(update, lsn);
        }
        if push.refusal.is_none_or(|refusal| refusal.partial()) {
            self.clock = self.clock.max(push.clock);
        }
        self.cells.record(push.session, push.sequence, lsn, push.refusal);
        Ok(applied)
    }

    fn define(&mut self, variable: &Variable, lsn: Lsn) -> Result<Applied, CannotApply> {
        if variable.id.0 != self.defined() + 1 {
            return Err(CannotApply::Fit(lsn));
        }
        self.variables.push(VariableState::new(variable, self.identity));
        Ok(Applied::default())
    }

    fn close(&mut self, closed: &ClosedSessions, lsn: Lsn) -> Result<Applied, CannotApply> {
        if !extends(closed, self.cells.closed()) {
            return Err(CannotApply::Fit(lsn));
        }
        self.cells.close(closed.clone());
        self.board.close(closed);
        // Rounds of a job that was restored, or whose shard 0 was set back while nobody was there, are counted from before the last one here.
        if self.cells.after(SessionId(0)).next().is_none() {
            if self.identity.shard != CLOCK_SHARD {
                self.board.forget_round();
            }
            // Nor does anybody end the round that is open.
            self.contributions.drop_closed(self.cells.closed());
        }
        Ok(Applied::default())
    }
}

/// Whether all sessions that are closed in `old` are closed in `new`: a closed session never opens again.
#[must_use]
pub fn extends(new: &ClosedSessions, old: &ClosedSessions) -> bool {
    let opens_again = |session| old.contains(session);
    new.high_water >= old.high_water && !new.open.iter().any(|&session| opens_again(session))
}

fn mix(digest: u64, word: u64) -> u64 {
    mix64(digest.rotate_left(1) ^ word).wrapping_add(word)
}

/// The parameters, for a cut to read.
struct Readable<'a>(&'a mut [VariableState]);

impl cut::Parameters for Readable<'_> {
    fn saved_bytes(&self, variable: VariableId, cut: CutId) -> usize {
        self.0[variable.0 as usize - 1].saved_bytes(cut)
    }

    fn read(&mut self, id: VariableId, cut: CutId, bytes_max: usize) -> (Option<Piece>, bool) {
        match &mut self.0[id.0 as usize - 1].parameters {
            Parameters::Table(table) => {
                let (rows, end) = table.read_cut(cut, bytes_max);
                ((!rows.is_empty() || !end).then(|| rows_piece(id, rows)), end)
            }
            Parameters::Dense(dense) => {
                let (blocks, end) = dense.read_cut(cut, bytes_max);
                let piece = (!blocks.numbers.is_empty() || !end).then(|| {
                    Piece::Blocks(v1::CutBlocks {
                        variable: id.0,
                        blocks: blocks.numbers,
                        lsns: blocks.lsns,
                        floats: blocks.floats.freeze(),
                    })
                });
                (piece, end)
            }
        }
    }
}

/// Whether a check reads every float.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Finite {
    /// The primary looks.
    Required,
    /// The primary looked.
    Known,
}

/// Whether gradients may be of blocks without values.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Blank {
    /// The values of a copy come after its contributions.
    Allowed,
    /// A push comes after them.
    Refused,
}

impl VariableState {
    fn new(variable: &Variable, identity: Identity) -> Self {
        let Identity { shard, shards, seed } = identity;
        let spec = &variable.spec;
        let place = Place { shard, shards, salt: spec.routing_salt() };
        let parameters = match &spec.shape {
            Shape::Table(table) => Parameters::Table(Table::new(TableRules {
                dim: table.dim as usize,
                init: table.init,
                optimizer: spec.optimizer,
                seed,
                salt: salt(&spec.name),
            })),
            Shape::Dense(dense) => {
                Parameters::Dense(Dense::new(dense.clone(), spec.optimizer, place))
            }
        };
        VariableState { variable: variable.clone(), place, steps: 0, parameters }
    }

    /// Bytes that a cut has saved of it.
    fn saved_bytes(&self, cut: CutId) -> usize {
        match &self.parameters {
            Parameters::Table(table) => table.saved_bytes(cut),
            Parameters::Dense(dense) => dense.saved_bytes(cut),
        }
    }

    /// How the floats of its updates travel.
    fn row_format(&self) -> RowFormat {
        match &self.variable.spec.shape {
            Shape::Table(table) => table.row_format,
            Shape::Dense(_) => RowFormat::F32,
        }
    }

    /// Applies an update that was checked.
    fn apply(&mut self, update: &Update, lsn: Lsn) -> u64 {
        let scalars = &update.scalars;
        let format = self.row_format();
        let skipped = match (&mut self.parameters, &update.change) {
            (Parameters::Table(table), Change::Rows { keys, gradients }) => {
                let keys = Keys::trusted(keys);
                match format {
                    RowFormat::F32 => table.push(keys, gradients, scalars, lsn),
                    RowFormat::Bf16 => table.push(keys, &widened(gradients), scalars, lsn),
                }
            }
            (Parameters::Dense(dense), Change::Gradients(blocks)) => {
                dense.push(&blocks.numbers, &blocks.floats, scalars, lsn)
            }
            (Parameters::Dense(dense), Change::Values(blocks)) => {
                dense.put(&blocks.numbers, &blocks.floats, lsn);
                return 0;
            }
            _ => return 0,
        };
        self.steps = update.step;
        skipped
    }
}
