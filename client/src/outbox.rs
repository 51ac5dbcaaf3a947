//! Exactly-once on the client's side, pure: which part of which push goes where next.
//!
//! Each shard has a queue of unacknowledged parts whose numbers are contiguous, and a cursor. The cursor goes back to the front whenever
//! something says that parts may not have arrived: a redirect, a refusal for the moment, a gap, a broken link, a new primary. Everything
//! behind it is then sent again, in order, and the shard's cells recognise what it has already. Each going back starts a new *generation*
//! of sends; what an answer to an older generation complains about was seen to already, so only its acknowledgements count. A generation
//! begins with one part alone, and the rest follows its acknowledgement: a server that is not ready is not sent everything each time.
//!
//! At most half of [`OUTCOME_WINDOW`] parts of a shard are on their way, so that the shard still remembers the outcome of each repeat.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use downpour_core::cells::{OUTCOME_WINDOW, Refusal};
use downpour_core::id::{Epoch, JobId, Lsn, ServerRef, SessionId, ShardId};
use downpour_proto::v1::{self, push_part_reply::Result as PartResult};

use crate::backoff::Backoff;
use crate::push::{PushOutcome, RolledBack};
use crate::state::Route;
use crate::{Error, Pulled};

const WINDOW: usize = OUTCOME_WINDOW as usize / 2;
const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(2), max: Duration::from_millis(100) };

/// One accepted push.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PushId(u64);

/// One stream to one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(u64);

/// What a push wants of one shard.
#[derive(Clone, Debug)]
pub(crate) struct OutPart {
    pub(crate) shard: ShardId,
    pub(crate) updates: Vec<v1::Update>,
    pub(crate) bytes: usize,
}

/// To be sent on `link`, in order; a link that is not there yet is to be opened to `server`.
#[derive(Debug)]
pub(crate) struct Send {
    pub(crate) link: LinkId,
    pub(crate) server: ServerRef,
    pub(crate) lane: u32,
    pub(crate) request: v1::PushRequest,
}

/// What a server said about who owns a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Redirected {
    pub(crate) shard: ShardId,
    pub(crate) epoch: Epoch,
    pub(crate) primary: Option<ServerRef>,
}

/// Why a shard's parts wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) shard: ShardId,
    pub(crate) cause: Cause,
    /// In a row.
    pub(crate) attempts: u32,
}

/// Kinds of [`Trouble`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    LinkDown,
    Redirect,
    Retry(v1::RetryReason),
    Gap,
}

/// All unacknowledged pushes of one session.
#[derive(Debug)]
pub(crate) struct Outbox {
    job: JobId,
    session: SessionId,
    /// Size that requests aim at.
    message_bytes: usize,
    shards: Vec<Queue>,
    pushes: BTreeMap<PushId, Pending>,
    /// By server and lane.
    links: BTreeMap<(ServerRef, u32), Link>,
    /// Streams to each server: a shard keeps to one of them, so its parts stay in order.
    lanes: u32,
    /// Shards that may have something to send, now or after their hold.
    ready: BTreeSet<ShardId>,
    completed: Vec<(PushId, Result<PushOutcome, Error>)>,
    rolled_back: Vec<RolledBack>,
    trouble: Option<Trouble>,
    next_push: u64,
    next_request: u64,
    next_link: u64,
    failed: Option<Error>,
}

#[derive(Debug)]
struct Queue {
    /// Epoch in which the shard was last set back to a checkpoint, as far as known: what the numbers here count from.
    numbering: Epoch,
    /// The same by the newest view, before the shard itself said so.
    set_back: Epoch,
    /// Highest number acknowledged with all before it; the front of `parts` is the next.
    acknowledged: u64,
    clocks: Clocks,
    parts: VecDeque<Part>,
    /// How many from the front were sent in this generation.
    sent: usize,
    generation: u64,
    /// Nothing of this generation was acknowledged yet.
    probing: bool,
    route: Route,
    hold_until: Option<Duration>,
    attempts: u32,
}

#[derive(Debug)]
struct Part {
    push: PushId,
    of: Of,
    updates: Vec<v1::Update>,
    bytes: usize,
    done: bool,
}

#[derive(Debug)]
struct Pending {
    clock: u64,
    view_version: u64,
    /// What its gradients were computed with.
    read: Option<Arc<Pulled>>,
    parts_left: usize,
    outcome: PushOutcome,
}

#[derive(Debug)]
struct Link {
    id: LinkId,
    /// Requests that wait for their reply, oldest first.
    waiting: VecDeque<(u64, Vec<Sent>)>,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    shard: ShardId,
    numbering: Epoch,
    sequence: u64,
    generation: u64,
}

/// What acknowledged pushes of a shard were of.
#[derive(Debug, Default)]
struct Clocks {
    /// Number of a push, and what it was of; those after it follow one by one until the next.
    runs: VecDeque<(u64, Of)>,
}

/// What a push was of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    /// The step at this clock.
    Clock(u64),
    /// Nothing: it asked what the shard lost.
    Nothing,
}

/// Runs that are remembered of a shard.
const RUNS_MAX: usize = 4096;

impl Clocks {
    fn note(&mut self, sequence: u64, of: Of) {
        if self.of(sequence) != Some(of) {
            self.runs.push_back((sequence, of));
        }
        if self.runs.len() > RUNS_MAX {
            self.runs.pop_front();
        }
    }

    fn of(&self, sequence: u64) -> Option<Of> {
        let after = self.runs.partition_point(|(first, _)| *first <= sequence);
        let (first, of) = self.runs.get(after.checked_sub(1)?)?;
        Some(match of {
            Of::Clock(clock) => Of::Clock(clock + (sequence - first)),
            Of::Nothing => Of::Nothing,
        })
    }

    /// Forgets those from `sequence` on.
    fn cut(&mut self, sequence: u64) {
        self.runs.truncate(self.runs.partition_point(|(first, _)| *first < sequence));
    }
}

impl Outbox {
    pub(crate) fn new(
        job: JobId,
        session: SessionId,
        message_bytes: usize,
        lanes: u32,
        routes: impl Iterator<Item = Route>,
    ) -> Self {
        let queue = |route| Queue {
            numbering: Epoch(0),
            set_back: Epoch(0),
            acknowledged: 0,
            clocks: Clocks::default(),
            parts: VecDeque::new(),
            sent: 0,
            generation: 0,
            probing: false,
            route,
            hold_until: None,
            attempts: 0,
        };
        Outbox {
            job,
            session,
            message_bytes,
            shards: routes.map(queue).collect(),
            pushes: BTreeMap::new(),
            links: BTreeMap::new(),
            lanes,
            ready: BTreeSet::new(),
            completed: Vec::new(),
            rolled_back: Vec::new(),
            trouble: None,
            next_push: 1,
            next_request: 1,
            next_link: 1,
            failed: None,
        }
    }

    /// Accepts a push that was computed with nothing that was pulled.
    pub(crate) fn push(&mut self, clock: u64, view_version: u64, parts: Vec<OutPart>) -> PushId {
        self.push_read(clock, view_version, None, parts)
    }

    /// Accepts a push: each part takes the next number of its shard.
    pub(crate) fn push_read(
        &mut self,
        clock: u64,
        view_version: u64,
        read: Option<Arc<Pulled>>,
        parts: Vec<OutPart>,
    ) -> PushId {
        let push = PushId(self.next_push);
        self.next_push += 1;
        let outcome = PushOutcome::default();
        if let Some(error) = &self.failed {
            self.completed.push((push, Err(error.clone())));
            return push;
        }
        if parts.is_empty() {
            self.completed.push((push, Ok(outcome)));
            return push;
        }
        let pending = Pending { clock, view_version, read, parts_left: parts.len(), outcome };
        self.pushes.insert(push, pending);
        for part in parts {
            let OutPart { shard, updates, bytes } = part;
            self.shards[shard.0 as usize].parts.push_back(Part {
                push,
                of: if updates.is_empty() { Of::Nothing } else { Of::Clock(clock) },
                updates,
                bytes,
                done: false,
            });
            self.ready.insert(shard);
        }
        push
    }

    /// What to send now. Parts of one push for one server travel together, up to about `message_bytes`.
    pub(crate) fn sends(&mut self, now: Duration) -> Vec<Send> {
        let mut chosen: Vec<(PushId, (ServerRef, u32), ShardId, u64)> = Vec::new();
        let lanes = self.lanes;
        let shards = &mut self.shards;
        self.ready.retain(|&shard| {
            let queue = &mut shards[shard.0 as usize];
            let Some(server) = queue.route.primary else { return false };
            if queue.hold_until.is_some_and(|until| now < until) {
                return true;
            }
            queue.hold_until = None;
            let end = queue.parts.len().min(if queue.probing { 1 } else { WINDOW });
            for index in queue.sent..end {
                let part = &queue.parts[index];
                if !part.done {
                    let to = (server, shard.0 % lanes);
                    chosen.push((part.push, to, shard, queue.acknowledged + 1 + index as u64));
                }
            }
            queue.sent = queue.sent.max(end);
            false
        });
        // Of one shard the pushes and the numbers rise together, so this keeps each shard's order.
        chosen.sort_unstable();
        let mut sends: Vec<Send> = Vec::new();
        let mut bytes = 0;
        let mut open: Option<(PushId, (ServerRef, u32))> = None;
        for (push, to, shard, sequence) in chosen {
            let queue = &self.shards[shard.0 as usize];
            let part = &queue.parts[(sequence - queue.acknowledged - 1) as usize];
            let (numbering, generation) = (queue.numbering, queue.generation);
            let sent = Sent { shard, numbering, sequence, generation };
            let read = self.pushes.get(&push).and_then(|pending| pending.read.as_ref());
            let wire = v1::PushPart {
                shard: shard.0,
                epoch: queue.route.epoch.0,
                sequence,
                updates: part.updates.clone(),
                numbering: numbering.0,
                read: read.and_then(|read| read.read(shard)),
            };
            let part_bytes = part.bytes;
            if open != Some((push, to)) || bytes + part_bytes > self.message_bytes {
                (open, bytes) = (Some((push, to)), 0);
                sends.push(self.begin(push, to));
            }
            bytes += part_bytes;
            let waiting = self.links.get_mut(&to).and_then(|link| link.waiting.back_mut());
            if let (Some(send), Some((_, parts))) = (sends.last_mut(), waiting) {
                send.request.parts.push(wire);
                parts.push(sent);
            }
        }
        sends
    }

    /// A request of `push` to a lane of a server without parts yet, entered as the newest on its link.
    fn begin(&mut self, push: PushId, to: (ServerRef, u32)) -> Send {
        let (server, lane) = to;
        let (next_request, next_link) = (&mut self.next_request, &mut self.next_link);
        let link = self.links.entry(to).or_insert_with(|| {
            *next_link += 1;
            Link { id: LinkId(*next_link - 1), waiting: VecDeque::new() }
        });
        let request = *next_request;
        *next_request += 1;
        link.waiting.push_back((request, Vec::new()));
        let pending = self.pushes.get(&push);
        let request = v1::PushRequest {
            request,
            job: self.job.0,
            session: self.session.0,
            incarnation: server.incarnation.0,
            view_version: pending.map_or(0, |pending| pending.view_version),
            clock: pending.map_or(0, |pending| pending.clock),
            parts: Vec::new(),
        };
        Send { link: link.id, server, lane, request }
    }

    /// When [`Outbox::sends`] has something again, if nothing else happens before.
    pub(crate) fn wake(&self) -> Option<Duration> {
        let holds = self.ready.iter().filter_map(|shard| self.shards[shard.0 as usize].hold_until);
        holds.min()
    }

    /// An answer that came on `link`. Returns what it says about who owns shards.
    ///
    /// # Errors
    /// The answer is not one to what was asked: the link cannot be trusted any more.
    pub(crate) fn reply(
        &mut self,
        link: LinkId,
        reply: v1::PushReply,
        now: Duration,
    ) -> Result<Vec<Redirected>, &'static str> {
        let Some(known) = self.links.values_mut().find(|known| known.id == link) else {
            return Ok(Vec::new());
        };
        // Checked as a whole before anything of it counts: what is wrong goes back to the front with its link.
        let (request, sent) = known.waiting.front().ok_or("a reply to nothing")?;
        if *request != reply.request || sent.len() != reply.parts.len() {
            return Err("a reply to another request");
        }
        let answers = sent.iter().zip(reply.parts).map(|(sent, part)| {
            if (sent.shard.0, sent.sequence) != (part.shard, part.sequence) {
                return Err("a reply to other parts");
            }
            Ok((*sent, Answer::read(part.result.ok_or("a part without a result")?)?))
        });
        let answers = answers.collect::<Result<Vec<_>, _>>()?;
        known.waiting.pop_front();
        let mut redirects = Vec::new();
        for (sent, answer) in answers {
            match answer {
                Answer::Done(done) => self.done(sent, done),
                Answer::Redirect(epoch, primary) => {
                    redirects.push(Redirected { shard: sent.shard, epoch, primary });
                    self.go_back(sent, Cause::Redirect, now);
                }
                Answer::Retry(reason) => self.go_back(sent, Cause::Retry(reason), now),
                Answer::Gap(expected, numbering) => {
                    self.gap(sent, expected, numbering, now);
                }
                Answer::SessionClosed => self.fail(Error::SessionClosed(self.session)),
            }
        }
        Ok(redirects)
    }

    /// A link broke: what was sent on it may or may not have arrived.
    pub(crate) fn link_down(&mut self, link: LinkId, now: Duration) {
        let known = self.links.iter().find(|(_, known)| known.id == link);
        let Some((&to, known)) = known else { return };
        let sent: Vec<Sent> =
            known.waiting.iter().flat_map(|(_, sent)| sent.iter().copied()).collect();
        self.links.remove(&to);
        for sent in sent {
            self.go_back(sent, Cause::LinkDown, now);
        }
    }

    /// Takes over where shards are; a shard that moved is sent again from its front.
    pub(crate) fn reroute(&mut self, route: impl Fn(ShardId) -> Route) {
        for (shard, queue) in (0..).map(ShardId).zip(&mut self.shards) {
            let new = route(shard);
            if new == queue.route {
                continue;
            }
            queue.route = new;
            queue.restart();
            (queue.hold_until, queue.attempts) = (None, 0);
            self.ready.insert(shard);
        }
    }

    /// Takes over which shards were set back to a checkpoint, and in which epoch.
    pub(crate) fn set_back(&mut self, set_back_in: impl Fn(ShardId) -> Option<Epoch>) {
        for shard in (0..self.shards.len() as u32).map(ShardId) {
            if let Some(epoch) = set_back_in(shard) {
                self.shards[shard.0 as usize].set_back = epoch;
                self.ask(shard);
            }
        }
    }

    /// A shard that was set back and has nothing more to be sent is asked what it lost, by a push of nothing.
    fn ask(&mut self, shard: ShardId) {
        let queue = &self.shards[shard.0 as usize];
        if queue.set_back > queue.numbering && queue.acknowledged > 0 && queue.parts.is_empty() {
            self.push(0, 0, vec![OutPart { shard, updates: Vec::new(), bytes: 0 }]);
        }
    }

    /// Ends everything: no push is sent any more, and those without an outcome are unknown.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.failed.is_some() {
            return;
        }
        let unknown = Error::Unknown { reason: error.to_string() };
        let open = std::mem::take(&mut self.pushes).into_keys();
        self.completed.extend(open.map(|push| (push, Err(unknown.clone()))));
        self.shards.iter_mut().for_each(|queue| queue.parts.clear());
        self.ready.clear();
        self.links.clear();
        self.failed = Some(error);
    }

    /// Why everything ended.
    pub(crate) fn failed(&self) -> Option<&Error> {
        self.failed.as_ref()
    }

    /// Pushes that have their outcome since the last call.
    pub(crate) fn take_completed(&mut self) -> Vec<(PushId, Result<PushOutcome, Error>)> {
        std::mem::take(&mut self.completed)
    }

    /// What shards lost since the last call.
    pub(crate) fn take_rolled_back(&mut self) -> Vec<RolledBack> {
        std::mem::take(&mut self.rolled_back)
    }

    /// What made a shard wait since the last call, if anything; the newest.
    pub(crate) fn take_trouble(&mut self) -> Option<Trouble> {
        self.trouble.take()
    }

    /// The newest push that was accepted.
    pub(crate) fn newest(&self) -> PushId {
        PushId(self.next_push - 1)
    }

    /// Whether `push` and all before it have their outcome.
    pub(crate) fn settled(&self, push: PushId) -> bool {
        self.pushes.first_key_value().is_none_or(|(oldest, _)| *oldest > push)
    }

    fn done(&mut self, sent: Sent, Done { lsn, refusal, stale_clocks }: Done) {
        let queue = &mut self.shards[sent.shard.0 as usize];
        if sent.numbering != queue.numbering {
            // What the number meant is rolled back, or sent again under another.
            return;
        }
        queue.attempts = 0;
        if sent.generation == queue.generation {
            queue.probing = false;
            self.ready.insert(sent.shard);
        }
        // An older number is a repeat of what was acknowledged over another link.
        let Some(index) = sent.sequence.checked_sub(queue.acknowledged + 1) else { return };
        let Some(part) = queue.parts.get_mut(index as usize).filter(|part| !part.done) else {
            return;
        };
        part.done = true;
        part.updates = Vec::new();
        let push = part.push;
        while queue.parts.front().is_some_and(|part| part.done)
            && let Some(part) = queue.parts.pop_front()
        {
            queue.acknowledged += 1;
            queue.clocks.note(queue.acknowledged, part.of);
            queue.sent = queue.sent.saturating_sub(1);
        }
        self.ready.insert(sent.shard);
        self.ask(sent.shard);
        let Some(pending) = self.pushes.get_mut(&push) else { return };
        pending.outcome.lsns.insert(sent.shard, lsn);
        pending.outcome.refusals.extend(refusal.map(|refusal| (sent.shard, refusal)));
        pending.outcome.stale_clocks = pending.outcome.stale_clocks.max(stale_clocks);
        pending.parts_left -= 1;
        if pending.parts_left == 0
            && let Some(pending) = self.pushes.remove(&push)
        {
            self.completed.push((push, Ok(pending.outcome)));
        }
    }

    fn gap(&mut self, sent: Sent, expected: u64, numbering: Epoch, now: Duration) {
        let queue = &mut self.shards[sent.shard.0 as usize];
        if numbering > queue.numbering {
            if expected == 0 || expected > queue.acknowledged + 1 + queue.parts.len() as u64 {
                let from = format!("the server of shard {}", sent.shard);
                let problem = format!("misses push {expected}, which was never sent");
                return self.fail(Error::Protocol { from, problem });
            }
            let lost = queue.set_back(sent.shard, expected, numbering);
            self.rolled_back.extend(lost);
            self.ready.insert(sent.shard);
        } else if sent.generation == queue.generation && expected <= queue.acknowledged {
            let acknowledged = queue.acknowledged;
            self.fail(Error::RolledBack { shard: sent.shard, expected, acknowledged });
        } else {
            self.go_back(sent, Cause::Gap, now);
        }
    }

    /// The front of the shard is sent again after a while, if this send is of the newest generation.
    fn go_back(&mut self, sent: Sent, cause: Cause, now: Duration) {
        let queue = &mut self.shards[sent.shard.0 as usize];
        if sent.generation != queue.generation || queue.parts.is_empty() {
            return;
        }
        let seed = self.session.0 ^ u64::from(sent.shard.0) << 40;
        queue.hold_until = Some(now + BACKOFF.wait(seed, queue.attempts));
        queue.attempts += 1;
        queue.restart();
        self.ready.insert(sent.shard);
        self.trouble = Some(Trouble { shard: sent.shard, cause, attempts: queue.attempts });
    }
}

/// A [`PartResult`] that was checked.
enum Answer {
    Done(Done),
    Redirect(Epoch, Option<ServerRef>),
    Retry(v1::RetryReason),
    Gap(u64, Epoch),
    SessionClosed,
}

/// What became of a part.
struct Done {
    lsn: Lsn,
    refusal: Option<Refusal>,
    stale_clocks: Option<u64>,
}

impl Answer {
    fn read(result: PartResult) -> Result<Self, &'static str> {
        Ok(match result {
            PartResult::Done(outcome) => {
                let refusal = outcome.refusal.map(Refusal::try_from).transpose();
                let refusal = refusal.map_err(|_| "a refusal without a reason")?;
                let v1::PushOutcome { lsn, stale_clocks, .. } = outcome;
                Answer::Done(Done { lsn: Lsn(lsn), refusal, stale_clocks })
            }
            PartResult::Redirect(redirect) => {
                let primary = redirect.primary.map(ServerRef::try_from).transpose();
                let primary = primary.map_err(|_| "a redirect to no server")?;
                Answer::Redirect(Epoch(redirect.epoch), primary)
            }
            PartResult::Retry(retry) => Answer::Retry(retry.reason()),
            PartResult::Gap(gap) => Answer::Gap(gap.expected, Epoch(gap.numbering)),
            PartResult::SessionClosed(_) => Answer::SessionClosed,
        })
    }
}

impl Queue {
    /// The shard goes on from a checkpoint, after number `expected - 1`. What was acknowledged since is lost and returned; what was not is sent (again),
    /// numbered on from there.
    fn set_back(&mut self, shard: ShardId, expected: u64, epoch: Epoch) -> Vec<RolledBack> {
        let mut lost: Vec<RolledBack> = Vec::new();
        let mut lose = |sequence: u64, of: Option<Of>| {
            let clock = match of {
                Some(Of::Nothing) => return,
                Some(Of::Clock(clock)) => Some(clock),
                None => None,
            };
            match lost.last_mut() {
                Some(last) if last.last + 1 == sequence => {
                    last.last = sequence;
                    last.clocks = last.clocks.zip(clock).map(|((first, _), clock)| (first, clock));
                }
                _ => {
                    let clocks = clock.map(|clock| (clock, clock));
                    lost.push(RolledBack { shard, epoch, first: sequence, last: sequence, clocks });
                }
            }
        };
        for sequence in expected..=self.acknowledged {
            lose(sequence, self.clocks.of(sequence));
        }
        let mut sequence = self.acknowledged;
        self.parts.retain(|part| {
            sequence += 1;
            let gone = part.done && sequence >= expected;
            if gone {
                lose(sequence, Some(part.of));
            }
            !gone
        });
        self.acknowledged = self.acknowledged.min(expected - 1);
        self.clocks.cut(expected);
        self.numbering = epoch;
        self.restart();
        (self.hold_until, self.attempts) = (None, 0);
        lost
    }

    fn restart(&mut self) {
        self.generation += 1;
        self.sent = 0;
        self.probing = true;
    }
}

#[cfg(test)]
mod tests;
