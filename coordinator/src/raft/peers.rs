//! Raft's messages between members: one long-lived stream to each other member; answers come on the stream of the other direction.
//!
//! Nothing waits for a slow or absent member: what does not fit its queue is dropped and Raft told so, and Raft sends it again.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use downpour_node::shutdown::Shutdown;
use downpour_proto::transport::{self, MESSAGE_BYTES_MAX};
use downpour_proto::v1::raft_client::RaftClient;
use downpour_proto::v1::raft_server::{Raft, RaftServer};
use downpour_proto::{Invalid, v1};
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, warn};

use super::driver::Outbox;
use super::handle::{Handle, Input};
use super::joining::Told;
use super::log::Admission;

/// Messages that wait for a member.
const QUEUE_MAX: usize = 256;
/// Pause before a broken stream is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// For one answer of a member that is met.
const MEET_TIMEOUT: Duration = Duration::from_secs(2);

/// Who is in the group.
#[derive(Clone, Debug)]
pub struct Group {
    /// Name of the cluster.
    pub cluster: String,
    /// This member.
    pub me: u64,
    /// host:port of every member, this one too.
    pub members: BTreeMap<u64, String>,
}

/// The queues to the other members.
#[derive(Debug)]
pub struct Links(BTreeMap<u64, mpsc::Sender<Message>>);

/// The ends of the queues, to be emptied once there is a driver.
#[derive(Debug)]
pub struct LinkEnds(BTreeMap<u64, mpsc::Receiver<Message>>);

/// A queue to each other member.
#[must_use]
pub fn links(group: &Group) -> (Links, LinkEnds) {
    let others = group.members.keys().filter(|&&id| id != group.me);
    let (senders, ends) = others
        .map(|&id| {
            let (sender, end) = mpsc::channel(QUEUE_MAX);
            ((id, sender), (id, end))
        })
        .unzip();
    (Links(senders), LinkEnds(ends))
}

impl Outbox for Links {
    fn send(&mut self, message: Message) -> bool {
        self.0.get(&message.to).is_some_and(|queue| queue.try_send(message).is_ok())
    }
}

impl LinkEnds {
    /// Starts to carry; a member that joins also meets every other one.
    ///
    /// # Errors
    /// A member's address is not host:port.
    pub fn start(
        self,
        group: &Group,
        admission: Admission,
        handle: &Handle,
        shutdown: &Shutdown,
    ) -> Result<(), Invalid> {
        let birth = admission.birth;
        for (id, queue) in self.0 {
            let channel = transport::channel(&group.members[&id])?;
            let client = RaftClient::new(channel)
                .max_encoding_message_size(MESSAGE_BYTES_MAX)
                .max_decoding_message_size(MESSAGE_BYTES_MAX);
            let (cluster, source) = (group.cluster.clone(), group.me);
            let (target, handle) = (id, handle.clone());
            let link = Link { cluster, source, target, birth, client, handle };
            if admission.joining {
                shutdown.spawn(format!("meeting with member {id}"), link.clone().meet());
            }
            shutdown.spawn(format!("link to member {id}"), link.carry(queue));
        }
        Ok(())
    }
}

#[derive(Clone)]
struct Link {
    cluster: String,
    source: u64,
    target: u64,
    birth: u64,
    client: RaftClient<tonic::transport::Channel>,
    handle: Handle,
}

impl Link {
    /// Ends with the other member's answer.
    async fn meet(mut self) {
        let request = v1::MeetRequest {
            cluster: self.cluster,
            source: self.source,
            target: self.target,
            birth: self.birth,
        };
        let mut waiting = false;
        loop {
            let call = self.client.meet(request.clone());
            match tokio::time::timeout(MEET_TIMEOUT, call).await {
                Ok(Ok(reply)) => {
                    let v1::MeetReply { term, commit } = reply.into_inner();
                    return self.handle.met(self.target, Told { term, commit }).await;
                }
                failed if !std::mem::replace(&mut waiting, true) => {
                    let problem = failed.map_or_else(
                        |_| "no answer".into(),
                        |said| {
                            said.err().map(|status| status.message().to_owned()).unwrap_or_default()
                        },
                    );
                    let member = self.target;
                    warn!(
                        member,
                        problem,
                        "the data directory is new: waiting to be told by every other member what it knows"
                    );
                }
                _ => {}
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    /// Ends when the driver, and with it the other end of the queue, is gone.
    async fn carry(mut self, mut queue: mpsc::Receiver<Message>) {
        while let Some(first) = queue.recv().await {
            let (stream, outgoing) = mpsc::channel(QUEUE_MAX);
            let mut client = self.client.clone();
            let call = client.deliver(ReceiverStream::new(outgoing));
            tokio::pin!(call);
            let mut next = Some(first);
            let ended = loop {
                if let Some(message) = next.take() {
                    self.forward(&stream, message).await;
                }
                tokio::select! {
                    ended = &mut call => break ended,
                    message = queue.recv() => match message {
                        Some(message) => next = Some(message),
                        None => return,
                    },
                }
            };
            if let Err(status) = ended {
                debug!(member = self.target, %status, "the stream to a member broke");
            }
            self.handle.report(Input::Unreachable(self.target)).await;
            tokio::time::sleep(RECONNECT_PAUSE).await;
            // What waited is old by now; Raft sends what is still needed.
            while queue.try_recv().is_ok() {}
        }
    }

    async fn forward(&mut self, stream: &mpsc::Sender<v1::RaftEnvelope>, message: Message) {
        let snapshot = message.get_msg_type() == MessageType::MsgSnapshot;
        let Ok(bytes) = message.write_to_bytes() else {
            warn!(member = self.target, "a raft message cannot be encoded");
            return;
        };
        let sent = stream.try_send(v1::RaftEnvelope {
            cluster: self.cluster.clone(),
            source: self.source,
            target: self.target,
            message: Bytes::from(bytes),
            birth: self.birth,
        });
        if sent.is_err() {
            self.handle.report(Input::Unreachable(self.target)).await;
        }
        if snapshot {
            // Raft then probes from the snapshot's index, and finds out if it did not arrive.
            self.handle.report(Input::SnapshotSent(self.target)).await;
        }
    }
}

/// Takes what other members send.
#[derive(Debug)]
pub struct Receiver {
    group: Group,
    handle: Handle,
    stop: CancellationToken,
}

impl Receiver {
    /// The service of this member.
    #[must_use]
    pub fn service(group: Group, handle: Handle, stop: CancellationToken) -> RaftServer<Receiver> {
        RaftServer::new(Receiver { group, handle, stop })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn check(&self, cluster: &str, source: u64, target: u64) -> Result<(), Invalid> {
        if cluster != self.group.cluster {
            let problem = format!("is {cluster:?}, not {:?}", self.group.cluster);
            return Err(Invalid::new("cluster", problem));
        }
        if target != self.group.me {
            let problem = format!("is {target}, not {}", self.group.me);
            return Err(Invalid::new("target", problem));
        }
        if source == self.group.me || !self.group.members.contains_key(&source) {
            let problem = format!("{source} is no other member of the group");
            return Err(Invalid::new("source", problem));
        }
        Ok(())
    }

    fn open(&self, envelope: &v1::RaftEnvelope) -> Result<Message, Invalid> {
        self.check(&envelope.cluster, envelope.source, envelope.target)?;
        let message = Message::parse_from_bytes(&envelope.message)
            .map_err(|error| Invalid::new("message", error.to_string()))?;
        if message.from != envelope.source || message.to != envelope.target {
            return Err(Invalid::new("message", "is not from the source to the target"));
        }
        Ok(message)
    }
}

#[tonic::async_trait]
impl Raft for Receiver {
    async fn deliver(
        &self,
        request: Request<Streaming<v1::RaftEnvelope>>,
    ) -> Result<Response<v1::DeliverReply>, Status> {
        let mut stream = request.into_inner();
        loop {
            let envelope = tokio::select! {
                envelope = stream.message() => envelope?,
                () = self.stop.cancelled() => None,
            };
            let Some(envelope) = envelope else { return Ok(Response::new(v1::DeliverReply {})) };
            let message = self.open(&envelope).inspect_err(|error| {
                warn!(%error, source = envelope.source, "refused a raft message");
            })?;
            self.handle.deliver(message, envelope.birth).await;
        }
    }

    async fn meet(
        &self,
        request: Request<v1::MeetRequest>,
    ) -> Result<Response<v1::MeetReply>, Status> {
        let v1::MeetRequest { cluster, source, target, birth } = request.into_inner();
        self.check(&cluster, source, target)?;
        if birth == 0 {
            return Err(Invalid::new("birth", "must not be 0").into());
        }
        let told = self.handle.meet(source, birth).await;
        let Told { term, commit } = told.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(v1::MeetReply { term, commit }))
    }
}
