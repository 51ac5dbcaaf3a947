//! The exact cut: the state of a shard at one LSN, read piece by piece while writes go on (docs/protocol.md 6).
//!
//! Small state is copied when the cut opens. A cursor walks the rows and blocks; before a write changes one that the cursor has not passed and that
//! is as old as the cut, its old value is *saved* for the reader. Afterwards its LSN is newer than the cut, and the cursor skips it. So each is handed
//! out once, as it was. [`Loader`] makes a state of the pieces.
//!
//! **Price.** Without an open cut, one branch for each batch of a push. With one, a comparison for each row and a copy of each row that is written
//! before the cursor came; what is saved is bounded like the log of a shard, and beyond that pushes are asked to come later.

mod load;
#[cfg(test)]
mod tests;

use bytes::BytesMut;
use downpour_core::cells::{Cell, SessionCells};
use downpour_core::clocks::Board;
use downpour_core::id::{Epoch, Lsn, SessionId, VariableId};
use downpour_core::lineage::Lineage;
use downpour_core::planted::{Bug, planted};
use downpour_proto::tensor::KEY_BYTES;
use downpour_proto::v1;
use downpour_proto::v1::cut_piece::Piece;
use thiserror::Error;

use crate::arena::{Arena, HEADER_WORDS};
use crate::rounds::{self, Contributions};
use crate::table::put_row;

pub use load::Loader;
pub(crate) use load::known;

/// Cells in one piece, with at most [`downpour_core::cells::OUTCOME_WINDOW`] refusals each.
const CELLS_PIECE_MAX: usize = 256;
/// Rows that one call looks at.
const ROWS_LOOK_MAX: usize = 1 << 14;

const WORD_BYTES: usize = size_of::<u32>();

/// Names an open cut of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CutId(u64);

impl CutId {
    /// Rises with every cut of a replica.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

/// There is no such cut: it was closed, or its shard is no longer served here.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the cut is no longer open")]
pub struct CutGone;

/// Which rows and blocks belong to a cut, by their LSN.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CutRange {
    pub(crate) id: CutId,
    /// Where the cut is.
    pub(crate) at: Lsn,
    /// What is not newer than this is left out.
    pub(crate) newer_than: Lsn,
}

impl CutRange {
    pub(crate) fn has(&self, lsn: Lsn) -> bool {
        lsn <= self.at && lsn > self.newer_than
    }
}

/// What the open cuts have of one table.
#[derive(Debug, Default)]
pub(crate) struct RowCuts(Vec<RowCut>);

#[derive(Debug)]
struct RowCut {
    range: CutRange,
    /// Where the cursor goes on.
    next: u32,
    /// Before the first row that is newer than the cut.
    end: u32,
    /// Rows with their headers, one after the other.
    saved: Vec<u32>,
}

impl RowCuts {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn open(&mut self, range: CutRange, end: u32) {
        self.0.push(RowCut { range, next: 0, end, saved: Vec::new() });
    }

    pub(crate) fn close(&mut self, id: CutId) {
        self.0.retain(|cut| cut.range.id != id);
    }

    pub(crate) fn saved_bytes(&self, id: CutId) -> usize {
        let saved = |cut: &RowCut| cut.saved.len() * WORD_BYTES;
        self.0.iter().find(|cut| cut.range.id == id).map_or(0, saved)
    }

    /// A row is about to be written.
    #[inline]
    pub(crate) fn before_write(&mut self, arena: &Arena, row: u32) {
        let header = arena.header(row);
        for cut in &mut self.0 {
            if row >= cut.next && cut.range.has(row_lsn(header)) {
                cut.saved.extend_from_slice(header);
                cut.saved.extend_from_slice(bytemuck::cast_slice(arena.floats(row)));
                if planted(Bug::SlotsOfAnotherMoment)
                    && arena.width() > 1
                    && let Some(slot) = cut.saved.last_mut()
                {
                    *slot = row;
                }
            }
        }
    }

    /// The next rows, saved ones first. True when these were the last.
    pub(crate) fn read(
        &mut self,
        id: CutId,
        arena: &Arena,
        bytes_max: usize,
        out: &mut RowsOut,
    ) -> bool {
        let Some(cut) = self.0.iter_mut().find(|cut| cut.range.id == id) else { return true };
        let stride = HEADER_WORDS + arena.width();
        while out.bytes() < bytes_max && !cut.saved.is_empty() {
            let mut row = cut.saved.split_off(cut.saved.len() - stride);
            if planted(Bug::SlotsOfAnotherMoment)
                && arena.width() > 1
                && let Some(slot) = row.last_mut()
            {
                *slot = arena.floats(*slot).last().map_or(0, |slot| slot.to_bits());
            }
            out.put(&row[..HEADER_WORDS], bytemuck::cast_slice(&row[HEADER_WORDS..]));
        }
        if cut.saved.is_empty() {
            // Not kept for what may never be saved again.
            cut.saved.shrink_to(stride * ROWS_LOOK_MAX / 16);
        }
        for (looked, row) in arena.numbers_from(cut.next).enumerate() {
            if row >= cut.end {
                break;
            }
            if looked == ROWS_LOOK_MAX || out.bytes() >= bytes_max {
                cut.next = row;
                return false;
            }
            let header = arena.header(row);
            if cut.range.has(row_lsn(header)) {
                out.put(header, arena.floats(row));
            }
        }
        cut.next = u32::MAX;
        cut.saved.is_empty()
    }
}

pub(crate) fn row_lsn(header: &[u32]) -> Lsn {
    Lsn(u64::from(header[2]) | u64::from(header[3]) << 32)
}

/// Rows on their way out.
#[derive(Debug)]
pub(crate) struct RowsOut {
    keys: BytesMut,
    lsns: BytesMut,
    floats: BytesMut,
}

impl RowsOut {
    /// With room for about `bytes` of rows of so many floats.
    pub(crate) fn with_capacity(bytes: usize, width: usize) -> Self {
        let rows = bytes / (HEADER_WORDS + width) / WORD_BYTES + 1;
        let room = |words: usize| BytesMut::with_capacity(rows * words * WORD_BYTES);
        RowsOut { keys: room(2), lsns: room(2), floats: room(width) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    fn bytes(&self) -> usize {
        self.keys.len() + self.lsns.len() + self.floats.len()
    }

    fn put(&mut self, header: &[u32], floats: &[f32]) {
        for (out, words) in [(&mut self.keys, &header[..2]), (&mut self.lsns, &header[2..])] {
            let word = u64::from(words[0]) | u64::from(words[1]) << 32;
            out.extend_from_slice(&word.to_le_bytes());
        }
        put_row(&mut self.floats, floats);
    }
}

/// The open cuts of a shard: what is not of one variable.
#[derive(Debug, Default)]
pub(crate) struct Cuts {
    last_id: u64,
    open: Vec<OpenCut>,
}

/// One open cut.
#[derive(Debug)]
struct OpenCut {
    range: CutRange,
    small: Option<v1::CutSmall>,
    /// As they were, and the last one that was handed out.
    cells: SessionCells,
    cell: SessionId,
    cells_end: bool,
    /// As they were, and whose was handed out last. Most are empty.
    contributions: Contributions,
    contributed: SessionId,
    /// Variables that were defined, and those that were handed out.
    variables: u32,
    read: u32,
    rows: u64,
    blocks: u64,
}

/// What a cut copies when it opens.
pub(crate) struct SmallState<'a> {
    pub(crate) lineage: &'a Lineage,
    pub(crate) clock: u64,
    pub(crate) numbering: Epoch,
    pub(crate) variables: Vec<v1::CutVariable>,
    pub(crate) cells: &'a SessionCells,
    pub(crate) board: &'a Board,
    pub(crate) contributions: &'a Contributions,
}

/// The parameters of a shard, as far as a cut reads them.
pub(crate) trait Parameters {
    /// Bytes saved for a cut of one variable.
    fn saved_bytes(&self, variable: VariableId, cut: CutId) -> usize;

    /// The next rows or blocks of a variable, and whether these were the last. Nothing if there are none left; an empty piece if none were found, but not
    /// all was looked at.
    fn read(&mut self, variable: VariableId, cut: CutId, bytes_max: usize)
    -> (Option<Piece>, bool);
}

impl Cuts {
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = CutId> {
        self.open.iter().map(|cut| cut.range.id)
    }

    pub(crate) fn open(&mut self, newer_than: Lsn, state: SmallState<'_>) -> CutRange {
        self.last_id += 1;
        let SmallState { lineage, clock, numbering, variables, cells, board, contributions } =
            state;
        let range = CutRange { id: CutId(self.last_id), at: lineage.last(), newer_than };
        let epoch = |&(epoch, previous): &(Epoch, Lsn)| v1::CutEpoch {
            epoch: epoch.0,
            previous_lsn: previous.0,
        };
        self.open.push(OpenCut {
            range,
            variables: variables.len() as u32,
            small: Some(v1::CutSmall {
                lsn: range.at.0,
                newer_than: newer_than.0,
                clock,
                variables,
                epochs: lineage.starts().iter().map(epoch).collect(),
                closed: Some(cells.closed().into()),
                numbering: numbering.0,
                board: Some(board.into()),
            }),
            cells: cells.clone(),
            cell: SessionId(0),
            cells_end: false,
            contributions: contributions.clone(),
            contributed: SessionId(0),
            read: 0,
            rows: 0,
            blocks: 0,
        });
        range
    }

    pub(crate) fn close(&mut self, id: CutId) {
        self.open.retain(|cut| cut.range.id != id);
    }

    /// The next piece of about `bytes_max`; at the end always [`Piece::End`].
    pub(crate) fn read(
        &mut self,
        id: CutId,
        bytes_max: usize,
        parameters: &mut impl Parameters,
    ) -> Result<Piece, CutGone> {
        let cut = self.open.iter_mut().find(|cut| cut.range.id == id).ok_or(CutGone)?;
        if let Some(small) = cut.small.take() {
            return Ok(Piece::Small(small));
        }
        if !cut.cells_end {
            return Ok(Piece::Cells(cut.read_cells()));
        }
        if let Some((session, kept)) = cut.contributions.after(cut.contributed) {
            cut.contributed = session;
            return Ok(Piece::Contribution(rounds::wire(session, kept)));
        }
        // What writers had to save goes first once it is a piece by itself: it occupies memory.
        let variables = (1..=cut.variables).map(VariableId);
        let full = variables.max_by_key(|&variable| parameters.saved_bytes(variable, id));
        if let Some(full) = full.filter(|&full| parameters.saved_bytes(full, id) >= bytes_max)
            && let (Some(piece), _) = parameters.read(full, id, bytes_max)
        {
            return Ok(cut.counted(piece));
        }
        while cut.read < cut.variables {
            let (piece, end) = parameters.read(VariableId(cut.read + 1), id, bytes_max);
            cut.read += u32::from(end);
            if let Some(piece) = piece {
                return Ok(cut.counted(piece));
            }
        }
        Ok(Piece::End(v1::CutEnd { rows: cut.rows, blocks: cut.blocks }))
    }
}

impl OpenCut {
    fn read_cells(&mut self) -> v1::CutCells {
        let count = if planted(Bug::ForgetCells) { 0 } else { CELLS_PIECE_MAX };
        let some: Vec<_> = self.cells.after(self.cell).take(count).collect();
        let last = some.last().map(|(session, _)| *session);
        let cells = some.into_iter().map(|(session, cell)| wire_cell(session, cell)).collect();
        match last {
            Some(last) => self.cell = last,
            None => self.cells_end = true,
        }
        v1::CutCells { cells }
    }

    fn counted(&mut self, piece: Piece) -> Piece {
        match &piece {
            Piece::Rows(rows) => self.rows += (rows.keys.len() / KEY_BYTES) as u64,
            Piece::Blocks(blocks) => self.blocks += blocks.blocks.len() as u64,
            Piece::Small(_) | Piece::Cells(_) | Piece::Contribution(_) | Piece::End(_) => {}
        }
        piece
    }
}

fn wire_cell(session: SessionId, cell: &Cell) -> v1::CutCell {
    let refusals = cell.refusals.iter().map(|(sequence, refusal)| v1::CutRefusal {
        sequence: *sequence,
        refusal: Some((*refusal).into()),
    });
    v1::CutCell {
        session: session.0,
        last: cell.last,
        lsn: cell.lsn.0,
        refusals: refusals.collect(),
    }
}

/// What was read of a table.
pub(crate) fn rows_piece(variable: VariableId, rows: RowsOut) -> Piece {
    let RowsOut { keys, lsns, floats } = rows;
    Piece::Rows(v1::CutRows {
        variable: variable.0,
        keys: keys.freeze(),
        lsns: lsns.freeze(),
        floats: floats.freeze(),
    })
}
