//! A worker among the others of its job: it tells its clock to the job's shard 0, waits there until it may begin a step, and brings the ends of rounds to all
//! shards (docs/protocol.md 7).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use downpour_core::consistency::{Consistency, Mode};
use downpour_core::id::{Epoch, ServerRef, ShardId, VariableId};
use downpour_core::view::JobView;
use downpour_proto::v1::advance_reply::Result as AdvanceResult;
use downpour_proto::v1::clock_client::ClockClient;
use downpour_proto::v1::round_part_reply::Result as RoundResult;
use downpour_proto::{convert, transport, v1};
use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;
use tonic::transport::Channel;

use crate::backoff::Backoff;
use crate::state::JobState;
use crate::watch::Watched;
use crate::{Error, Session};

/// Where a job's clocks are.
const CLOCK_SHARD: ShardId = ShardId(0);
/// A wait for others is asked for again after this.
const WAIT_MS: u32 = 5_000;
/// For one attempt beyond what it waits: a server that hangs is asked again, and perhaps another one.
const ATTEMPT: Duration = Duration::from_secs(5);
const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(2), max: Duration::from_millis(200) };
/// Failed attempts in a row after which the routing looks old.
const ATTEMPTS_UNTIL_NUDGE: u32 = 4;

/// A worker's clock. Make one for each loop that trains, one loop after the other, and [leave](Clock::leave) when no step begins any more, or before waiting for what others must do first
/// (the last tasks of a pass, say): they would wait for this worker. One that is only dropped is waited for until its session ends.
pub struct Clock {
    session: Session,
    servers: HashMap<ServerRef, ClockClient<Channel>>,
    /// What shard 0 has or is to be told. None: nothing of the job has clocks, as far as this worker has come.
    seat: Option<Seat>,
    /// The last round whose end was brought to all shards.
    brought: u64,
    waited: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seat {
    /// Which of the session's seats, from 1.
    number: u64,
    clock: u64,
    /// The round that the last step contributed to, until its fate is known.
    contributed: Option<u64>,
    /// Some shard had closed that round before: it is told as if nothing was contributed.
    late: bool,
    /// It is being given back, as far as is known.
    leaves: bool,
}

impl Seat {
    /// That of a step that is to begin. What was perhaps given back is not had any more: shard 0 heeds nothing of that number.
    fn taken(before: Option<Seat>, seats: &AtomicU64) -> Seat {
        match before {
            Some(seat) if !seat.leaves => seat,
            given_back => {
                let number = seats.fetch_add(1, Ordering::Relaxed) + 1;
                Seat { number, leaves: false, ..given_back.unwrap_or_default() }
            }
        }
    }
}

/// A step that may begin.
#[derive(Clone, Debug, Default)]
pub struct Begun {
    /// The job's clock of this worker; none where nothing has clocks.
    pub clock: Option<u64>,
    /// How many steps it is ahead of the slowest.
    pub ahead: u64,
    /// The modes of this step.
    pub consistency: Consistency,
    /// Whether the contributions of the last step were counted; none where it made none.
    pub counted: Option<bool>,
}

impl Begun {
    /// The round that this step contributes to with the gradients of some variables; none where it does with none.
    #[must_use]
    pub fn round(&self, view: &JobView) -> Option<StepRound> {
        let number = self.clock? + 1;
        let sync = |mode| matches!(mode, Mode::Sync { .. });
        let contributing = view.variables.iter().filter(|one| sync(self.consistency.of(one)));
        let variables: BTreeSet<_> = contributing.map(|variable| variable.id).collect();
        self.consistency
            .backup_workers()
            .map(|_| StepRound { number, variables: Arc::new(variables) })
    }
}

/// Which gradients of a push are kept until their round is over, to be applied together with those of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepRound {
    /// From 1.
    pub number: u64,
    /// Of these.
    pub variables: Arc<BTreeSet<VariableId>>,
}

impl StepRound {
    /// Makes contributions of the gradients that are some.
    pub(crate) fn mark(&self, updates: &mut [v1::Update]) {
        use v1::contribution::Body as Part;
        use v1::update::Body;
        for update in updates {
            if !self.variables.contains(&VariableId(update.variable)) {
                continue;
            }
            let body = match update.body.take() {
                Some(Body::Rows(rows)) => Part::Rows(rows),
                Some(Body::Gradients(blocks)) => Part::Gradients(blocks),
                other => {
                    update.body = other;
                    continue;
                }
            };
            let contribution = v1::Contribution { round: self.number, body: Some(body) };
            update.body = Some(Body::Contribution(contribution));
        }
    }
}

/// Why one attempt brought nothing.
enum Failed {
    /// It is known where to ask now.
    Moved,
    Later(String),
    Over(Error),
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        match Error::permanent("tell the clock", &status) {
            Some(error) => Failed::Over(error),
            None => Failed::Later(status.message().to_owned()),
        }
    }
}

impl Clock {
    /// Of a session that is about to train.
    #[must_use]
    pub fn new(session: &Session) -> Self {
        Clock {
            session: session.clone(),
            servers: HashMap::new(),
            seat: None,
            brought: 0,
            waited: Duration::ZERO,
        }
    }

    /// Nothing has clocks: [`Clock::begin`] returns at once and asks nobody.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.seat.is_none() && !self.session.state().view.consistency.has_clocks()
    }

    /// A step is over, all of its pushes acknowledged; it had contributed to this round. `late`: a shard [dropped](crate::PushOutcome::late) what it got, so none may count,
    /// also where shard 0 was set back and the round is open there again.
    pub fn finished(&mut self, round: Option<u64>, late: bool) {
        if let Some(seat) = &mut self.seat {
            seat.clock += 1;
            if round == Some(seat.clock) {
                (seat.contributed, seat.late) = (round, late);
            }
        }
    }

    /// Whether the fate of the last step's contributions is not known yet: [`Clock::begin`] tells it.
    #[must_use]
    pub fn awaits_round(&self) -> bool {
        self.seat.is_some_and(|seat| seat.contributed.is_some())
    }

    /// How long steps had to wait for others.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Waits until the next step may begin. May be dropped, and called again.
    ///
    /// # Errors
    /// The session ended, or nobody answers for as long as its deadline.
    pub async fn begin(&mut self) -> Result<Begun, Error> {
        if self.is_idle() {
            return Ok(Begun::default());
        }
        let begun = Instant::now();
        // Also if this is dropped before the answer: the servers may have heard of it, so it has to leave.
        let seat = Seat::taken(self.seat, self.session.seats());
        self.seat = Some(seat);
        let mut patience = Patience::new(&self.session, "bring the end of a round");
        let seated = loop {
            let seated = self.told().await?;
            if !seated.may_begin {
                patience = Patience::new(&self.session, "bring the end of a round");
                continue;
            }
            let number = seated.last_round.as_ref().map_or(0, |round| round.number);
            if number <= self.brought {
                break seated;
            }
            // Where shards do not hear of it from shard 0, that one is asked again: it may have been set back to before this round.
            if self.bring(number, &mut patience).await? {
                self.brought = number;
                break seated;
            }
        };
        self.waited += begun.elapsed();
        let counted = seat.contributed.map(|round| seated.counted == round && !seat.late);
        self.seat = Some(Seat { clock: seated.clock, contributed: None, late: false, ..seat });
        if seated.may_leave && counted.is_none() {
            self.leave().await?;
            return Ok(Begun::default());
        }
        Ok(Begun {
            clock: Some(seated.clock),
            ahead: seated.clock.saturating_sub(seated.floor),
            consistency: seated.consistency.unwrap_or_default().try_into()?,
            counted,
        })
    }

    /// No step begins any more: nobody waits for this worker.
    ///
    /// # Errors
    /// As [`Clock::begin`].
    pub async fn leave(&mut self) -> Result<(), Error> {
        if let Some(seat) = &mut self.seat {
            // Also if this is dropped before the answer.
            seat.leaves = true;
            self.told().await?;
            self.seat = None;
        }
        Ok(())
    }

    /// Tells shard 0, and waits there for a while.
    async fn told(&mut self) -> Result<v1::Seated, Error> {
        let Seat { number, clock, contributed, late, leaves } = self.seat.unwrap_or_default();
        let mut patience = Patience::new(&self.session, "tell the clock");
        loop {
            let state = self.session.state();
            let asked = match self.server(&state, CLOCK_SHARD) {
                Ok((server, epoch, mut client)) => {
                    let request = v1::AdvanceRequest {
                        job: self.session.job().0,
                        incarnation: server.incarnation.0,
                        epoch: epoch.0,
                        session: self.session.id().0,
                        view_version: state.view.version,
                        clock,
                        contributes: contributed.is_some() && !late,
                        leaves,
                        wait_ms: WAIT_MS,
                        seat: number,
                    };
                    let within = ATTEMPT + Duration::from_millis(WAIT_MS.into());
                    let asking = async {
                        match timeout(within, client.advance(request)).await {
                            Ok(answer) => Ok(answer?.into_inner()),
                            Err(_) => Err(Failed::Later("no answer".into())),
                        }
                    };
                    patience.ended(asking).await?.and_then(|reply| self.advanced(reply))
                }
                Err(failed) => Err(failed),
            };
            match asked {
                Ok(seated) => return Ok(seated),
                Err(failed) => patience.wait(self.session.watched(), failed).await?,
            }
        }
    }

    fn advanced(&self, reply: v1::AdvanceReply) -> Result<v1::Seated, Failed> {
        match reply.result {
            Some(AdvanceResult::Seated(seated)) => Ok(seated),
            Some(AdvanceResult::Redirect(redirect)) => Err(self.redirected(CLOCK_SHARD, redirect)),
            Some(AdvanceResult::Retry(retry)) => {
                Err(Failed::Later(format!("{:?}", retry.reason())))
            }
            Some(AdvanceResult::SessionClosed(_)) => {
                Err(Failed::Over(Error::SessionClosed(self.session.id())))
            }
            None => Err(Failed::Later("an answer without a result".into())),
        }
    }

    /// Brings the end of a round to every shard of the job but the one that told of it. False: some shards have not taken it after a while.
    async fn bring(&mut self, number: u64, patience: &mut Patience) -> Result<bool, Error> {
        let shards = (0..self.session.state().view.spec.shards).map(ShardId);
        let mut left: BTreeSet<ShardId> = shards.filter(|shard| *shard != CLOCK_SHARD).collect();
        for _ in 0..ATTEMPTS_UNTIL_NUDGE {
            let state = self.session.state();
            let mut last = Failed::Later(String::from("no shard has a primary"));
            let mut requests: BTreeMap<ServerRef, (ClockClient<Channel>, Vec<v1::RoundPart>)> =
                BTreeMap::new();
            for shard in &left {
                match self.server(&state, *shard) {
                    Ok((server, epoch, client)) => {
                        let part = v1::RoundPart { shard: shard.0, epoch: epoch.0 };
                        requests.entry(server).or_insert((client, Vec::new())).1.push(part);
                    }
                    Err(failed) => last = failed,
                }
            }
            let job = self.session.job().0;
            let asking = requests.into_iter().map(|(server, (mut client, parts))| async move {
                let round = Some(v1::Round { number, members: Vec::new() });
                let incarnation = server.incarnation.0;
                let request = v1::EndRoundRequest { job, incarnation, round, parts };
                match timeout(ATTEMPT, client.end_round(request)).await {
                    Ok(answer) => Ok(answer?.into_inner()),
                    Err(_) => Err(Failed::Later("no answer".into())),
                }
            });
            for reply in patience.ended(join_all(asking)).await? {
                match reply {
                    Ok(reply) => {
                        for part in reply.parts {
                            match self.ended(&part) {
                                Ok(()) => _ = left.remove(&ShardId(part.shard)),
                                Err(failed) => last = failed,
                            }
                        }
                    }
                    Err(failed) => last = failed,
                }
            }
            if left.is_empty() {
                return Ok(true);
            }
            patience.wait(self.session.watched(), last).await?;
        }
        Ok(false)
    }

    fn ended(&self, part: &v1::RoundPartReply) -> Result<(), Failed> {
        match &part.result {
            Some(RoundResult::Done(true)) => Ok(()),
            Some(RoundResult::Redirect(redirect)) => {
                Err(self.redirected(ShardId(part.shard), *redirect))
            }
            Some(RoundResult::Retry(retry)) => Err(Failed::Later(format!("{:?}", retry.reason()))),
            Some(RoundResult::Done(false)) | None => {
                Err(Failed::Later("an answer without a result".into()))
            }
        }
    }

    fn redirected(&self, shard: ShardId, redirect: v1::Redirect) -> Failed {
        let primary = redirect.primary.map(|primary| convert::server("primary", Some(primary)));
        let Ok(primary) = primary.transpose() else {
            return Failed::Later("a redirect to nobody".into());
        };
        let mut news = false;
        self.session.watched().update(|state| {
            news = state.redirected(shard, Epoch(redirect.epoch), primary);
            news
        });
        if news { Failed::Moved } else { Failed::Later(format!("shard {shard} is not there")) }
    }

    /// Who has a shard, and a connection there.
    fn server(
        &mut self,
        state: &JobState,
        shard: ShardId,
    ) -> Result<(ServerRef, Epoch, ClockClient<Channel>), Failed> {
        let route = state.route(shard);
        let nobody = || Failed::Later(format!("shard {shard} has no primary that is known"));
        let server = route.primary.ok_or_else(nobody)?;
        let address = state.address(server).ok_or_else(nobody)?;
        if let Some(client) = self.servers.get(&server) {
            return Ok((server, route.epoch, client.clone()));
        }
        let channel = transport::channel(address);
        let channel = channel.map_err(|invalid| Failed::Later(invalid.to_string()))?;
        let client = ClockClient::new(channel);
        self.servers.retain(|server, _| state.address(*server).is_some());
        self.servers.insert(server, client.clone());
        Ok((server, route.epoch, client))
    }
}

/// Attempts at one thing, until the session's deadline.
struct Patience {
    what: &'static str,
    within: Duration,
    until: Instant,
    attempts: u32,
    seed: u64,
    changes: watch::Receiver<Arc<JobState>>,
    over: watch::Receiver<Option<Error>>,
}

impl Patience {
    fn new(session: &Session, what: &'static str) -> Self {
        let within = session.deadline();
        Patience {
            what,
            within,
            until: Instant::now() + within,
            attempts: 0,
            seed: session.id().0,
            changes: session.watch(),
            over: session.watch_end(),
        }
    }

    /// What `work` gives, unless the session ends first.
    async fn ended<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Error> {
        let done = tokio::select! {
            biased;
            over = self.over.wait_for(Option::is_some) => Err(over.ok().and_then(|over| over.clone())),
            done = work => Ok(done),
        };
        done.map_err(|over| over.unwrap_or(Error::JobDeleted))
    }

    /// Waits before the next attempt: for a while, or until the job's state changes.
    async fn wait(&mut self, watched: &Watched, failed: Failed) -> Result<(), Error> {
        let last = match failed {
            Failed::Moved => return Ok(()),
            Failed::Over(error) => return Err(error),
            Failed::Later(last) => last,
        };
        if Instant::now() >= self.until {
            return Err(Error::Deadline { what: self.what, within: self.within, last });
        }
        self.attempts += 1;
        if self.attempts.is_multiple_of(ATTEMPTS_UNTIL_NUDGE) {
            watched.nudge();
        }
        let pause = BACKOFF.wait(self.seed, self.attempts);
        self.changes.mark_unchanged();
        let mut changes = self.changes.clone();
        self.ended(async {
            tokio::select! {
                () = sleep(pause) => {}
                _ = changes.changed() => {}
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_that_was_perhaps_given_back_is_taken_anew_and_the_clock_goes_on() {
        let seats = AtomicU64::new(0);
        let mut seat = Seat::taken(None, &seats);
        assert_eq!((seat.number, seat.clock), (1, 0));
        seat.clock = 27;
        assert_eq!(Seat::taken(Some(seat), &seats).number, 1);
        seat.leaves = true;
        let seat = Seat::taken(Some(seat), &seats);
        assert_eq!((seat.number, seat.clock, seat.leaves), (2, 27, false));
        assert_eq!(Seat::taken(None, &seats).number, 3);
    }

    #[test]
    fn only_gradients_of_variables_in_rounds_become_contributions() {
        let rows = |variable| v1::Update {
            variable,
            body: Some(v1::update::Body::Rows(v1::RowGradients::default())),
        };
        let values = v1::Update {
            variable: 3,
            body: Some(v1::update::Body::Values(v1::DenseBlocks::default())),
        };
        let mut updates = vec![rows(1), rows(2), values.clone()];
        let variables = Arc::new([VariableId(2), VariableId(3)].into());
        StepRound { number: 7, variables }.mark(&mut updates);
        assert_eq!((&updates[0], &updates[2]), (&rows(1), &values));
        let Some(v1::update::Body::Contribution(contribution)) = &updates[1].body else {
            panic!("not a contribution: {:?}", updates[1]);
        };
        assert_eq!(contribution.round, 7);
        assert!(matches!(contribution.body, Some(v1::contribution::Body::Rows(_))));
    }
}
