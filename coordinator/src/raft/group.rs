//! The driver's part of changing the group: which changes it lets into the log, and what it does when one is applied.
//!
//! One member at a time, by Raft's single-member changes. A leader proposes one only when the one before is applied and an entry of its own
//! term is committed (two leaders could otherwise count majorities that do not meet). A new member is a learner first: it takes the log, by a snapshot
//! where the leader has no more of it, and counts in no majority before it has caught up.

use prost::Message as _;
use protobuf::Message as _;
use raft::StateRole;
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, Message, MessageType};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::driver::{Driver, Fatal, Outbox};
use super::handle::{Error, Wish, WishKind};
use super::log::Disk;
use crate::state::members::{ChangeRecord, Due, MemberChange, Members, Standing};
use crate::state::{Outcome, Refused, Reply};

/// A learner that lacks no more entries than this has caught up: the rest comes while its vote is decided.
const LAG_MAX: u64 = 64;

type Answer = oneshot::Sender<Result<Outcome, Error>>;

impl<D: Disk, O: Outbox> Driver<D, O> {
    /// The birth of a member's data directory, where only that one is believed.
    pub(super) fn known_birth(&self, member: u64) -> Option<u64> {
        let met = self.births.get(&member).copied();
        let begun = || self.state.cluster().members.list.get(&member).map(|one| one.birth);
        met.or_else(begun).filter(|&birth| birth != 0)
    }

    /// Why a member whose data directory is new may not come back under its number: with another group than that which it was founded with, it
    /// would not meet everybody who may count on what it forgot.
    pub(super) fn no_way_back(&self, member: u64, birth: u64) -> Option<Error> {
        let changed = self.state.cluster().members.version > 0;
        let known = self.births.get(&member) == Some(&birth);
        (changed && !known).then(|| {
            let problem = format!(
                "the data directory of member {member} is new, and the group was changed since it was founded: remove member {member} and add another in its place"
            );
            Error::Refused(Refused::FailedPrecondition(problem))
        })
    }

    /// Why this member cannot go on, where it founded its group alone and knows of nobody that came later, and yet `other` counts it as its own: only it could have let the
    /// other in, so its data directory is not the one with which it did.
    pub(super) fn forgot(&self, other: u64) -> Option<String> {
        let (me, image) = (self.options.id, self.node.store().image());
        let alone = image.identity.as_ref().is_some_and(|identity| identity.voters == [me]);
        let changed = self.state.cluster().members.version > 0;
        if !alone || changed || other == me {
            return None;
        }
        // What was let in is in the log before it hears of that, and may not be applied (again) yet.
        let mut entries = image.entries.iter();
        let known = entries.any(|entry| entry.get_entry_type() != EntryType::EntryNormal);
        (!known).then(|| {
            format!(
                "member {other} counts member {me} as one of its group, and this data directory knows of nobody but member {me}: it is new, or another one's. \
                 Give member {me} its own directory back, or remove member {me} and add another in its place"
            )
        })
    }

    /// Who does not vote does not campaign either, so it would never learn that it was removed: the others send it nothing any more, and refuse what it sends. It says something that
    /// means nothing, once in an election's time, while nobody says anything to it.
    pub(super) fn ask_for_news(&mut self) {
        let (me, raft) = (self.options.id, &self.node.raft);
        let due = self.ticks.is_multiple_of(self.options.election_ticks as u64);
        if !due || raft.promotable() || self.joining.is_some() || self.standing().heard.len() > 1 {
            return;
        }
        let term = raft.term;
        for to in self.members().list.into_keys().filter(|&id| id != me) {
            let mut message = Message { from: me, to, term, ..Message::default() };
            message.set_msg_type(MessageType::MsgHeartbeatResponse);
            _ = self.outbox.send(message);
        }
    }

    /// How the group stands, as far as this member sees.
    pub(super) fn standing(&self) -> Standing {
        let members = self.node.raft.prs().conf().to_conf_state();
        let (me, election_ticks) = (self.options.id, self.options.election_ticks as u64);
        let late = |at: u64| self.ticks - at > election_ticks;
        let heard = self.heard.iter().filter(|&(_, &at)| !late(at)).map(|(&id, _)| id);
        Standing {
            heard: heard.chain([me]).collect(),
            voters: members.voters.into_iter().collect(),
            learners: members.learners.into_iter().collect(),
        }
    }

    fn members(&self) -> Members {
        self.state.cluster().members.or_founded(&self.options.founders)
    }

    /// Who is furthest among the others that vote and are heard.
    pub(super) fn successor(&self) -> Option<u64> {
        let Standing { voters, heard, .. } = self.standing();
        let others = voters.intersection(&heard).filter(|&&id| id != self.options.id);
        let matched = |id: u64| self.node.raft.prs().get(id).map(|progress| progress.matched);
        others.copied().max_by_key(|&id| (matched(id), id))
    }

    /// Whether Raft would take a change now.
    fn takes_changes(&self) -> bool {
        let raft = &self.node.raft;
        raft.commit_to_current_term() && !raft.has_pending_conf() && raft.lead_transferee.is_none()
    }

    pub(super) fn change_members(&mut self, wish: Wish, reply: Answer) {
        match self.wished(wish) {
            Ok((Due::Change(change), false)) => match self.propose_change(&change) {
                Ok((index, term)) => self.proposals.add(index, term, reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Ok((due, _)) => {
                let reply_now = match due {
                    Due::Nothing(id) => Reply::Member { id, changed: false },
                    Due::Change(change) => Reply::Member { id: change.member(), changed: true },
                };
                let _ = reply.send(Ok(Ok(reply_now)));
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// What is to be done, and whether only to say so.
    fn wished(&mut self, Wish { kind, dry_run }: Wish) -> Result<(Due, bool), Error> {
        if self.node.raft.state != StateRole::Leader {
            return Err(Error::NotLeader { leader: self.leader() });
        }
        if !self.takes_changes() {
            return Err(Error::Overloaded);
        }
        let (members, me) = (self.members(), self.options.id);
        let due = match kind {
            WishKind::Add(id, address) => members.may_add(id, &address)?,
            WishKind::Remove(id) => match members.may_remove(id, &self.standing()) {
                // A leader that has just begun has not heard everybody yet.
                Err(Refused::FailedPrecondition(_))
                    if self.ticks_leading <= self.options.election_ticks as u64 =>
                {
                    return Err(Error::Overloaded);
                }
                due => due?,
            },
        };
        if due == Due::Change(MemberChange::Remove(me)) && !dry_run {
            // Whoever leads then removes this one: the caller is told to ask there.
            let Some(next) = self.successor() else { return Err(Error::Overloaded) };
            info!(member = next, "handing over leadership, for this member is to be removed");
            self.node.transfer_leader(next);
            return Err(Error::NotLeader { leader: Some(next) });
        }
        Ok((due, dry_run))
    }

    fn propose_change(&mut self, change: &MemberChange) -> Result<(u64, u64), Error> {
        let founders = self.options.founders.clone();
        let (kind, address) = match change {
            MemberChange::Add(_, address) => (ConfChangeType::AddLearnerNode, address.clone()),
            MemberChange::Promote(_) => (ConfChangeType::AddNode, String::new()),
            MemberChange::Remove(_) => (ConfChangeType::RemoveNode, String::new()),
        };
        let mut raft_change = ConfChange::default();
        raft_change.set_change_type(kind);
        raft_change.node_id = change.member();
        let births = [(self.options.id, self.node.store().image().admission.birth)].into();
        raft_change.context = ChangeRecord { address, founders, births }.encode_to_vec().into();
        let full = self.proposals.full();
        if full || self.node.propose_conf_change(Vec::new(), raft_change).is_err() {
            return Err(Error::Overloaded);
        }
        info!(?change, "proposing a change of the group");
        Ok((self.node.raft.raft_log.last_index(), self.node.raft.term))
    }

    /// Has learners vote that have caught up.
    pub(super) fn promote(&mut self) {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader || !self.takes_changes() {
            return;
        }
        let standing = self.standing();
        if standing.learners.is_empty() {
            return;
        }
        let caught_up = |id| {
            let matched = raft.prs().get(id).map_or(0, |progress| progress.matched);
            matched + LAG_MAX >= raft.raft_log.committed && matched > 0
        };
        if let Some(change) = self.members().promotion(&standing, caught_up)
            && let Err(error) = self.propose_change(&change)
        {
            warn!(?change, %error, "a member that has caught up does not vote yet");
        }
    }

    /// Has `to` lead, or the furthest, unless another than `from` does.
    pub(super) fn transfer(&mut self, from: u64, to: u64) -> Result<Outcome, Error> {
        let me = self.options.id;
        if self.node.raft.state != StateRole::Leader {
            return Err(Error::NotLeader { leader: self.leader() });
        }
        if to == me || (to == 0 && from != me) {
            return Ok(Ok(Reply::Member { id: me, changed: false }));
        }
        let Standing { voters, heard, .. } = self.standing();
        let no = |problem: String| Err(Error::Refused(Refused::FailedPrecondition(problem)));
        let target = match to {
            0 => self.successor(),
            to if !voters.contains(&to) => {
                let text = format!("member {to} is not among those that vote, {voters:?}");
                return Err(Error::Refused(Refused::NotFound(text)));
            }
            to if !heard.contains(&to) => return no(format!("member {to} is not heard")),
            to => Some(to),
        };
        let Some(target) = target else { return no("no other member that votes is heard".into()) };
        info!(member = target, "handing over leadership, as an operator asked");
        self.node.transfer_leader(target);
        Ok(Ok(Reply::Member { id: target, changed: true }))
    }

    /// The group is as the entry says from now on. The inner error says why the entry cannot be read.
    pub(super) fn apply_change(&mut self, entry: &Entry) -> Result<Result<Outcome, String>, Fatal> {
        let (raft_change, change, record) = match read(entry) {
            Ok(read) => read,
            Err(problem) => return Ok(Err(problem)),
        };
        let members = self.node.apply_conf_change(&raft_change)?;
        info!(?change, ?members, "the group changed");
        self.node.mut_store().set_members(members);
        self.state.change_members(entry.index, &change, &record.founders, &record.births);
        self.snapshot_due = true;
        self.removed |= change == MemberChange::Remove(self.options.id);
        Ok(Ok(Ok(Reply::Member { id: change.member(), changed: true })))
    }
}

fn read(entry: &Entry) -> Result<(ConfChange, MemberChange, ChangeRecord), String> {
    let raft_change =
        ConfChange::parse_from_bytes(&entry.data).map_err(|error| error.to_string())?;
    let record =
        ChangeRecord::decode(&raft_change.context[..]).map_err(|error| error.to_string())?;
    let id = raft_change.node_id;
    let change = match raft_change.get_change_type() {
        ConfChangeType::AddLearnerNode => MemberChange::Add(id, record.address.clone()),
        ConfChangeType::AddNode => MemberChange::Promote(id),
        ConfChangeType::RemoveNode => MemberChange::Remove(id),
    };
    Ok((raft_change, change, record))
}
