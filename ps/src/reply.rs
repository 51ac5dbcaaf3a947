//! What the state machine said, as the wire says it.

use downpour_proto::v1;
use downpour_proto::v1::pull_part_reply::Result as PullResult;
use downpour_proto::v1::push_part_reply::Result as PushResult;

use crate::shard::{Declined, Redirect, Ticket};

impl From<Redirect> for v1::Redirect {
    fn from(redirect: Redirect) -> Self {
        v1::Redirect { epoch: redirect.epoch.0, primary: redirect.primary.map(Into::into) }
    }
}

fn retry(reason: v1::RetryReason) -> v1::Retry {
    v1::Retry { reason: reason.into() }
}

pub(crate) fn push_declined(declined: Declined) -> PushResult {
    match declined {
        Declined::Redirect(redirect) => PushResult::Redirect(redirect.into()),
        Declined::Retry(reason) => PushResult::Retry(retry(reason)),
    }
}

pub(crate) fn pull_declined(declined: Declined) -> PullResult {
    match declined {
        Declined::Redirect(redirect) => PullResult::Redirect(redirect.into()),
        Declined::Retry(reason) => PullResult::Retry(retry(reason)),
    }
}

pub(crate) fn push_done(ticket: &Ticket) -> PushResult {
    PushResult::Done(v1::PushOutcome {
        lsn: ticket.lsn.0,
        repeated: ticket.repeated,
        refusal: ticket.refusal.map(Into::into),
        stale_clocks: ticket.staleness.map(|staleness| staleness.clocks),
    })
}

/// Label of the counter of parts.
pub(crate) fn outcome(result: &PushResult) -> &'static str {
    match result {
        PushResult::Done(v1::PushOutcome { refusal: Some(_), .. }) => "refused",
        PushResult::Done(v1::PushOutcome { repeated: true, .. }) => "repeated",
        PushResult::Done(_) => "applied",
        PushResult::Redirect(_) => "redirect",
        PushResult::Retry(_) => "retry",
        PushResult::Gap(_) => "gap",
        PushResult::SessionClosed(_) => "session_closed",
    }
}
