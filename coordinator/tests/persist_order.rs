//! Nothing is promised before it is on the disk: every message is compared with what a power cut at that moment would leave.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use downpour_coordinator::command::Body;
use downpour_coordinator::metrics::RaftMetrics;
use downpour_coordinator::raft::log::{Change, Disk, Error, Identity, Image, Log};
use downpour_coordinator::raft::mem_disk::{MemDisk, Platters};
use downpour_coordinator::raft::{Driver, Fatal, Handle, Options, driver};
use downpour_node::metrics::Registry;
use downpour_proto::v1;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const DEADLINE: Duration = Duration::from_secs(60);

/// A disk that may be told to forget its barriers.
struct TestDisk {
    disk: MemDisk,
    honest: bool,
}

impl Disk for TestDisk {
    fn load(&mut self) -> Result<Image, Error> {
        self.disk.load()
    }

    fn write(&mut self, change: &Change<'_>) -> Result<(), Error> {
        let sync = change.sync && (self.honest || change.identity.is_some());
        self.disk.write(&Change { sync, ..change.clone() })
    }
}

/// What messages broke their promise, and how many kept one.
#[derive(Debug, Default)]
struct Findings {
    broken: Vec<String>,
    kept: BTreeMap<String, u32>,
}

/// Looks at each message as it leaves.
struct TestOutbox {
    platters: Platters,
    network: mpsc::UnboundedSender<Message>,
    findings: Arc<Mutex<Findings>>,
}

impl driver::Outbox for TestOutbox {
    fn send(&mut self, message: Message) -> bool {
        let durable = MemDisk::new(&self.platters).load().unwrap();
        let mut findings = self.findings.lock().unwrap();
        if promise_holds(&message, &durable) {
            *findings.kept.entry(format!("{:?}", message.get_msg_type())).or_default() += 1;
        } else {
            findings.broken.push(format!("{message:?} while {:?} is durable", durable.hard_state));
        }
        self.network.send(message).is_ok()
    }
}

fn promise_holds(message: &Message, durable: &Image) -> bool {
    let hard_state = &durable.hard_state;
    let last = durable.truncated.index + durable.entries.len() as u64;
    let voted_for = |candidate| hard_state.term == message.term && hard_state.vote == candidate;
    match message.get_msg_type() {
        MessageType::MsgRequestPreVote | MessageType::MsgRequestPreVoteResponse => true,
        MessageType::MsgRequestVote => voted_for(message.from),
        MessageType::MsgRequestVoteResponse => message.reject || voted_for(message.to),
        MessageType::MsgAppendResponse => {
            message.term <= hard_state.term && (message.reject || message.index <= last)
        }
        _ => message.term <= hard_state.term,
    }
}

type Member = (Handle, JoinHandle<Result<(), Fatal>>);

struct Network {
    platters: BTreeMap<u64, Platters>,
    members: BTreeMap<u64, Member>,
    sender: mpsc::UnboundedSender<Message>,
    receiver: mpsc::UnboundedReceiver<Message>,
    findings: Arc<Mutex<Findings>>,
    honest: bool,
}

impl Network {
    fn new(honest: bool) -> Network {
        let (sender, receiver) = mpsc::unbounded_channel();
        let platters = (1..=3).map(|id| (id, Platters::default())).collect();
        let (members, findings) = (BTreeMap::new(), Arc::default());
        let mut network = Network { platters, members, sender, receiver, findings, honest };
        (1..=3).for_each(|id| network.start(id));
        network
    }

    fn start(&mut self, id: u64) {
        let platters = self.platters[&id].clone();
        let disk = TestDisk { disk: MemDisk::new(&platters), honest: self.honest };
        let identity = Identity { cluster: "test".into(), member: id, voters: vec![1, 2, 3] };
        let outbox =
            TestOutbox { platters, network: self.sender.clone(), findings: self.findings.clone() };
        let options = Options {
            id,
            tick: Duration::from_millis(5),
            election_ticks: 10,
            heartbeat_ticks: 2,
            compact_entries: 20,
            compact_bytes: 1 << 20,
            keep_entries: 5,
        };
        let metrics = RaftMetrics::new(&Registry::new());
        let log = Log::open(disk, &identity).unwrap();
        let (driver, handle) = Driver::new(options, log, outbox, metrics).unwrap();
        self.members.insert(id, (handle, tokio::spawn(driver.run())));
    }

    /// A power cut: what was not synced is gone.
    async fn crash(&mut self, id: u64) {
        let (_, task) = self.members.remove(&id).unwrap();
        task.abort();
        let _ = task.await;
    }

    /// Carries messages until `done`.
    async fn carry_until(&mut self, mut done: impl FnMut(&Network) -> bool) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !done(self) {
            let message = tokio::time::timeout_at(deadline, self.receiver.recv()).await;
            let message = message.expect("in time").expect("the network goes on");
            if let Some((handle, _)) = self.members.get(&message.to) {
                handle.deliver(message).await;
            }
        }
    }

    fn leader(&self) -> Option<u64> {
        let leads = |(_, (handle, _)): &(&u64, &Member)| handle.status().leads();
        self.members.iter().find(leads).map(|(id, _)| *id)
    }

    async fn commit(&mut self, count: u64) {
        self.carry_until(|network| network.leader().is_some()).await;
        let handle = self.members[&self.leader().unwrap()].0.clone();
        let proposals = (0..count).map(|number| {
            let handle = handle.clone();
            let request = v1::RegisterServerRequest {
                name: format!("ps-{}", number % 3),
                address: "host:1".into(),
                zone: String::new(),
                request_id: number.to_string(),
            };
            tokio::spawn(async move { handle.propose(Body::RegisterServer(request)).await })
        });
        let proposals: Vec<_> = proposals.collect();
        self.carry_until(|_| proposals.iter().all(JoinHandle::is_finished)).await;
        for proposal in proposals {
            proposal.await.unwrap().unwrap();
        }
    }
}

#[tokio::test]
async fn no_message_leaves_before_what_it_promises_is_durable() {
    let mut network = Network::new(true);
    for _ in 0..6 {
        network.commit(30).await;
        let leader = network.leader().unwrap();
        network.crash(leader).await;
        network.commit(30).await;
        network.start(leader);
        let goal = network.members[&network.leader().unwrap()].0.status().commit;
        let caught_up = |network: &Network| network.members[&leader].0.status().applied >= goal;
        network.carry_until(caught_up).await;
    }
    let findings = network.findings.lock().unwrap();
    assert_eq!(findings.broken, Vec::<String>::new());
    for kind in ["MsgRequestVote", "MsgRequestVoteResponse", "MsgAppendResponse", "MsgSnapshot"] {
        assert!(findings.kept.contains_key(kind), "{kind} was never sent: {findings:?}");
    }
}

#[tokio::test]
async fn a_disk_that_forgets_its_barriers_is_found() {
    let mut network = Network::new(false);
    network.commit(1).await;
    assert!(!network.findings.lock().unwrap().broken.is_empty());
}
