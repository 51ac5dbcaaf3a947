//! The members that a tenure waits for.

use std::collections::BTreeMap;

use downpour_core::id::{Lsn, ServerRef};
use downpour_core::routing::ShardRoute;

use super::joining::Learner;

/// The other members of the in-sync set: a push is acknowledged when all of them have it. A member leaves only by a committed route
/// that was read back (docs/protocol.md 3.2).
#[derive(Debug, Default)]
pub struct WaitSet {
    members: BTreeMap<ServerRef, Member>,
    /// Who the shard is copied to: waited for from shortly before its addition is proposed, and no member before that is known to be committed.
    pub(super) learner: Option<Learner>,
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
        let members = members.map(|server| (server, Member::default())).collect();
        WaitSet { members, learner: None }
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

    /// A committed set was read back, after that of version `known`: who stays keeps its position, who left is no longer waited for. Gives the learner if
    /// it left.
    pub(super) fn replace(
        &mut self,
        route: &ShardRoute,
        known: u64,
        me: ServerRef,
    ) -> Option<Learner> {
        let mut old = std::mem::take(&mut self.members);
        if let Some(learner) = &self.learner {
            old.insert(learner.server(), learner.position);
        }
        let position = |server| old.get(&server).copied().unwrap_or_default();
        self.members = route.others(me).map(|server| (server, position(server))).collect();
        let members = &self.members;
        self.learner.take_if(|learner| {
            members.contains_key(&learner.server())
                || !learner.goes_on(route.joining, known, route.set_version)
        })
    }

    pub(super) fn member_mut(&mut self, server: ServerRef) -> Option<&mut Member> {
        self.members.get_mut(&server)
    }

    /// The position of a member, or of the learner.
    pub(super) fn get_mut(&mut self, server: ServerRef) -> Option<&mut Member> {
        let learner = self.learner.as_mut().filter(|learner| learner.server() == server);
        match learner {
            Some(learner) => Some(&mut learner.position),
            None => self.members.get_mut(&server),
        }
    }

    /// What every member has, of a log that ends at `last`; none while a member's position is unknown.
    pub(super) fn committed(&self, last: Lsn) -> Option<Lsn> {
        let learner = self.learner.iter().filter(|learner| learner.waited_for());
        let mut positions = self.members.values().chain(learner.map(|learner| &learner.position));
        positions.try_fold(last, |commit, member| Some(commit.min(member.acked?)))
    }

    /// A planted bug: what the members have is not asked.
    pub(super) fn assume_level_at(&mut self, last: Lsn) {
        for member in self.members.values_mut() {
            (member.acked, member.sent) = (Some(last), last);
        }
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
