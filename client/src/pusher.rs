//! The task that owns the [`Outbox`] and its streams: it performs what the outbox decides.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use downpour_core::id::ServerRef;
use downpour_proto::v1;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tonic::Status;

use crate::outbox::{Cause, LinkId, OutPart, Outbox, PushId, Send, Trouble};
use crate::push::{PushOutcome, RolledBack};
use crate::servers::Servers;
use crate::state::JobState;
use crate::watch::Watched;
use crate::{Error, Pulled};

/// Failed attempts in a row after which the routing looks old.
const ATTEMPTS_UNTIL_NUDGE: u32 = 4;
/// Inputs taken before the outbox is asked what to send.
const BATCH_MAX: usize = 64;
/// Stretches of pushes that were rolled back that a session remembers.
const ROLLED_BACK_MAX: usize = 10_000;

/// What others ask of the pusher.
pub(crate) enum Input {
    Push(Accepted),
    /// Answered when every push accepted so far has its outcome.
    Flush(oneshot::Sender<Result<(), Error>>),
}

/// A push, or what one holds for some of its shards, encoded.
pub(crate) struct Accepted {
    pub(crate) clock: u64,
    pub(crate) view_version: u64,
    pub(crate) read: Option<Arc<Pulled>>,
    pub(crate) parts: Vec<OutPart>,
    pub(crate) outcome: oneshot::Sender<Result<PushOutcome, Error>>,
    /// The caller's share of the bytes in flight, given back with the last outcome.
    pub(crate) share: Arc<OwnedSemaphorePermit>,
}

/// Who waits for an outcome, and the share that is held until then.
type Waiting = (oneshot::Sender<Result<PushOutcome, Error>>, Arc<OwnedSemaphorePermit>);

/// What links report.
struct LinkEvent {
    server: ServerRef,
    link: LinkId,
    what: Result<v1::PushReply, Status>,
}

struct OpenLink {
    server: ServerRef,
    requests: mpsc::UnboundedSender<v1::PushRequest>,
    task: AbortHandle,
}

pub(crate) struct Pusher {
    outbox: Outbox,
    watched: Watched,
    changes: watch::Receiver<Arc<JobState>>,
    /// Set by whoever finds that the session is over.
    ended: watch::Sender<Option<Error>>,
    /// What made pushes wait last, for the messages of tickets that give up.
    trouble: Arc<Mutex<String>>,
    rolled_back: Arc<Mutex<Vec<RolledBack>>>,
    servers: Servers,
    started: Instant,
    waiting: BTreeMap<PushId, Waiting>,
    flushes: Vec<(PushId, oneshot::Sender<Result<(), Error>>)>,
    links: BTreeMap<LinkId, OpenLink>,
    /// Unbounded: what is in flight is bounded by the shares of the pushes.
    events: mpsc::UnboundedSender<LinkEvent>,
    tasks: JoinSet<()>,
}

impl Pusher {
    /// Starts the task on `tasks`; pushes go to the returned channel.
    pub(crate) fn start(
        outbox: Outbox,
        watched: Watched,
        servers: Servers,
        ended: watch::Sender<Option<Error>>,
        trouble: Arc<Mutex<String>>,
        rolled_back: Arc<Mutex<Vec<RolledBack>>>,
        tasks: &mut JoinSet<()>,
    ) -> mpsc::Sender<Input> {
        let (inputs, input_queue) = mpsc::channel(BATCH_MAX);
        let (events, event_queue) = mpsc::unbounded_channel();
        let pusher = Pusher {
            outbox,
            changes: watched.subscribe(),
            watched,
            ended,
            trouble,
            rolled_back,
            servers,
            started: Instant::now(),
            waiting: BTreeMap::new(),
            flushes: Vec::new(),
            links: BTreeMap::new(),
            events,
            tasks: JoinSet::new(),
        };
        tasks.spawn(pusher.run(input_queue, event_queue));
        inputs
    }

    async fn run(
        mut self,
        mut inputs: mpsc::Receiver<Input>,
        mut events: mpsc::UnboundedReceiver<LinkEvent>,
    ) {
        let mut ended = self.ended.subscribe();
        self.changes.mark_changed();
        let (mut input_batch, mut event_batch) = (Vec::new(), Vec::new());
        loop {
            let wake = self.outbox.wake().map(|wake| self.started + wake);
            tokio::select! {
                count = inputs.recv_many(&mut input_batch, BATCH_MAX) => {
                    if count == 0 {
                        return;
                    }
                }
                _ = events.recv_many(&mut event_batch, BATCH_MAX) => {}
                Ok(()) = self.changes.changed() => self.reroute(),
                Ok(end) = ended.wait_for(Option::is_some) => {
                    let end = end.clone();
                    end.into_iter().for_each(|error| self.outbox.fail(error));
                }
                () = sleep_until(wake) => {}
            }
            input_batch.drain(..).for_each(|input| self.input(input));
            event_batch.drain(..).for_each(|event| self.event(event));
            self.send();
            self.report();
            if let Some(error) = self.outbox.failed() {
                self.ended.send_if_modified(|ended| {
                    let first = ended.is_none();
                    ended.get_or_insert_with(|| error.clone());
                    first
                });
                break;
            }
        }
        self.tasks.abort_all();
        inputs.close();
        while let Some(input) = inputs.recv().await {
            self.input(input);
            self.report();
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Push(push) => {
                let Accepted { clock, view_version, read, parts, .. } = push;
                let id = self.outbox.push_read(clock, view_version, read, parts);
                self.waiting.insert(id, (push.outcome, push.share));
            }
            Input::Flush(done) => self.flushes.push((self.outbox.newest(), done)),
        }
    }

    fn event(&mut self, event: LinkEvent) {
        let LinkEvent { server, link, what } = event;
        let now = self.now();
        let status = match what {
            Ok(reply) => match self.outbox.reply(link, reply, now) {
                Ok(redirects) if redirects.is_empty() => return,
                Ok(redirects) => {
                    self.watched.update(|state| {
                        redirects.iter().fold(false, |news, &redirect| {
                            let crate::outbox::Redirected { shard, epoch, primary } = redirect;
                            state.redirected(shard, epoch, primary) || news
                        })
                    });
                    return;
                }
                Err(problem) => Status::internal(problem),
            },
            Err(status) => status,
        };
        if let Some(error) = refused(&status) {
            self.outbox.fail(error);
            return;
        }
        tracing::debug!(%server, code = ?status.code(), message = status.message(), "push stream ended");
        self.outbox.link_down(link, now);
        if let Some(open) = self.links.remove(&link) {
            open.task.abort();
        }
    }

    fn reroute(&mut self) {
        let state = self.changes.borrow_and_update().clone();
        self.outbox.reroute(|shard| state.route(shard));
        self.outbox.set_back(|shard| state.view.orders.set_back_in(shard));
        let now = self.now();
        let outbox = &mut self.outbox;
        // A server that was replaced will not answer any more.
        self.links.retain(|&link, open| {
            let current = state.address(open.server).is_some();
            if !current {
                outbox.link_down(link, now);
                open.task.abort();
            }
            current
        });
    }

    fn send(&mut self) {
        for send in self.outbox.sends(self.now()) {
            let open = match self.links.get(&send.link) {
                Some(open) => open,
                None => {
                    let open = self.open(&send);
                    self.links.entry(send.link).or_insert(open)
                }
            };
            // A link that has ended says so in an event of its own.
            let _ = open.requests.send(send.request);
        }
    }

    fn open(&mut self, send: &Send) -> OpenLink {
        let Send { server, lane, link, .. } = *send;
        let (requests, queue) = mpsc::unbounded_channel();
        let connected = self.servers.get(&self.changes.borrow(), server);
        let events = self.events.clone();
        let task = self.tasks.spawn(async move {
            // Whoever listens no more needs no report.
            let report = |what| _ = events.send(LinkEvent { server, link, what });
            let status = match connected {
                Some(connected) => connected.push(lane, queue, |reply| report(Ok(reply))).await,
                None => Status::unavailable("the server's address is not known"),
            };
            report(Err(status));
        });
        OpenLink { server, requests, task }
    }

    /// Hands out what the outbox has finished.
    fn report(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        for (push, outcome) in self.outbox.take_completed() {
            if let Some((ticket, _share)) = self.waiting.remove(&push) {
                let _ = ticket.send(outcome);
            }
        }
        for (push, done) in std::mem::take(&mut self.flushes) {
            if let Some(error) = self.outbox.failed() {
                let _ = done.send(Err(error.clone()));
            } else if self.outbox.settled(push) {
                let _ = done.send(Ok(()));
            } else if !done.is_closed() {
                self.flushes.push((push, done));
            }
        }
        for lost in self.outbox.take_rolled_back() {
            tracing::warn!("{lost}");
            let mut all = self.rolled_back.lock();
            if all.len() < ROLLED_BACK_MAX {
                all.push(lost);
            }
        }
        if let Some(trouble) = self.outbox.take_trouble() {
            if trouble.attempts >= ATTEMPTS_UNTIL_NUDGE {
                self.watched.nudge();
            }
            *self.trouble.lock() = describe(trouble, &self.changes.borrow());
        }
    }
}

/// The same request would be refused again: the client and the server disagree about the contract.
fn refused(status: &Status) -> Option<Error> {
    use tonic::Code;
    matches!(status.code(), Code::InvalidArgument | Code::OutOfRange)
        .then(|| Error::permanent("push", status))
        .flatten()
}

fn describe(trouble: Trouble, state: &JobState) -> String {
    let Trouble { shard, cause, attempts } = trouble;
    let cause = match cause {
        Cause::LinkDown => "the connection broke",
        Cause::Redirect => "the server is not its primary",
        Cause::Gap => "the server misses an earlier push",
        Cause::Retry(v1::RetryReason::Overloaded) => "the server is overloaded",
        Cause::Retry(v1::RetryReason::TooFewInSync) => "too few replicas are in sync",
        Cause::Retry(v1::RetryReason::NoLease) => "the primary is alone and has no lease",
        Cause::Retry(v1::RetryReason::Lost) => "every replica is gone",
        Cause::Retry(_) => "the server is not ready",
    };
    let route = state.route(shard);
    let primary = route.primary.and_then(|server| state.address(server));
    let primary = primary.unwrap_or("nowhere");
    format!("shard {shard} at {primary}, epoch {}: {cause} ({attempts} in a row)", route.epoch)
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake).await,
        None => std::future::pending().await,
    }
}
