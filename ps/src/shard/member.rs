//! The members that a tenure waits for.

use std::collections::BTreeMap;

use downpour_core::id::{Lsn, ServerRef};

/// The other members of the in-sync set: a push is acknowledged when all of them have it. A member leaves only by a committed route
/// that was read back (docs/protocol.md 3.2).
#[derive(Clone, Debug, Default)]
pub struct WaitSet {
    members: BTreeMap<ServerRef, Member>,
}

/// How far a member is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Member {
    /// It has everything up to here; none: it was not fenced yet.
    pub acked: Option<Lsn>,
    /// What was sent last, and the commit LSN that went with it.
    pub(super) sent: Lsn,
    pub(super) sent_commit: Lsn,
}

impl WaitSet {
    pub(super) fn new(members: impl Iterator<Item = ServerRef>) -> Self {
        WaitSet { members: members.map(|server| (server, Member::default())).collect() }
    }

    /// Members beside the primary.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// The primary is alone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The members and how far they are.
    pub fn members(&self) -> impl Iterator<Item = (ServerRef, &Member)> {
        self.members.iter().map(|(server, member)| (*server, member))
    }

    /// The committed set changed: who stays keeps its position, who left is no longer waited for.
    pub(super) fn replace(&mut self, members: impl Iterator<Item = ServerRef>) {
        let old = std::mem::take(&mut self.members);
        let position = |server| old.get(&server).copied().unwrap_or_default();
        self.members = members.map(|server| (server, position(server))).collect();
    }

    pub(super) fn get_mut(&mut self, server: ServerRef) -> Option<&mut Member> {
        self.members.get_mut(&server)
    }

    /// What every member has, of a log that ends at `last`; none while a member's position is unknown.
    pub(super) fn committed(&self, last: Lsn) -> Option<Lsn> {
        self.members.values().try_fold(last, |commit, member| Some(commit.min(member.acked?)))
    }

    /// Every member is fenced and has exactly the log that ends at `last`.
    pub(super) fn level_at(&self, last: Lsn) -> bool {
        self.members.values().all(|member| member.acked == Some(last))
    }
}

impl Member {
    /// The commit LSN that it was sent.
    #[must_use]
    pub fn told(&self) -> Lsn {
        self.sent_commit
    }

    /// Forgets what was sent and not acknowledged, to send it again.
    pub(super) fn rewind(&mut self) {
        self.sent = self.acked.unwrap_or_default();
        self.sent_commit = Lsn::ZERO;
    }
}
