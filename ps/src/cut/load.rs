//! A state from the pieces of a cut. They come from a disk or from the network, and are believed only as far as they fit together.

use downpour_core::cells::{Cell, Refusal, SessionCells};
use downpour_core::clocks::Board;
use downpour_core::id::{Epoch, Lsn, SessionId, VariableId};
use downpour_core::lineage::Lineage;
use downpour_core::spec::Variable;
use downpour_core::tensor_bytes::all_finite;
use downpour_proto::v1::cut_piece::Piece;
use downpour_proto::{Invalid, v1, validate};

use crate::rounds::Contribution;
use crate::state::{Identity, ShardState};

/// Builds a state from the pieces of a cut, and then of the increments after it.
#[derive(Debug)]
pub struct Loader {
    state: ShardState,
    stage: Stage,
    /// Where the cuts before this one ended.
    base: Lsn,
    rows: u64,
    blocks: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No cut, or a whole one.
    Between,
    Cells,
    Parameters,
}

impl Loader {
    /// For a shard of which nothing is here.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Loader {
            state: ShardState::new(identity),
            stage: Stage::Between,
            base: Lsn::ZERO,
            rows: 0,
            blocks: 0,
        }
    }

    /// Takes the next piece. True when the cut is whole.
    ///
    /// # Errors
    /// The piece does not fit the others. What was loaded is of no use then.
    pub fn take(&mut self, piece: Piece) -> Result<bool, Invalid> {
        match (piece, self.stage) {
            (Piece::Small(small), Stage::Between) => self.begin(small)?,
            (Piece::Cells(cells), Stage::Cells) => self.cells(cells)?,
            (Piece::Contribution(one), Stage::Cells) => self.contribution(one)?,
            (Piece::Rows(rows), Stage::Cells | Stage::Parameters) => self.rows(&rows)?,
            (Piece::Blocks(blocks), Stage::Cells | Stage::Parameters) => self.blocks(&blocks)?,
            (Piece::End(end), Stage::Cells | Stage::Parameters) => return self.end(end),
            _ => return Err(Invalid::new("piece", "comes out of turn")),
        }
        Ok(false)
    }

    /// The state, as it was at the last cut.
    ///
    /// # Errors
    /// There is no whole cut.
    pub fn finish(self) -> Result<ShardState, Invalid> {
        if self.stage != Stage::Between || self.state.last() == Lsn::ZERO {
            return Err(Invalid::new("piece.end", "is missing"));
        }
        Ok(self.state)
    }

    /// What was loaded so far.
    #[must_use]
    pub fn state(&self) -> &ShardState {
        &self.state
    }

    /// LSN of the cut that is being loaded.
    #[must_use]
    pub fn at(&self) -> Lsn {
        self.state.last()
    }

    fn begin(&mut self, small: v1::CutSmall) -> Result<(), Invalid> {
        let epoch = |epoch: &v1::CutEpoch| (Epoch(epoch.epoch), Lsn(epoch.previous_lsn));
        let epochs = small.epochs.iter().map(epoch).collect();
        let lineage = Lineage::restore(epochs, Lsn(small.lsn))
            .filter(|lineage| lineage.last() > Lsn::ZERO)
            .ok_or_else(|| Invalid::new("small.epochs", "are not a history"))?;
        self.base = self.state.last();
        if lineage.last() < self.base || !lineage.contains(self.base) {
            return Err(Invalid::new("small.epochs", "do not continue the cut before"));
        }
        if Lsn(small.newer_than) > self.base {
            let problem =
                format!("is {}, but the cut before is at {}", small.newer_than, self.base);
            return Err(Invalid::new("small.newer_than", problem));
        }
        let closed = small.closed.unwrap_or_default().try_into()?;
        let mut variables = Vec::with_capacity(small.variables.len());
        for (wanted, v1::CutVariable { variable, steps }) in (1..).zip(small.variables) {
            let missing = || Invalid::new("small.variables.variable", "is not given");
            let variable = Variable::try_from(variable.ok_or_else(missing)?)?;
            if variable.id != VariableId(wanted) {
                return Err(Invalid::new("small.variables", "are not numbered in order from 1"));
            }
            variables.push((variable, steps));
        }
        let cells = SessionCells::with_closed(closed);
        if lineage.last().epoch() < Epoch(small.numbering) {
            return Err(Invalid::new("small.numbering", "is of an epoch that is not there yet"));
        }
        let board = small.board.map(Board::try_from).transpose()?.unwrap_or_default();
        let told = (small.clock, Epoch(small.numbering), board);
        if !self.state.restore_small(variables, cells, lineage, told) {
            return Err(Invalid::new("small.variables", "are not those of the cut before"));
        }
        (self.stage, self.rows, self.blocks) = (Stage::Cells, 0, 0);
        Ok(())
    }

    fn cells(&mut self, cells: v1::CutCells) -> Result<(), Invalid> {
        for v1::CutCell { session, last, lsn, refusals } in cells.cells {
            self.known(Lsn(lsn), "cells.lsn")?;
            let refusal = |one: v1::CutRefusal| {
                let missing = || Invalid::new("cells.refusals.refusal", "is not given");
                let refusal = Refusal::try_from(one.refusal.ok_or_else(missing)?)?;
                Ok((one.sequence, refusal))
            };
            let refusals = refusals.into_iter().map(refusal).collect::<Result<_, Invalid>>()?;
            let cell = Cell { last, lsn: Lsn(lsn), refusals };
            (self.state.restore_cell(SessionId(session), cell))
                .map_err(|error| Invalid::new("cells", error.to_string()))?;
        }
        Ok(())
    }

    fn contribution(&mut self, one: v1::CutContribution) -> Result<(), Invalid> {
        validate::updates_in_order(&one.updates)?;
        let update = |update: v1::Update| {
            let body = update
                .body
                .ok_or_else(|| Invalid::new("contribution.updates.body", "is not given"))?;
            Ok((VariableId(update.variable), body.try_into()?))
        };
        let updates = one.updates.into_iter().map(update).collect::<Result<_, Invalid>>()?;
        let contribution = Contribution { round: one.round, updates };
        self.state.restore_contribution(SessionId(one.session), contribution)
    }

    fn rows(&mut self, rows: &v1::CutRows) -> Result<(), Invalid> {
        self.stage = Stage::Parameters;
        finite("rows.floats", &rows.floats)?;
        let count = self.state.restore_rows(rows, self.base)?;
        self.rows += count;
        Ok(())
    }

    fn blocks(&mut self, blocks: &v1::CutBlocks) -> Result<(), Invalid> {
        self.stage = Stage::Parameters;
        finite("blocks.floats", &blocks.floats)?;
        self.state.restore_blocks(blocks, self.base)?;
        self.blocks += blocks.blocks.len() as u64;
        Ok(())
    }

    fn end(&mut self, end: v1::CutEnd) -> Result<bool, Invalid> {
        if (end.rows, end.blocks) != (self.rows, self.blocks) {
            let problem = format!(
                "names {} rows and {} blocks, but {} and {} came",
                end.rows, end.blocks, self.rows, self.blocks
            );
            return Err(Invalid::new("end", problem));
        }
        self.stage = Stage::Between;
        Ok(true)
    }

    fn known(&self, lsn: Lsn, field: &'static str) -> Result<(), Invalid> {
        known(self.state.lineage(), lsn, field)
    }
}

/// A position of the history, after its beginning.
pub(crate) fn known(lineage: &Lineage, lsn: Lsn, field: &'static str) -> Result<(), Invalid> {
    if lsn == Lsn::ZERO || !lineage.contains(lsn) {
        return Err(Invalid::new(field, format!("{lsn} is not a position of the history")));
    }
    Ok(())
}

fn finite(field: &'static str, floats: &[u8]) -> Result<(), Invalid> {
    if !all_finite(floats) {
        return Err(Invalid::new(field, "are not all finite"));
    }
    Ok(())
}
