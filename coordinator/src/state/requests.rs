//! Requests that are remembered, so that a repeat is the same call.

use std::collections::{BTreeMap, VecDeque};

use downpour_core::id::{ServerRef, SessionId};

/// How many are remembered: a repeat comes within seconds of the first.
const REMEMBERED_MAX: usize = 4096;

/// What a request was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remembered {
    /// RegisterServer.
    Server(ServerRef),
    /// OpenSession.
    Session(SessionId),
}

/// The newest requests by what they asked and their id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Requests {
    answers: BTreeMap<String, Remembered>,
    order: VecDeque<String>,
}

impl Requests {
    pub(super) fn find(&self, request: &str) -> Option<&Remembered> {
        self.answers.get(request)
    }

    pub(super) fn remember(&mut self, request: String, answer: Remembered) {
        if self.order.len() == REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.answers.remove(&oldest);
        }
        self.order.push_back(request.clone());
        self.answers.insert(request, answer);
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// Oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, Remembered)> {
        self.order.iter().map(|request| (request, self.answers[request]))
    }
}
