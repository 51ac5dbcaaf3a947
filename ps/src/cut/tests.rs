use std::collections::BTreeSet;

use downpour_core::cells::ClosedSessions;
use downpour_core::id::{Epoch, Lsn, SessionId};
use downpour_core::mix::mix64;
use downpour_proto::v1;
use downpour_proto::v1::RetryReason;
use downpour_proto::v1::cut_piece::Piece;
use proptest::prelude::*;
use prost::Message;

use super::{CutGone, CutId, Loader};
use crate::record::Change;
use crate::shard::tests::fixture::*;
use crate::shard::{Declined, Pushed, Shard};
use crate::state::ShardState;

fn words(state: &ShardState) -> Vec<u64> {
    let mut words = Vec::new();
    state.encode(&mut |word| words.push(word));
    words
}

/// A shard with a history: several sessions, refusals, a closed session, rows, blocks.
struct Busy {
    shard: Shard,
    seed: u64,
    draws: u64,
    sequences: [u64; 4],
}

impl Busy {
    fn new(seed: u64) -> Self {
        let [shard] = cluster();
        Busy { shard, seed, draws: 0, sequences: [1; 4] }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.draws += 1;
        mix64(self.seed << 32 ^ self.draws) % below
    }

    fn push(&mut self) {
        let session = self.draw(4) as usize;
        let keys: BTreeSet<u64> = (0..1 + self.draw(20)).map(|_| self.draw(120)).collect();
        let keys: Vec<u64> = keys.into_iter().collect();
        let value = if self.draw(12) == 0 { f32::NAN } else { self.draw(9) as f32 - 4.0 };
        let updates = match self.draw(8) {
            0 => vec![update(DENSE, Change::Values(blocks(&[0, 2], 13, value)))],
            1 => vec![update(DENSE, Change::Gradients(blocks(&[0], 8, value)))],
            2 => vec![update(DENSE, Change::Values(blocks(&[0, 1, 2], 21, value)))],
            3 | 4 => vec![rows(COUNTS, 1, &keys, value), rows(EMBEDDING, 3, &keys, value)],
            5 => vec![rows(EMBEDDING, 3, &keys, value)],
            _ => vec![rows(COUNTS, 1, &keys, value)],
        };
        let number = SessionId(session as u64 + 1);
        let pushed = push(&mut self.shard, push_of(number, self.sequences[session], updates));
        match pushed {
            Pushed::Logged(_) => self.sequences[session] += 1,
            Pushed::SessionClosed => {}
            other => panic!("{other:?}"),
        }
    }

    fn close_a_session(&mut self) {
        let view = view(2, route(1, 1, 1, &[1]));
        self.shard.on_view(changed(&view, |view| {
            view.sessions = ClosedSessions { high_water: 2, open: [SessionId(2)].into() };
        }));
    }
}

/// A cut that is being read, and what it must give.
struct Reading {
    id: CutId,
    at: Vec<u64>,
    loader: Loader,
}

impl Reading {
    fn begin(busy: &mut Busy, loader: Loader) -> Reading {
        let id = busy.shard.open_cut(loader.at()).expect("it serves");
        Reading { id, at: words(busy.shard.state()), loader }
    }

    /// True when it is whole.
    fn step(&mut self, busy: &mut Busy) -> bool {
        let bytes = 1 + busy.draw(400) as usize;
        let piece = busy.shard.read_cut(self.id, bytes).expect("it is open");
        self.loader.take(piece).expect("it fits")
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_cut_read_while_writes_go_on_is_the_state_at_its_lsn_byte_for_byte(seed in 0u64..1 << 30) {
        let mut busy = Busy::new(seed);
        (0..40).for_each(|_| busy.push());
        let identity = busy.shard.state().identity();
        let mut readings = Vec::new();
        let mut whole = 0;
        for step in 0..400 {
            match busy.draw(10) {
                // Two at once, each its own.
                0 if readings.len() < 2 => {
                    let reading = Reading::begin(&mut busy, Loader::new(identity));
                    readings.push(reading);
                }
                1..5 => busy.push(),
                _ if step == 200 => busy.close_a_session(),
                _ if !readings.is_empty() => {
                    let at = busy.draw(readings.len() as u64) as usize;
                    if !readings[at].step(&mut busy) {
                        continue;
                    }
                    let Reading { id, at, loader } = readings.swap_remove(at);
                    busy.shard.close_cut(id);
                    let state = loader.finish().expect("whole");
                    prop_assert_eq!(words(&state), at);
                    whole += 1;
                }
                _ => {}
            }
        }
        prop_assert!(whole > 1);
        for Reading { id, .. } in readings {
            busy.shard.close_cut(id);
            prop_assert_eq!(busy.shard.read_cut(id, 100), Err(CutGone));
        }
        prop_assert_eq!(busy.shard.state().cut_bytes(), 0);
    }

    #[test]
    fn a_cut_and_the_increments_after_it_are_the_state_at_the_last(seed in 0u64..1 << 30) {
        let mut busy = Busy::new(seed);
        let mut loader = Loader::new(busy.shard.state().identity());
        for _ in 0..4 {
            (0..10).for_each(|_| busy.push());
            let mut reading = Reading::begin(&mut busy, loader);
            while !reading.step(&mut busy) {
                busy.push();
            }
            busy.shard.close_cut(reading.id);
            loader = reading.loader;
            let mut here = Vec::new();
            loader.state().encode(&mut |word| here.push(word));
            prop_assert_eq!(here, reading.at);
        }
    }

    #[test]
    fn spoilt_pieces_are_refused_by_field_or_give_a_state(
        spoils in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut pieces: Vec<v1::CutPiece> = pieces();
        for (piece, at, byte) in spoils {
            let piece = piece.get(&pieces).clone();
            let mut bytes = piece.encode_to_vec();
            if bytes.is_empty() {
                continue;
            }
            let place = at.index(bytes.len());
            bytes[place] = byte;
            let index = pieces.iter().position(|one| *one == piece).expect("it is one of them");
            if let Ok(spoilt) = v1::CutPiece::decode(bytes.as_slice()) {
                pieces[index] = spoilt;
            }
        }
        if let Ok(state) = load(pieces) {
            let _ = state.digest();
        }
    }
}

/// All pieces of the cut of a busy shard.
fn pieces() -> Vec<v1::CutPiece> {
    let mut busy = Busy::new(3);
    (0..40).for_each(|_| busy.push());
    busy.close_a_session();
    let id = busy.shard.open_cut(Lsn::ZERO).expect("it serves");
    let mut pieces = Vec::new();
    loop {
        let piece = busy.shard.read_cut(id, 300).expect("it is open");
        let end = matches!(piece, Piece::End(_));
        pieces.push(v1::CutPiece { piece: Some(piece) });
        if end {
            return pieces;
        }
    }
}

fn load(pieces: Vec<v1::CutPiece>) -> Result<ShardState, downpour_proto::Invalid> {
    let mut loader = Loader::new(cluster::<1>()[0].state().identity());
    for piece in pieces.into_iter().filter_map(|one| one.piece) {
        loader.take(piece)?;
    }
    loader.finish()
}

#[test]
fn a_cut_with_something_missing_or_twice_is_refused_by_field() {
    let whole = pieces();
    assert!(load(whole.clone()).is_ok());
    let kind = |wanted: fn(&Piece) -> bool| {
        let found = whole.iter().position(|one| one.piece.as_ref().is_some_and(wanted));
        found.expect("there is one")
    };
    let rows = kind(|piece| matches!(piece, Piece::Rows(rows) if !rows.keys.is_empty()));
    let blocks = kind(|piece| matches!(piece, Piece::Blocks(_)));
    let cells = kind(|piece| matches!(piece, Piece::Cells(cells) if !cells.cells.is_empty()));
    let field = |change: &dyn Fn(&mut Vec<v1::CutPiece>)| {
        let mut pieces = whole.clone();
        change(&mut pieces);
        load(pieces).map(|state| state.last()).map_err(|invalid| invalid.field)
    };
    assert_eq!(field(&|pieces| drop(pieces.remove(0))), Err("piece"));
    assert_eq!(field(&|pieces| drop(pieces.pop())), Err("piece.end"));
    assert_eq!(field(&|pieces| drop(pieces.remove(rows))), Err("end"));
    assert_eq!(field(&|pieces| drop(pieces.remove(blocks))), Err("end"));
    assert_eq!(field(&|pieces| pieces.insert(rows, pieces[rows].clone())), Err("rows.keys"));
    assert_eq!(
        field(&|pieces| pieces.insert(blocks, pieces[blocks].clone())),
        Err("blocks.blocks")
    );
    assert_eq!(field(&|pieces| pieces.insert(cells, pieces[cells].clone())), Err("cells"));
    let of_rows = |change: fn(&mut v1::CutRows)| {
        field(&|pieces| match &mut pieces[rows].piece {
            Some(Piece::Rows(rows)) => change(rows),
            _ => unreachable!("it is a piece of rows"),
        })
    };
    assert_eq!(of_rows(|rows| rows.variable = DENSE.0), Err("rows.variable"));
    assert_eq!(of_rows(|rows| rows.variable = 0), Err("rows.variable"));
    assert_eq!(of_rows(|rows| rows.keys = rows.keys.slice(8..)), Err("rows.floats"));
    assert_eq!(of_rows(|rows| rows.floats = rows.floats.slice(4..)), Err("rows.floats"));
    let later = |rows: &mut v1::CutRows| {
        rows.lsns = (0..rows.keys.len() / 8).flat_map(|_| (1u64 << 60).to_le_bytes()).collect();
    };
    assert_eq!(of_rows(later), Err("rows.lsns"));
    let nan = |rows: &mut v1::CutRows| {
        rows.floats = std::iter::repeat_n(0xFF, rows.floats.len()).collect();
    };
    assert_eq!(of_rows(nan), Err("rows.floats"));
    let of_small = |change: fn(&mut v1::CutSmall)| {
        field(&|pieces| match &mut pieces[0].piece {
            Some(Piece::Small(small)) => change(small),
            _ => unreachable!("it comes first"),
        })
    };
    assert_eq!(of_small(|small| small.lsn = 0), Err("small.epochs"));
    assert_eq!(of_small(|small| small.epochs.clear()), Err("small.epochs"));
    assert_eq!(of_small(|small| small.newer_than = 1), Err("small.newer_than"));
    assert_eq!(of_small(|small| small.variables.swap(0, 1)), Err("small.variables"));
}

#[test]
fn pushes_wait_while_a_cut_has_saved_all_that_it_may_and_go_on_when_it_was_read_or_closed() {
    let [mut shard] = cluster();
    let keys: Vec<u64> = (0..LOG_BYTES_MAX as u64 / 20 + 1).collect();
    ticket(push(&mut shard, counting(1, &keys)));
    let id = shard.open_cut(Lsn::ZERO).expect("it serves");
    assert!(!shard.cuts_press());
    ticket(push(&mut shard, counting(2, &keys)));
    assert!(shard.cuts_press(), "a copy that goes slowly on purpose holds up pushes");
    let later = Pushed::Declined(Declined::Retry(RetryReason::Overloaded));
    assert_eq!(push(&mut shard, counting(3, &[5])), later);
    // The small state, the end of the cells, and then what was saved.
    while shard.state().cut_bytes() >= LOG_BYTES_MAX {
        shard.read_cut(id, 1 << 18).expect("it is open");
    }
    ticket(push(&mut shard, counting(3, &[5])));
    shard.close_cut(id);
    assert_eq!(shard.state().cut_bytes(), 0);
    assert!(!shard.cuts_press());
}

#[test]
fn a_cut_ends_with_the_tenure_that_it_was_opened_in() {
    let [mut primary, mut backup] = cluster();
    assert_eq!(backup.open_cut(Lsn::ZERO), None);
    let id = primary.open_cut(Lsn::ZERO).expect("it serves");
    assert!(primary.read_cut(id, 100).is_ok());
    primary.fence(Epoch(2), server(2));
    assert_eq!(primary.read_cut(id, 100), Err(CutGone));
}

#[test]
fn a_cut_of_a_tensor_of_which_little_changed_is_whole() {
    use downpour_core::spec::{DenseSpec, Shape};
    const BLOCKS: u32 = 10_000;
    let many = changed(&view(1, route(1, 1, 1, &[1])), |view| {
        let dense = DenseSpec { shape: vec![BLOCKS.into()], block_floats: 1 };
        view.variables[DENSE.0 as usize - 1].spec.shape = Shape::Dense(dense);
    });
    let mut shard = replica(server(1), &many);
    let numbers: Vec<u32> = (0..BLOCKS).collect();
    let first = Change::Values(blocks(&numbers, numbers.len(), 1.0));
    ticket(push(&mut shard, push_of(SESSION, 1, vec![update(DENSE, first)])));
    let mut loader = Loader::new(shard.state().identity());
    for sequence in 2..4 {
        let id = shard.open_cut(loader.at()).expect("it serves");
        while !loader.take(shard.read_cut(id, 1 << 10).expect("it is open")).expect("it fits") {}
        shard.close_cut(id);
        assert_eq!(words(loader.state()), words(shard.state()));
        let last = Change::Gradients(blocks(&[BLOCKS - 1], 1, 1.0));
        ticket(push(&mut shard, push_of(SESSION, sequence, vec![update(DENSE, last)])));
    }
}
