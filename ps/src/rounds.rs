//! What sessions contributed to the round of synchronous training that is open (docs/protocol.md 7): kept as it came, and at the end of the round summed in the
//! order of the sessions and divided by their number. Both are plain sums of `f32` in one order, so every member computes the same bits.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use downpour_core::cells::ClosedSessions;
use downpour_core::clocks::Round;
use downpour_core::id::{SessionId, VariableId};
use downpour_core::tensor_bytes::floats;
use downpour_proto::tensor::Keys;
use downpour_proto::{Invalid, v1};

use crate::record::{Blocks, Change};

/// Bytes that keeping an update costs beside its tensors, about. It bounds how many there are.
const UPDATE_BYTES: usize = 128;

/// Bytes that keeping a contribution costs.
pub(crate) fn cost(change: &Change) -> usize {
    UPDATE_BYTES + change.bytes()
}

/// The contributions of one shard.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Contributions {
    sessions: BTreeMap<SessionId, Contribution>,
    bytes: usize,
}

/// What one session contributed to one round.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Contribution {
    pub(crate) round: u64,
    /// In the order in which they came.
    pub(crate) updates: Vec<(VariableId, Change)>,
}

impl Contribution {
    fn bytes(&self) -> usize {
        self.updates.iter().map(|(_, change)| cost(change)).sum()
    }
}

impl Contributions {
    /// What keeping all gradients costs.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// What keeping one session's gradients costs, and how many updates there are.
    pub(crate) fn of_session(&self, session: SessionId) -> (usize, usize) {
        self.sessions.get(&session).map_or((0, 0), |kept| (kept.bytes(), kept.updates.len()))
    }

    /// What keeping the gradients of sessions that have ended costs.
    pub(crate) fn of_closed(&self, closed: &ClosedSessions) -> usize {
        let of_closed = self.sessions.iter().filter(|(session, _)| closed.contains(**session));
        of_closed.map(|(_, kept)| kept.bytes()).sum()
    }

    /// Drops what sessions left that have ended: it may be of a round that never comes, and then nothing else would.
    pub(crate) fn drop_closed(&mut self, closed: &ClosedSessions) {
        self.sessions.retain(|session, _| !closed.contains(*session));
        self.bytes = self.sessions.values().map(Contribution::bytes).sum();
    }

    /// Whether the session has contributed to a later round: this one is over for it.
    pub(crate) fn is_over(&self, session: SessionId, round: u64) -> bool {
        self.sessions.get(&session).is_some_and(|known| known.round > round)
    }

    /// Keeps gradients until their round is over. A push may come again and again for one round: what it does not name is not kept.
    pub(crate) fn keep(
        &mut self,
        session: SessionId,
        round: u64,
        variable: VariableId,
        change: Change,
    ) {
        let kept = self.sessions.entry(session).or_default();
        if kept.round < round {
            // Who contributes to a round knows that the ones before are over.
            self.bytes -= kept.bytes();
            *kept = Contribution { round, updates: Vec::new() };
        }
        if kept.round == round && !change.is_empty() {
            self.bytes += cost(&change);
            kept.updates.push((variable, change));
        }
    }

    /// Variables that members of a round contributed to.
    pub(crate) fn variables(&self, round: &Round) -> BTreeSet<VariableId> {
        self.of(round).map(|(variable, _)| *variable).collect()
    }

    /// What members of a round contributed to a variable, in the order of the sessions.
    pub(crate) fn gradients(
        &self,
        round: &Round,
        variable: VariableId,
    ) -> impl Iterator<Item = &Change> {
        self.of(round).filter(move |(of, _)| *of == variable).map(|(_, change)| change)
    }

    fn of(&self, round: &Round) -> impl Iterator<Item = &(VariableId, Change)> {
        let kept = round.members.iter().filter_map(|member| self.sessions.get(member));
        kept.filter(|kept| kept.round == round.number).flat_map(|kept| &kept.updates)
    }

    /// A round is over: what is left of it is dropped, and what sessions left that have ended.
    pub(crate) fn end_round(&mut self, number: u64, closed: &ClosedSessions) {
        self.sessions.retain(|session, kept| kept.round > number && !closed.contains(*session));
        self.bytes = self.sessions.values().map(Contribution::bytes).sum();
    }

    /// For a cut: what each session contributed, after one of them.
    pub(crate) fn after(&self, after: SessionId) -> Option<(SessionId, &Contribution)> {
        let mut later = self.sessions.range(SessionId(after.0 + 1)..);
        later.next().map(|(session, kept)| (*session, kept))
    }

    /// Puts back what one session contributed.
    pub(crate) fn restore(
        &mut self,
        session: SessionId,
        contribution: Contribution,
    ) -> Result<(), Invalid> {
        if session.0 == 0 || contribution.round == 0 || self.sessions.contains_key(&session) {
            return Err(Invalid::new(
                "contribution.session",
                "or its round is missing, or it comes twice",
            ));
        }
        self.bytes += contribution.bytes();
        self.sessions.insert(session, contribution);
        Ok(())
    }

    /// Hands everything to `sink`, word by word.
    pub(crate) fn encode(&self, sink: &mut impl FnMut(u64)) {
        for (session, Contribution { round, updates }) in &self.sessions {
            [session.0, *round, updates.len() as u64].into_iter().for_each(&mut *sink);
            for (variable, change) in updates {
                sink(variable.0.into());
                change.encode(sink);
            }
        }
    }

    /// What a sample of the state has of them.
    pub(crate) fn sample(&self, sink: &mut impl FnMut(u64)) {
        for (session, kept) in &self.sessions {
            [session.0, kept.round, kept.bytes() as u64].into_iter().for_each(&mut *sink);
        }
    }
}

pub(crate) fn wire(session: SessionId, contribution: &Contribution) -> v1::CutContribution {
    let update = |(variable, change): &(VariableId, Change)| v1::Update {
        variable: variable.0,
        body: Some(change.into()),
    };
    v1::CutContribution {
        session: session.0,
        round: contribution.round,
        updates: contribution.updates.iter().map(update).collect(),
    }
}

/// A sum of gradients of rows or blocks that differ in which they name.
#[derive(Debug, Default)]
pub(crate) struct Sum {
    /// Where the floats of each row or block are.
    at: BTreeMap<u64, Range<usize>>,
    floats: Vec<f32>,
}

impl Sum {
    /// Adds the gradients of rows.
    pub(crate) fn add_rows(&mut self, keys: Keys<'_>, gradients: &[u8]) {
        let row_bytes = gradients.len() / keys.len().max(1);
        for (key, row) in keys.iter().zip(gradients.chunks_exact(row_bytes.max(1))) {
            self.add(key, row);
        }
    }

    /// Adds the gradients of blocks, which have so many bytes.
    pub(crate) fn add_blocks(&mut self, blocks: &Blocks, block_bytes: impl Fn(u32) -> usize) {
        let mut rest = &blocks.floats[..];
        for &number in &blocks.numbers {
            let (gradient, after) = rest.split_at(block_bytes(number));
            self.add(number.into(), gradient);
            rest = after;
        }
    }

    fn add(&mut self, id: u64, gradient: &[u8]) {
        let start = self.floats.len();
        let range = self.at.entry(id).or_insert(start..start + gradient.len() / size_of::<f32>());
        if range.start == start {
            self.floats.resize(range.end, 0.0);
        }
        let sums = &mut self.floats[range.clone()];
        sums.iter_mut().zip(floats(gradient)).for_each(|(sum, one)| *sum += one);
    }

    /// The rows or blocks that were named, rising, and their means over so many members, raw.
    pub(crate) fn mean(self, members: usize) -> (Vec<u64>, Vec<u8>) {
        let mut raw = Vec::with_capacity(self.floats.len() * size_of::<f32>());
        for range in self.at.values() {
            for sum in &self.floats[range.clone()] {
                raw.extend_from_slice(&(sum / members as f32).to_le_bytes());
            }
        }
        (self.at.into_keys().collect(), raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(floats: &[f32]) -> Vec<u8> {
        floats.iter().flat_map(|float| float.to_le_bytes()).collect()
    }

    fn keys(keys: &[u64]) -> Vec<u8> {
        keys.iter().flat_map(|key| key.to_le_bytes()).collect()
    }

    #[test]
    fn the_mean_is_over_all_members_also_where_one_has_no_gradient() {
        let mut sum = Sum::default();
        sum.add_rows(Keys::trusted(&keys(&[3, 9])), &raw(&[1.0, 2.0, 3.0, 4.0]));
        sum.add_rows(Keys::trusted(&keys(&[1, 9])), &raw(&[8.0, 8.0, 5.0, 6.0]));
        sum.add_rows(Keys::trusted(&[]), &[]);
        let (ids, means) = sum.mean(4);
        assert_eq!(ids, [1, 3, 9]);
        assert_eq!(means, raw(&[2.0, 2.0, 0.25, 0.5, 2.0, 2.5]));
    }

    #[test]
    fn blocks_of_different_lengths_are_summed() {
        let blocks = |numbers: &[u32], floats: &[f32]| Blocks {
            numbers: numbers.to_vec(),
            floats: raw(floats).into(),
        };
        let bytes = |number| if number == 2 { 4 } else { 8 };
        let mut sum = Sum::default();
        sum.add_blocks(&blocks(&[0, 2], &[1.0, 2.0, 3.0]), bytes);
        sum.add_blocks(&blocks(&[2], &[5.0]), bytes);
        assert_eq!(sum.mean(2), (vec![0, 2], raw(&[0.5, 1.0, 4.0])));
    }

    #[test]
    fn what_a_session_contributes_to_the_next_round_takes_the_place_of_what_it_left() {
        let change = |bytes: usize| Change::Rows {
            keys: keys(&[1]).into(),
            gradients: vec![0; bytes].into(),
        };
        let (session, variable) = (SessionId(7), VariableId(1));
        let mut kept = Contributions::default();
        kept.keep(session, 1, variable, change(4));
        kept.keep(session, 1, variable, change(8));
        assert_eq!(kept.bytes(), 2 * UPDATE_BYTES + 8 + 4 + 8 + 8);
        kept.keep(session, 2, variable, change(4));
        assert_eq!(kept.bytes(), UPDATE_BYTES + 8 + 4);
        let empty = Change::Rows { keys: Vec::new().into(), gradients: Vec::new().into() };
        kept.keep(session, 2, variable, empty);
        assert_eq!(kept.of_session(session), (UPDATE_BYTES + 8 + 4, 1));
        assert!(kept.is_over(session, 1) && !kept.is_over(session, 2));
        kept.end_round(1, &ClosedSessions::default());
        assert_eq!(kept.bytes(), UPDATE_BYTES + 12, "it is of the next round");
        kept.end_round(1, &ClosedSessions { high_water: 7, open: [].into() });
        assert_eq!((kept.bytes(), kept.after(SessionId(0))), (0, None));
    }

    #[test]
    fn what_sessions_left_that_ended_makes_room_for_others() {
        let change = || Change::Rows { keys: keys(&[1]).into(), gradients: vec![0; 4].into() };
        let mut kept = Contributions::default();
        for session in [7, 8] {
            kept.keep(SessionId(session), u64::MAX, VariableId(1), change());
        }
        let closed = ClosedSessions { high_water: 7, open: [].into() };
        assert_eq!((kept.bytes(), kept.of_closed(&closed)), (2 * cost(&change()), cost(&change())));
        kept.drop_closed(&closed);
        assert_eq!((kept.bytes(), kept.of_closed(&closed)), (cost(&change()), 0));
        assert_eq!(kept.of_session(SessionId(8)).1, 1);
    }
}
