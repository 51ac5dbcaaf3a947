//! What was decided of late, for people: part of the committed state, so that it outlives the leader that decided.

use std::sync::Arc;

use super::State;

/// How many are kept.
const EVENTS_MAX: usize = 512;
/// Longest text of one; longer ones are cut.
const TEXT_BYTES_MAX: usize = 512;
/// What one takes in a snapshot.
pub(super) const EVENTS_BYTES: usize = EVENTS_MAX * (TEXT_BYTES_MAX + 48);

/// Something that was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Position in the log of the command.
    pub version: u64,
    /// Wall time at the leader that proposed it, in milliseconds since 1970.
    pub at_ms: u64,
    /// What it is about: `node`, `failover`, `placement`, `move`.
    pub kind: String,
    /// What, and why.
    pub text: String,
}

impl State {
    /// Takes note of what the command that is being applied does.
    pub(super) fn tell(&mut self, kind: &str, mut text: String) {
        let whole = |end: &usize| text.is_char_boundary(*end);
        let end = (0..=text.len().min(TEXT_BYTES_MAX)).rev().find(whole);
        text.truncate(end.unwrap_or(0));
        let (version, at_ms) = (self.cluster.version, self.now_ms);
        let events = Arc::make_mut(&mut self.cluster.events);
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(Event { version, at_ms, kind: kind.into(), text });
    }
}
