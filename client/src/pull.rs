//! Reading rows and dense blocks.

mod plan;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use downpour_core::id::{Epoch, JobId, Lsn, ServerRef, ShardId, VariableId};
use downpour_proto::v1::{self, pull_part_reply::Result as PartResult};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::{Code, Status};

use crate::Error;
use crate::backoff::Backoff;
use crate::dense::DenseCache;
use crate::servers::Servers;
use crate::state::JobState;
use crate::watch::Watched;
use plan::{Message, Plan, Work};

/// Rows of one table to read.
#[derive(Debug)]
pub struct TableRows<'a> {
    /// The table.
    pub variable: VariableId,
    /// Each once; fastest in the order of the table's [`crate::Arrangement`].
    pub keys: &'a [u64],
    /// Where the rows go, in the order of the keys: `keys.len() * dim` floats.
    pub values: &'a mut [f32],
}

/// What a pull read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pulled {
    /// For each shard that was asked: the values contain every record up to here (the lowest, when it was asked in several messages). The
    /// staleness of a push that later gets LSN `x` of the same epoch there is `x.count() - lsn.count() - 1`: the records in between.
    pub lsns: BTreeMap<ShardId, Lsn>,
    /// For each of them its clock then, the lowest too: how many steps the furthest worker had finished, as far as the shard knew.
    pub clocks: BTreeMap<ShardId, u64>,
}

impl Pulled {
    /// What a push to a shard says of it.
    pub(crate) fn read(&self, shard: ShardId) -> Option<v1::Read> {
        let (lsn, clock) = (self.lsns.get(&shard)?.0, *self.clocks.get(&shard)?);
        Some(v1::Read { lsn, clock })
    }
}

/// For one attempt: a server that hangs without its connection breaking.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Bytes of answers under way at once: enough for 10 Gbit/s over 10 ms.
const ANSWER_BYTES_MAX: usize = 16 << 20;
const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(2), max: Duration::from_millis(100) };
/// Failed attempts in a row after which the routing looks old.
const ATTEMPTS_UNTIL_NUDGE: u32 = 4;

/// What pulls of one session share.
pub(crate) struct Puller {
    pub(crate) job: JobId,
    pub(crate) watched: Watched,
    pub(crate) servers: Servers,
    pub(crate) ended: watch::Sender<Option<Error>>,
    pub(crate) deadline: Duration,
}

/// Why a message brought nothing.
enum Failed {
    /// A shard of it has a new epoch.
    Moved,
    Status(Status),
}

impl Puller {
    /// See [`crate::Session::pull`].
    pub(crate) async fn pull(
        &self,
        tables: &mut [TableRows<'_>],
        mut dense: Option<&mut DenseCache>,
    ) -> Result<Pulled, Error> {
        let mut changes = self.watched.subscribe();
        let mut ended = self.ended.subscribe();
        let (plan, mut work) = Plan::new(
            &self.watched.now().view,
            tables,
            dense.as_deref(),
            self.servers.message_bytes(),
        )?;
        let deadline = sleep(self.deadline);
        tokio::pin!(deadline);
        let mut pulled = Pulled::default();
        let mut queue: VecDeque<Message> = VecDeque::new();
        let mut flying = FuturesUnordered::new();
        let mut retry_at = Instant::now();
        let (mut attempts, mut last) = (0, String::from("no shard has a primary"));
        loop {
            if !work.is_empty() && retry_at <= Instant::now() {
                let state = changes.borrow_and_update().clone();
                let (bytes, lanes) = (self.servers.message_bytes(), self.servers.lanes());
                queue.extend(Plan::messages(&mut work, bytes, lanes, |shard| state.route(shard)));
                retry_at = Instant::now() + BACKOFF.wait(u64::from(attempts), attempts);
            }
            while flying.len() < ANSWER_BYTES_MAX / self.servers.message_bytes()
                && let Some(message) = queue.pop_front()
            {
                let request = plan.request(self.job, &message, tables, dense.as_deref());
                flying.push(self.ask(message, request));
            }
            if flying.is_empty() && work.is_empty() {
                return Ok(pulled);
            }
            tokio::select! {
                Some((message, answer)) = flying.next() => {
                    let failed = match answer {
                        Ok(reply) => {
                            let dense = dense.as_deref_mut();
                            self.take(&plan, message, reply, tables, dense, &mut pulled)?
                        }
                        Err(Failed::Moved) => Some((message.into_work(), "it moved".into())),
                        Err(Failed::Status(status)) => {
                            let code = status.code();
                            if matches!(code, Code::InvalidArgument | Code::OutOfRange)
                                && let Some(error) = Error::permanent("pull", &status)
                            {
                                return Err(error);
                            }
                            let problem = format!("{code:?}: {}", status.message());
                            let server = message.server;
                            Some((message.into_work(), format!("server {server}: {problem}")))
                        }
                    };
                    if let Some((again, problem)) = failed {
                        work.extend(again);
                        last = problem;
                        attempts += 1;
                        if attempts >= ATTEMPTS_UNTIL_NUDGE {
                            self.watched.nudge();
                        }
                    }
                }
                () = sleep_until(retry_at), if !work.is_empty() => {}
                Ok(()) = changes.changed(), if !work.is_empty() => {
                    if changes.borrow().deleted {
                        return Err(Error::JobDeleted);
                    }
                    retry_at = Instant::now();
                }
                Ok(end) = ended.wait_for(Option::is_some) => {
                    return Err(end.clone().unwrap_or(Error::JobDeleted));
                }
                () = &mut deadline => {
                    return Err(Error::Deadline { what: "pull", within: self.deadline, last });
                }
            }
        }
    }

    /// One message. Ends early when one of its shards has a new epoch.
    async fn ask(
        &self,
        message: Message,
        request: v1::PullRequest,
    ) -> (Message, Result<v1::PullReply, Failed>) {
        let mut changes = self.watched.subscribe();
        let Some(mut server) = self.servers.get(&self.watched.now(), message.server) else {
            let status = Status::unavailable("its address is not known");
            return (message, Err(Failed::Status(status)));
        };
        let moved = async {
            let newer = |state: &Arc<JobState>| {
                message.parts.iter().any(|part| state.route(part.shard).epoch > part.epoch)
            };
            // Ends with an error when nobody watches any more; then nothing will move.
            if changes.wait_for(newer).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let answer = tokio::select! {
            answer = timeout(ATTEMPT, server.pull(message.lane, request)) => match answer {
                Ok(Ok(reply)) => Ok(reply),
                Ok(Err(status)) => Err(Failed::Status(status)),
                Err(_) => Err(Failed::Status(Status::deadline_exceeded("no answer"))),
            },
            () = moved => Err(Failed::Moved),
        };
        (message, answer)
    }

    /// Takes the values of an answer over; returns what has to be asked again, and why.
    fn take(
        &self,
        plan: &Plan,
        message: Message,
        reply: v1::PullReply,
        tables: &mut [TableRows<'_>],
        mut dense: Option<&mut DenseCache>,
        pulled: &mut Pulled,
    ) -> Result<Option<(Vec<Work>, String)>, Error> {
        let server = message.server;
        let broken =
            |problem: String| Error::Protocol { from: format!("server {server}"), problem };
        if reply.parts.len() != message.parts.len() {
            return Err(broken("not as many parts as were asked for".into()));
        }
        let state = self.watched.now();
        let mut again: Option<(Vec<Work>, String)> = None;
        let mut redirects = Vec::new();
        for (part, answer) in message.parts.into_iter().zip(reply.parts) {
            let shard = part.shard;
            if answer.shard != shard.0 {
                return Err(broken("an answer for another shard".into()));
            }
            let problem = match answer.result {
                // A primary that was replaced must not be believed any more (docs/protocol.md 4.3).
                Some(PartResult::Pulled(_)) if state.route(shard).epoch > part.epoch => {
                    "its answer is of an older epoch".into()
                }
                Some(PartResult::Pulled(values)) => {
                    plan.take(&part, &values, tables, dense.as_deref_mut()).map_err(broken)?;
                    let lsn = pulled.lsns.entry(shard).or_insert(Lsn(values.lsn));
                    *lsn = (*lsn).min(Lsn(values.lsn));
                    let clock = pulled.clocks.entry(shard).or_insert(values.clock);
                    *clock = (*clock).min(values.clock);
                    continue;
                }
                Some(PartResult::Redirect(redirect)) => {
                    let primary = redirect.primary.map(ServerRef::try_from).transpose();
                    let primary = primary.map_err(|invalid| broken(invalid.to_string()))?;
                    redirects.push((shard, Epoch(redirect.epoch), primary));
                    format!("it is not the primary in epoch {}", part.epoch)
                }
                Some(PartResult::Retry(retry)) => format!("{:?}", retry.reason()),
                None => return Err(broken("a part without a result".into())),
            };
            let (work, last) = again.get_or_insert_default();
            work.extend(part.work);
            *last = format!("shard {shard} on server {server}: {problem}");
        }
        if !redirects.is_empty() {
            self.watched.update(|state| {
                redirects.iter().fold(false, |news, &(shard, epoch, primary)| {
                    state.redirected(shard, epoch, primary) || news
                })
            });
        }
        Ok(again)
    }
}

impl Message {
    fn into_work(self) -> Vec<Work> {
        self.parts.into_iter().flat_map(|part| part.work).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::servers::Transport;
    use crate::state::tests::state;
    use downpour_core::id::SessionId;
    use downpour_core::init::Init;
    use downpour_core::optimizer::{OptimizerSpec, Sgd};
    use downpour_core::spec::{Shape, TableSpec, Variable, VariableSpec};

    const MESSAGE_BYTES: usize = 1 << 20;
    const TABLE: VariableId = VariableId(1);

    /// One table with rows of one float on two shards.
    fn puller() -> Puller {
        let mut state = state();
        let shape = Shape::Table(TableSpec::new(1, Init::Zeros, "t"));
        let optimizer = OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 });
        let spec = VariableSpec { name: "t".into(), optimizer, shape };
        state.view.variables.push(Variable { id: TABLE, spec });
        Puller {
            job: JobId(1),
            watched: Watched::new(state),
            servers: Servers::new(SessionId(1), Transport::Grpc),
            ended: watch::Sender::new(None),
            deadline: Duration::from_secs(1),
        }
    }

    fn pulled(part: &v1::PullPart) -> v1::PullPartReply {
        let bytes: Vec<u8> =
            part.rows[0].keys.chunks(8).flat_map(|_| 5.0f32.to_le_bytes()).collect();
        let values = v1::PulledPart { lsn: 3, rows: vec![bytes.into()], ..Default::default() };
        v1::PullPartReply { shard: part.shard, result: Some(PartResult::Pulled(values)) }
    }

    /// What is left to do when `change` happens between the question and the honest answer, and the values then.
    fn left_after(change: impl Fn(&Puller, &Message, &mut v1::PullReply)) -> (usize, Vec<f32>) {
        let puller = puller();
        let keys: Vec<u64> = (0..64).collect();
        let mut values = vec![0.0; 64];
        let mut tables = [TableRows { variable: TABLE, keys: &keys, values: &mut values }];
        let state = puller.watched.now();
        let (plan, mut work) =
            Plan::new(&state.view, &tables, None, MESSAGE_BYTES).expect("a plan");
        let messages = Plan::messages(&mut work, MESSAGE_BYTES, 1, |shard| state.route(shard));
        let mut left = 0;
        for message in messages {
            let request = plan.request(JobId(1), &message, &tables, None);
            let mut reply = v1::PullReply { parts: request.parts.iter().map(pulled).collect() };
            change(&puller, &message, &mut reply);
            let taken =
                puller.take(&plan, message, reply, &mut tables, None, &mut Pulled::default());
            left += taken.expect("an honest answer").map_or(0, |(work, _)| work.len());
        }
        (left, values)
    }

    #[test]
    fn an_answer_of_an_epoch_below_the_highest_seen_is_not_believed() {
        assert_eq!(left_after(|_, _, _| {}), (0, vec![5.0; 64]));
        let left = left_after(|puller, message, _| {
            let part = &message.parts[0];
            let higher = Epoch(part.epoch.0 + 1);
            puller.watched.update(|state| state.redirected(part.shard, higher, None));
        });
        assert_eq!(left, (2, vec![0.0; 64]));
    }

    #[test]
    fn a_redirect_is_learnt_and_its_part_is_asked_again() {
        let left = left_after(|puller, message, reply| {
            let elsewhere =
                v1::Redirect { epoch: 9, primary: Some(v1::ServerRef { node: 7, incarnation: 7 }) };
            let shard = message.parts[0].shard;
            if shard == ShardId(1) {
                reply.parts[0].result = Some(PartResult::Redirect(elsewhere));
            }
            assert_eq!(puller.watched.now().route(shard).epoch, Epoch(1));
        });
        assert_eq!(left.0, 1);
        assert!(left.1.contains(&5.0) && left.1.contains(&0.0));
    }
}
