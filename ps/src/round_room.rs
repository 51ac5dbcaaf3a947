//! What this server keeps of contributions to rounds (docs/protocol.md 7.5), over all shards: one shard bounds its own.

use downpour_core::cells::{Refusal, RefusalReason};
use downpour_core::id::JobId;

use crate::life::Life;
use crate::record::{Change, Push, Update};
use crate::rounds::cost;

/// Whether a push finds room for what it contributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RoundRoom {
    /// It does, or contributes nothing.
    Enough,
    /// When rounds of jobs with lower numbers are over.
    Later,
    /// What its own job keeps here is of the round that it contributes to, and would be too much: that round does not end without it.
    Never(Refusal),
}

impl Life {
    /// Looks for room: what is kept is counted, and what pushes beside this one bring is not, so a little more may be kept.
    pub(crate) fn round_room(&self, job: JobId, push: &Push) -> RoundRoom {
        let contributes = |update: &&Update| matches!(update.change, Change::Contribution { .. });
        let mut contributions = push.updates.iter().filter(contributes);
        let Some(first) = contributions.next() else { return RoundRoom::Enough };
        let bytes = cost(&first.change) + contributions.map(|one| cost(&one.change)).sum::<usize>();
        let bytes_max = self.process.config.contribution_bytes_max;
        if self.contributed(None) + bytes <= bytes_max {
            return RoundRoom::Enough;
        }
        if self.contributed(Some(job)) + bytes > bytes_max {
            let reason = RefusalReason::RoundTooLarge;
            return RoundRoom::Never(Refusal { reason, variable: first.variable });
        }
        // Two jobs that each wait for the other's round would wait for ever.
        if self.contributes_before(job) { RoundRoom::Later } else { RoundRoom::Enough }
    }
}

#[cfg(test)]
mod tests {
    use downpour_core::id::SessionId;

    use super::*;
    use crate::hostile::serving_with;
    use crate::shard::tests::fixture::{COUNTS, basis, push_of, rows};
    use crate::shard::{Contact, Pushed};

    #[tokio::test]
    async fn a_round_that_a_server_cannot_keep_is_refused_at_once_and_another_jobs_is_waited_for() {
        let (life, _) = serving_with(|config| config.contribution_bytes_max = 700);
        let hosted = life.all().pop().expect("one shard");
        let contributes = |session| {
            let update = rows(COUNTS, 1, &[1, 2], 1.0);
            let change = Change::Contribution { round: 1, gradients: Box::new(update.change) };
            let update = Update { change, ..rows(COUNTS, 1, &[1, 2], 1.0) };
            push_of(SessionId(session), 1, vec![update])
        };
        let plain = push_of(SessionId(9), 1, vec![rows(COUNTS, 1, &[1, 2], 1.0)]);
        let (own, other) = (hosted.key.job, JobId(hosted.key.job.0 + 1));
        let mut taken = 0;
        for session in 1.. {
            if life.round_room(own, &contributes(session)) != RoundRoom::Enough {
                break;
            }
            let (push, epoch) = (contributes(session), hosted.shard.lock().epoch());
            let pushed = life.with(&hosted, |shard| {
                shard.push(basis(epoch, 1), push, Contact::Leased, u64::MAX)
            });
            assert!(matches!(pushed, Pushed::Logged(ticket) if ticket.refusal.is_none()));
            taken += 1;
        }
        assert!(taken > 1, "some find room");
        let refusal = Refusal { reason: RefusalReason::RoundTooLarge, variable: COUNTS };
        assert_eq!(life.round_room(own, &contributes(99)), RoundRoom::Never(refusal));
        assert_eq!(life.round_room(other, &contributes(99)), RoundRoom::Later);
        let before = JobId(own.0 - 1);
        assert_eq!(life.round_room(before, &contributes(99)), RoundRoom::Enough, "or both wait");
        assert_eq!(life.round_room(own, &plain), RoundRoom::Enough);
        // Consumed, so that no push after it is a gap.
        let push = Push { refusal: Some(refusal), ..contributes(99) };
        let epoch = hosted.shard.lock().epoch();
        let pushed = life
            .with(&hosted, |shard| shard.push(basis(epoch, 1), push, Contact::Leased, u64::MAX));
        assert!(matches!(pushed, Pushed::Logged(ticket) if ticket.refusal == Some(refusal)));
        life.with(&hosted, crate::shard::Shard::remove);
        assert_eq!(life.contributed(None), 0, "what is dropped is not counted for ever");
    }
}
