//! Reads through any member are linearizable, whatever happens to leaders and links.

#[path = "support/linearizability.rs"]
mod checker;
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use checker::{Effect, Operation, linearizable};
use downpour_core::mix::mix64;
use downpour_proto::v1;
use proptest::prelude::*;
use support::{Client, Group, eventually, get_cluster};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;

const CLIENTS: u64 = 5;
const KEYS: [&str; 2] = ["left", "right"];
/// A client that hears nothing for this long counts the outcome as unknown.
const PATIENCE: Duration = Duration::from_secs(2);

fn operation(invoked: u64, answered: u64, effect: Effect) -> Operation {
    Operation { invoked, answered: Some(answered), effect }
}

#[test]
fn the_checker_accepts_what_an_order_explains() {
    use Effect::{NoSwap, Read, Swap, Write};
    let history = [
        operation(0, 10, Write(1)),
        operation(1, 2, Read(0)),
        operation(3, 4, Read(1)),
        operation(5, 6, Swap { expected: 1, new: 2 }),
        operation(7, 8, NoSwap { expected: 1, found: 2 }),
        Operation { invoked: 9, answered: None, effect: Write(3) },
        Operation { invoked: 9, answered: None, effect: Write(4) },
        operation(20, 21, Read(2)),
        operation(22, 23, Read(3)),
    ];
    assert!(linearizable(&history));
}

#[test]
fn the_checker_rejects_a_stale_read() {
    use Effect::{Read, Write};
    let history = [operation(0, 1, Write(1)), operation(2, 3, Write(2)), operation(4, 5, Read(1))];
    assert!(!linearizable(&history));
    let backwards = [
        Operation { invoked: 0, answered: None, effect: Write(1) },
        operation(1, 2, Read(1)),
        operation(3, 4, Read(0)),
    ];
    assert!(!linearizable(&backwards), "what was seen once cannot be unseen");
}

#[test]
fn the_checker_rejects_a_swap_that_two_clients_won() {
    let swap = |new| Effect::Swap { expected: 0, new };
    assert!(!linearizable(&[operation(0, 9, swap(1)), operation(0, 9, swap(2))]));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A history that a register really went through is accepted, however its intervals are widened.
    #[test]
    fn the_checker_accepts_every_real_history(
        steps in prop::collection::vec((0u8..4, 0u64..30, 0u64..30), 1..60),
    ) {
        let mut value = 0;
        let history: Vec<_> = (1..).zip(steps).map(|(number, (kind, before, after)): (u64, _)| {
            let new = number;
            let effect = match kind {
                0 => Effect::Write(new),
                1 => Effect::Swap { expected: value, new },
                2 => Effect::NoSwap { expected: value + 1000, found: value },
                _ => Effect::Read(value),
            };
            if kind < 2 {
                value = new;
            }
            let at = 100 + 10 * number;
            operation(at - before, at + after, effect)
        }).collect();
        prop_assert!(linearizable(&history));
    }
}

/// One client: it sets, swaps and reads labels through all members in turn, and writes down what it was told.
struct Worker {
    number: u64,
    job: u64,
    clients: Vec<Client>,
    started: Instant,
    answers: Arc<AtomicU64>,
    history: BTreeMap<&'static str, Vec<Operation>>,
    seen: BTreeMap<&'static str, u64>,
}

impl Worker {
    async fn run(mut self, stop: CancellationToken) -> BTreeMap<&'static str, Vec<Operation>> {
        for turn in 1.. {
            if stop.is_cancelled() {
                break;
            }
            // Which key, kind and member: mixed, so that each meets each.
            let choice = mix64(turn * CLIENTS + self.number) as usize;
            let key = KEYS[choice % KEYS.len()];
            let client = self.clients[choice / 8 % self.clients.len()].clone();
            // Unique over all clients.
            let new = turn * CLIENTS + self.number;
            let expected = self.seen.get(key).copied().unwrap_or(0);
            let invoked = self.now();
            let told = match choice / 64 % 3 {
                0 => self.read(client, key).await.map(Effect::Read).map_err(|_| None),
                1 => self.label(client, key, new, None).await.map_err(|_| Some(Effect::Write(new))),
                _ => {
                    let swapped = self.label(client, key, new, Some(expected)).await;
                    swapped.map_err(|_| Some(Effect::Swap { expected, new }))
                }
            };
            let (effect, answered) = match told {
                Ok(effect) => (effect, Some(self.now())),
                Err(Some(effect)) => (effect, None),
                Err(None) => continue,
            };
            if answered.is_some() {
                self.answers.fetch_add(1, Ordering::Relaxed);
                let value = match effect {
                    Effect::Read(value) | Effect::Write(value) => value,
                    Effect::Swap { new, .. } => new,
                    Effect::NoSwap { found, .. } => found,
                };
                self.seen.insert(key, value);
            }
            self.history.entry(key).or_default().push(Operation { invoked, answered, effect });
        }
        self.history
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    async fn read(&self, client: Client, key: &str) -> Result<u64, Status> {
        let reading = tokio::time::timeout(PATIENCE, get_cluster(&client));
        let cluster = reading.await.map_err(|_| Status::deadline_exceeded("patience"))??;
        let value = cluster.jobs[0].labels.get(key).map(String::as_str);
        Ok(value.unwrap_or("0").parse().unwrap())
    }

    async fn label(
        &self,
        mut client: Client,
        key: &str,
        new: u64,
        expected: Option<u64>,
    ) -> Result<Effect, Status> {
        let text = |value: u64| if value == 0 { String::new() } else { value.to_string() };
        let request = v1::LabelJobRequest {
            job: self.job,
            key: key.into(),
            value: text(new),
            expected: expected.map(text),
        };
        let labelling = tokio::time::timeout(PATIENCE, client.label_job(request));
        let reply = labelling.await.map_err(|_| Status::deadline_exceeded("patience"))??;
        let reply = reply.into_inner();
        Ok(match expected {
            None => Effect::Write(new),
            Some(expected) if reply.changed => Effect::Swap { expected, new },
            Some(expected) => {
                let found = if reply.value.is_empty() { 0 } else { reply.value.parse().unwrap() };
                Effect::NoSwap { expected, found }
            }
        })
    }
}

/// Clients at work on one job's labels.
struct Load {
    answers: Arc<AtomicU64>,
    stop: CancellationToken,
    workers: Vec<JoinHandle<BTreeMap<&'static str, Vec<Operation>>>>,
}

impl Load {
    async fn start(group: &Group) -> Load {
        group.register("ps-0", "").await;
        let job = group.create_job("ctr", 1, 1).await.job;
        let (answers, stop) = (Arc::<AtomicU64>::default(), CancellationToken::new());
        let started = Instant::now();
        let worker = |number| Worker {
            number,
            job,
            clients: group.ids().into_iter().map(|id| group.client(id)).collect(),
            started,
            answers: answers.clone(),
            history: BTreeMap::new(),
            seen: BTreeMap::new(),
        };
        let workers =
            (0..CLIENTS).map(|number| tokio::spawn(worker(number).run(stop.clone()))).collect();
        Load { answers, stop, workers }
    }

    /// Waits until so many more operations were answered.
    async fn answered(&self, more: u64) {
        let goal = self.answers.load(Ordering::Relaxed) + more;
        eventually("clients get answers", || async {
            let answers = self.answers.load(Ordering::Relaxed);
            if answers >= goal { Ok(()) } else { Err((answers, goal)) }
        })
        .await;
    }

    /// Ends the clients; checks what they were told.
    async fn check(self) {
        self.stop.cancel();
        let mut histories: BTreeMap<&str, Vec<Operation>> = BTreeMap::new();
        for worker in self.workers {
            for (key, history) in worker.await.unwrap() {
                histories.entry(key).or_default().extend(history);
            }
        }
        for (key, history) in histories {
            let unknown = history.iter().filter(|one| one.answered.is_none()).count();
            eprintln!("{key}: {} operations, {unknown} of unknown outcome", history.len());
            assert!(linearizable(&history), "{key}: {history:?}");
            assert!(!linearizable(&with_stale_read(&history)), "a planted stale read is found");
        }
    }
}

/// The history with one read more, at its end, of a value that another had taken the place of.
fn with_stale_read(history: &[Operation]) -> Vec<Operation> {
    let reads = history.iter().filter_map(|one| match one.effect {
        Effect::Read(value) if value != 0 => Some((one.invoked, one.answered?, value)),
        _ => None,
    });
    let reads: Vec<_> = reads.collect();
    let &(last, _, current) = reads.iter().max().expect("somebody read");
    let stale = reads.iter().find(|(_, answered, value)| *answered < last && *value != current);
    let stale = stale.expect("the register moved on").2;
    let end = history.iter().filter_map(|one| one.answered).max().unwrap();
    let mut planted = history.to_vec();
    planted.push(operation(end + 1, end + 2, Effect::Read(stale)));
    planted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_are_linearizable_while_leaders_die_and_links_are_cut() {
    const PROGRESS: u64 = 40;
    let mut group = Group::start(3).await;
    let load = Load::start(&group).await;
    load.answered(PROGRESS).await;
    for round in 0..6 {
        let leader = group.leader().await;
        let others: Vec<u64> = group.ids().into_iter().filter(|&id| id != leader).collect();
        match round % 3 {
            0 => {
                group.stop(leader).await.unwrap();
                load.answered(PROGRESS).await;
                group.restart(leader).await;
            }
            1 => {
                group.isolate(leader, true);
                group.leader_among(&others).await;
                load.answered(PROGRESS).await;
                group.isolate(leader, false);
            }
            _ => {
                group.link(leader, others[0], false);
                load.answered(PROGRESS).await;
                group.link(leader, others[0], true);
            }
        }
        load.answered(PROGRESS).await;
    }
    load.check().await;
    for id in group.ids() {
        group.stop(id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_old_leader_answers_no_read_and_no_heartbeat() {
    let group = Group::start(3).await;
    let server = group.register("ps-0", "").await;
    let old = group.leader().await;
    let others: Vec<u64> = group.ids().into_iter().filter(|&id| id != old).collect();
    let heartbeat = v1::HeartbeatRequest { server: Some(server), reports: vec![], load: None };
    group.client(old).heartbeat(heartbeat.clone()).await.unwrap();
    // A leader may answer those before it has asked itself how far it must be to show anything.
    let watch = || async { group.client(old).watch(v1::WatchRequest { job: 0 }).await.map(drop) };
    eventually("it shows what it knows", watch).await;
    group.isolate(old, true);
    let new = group.leader_among(&others).await;
    let spec = v1::JobSpec { name: "new".into(), shards: 1, replicas: 1, min_in_sync: 1, seed: 1 };
    group.client(new).create_job(v1::CreateJobRequest { spec: Some(spec) }).await.unwrap();

    // Whatever the old leader believes: what it answers now would lack the job.
    get_cluster(&group.client(old)).await.unwrap_err();
    group.client(old).heartbeat(heartbeat).await.unwrap_err();
    // It still shows what it knows.
    watch().await.unwrap();

    group.isolate(old, false);
    let reply = eventually("it is a follower or leads again", || async {
        match get_cluster(&group.client(old)).await {
            Ok(cluster) => Ok(Some(cluster)),
            Err(status) if status.metadata().contains_key("downpour-leader") => Ok(None),
            Err(status) => Err(status),
        }
    });
    assert!(reply.await.is_none_or(|cluster| cluster.jobs.len() == 1));
}
