//! Who is in the group of coordinators, once that was changed while it runs. Raft's own configuration says who votes; this says where
//! members are, and which numbers were ever given out. Both change with the same entries of the log, one member at a time.

use std::collections::{BTreeMap, BTreeSet};

use downpour_proto::Invalid;
use prost::Message;

use super::{Refused, Reply, State};

/// Most members. More copies make each command slower and nothing safer.
pub const MEMBERS_MAX: usize = 7;
/// A new number is at most so far above the highest: nobody uses them up.
const GAP_MAX: u64 = 100;

/// The group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// Position in the log of the last change; 0: there was none, and the group is as its members' options say.
    pub version: u64,
    /// By number; empty where there was no change.
    pub list: BTreeMap<u64, Member>,
    /// The highest number that was ever a member's. Numbers never come back: whoever hears from a lower one that is not in the list knows that it
    /// was removed.
    pub last: u64,
}

/// A member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// host:port.
    pub address: String,
    /// It votes; otherwise it is catching up.
    pub voter: bool,
    /// It was there when the group was founded.
    pub founder: bool,
    /// Of its data directory; 0: of a founder that did not lead when the group was first changed, or it has not begun.
    pub birth: u64,
}

/// A change of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// A new member takes the log, and does not vote yet.
    Add(u64, String),
    /// It has caught up, and votes.
    Promote(u64),
    /// A member leaves.
    Remove(u64),
}

impl MemberChange {
    /// Who comes or goes.
    #[must_use]
    pub fn member(&self) -> u64 {
        match *self {
            Self::Add(id, _) | Self::Promote(id) | Self::Remove(id) => id,
        }
    }
}

/// What the entry of a change carries besides Raft's own.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ChangeRecord {
    /// Given when a member is added.
    #[prost(string, tag = "1")]
    pub(crate) address: String,
    /// Where the founders are, as the leader knows it: used at the first change.
    #[prost(btree_map = "uint64, string", tag = "2")]
    pub(crate) founders: BTreeMap<u64, String>,
    /// Of their data directories, as far as the leader vouches for them: used at the first change. One that founded its group alone asks nobody when its
    /// directory is lost, so the others must know its next one from this one.
    #[prost(btree_map = "uint64, uint64", tag = "3")]
    pub(crate) births: BTreeMap<u64, u64>,
}

/// How the group stands, as the leader sees it now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Who votes.
    pub voters: BTreeSet<u64>,
    /// Who catches up.
    pub learners: BTreeSet<u64>,
    /// Of whom something was heard of late; the leader itself too.
    pub heard: BTreeSet<u64>,
}

impl Standing {
    /// Who of `voters` is not heard, where that leaves no majority.
    fn missing(&self, voters: &BTreeSet<u64>) -> Option<Vec<u64>> {
        let silent: Vec<u64> = voters.difference(&self.heard).copied().collect();
        (2 * silent.len() >= voters.len()).then_some(silent)
    }
}

/// What a change that may be made takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing: it is so already.
    Nothing(u64),
    /// An entry of the log.
    Change(MemberChange),
}

impl Members {
    /// The group: as it was changed, or as it was founded.
    #[must_use]
    pub fn or_founded(&self, founders: &BTreeMap<u64, String>) -> Members {
        if self.version > 0 {
            return self.clone();
        }
        let founder = |(&id, address): (&u64, &String)| {
            (id, Member { address: address.clone(), voter: true, founder: true, birth: 0 })
        };
        let list: BTreeMap<_, _> = founders.iter().map(founder).collect();
        let last = list.keys().next_back().copied().unwrap_or(0);
        Members { version: 0, list, last }
    }

    /// Whether this number was a member's and is no longer.
    #[must_use]
    pub fn was_removed(&self, id: u64) -> bool {
        self.version > 0 && id <= self.last && !self.list.contains_key(&id)
    }

    /// Whether a new member may be added: under this number, or under the next one where it is 0.
    ///
    /// # Errors
    /// It may not; says why.
    pub fn may_add(&self, id: u64, address: &str) -> Result<Due, Refused> {
        let there = self.list.iter().find(|(_, member)| member.address == address);
        if let Some((&number, _)) = there {
            if id == 0 || id == number {
                return Ok(Due::Nothing(number));
            }
            return Err(Refused::AlreadyExists(format!("{address} is member {number}")));
        }
        let next = self.last + 1;
        let id = if id == 0 { next } else { id };
        let no = |problem: String| Err(Refused::FailedPrecondition(problem));
        if let Some(member) = self.list.get(&id) {
            let text =
                format!("member {id} is at {}; the next free number is {next}", member.address);
            return Err(Refused::AlreadyExists(text));
        }
        if id < next {
            return no(format!(
                "number {id} was a member's that was removed: numbers never come back; the next is {next}"
            ));
        }
        if id > self.last + GAP_MAX {
            return no(format!("{id} is far above the next number, {next}"));
        }
        if self.list.len() >= MEMBERS_MAX {
            return no(format!("there are {MEMBERS_MAX} members, and more are not of use"));
        }
        if let Some((learner, _)) = self.list.iter().find(|(_, member)| !member.voter) {
            return no(format!(
                "member {learner} is still catching up, and one member is added at a time: wait until it votes, or remove it"
            ));
        }
        Ok(Due::Change(MemberChange::Add(id, address.to_owned())))
    }

    /// Whether a member may be removed now.
    ///
    /// # Errors
    /// It may not; says why.
    pub fn may_remove(&self, id: u64, standing: &Standing) -> Result<Due, Refused> {
        if !self.list.contains_key(&id) {
            return match id <= self.last {
                true => Ok(Due::Nothing(id)),
                false => Err(Refused::NotFound(format!("there is no member {id}"))),
            };
        }
        let mut left = standing.voters.clone();
        if left.remove(&id) {
            if left.is_empty() {
                let text = format!("member {id} is the only one that votes");
                return Err(Refused::FailedPrecondition(text));
            }
            if let Some(silent) = standing.missing(&left) {
                return Err(Refused::FailedPrecondition(format!(
                    "without member {id} a majority of {left:?} would be needed, and {silent:?} are not heard: nothing could be decided any more"
                )));
            }
        }
        Ok(Due::Change(MemberChange::Remove(id)))
    }

    /// Who has caught up and is to vote: with it, a majority must be heard too.
    #[must_use]
    pub fn promotion(
        &self,
        standing: &Standing,
        caught_up: impl Fn(u64) -> bool,
    ) -> Option<MemberChange> {
        let may = |&&id: &&u64| {
            let mut voters = standing.voters.clone();
            voters.insert(id);
            standing.heard.contains(&id) && caught_up(id) && standing.missing(&voters).is_none()
        };
        standing.learners.iter().find(may).map(|&id| MemberChange::Promote(id))
    }
}

impl State {
    /// Applies a change that Raft has made at `index` of the log.
    pub fn change_members(
        &mut self,
        index: u64,
        change: &MemberChange,
        founders: &BTreeMap<u64, String>,
        births: &BTreeMap<u64, u64>,
    ) {
        debug_assert!(index > self.cluster.version);
        self.cluster.version = index;
        let mut members = self.cluster.members.or_founded(founders);
        if members.version == 0 {
            for (id, member) in &mut members.list {
                member.birth = births.get(id).copied().unwrap_or(0);
            }
        }
        members.version = index;
        let text = match change {
            MemberChange::Add(id, address) => {
                members.last = members.last.max(*id);
                let (address, known) = (address.clone(), members.list.get(id));
                let member = Member { address, ..known.cloned().unwrap_or_default() };
                let text = format!(
                    "member {id} at {} is added; it votes when it has caught up",
                    member.address
                );
                members.list.insert(*id, member);
                text
            }
            MemberChange::Promote(id) => {
                if let Some(member) = members.list.get_mut(id) {
                    member.voter = true;
                }
                format!("member {id} has caught up and votes")
            }
            MemberChange::Remove(id) => {
                members.list.remove(id);
                format!("member {id} is removed")
            }
        };
        self.cluster.members = members.into();
        self.tell("coordinator", text);
    }

    /// A process at `address`, with a data directory of this birth, begins as the member that was added there.
    pub(super) fn begin_member(&mut self, address: &str, birth: u64) -> Result<Reply, Refused> {
        let members = &self.cluster.members;
        let found = members.list.iter().find(|(_, member)| member.address == address);
        let Some((&id, member)) = found else {
            return Err(Refused::NotFound(format!(
                "no member was added at {address}: psctl coordinator add {address}"
            )));
        };
        let lost = |what: &str| {
            Err(Refused::FailedPrecondition(format!(
                "member {id} at {address} {what}, and this data directory is new: it may have forgotten what it promised. Remove member {id} and add \
                 another in its place"
            )))
        };
        match member.birth {
            _ if member.founder => lost("was there when the group was founded"),
            0 => {
                let mut members = members.as_ref().clone();
                members.list.insert(id, Member { birth, ..member.clone() });
                self.cluster.members = members.into();
                Ok(Reply::Member { id, changed: true })
            }
            known if known == birth => Ok(Reply::Member { id, changed: false }),
            _ => lost("has begun before"),
        }
    }
}

/// See [`Members`].
#[derive(Clone, PartialEq, Message)]
pub(super) struct MembersRecord {
    #[prost(uint64, tag = "1")]
    version: u64,
    #[prost(message, repeated, tag = "2")]
    list: Vec<MemberRecord>,
    #[prost(uint64, tag = "3")]
    last: u64,
}

#[derive(Clone, PartialEq, Message)]
struct MemberRecord {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    address: String,
    #[prost(bool, tag = "3")]
    voter: bool,
    #[prost(bool, tag = "4")]
    founder: bool,
    #[prost(uint64, tag = "5")]
    birth: u64,
}

impl From<&Members> for MembersRecord {
    fn from(members: &Members) -> Self {
        let record = |(&id, member): (&u64, &Member)| {
            let Member { address, voter, founder, birth } = member.clone();
            MemberRecord { id, address, voter, founder, birth }
        };
        let list = members.list.iter().map(record).collect();
        MembersRecord { version: members.version, list, last: members.last }
    }
}

impl TryFrom<MembersRecord> for Members {
    type Error = Invalid;

    fn try_from(record: MembersRecord) -> Result<Self, Invalid> {
        let MembersRecord { version, list, last } = record;
        let member = |record: MemberRecord| {
            let MemberRecord { id, address, voter, founder, birth } = record;
            if id == 0 || id > last {
                return Err(Invalid::new(
                    "snapshot.members.id",
                    format!("{id} is not up to {last}"),
                ));
            }
            Ok((id, Member { address, voter, founder, birth }))
        };
        let list = list.into_iter().map(member).collect::<Result<_, _>>()?;
        Ok(Members { version, list, last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn founders() -> BTreeMap<u64, String> {
        (1..=3).map(|id| (id, format!("c{id}:1"))).collect()
    }

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    fn standing(voters: &[u64], learners: &[u64], heard: &[u64]) -> Standing {
        Standing { voters: set(voters), learners: set(learners), heard: set(heard) }
    }

    fn changed(changes: &[MemberChange]) -> State {
        let mut state = State::default();
        for (index, change) in (1..).zip(changes) {
            state.change_members(index, change, &founders(), &[(1, 40 + index)].into());
        }
        state
    }

    fn add(id: u64) -> MemberChange {
        MemberChange::Add(id, format!("c{id}:1"))
    }

    #[test]
    fn a_founded_group_is_known_before_any_change_and_kept_after_it() {
        let founded = Members::default().or_founded(&founders());
        assert_eq!((founded.version, founded.last, founded.list.len()), (0, 3, 3));
        assert!(!founded.was_removed(1) && !founded.was_removed(9));
        let state = changed(&[add(4), MemberChange::Promote(4), MemberChange::Remove(1)]);
        let members = &state.cluster().members;
        assert_eq!(members.list.keys().copied().collect::<Vec<_>>(), [2, 3, 4]);
        assert!(members.was_removed(1) && !members.was_removed(4) && !members.was_removed(5));
        assert!(members.list[&4].voter && !members.list[&4].founder && members.list[&2].founder);
        let state_then = changed(&[add(4), MemberChange::Promote(4)]);
        let births = |id| state_then.cluster().members.list[&id].birth;
        assert_eq!((births(1), births(2), births(4)), (41, 0, 0), "as at the first change");
        // What its options say does not count any more.
        assert_eq!(members.or_founded(&founders()), **members);
        assert_eq!(State::restore(&state.snapshot()).unwrap(), state);
        assert_eq!(state.cluster().events.len(), 3);
    }

    #[test]
    fn numbers_and_addresses_are_given_once_and_one_member_is_added_at_a_time() {
        let founded = Members::default().or_founded(&founders());
        assert_eq!(founded.may_add(0, "c4:1"), Ok(Due::Change(add(4))));
        assert_eq!(founded.may_add(9, "c9:1"), Ok(Due::Change(add(9))));
        assert_eq!(founded.may_add(0, "c2:1"), Ok(Due::Nothing(2)), "a repeat");
        assert!(matches!(founded.may_add(4, "c2:1"), Err(Refused::AlreadyExists(_))));
        assert!(matches!(founded.may_add(2, "c4:1"), Err(Refused::AlreadyExists(_))));
        assert!(founded.may_add(u64::MAX, "c4:1").is_err(), "uses up all numbers");

        let state = changed(&[add(4)]);
        assert!(state.cluster().members.may_add(5, "c5:1").is_err(), "4 is catching up");
        let state = changed(&[add(4), MemberChange::Remove(4)]);
        let members = &state.cluster().members;
        assert!(members.may_add(4, "c4:1").is_err(), "it was a member's");
        assert_eq!(
            members.may_add(0, "c4:1"),
            Ok(Due::Change(MemberChange::Add(5, "c4:1".into())))
        );

        let full = (4..=7).flat_map(|id| [add(id), MemberChange::Promote(id)]);
        let state = changed(&full.collect::<Vec<_>>());
        assert!(state.cluster().members.may_add(8, "c8:1").is_err());
    }

    #[test]
    fn a_removal_that_would_leave_no_majority_is_refused() {
        let members = Members::default().or_founded(&founders());
        let remove = |id, standing: &Standing| members.may_remove(id, standing);
        let all = standing(&[1, 2, 3], &[], &[1, 2, 3]);
        assert_eq!(remove(2, &all), Ok(Due::Change(MemberChange::Remove(2))));
        assert!(matches!(remove(4, &all), Err(Refused::NotFound(_))));
        let one_silent = standing(&[1, 2, 3], &[], &[1, 2]);
        assert_eq!(remove(3, &one_silent), Ok(Due::Change(MemberChange::Remove(3))));
        let Err(Refused::FailedPrecondition(why)) = remove(2, &one_silent) else { panic!() };
        assert!(why.contains("{1, 3}") && why.contains("[3] are not heard"), "{why}");
        let alone = standing(&[1], &[], &[1]);
        let one = Members::default().or_founded(&[(1, "c1:1".into())].into());
        assert!(one.may_remove(1, &alone).is_err());
        // Who does not vote may always go, and who is gone is gone.
        let state = changed(&[add(4), MemberChange::Remove(3)]);
        let members = &state.cluster().members;
        assert_eq!(
            members.may_remove(4, &standing(&[1, 2], &[4], &[1])),
            Ok(Due::Change(MemberChange::Remove(4)))
        );
        assert_eq!(members.may_remove(3, &all), Ok(Due::Nothing(3)));
    }

    #[test]
    fn a_learner_votes_when_it_has_caught_up_and_its_vote_cannot_be_missed() {
        let members = Members::default();
        let now = |heard: &[u64], caught_up| {
            members.promotion(&standing(&[1, 2, 3], &[4], heard), |_| caught_up)
        };
        assert_eq!(now(&[1, 2, 3, 4], true), Some(MemberChange::Promote(4)));
        assert_eq!(now(&[1, 2, 3, 4], false), None);
        assert_eq!(now(&[1, 2, 3], true), None, "it is silent");
        assert_eq!(now(&[1, 2, 4], true), Some(MemberChange::Promote(4)));
        assert_eq!(now(&[1, 4], true), None, "three of four would be needed");
    }

    #[test]
    fn a_member_begins_with_one_data_directory_and_never_with_another() {
        let mut state = changed(&[add(4)]);
        assert!(matches!(state.begin_member("elsewhere:1", 7), Err(Refused::NotFound(_))));
        assert!(state.begin_member("c1:1", 7).is_err(), "a founder has its own way back");
        let begun = |changed| Ok(Reply::Member { id: 4, changed });
        assert_eq!(state.begin_member("c4:1", 7), begun(true));
        assert_eq!(state.begin_member("c4:1", 7), begun(false), "a repeat");
        assert!(state.begin_member("c4:1", 8).is_err(), "it lost the first one");
        let version = state.cluster().version;
        state.change_members(version + 1, &MemberChange::Promote(4), &founders(), &[].into());
        assert_eq!(state.cluster().members.list[&4].birth, 7);
    }
}
