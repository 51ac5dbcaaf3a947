//! Drivers on one thread, with disks in memory and a network that a test carries message by message.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use downpour_coordinator::command::Body;
use downpour_coordinator::metrics::RaftMetrics;
use downpour_coordinator::raft::log::{self, Admission, Change, Disk, Identity, Image, Log};
use downpour_coordinator::raft::mem_disk::{MemDisk, Platters};
use downpour_coordinator::raft::{Driver, Error, Fatal, Handle, Options, Wish, WishKind, driver};
use downpour_coordinator::state::Reply;
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
    fn load(&mut self) -> Result<Image, log::Error> {
        self.disk.load()
    }

    fn write(&mut self, change: &Change<'_>) -> Result<(), log::Error> {
        let sync = change.sync && (self.honest || change.identity.is_some());
        self.disk.write(&Change { sync, ..change.clone() })
    }
}

/// What messages broke their promise, and how many kept one.
#[derive(Debug, Default)]
pub struct Findings {
    pub broken: Vec<String>,
    pub kept: BTreeMap<String, u32>,
}

/// Looks at each message as it leaves.
struct TestOutbox {
    platters: Platters,
    birth: u64,
    network: mpsc::UnboundedSender<(Message, u64)>,
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
        self.network.send((message, self.birth)).is_ok()
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

pub type Member = (Handle, JoinHandle<Result<(), Fatal>>);

pub struct Network {
    /// Members whose messages are lost, to and fro.
    pub isolated: BTreeSet<u64>,
    /// Members that are not heard, and hear.
    pub mute: BTreeSet<u64>,
    platters: BTreeMap<u64, Platters>,
    /// Of disks that came in place of lost ones.
    births: BTreeMap<u64, u64>,
    pub members: BTreeMap<u64, Member>,
    sender: mpsc::UnboundedSender<(Message, u64)>,
    receiver: mpsc::UnboundedReceiver<(Message, u64)>,
    /// Messages that reached a member, by kind.
    pub delivered: HashMap<(u64, MessageType), u32>,
    pub findings: Arc<Mutex<Findings>>,
    honest: bool,
    /// Of member 3; the others have 10.
    election_ticks: usize,
}

impl Network {
    pub fn new(honest: bool) -> Network {
        Self::with_election_ticks(honest, 10)
    }

    /// The third member waits for so long before it gives up a leader, or its own leadership.
    pub fn with_election_ticks(honest: bool, election_ticks: usize) -> Network {
        let (sender, receiver) = mpsc::unbounded_channel();
        let platters = (1..=3).map(|id| (id, Platters::default())).collect();
        let (members, findings) = (BTreeMap::new(), Arc::default());
        let (isolated, mute) = (BTreeSet::new(), BTreeSet::new());
        let mut network = Network {
            isolated,
            mute,
            platters,
            births: BTreeMap::new(),
            members,
            sender,
            receiver,
            delivered: HashMap::new(),
            findings,
            honest,
            election_ticks,
        };
        (1..=3).for_each(|id| network.start(id));
        network
    }

    pub fn start(&mut self, id: u64) {
        let platters = self.platters[&id].clone();
        let disk = TestDisk { disk: MemDisk::new(&platters), honest: self.honest };
        let identity = Identity { cluster: "test".into(), member: id, voters: vec![1, 2, 3] };
        let birth = self.births.get(&id).copied().unwrap_or(0);
        let (network, findings) = (self.sender.clone(), self.findings.clone());
        let outbox = TestOutbox { platters, birth, network, findings };
        let options = Options {
            id,
            tick: Duration::from_millis(5),
            election_ticks: if id == 3 { self.election_ticks } else { 10 },
            heartbeat_ticks: 2,
            compact_entries: 20,
            compact_bytes: 1 << 20,
            keep_entries: 5,
            founders: (1..=3).map(|id| (id, format!("c{id}:1"))).collect(),
        };
        let metrics = RaftMetrics::new(&Registry::new());
        // Groups of tests are founded by decree, but a member without its disk joins.
        let joining = self.births.contains_key(&id);
        let fresh = Admission { birth, joining };
        let log = Log::open(disk, &identity, fresh).unwrap();
        let (driver, handle) = Driver::new(options, log, outbox, metrics).unwrap();
        self.members.insert(id, (handle, tokio::spawn(driver.run())));
    }

    /// A power cut: what was not synced is gone.
    pub async fn crash(&mut self, id: u64) {
        let (_, task) = self.members.remove(&id).unwrap();
        task.abort();
        let _ = task.await;
    }

    /// A member that is down has an empty disk from now on.
    pub fn lose_disk(&mut self, id: u64) {
        self.platters.insert(id, Platters::default());
        self.births.insert(id, 7);
    }

    /// `joiner` asks another member.
    pub async fn meet(&self, joiner: u64, other: u64) {
        let told = self.members[&other].0.meet(joiner, self.births[&joiner]).await.unwrap();
        self.members[&joiner].0.met(other, told).await;
    }

    /// A member that is added later, with an unused disk.
    pub fn start_new(&mut self, id: u64) {
        self.platters.insert(id, Platters::default());
        self.start(id);
    }

    /// Asks whoever leads until it answers otherwise than that it cannot now.
    pub async fn change(&mut self, kind: WishKind) -> Result<Reply, Error> {
        loop {
            self.carry_until(|network| network.leader().is_some()).await;
            let handle = self.members[&self.leader().unwrap()].0.clone();
            let wish = Wish { kind: kind.clone(), dry_run: false };
            let asked = tokio::spawn(async move { handle.change_members(wish).await });
            self.carry_until(|_| asked.is_finished()).await;
            match asked.await.unwrap() {
                Err(Error::NotLeader { .. } | Error::Overloaded | Error::Overwritten) => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                answer => return answer,
            }
        }
    }

    /// Numbers of those that vote, as the leader knows it.
    pub fn voters(&self) -> Vec<u64> {
        let Some(leader) = self.leader() else { return Vec::new() };
        let members = self.members[&leader].0.status().members;
        members.into_iter().filter(|one| !one.learner).map(|one| one.id).collect()
    }

    /// Carries messages until `done`.
    pub async fn carry_until(&mut self, mut done: impl FnMut(&Network) -> bool) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !done(self) {
            let message = tokio::time::timeout_at(deadline, self.receiver.recv()).await;
            let (message, birth) = message.expect("in time").expect("the network goes on");
            let cut_off = |id| self.isolated.contains(id);
            if cut_off(&message.from) || cut_off(&message.to) || self.mute.contains(&message.from) {
                continue;
            }
            if let Some((handle, _)) = self.members.get(&message.to) {
                *self.delivered.entry((message.to, message.get_msg_type())).or_default() += 1;
                handle.deliver(message, birth).await;
            }
        }
    }

    pub fn leader(&self) -> Option<u64> {
        let reached = self.members.iter().filter(|(id, _)| !self.isolated.contains(id));
        let mut leading = reached.filter(|(_, (handle, _))| handle.status().leads());
        leading.next().map(|(id, _)| *id)
    }

    pub async fn commit(&mut self, count: u64) {
        self.carry_until(|network| network.leader().is_some()).await;
        let handle = self.members[&self.leader().unwrap()].0.clone();
        let proposals = (0..count).map(|number| {
            let handle = handle.clone();
            let request = v1::RegisterServerRequest {
                name: format!("ps-{}", number % 3),
                address: "host:1".into(),
                zone: String::new(),
                request_id: number.to_string(),
                ..Default::default()
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
