//! A member whose data directory is new: it may have lost an older one, and with it votes and acknowledgements that others count on.
//!
//! Such a member is silent in elections: it does not vote and does not campaign. It takes the leader's log like any follower (what it
//! acknowledges from now on it has). It is admitted when both hold:
//!
//! 1. **Every** other member has told its term and commit index ([`Told`]), and believes nothing from then on that came from the older
//!    directory.
//! 2. Either all of them told term 0: nobody has a history, so there was nothing to forget (the first start of a cluster). Or it follows a
//!    leader in a term at least as high as any that was told, and has the log up to a commit that is at least as high as any that was told and
//!    is an entry of that leader's own term.
//!
//! Why that is enough. It voted for nobody in a higher term than was told: each of its candidates has kept its own term. It is admitted with its
//! vote of the current term spent, so it does not vote twice. A leader was elected by promises that were kept, so it has whatever was
//! committed before its term; what was committed since, with the help of a lost acknowledgement, is below the commit that its leader told.
//!
//! When a majority of the group has lost its directories, nobody is admitted, for what was committed may be gone.

use std::collections::BTreeMap;

/// What another member told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Its term.
    pub term: u64,
    /// Up to where it knew the log to be committed.
    pub commit: u64,
}

/// How a member stands while it joins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Its own term.
    pub(super) term: u64,
    /// It follows a leader in this term.
    pub(super) follows: bool,
    /// Up to where it has the log and knows it to be committed.
    pub(super) commit: u64,
    /// Term of that entry.
    pub(super) commit_term: u64,
}

/// Who has been met.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Joining {
    others: BTreeMap<u64, Option<Told>>,
}

impl Joining {
    pub(super) fn new(others: impl IntoIterator<Item = u64>) -> Self {
        Joining { others: others.into_iter().map(|id| (id, None)).collect() }
    }

    /// The first word of each counts: it was asked when this directory was new to it.
    pub(super) fn met(&mut self, member: u64, told: Told) {
        if let Some(known) = self.others.get_mut(&member) {
            known.get_or_insert(told);
        }
    }

    /// See the module.
    pub(super) fn is_over(&self, standing: Standing) -> bool {
        let told: Option<Vec<Told>> = self.others.values().copied().collect();
        let Some(told) = told else { return false };
        let term = told.iter().map(|one| one.term).max().unwrap_or(0);
        let commit = told.iter().map(|one| one.commit).max().unwrap_or(0);
        let no_history = term == 0 && standing.term == 0;
        let caught_up = standing.follows
            && standing.term >= term
            && standing.commit >= commit
            && standing.commit_term == standing.term;
        no_history || caught_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAUGHT_UP: Standing = Standing { term: 5, follows: true, commit: 9, commit_term: 5 };

    fn met(told: [(u64, u64); 2]) -> Joining {
        let mut joining = Joining::new([2, 3]);
        for (member, (term, commit)) in (2..).zip(told) {
            joining.met(member, Told { term, commit });
        }
        joining
    }

    #[test]
    fn nothing_counts_before_every_other_member_has_been_met() {
        let mut joining = Joining::new([2, 3]);
        joining.met(2, Told::default());
        joining.met(7, Told::default());
        assert!(!joining.is_over(Standing::default()) && !joining.is_over(CAUGHT_UP));
        joining.met(3, Told::default());
        assert!(joining.is_over(Standing::default()));
    }

    #[test]
    fn a_group_with_a_history_is_caught_up_with_first() {
        let joining = met([(5, 9), (4, 7)]);
        assert!(joining.is_over(CAUGHT_UP));
        for short in [
            Standing::default(),
            Standing { follows: false, ..CAUGHT_UP },
            Standing { term: 4, commit_term: 4, ..CAUGHT_UP },
            Standing { commit: 8, ..CAUGHT_UP },
            Standing { commit_term: 4, ..CAUGHT_UP },
        ] {
            assert!(!joining.is_over(short), "{short:?}");
        }
    }

    #[test]
    fn a_later_word_does_not_replace_the_first() {
        let mut joining = met([(5, 9), (4, 7)]);
        joining.met(2, Told::default());
        joining.met(3, Told::default());
        assert!(!joining.is_over(Standing::default()));
    }
}
