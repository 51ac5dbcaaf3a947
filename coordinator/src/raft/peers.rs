//! Raft's messages between members: one long-lived stream to each other member; answers come on the stream of the other direction.
//!
//! Nothing waits for a slow or absent member: what does not fit its queue is dropped and Raft told so, and Raft sends it again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use downpour_node::shutdown::Shutdown;
use downpour_proto::transport::{self, MESSAGE_BYTES_MAX};
use downpour_proto::v1::raft_client::RaftClient;
use downpour_proto::v1::raft_server::{Raft, RaftServer};
use downpour_proto::{Invalid, v1};
use parking_lot::Mutex;
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{debug, warn};

use super::driver::Outbox;
use super::handle::{Error, Handle, Input};
use super::joining::Told;
use super::log::Admission;
use crate::command::Body;
use crate::service::status;
use crate::state::members::Members;
use crate::state::{Cluster, Reply};

/// Messages that wait for a member.
const QUEUE_MAX: usize = 256;
/// Pause before a broken stream is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// For one answer of a member that is met.
const MEET_TIMEOUT: Duration = Duration::from_secs(2);

/// Links that strangers bring about at most: an envelope says where its source is, and a member that was away may not know it.
const STRANGERS_MAX: usize = 16;

/// Who is in the group, as the options say or as a member that joined was told.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// Name of the cluster.
    pub cluster: String,
    /// This member.
    pub me: u64,
    /// host:port at which the others reach it.
    pub address: String,
    /// host:port of the members as far as known at the start; those that founded the group, where this one is of them.
    pub members: BTreeMap<u64, String>,
    /// Numbers of those that founded it.
    pub founders: Vec<u64>,
}

impl Group {
    /// As the committed state says; as known at the start, where the group was not changed.
    #[must_use]
    pub fn now(&self, cluster: &Cluster) -> Members {
        cluster.members.or_founded(&self.members)
    }
}

/// The queues to the other members. All clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Links(Arc<Mutex<BTreeMap<u64, mpsc::Sender<Message>>>>);

impl Outbox for Links {
    fn send(&mut self, message: Message) -> bool {
        self.0.lock().get(&message.to).is_some_and(|queue| queue.try_send(message).is_ok())
    }
}

/// Carries what is queued, to whoever is in the group.
#[derive(Clone, Debug)]
pub struct Carrier {
    group: Group,
    links: Links,
    birth: u64,
    handle: Handle,
    shutdown: Shutdown,
}

impl Carrier {
    /// Starts to carry to the members that are known; a member that joins also meets every other one.
    ///
    /// # Errors
    /// A member's address is not host:port.
    pub fn start(
        group: &Group,
        links: &Links,
        admission: Admission,
        handle: &Handle,
        shutdown: &Shutdown,
    ) -> Result<Carrier, Invalid> {
        let carrier = Carrier {
            group: group.clone(),
            links: links.clone(),
            birth: admission.birth,
            handle: handle.clone(),
            shutdown: shutdown.clone(),
        };
        let members = group.now(&handle.cluster()).list;
        for (&id, member) in members.iter().filter(|&(&id, _)| id != group.me) {
            let link = carrier.connect(id, &member.address)?;
            if let Some(link) = link.filter(|_| admission.joining) {
                shutdown.spawn(format!("meeting with member {id}"), link.meet());
            }
        }
        shutdown.spawn("changes of the group", carrier.clone().follow());
        Ok(carrier)
    }

    /// A link to a member that has none.
    fn connect(&self, id: u64, address: &str) -> Result<Option<Link>, Invalid> {
        let mut links = self.links.0.lock();
        if id == self.group.me || links.contains_key(&id) {
            return Ok(None);
        }
        let client = client(transport::channel(address)?);
        let Group { cluster, me, address, .. } = self.group.clone();
        let (birth, handle) = (self.birth, self.handle.clone());
        let link = Link { cluster, source: me, address, target: id, birth, client, handle };
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        links.insert(id, sender);
        self.shutdown.spawn(format!("link to member {id}"), link.clone().carry(queue));
        Ok(Some(link))
    }

    /// Ends when the process stops.
    async fn follow(self) {
        let (mut clusters, stop) = (self.handle.watch_cluster(), self.shutdown.token());
        let mut known = 0;
        loop {
            let cluster = clusters.borrow_and_update().clone();
            let members = &cluster.members;
            if members.version > known {
                known = members.version;
                // What was sent to a member that was removed may still have to reach it: its link ends when it is gone.
                for (&id, member) in &members.list {
                    if let Err(problem) = self.connect(id, &member.address) {
                        warn!(member = id, %problem, "a member cannot be reached");
                    }
                }
                self.links.0.lock().retain(|&id, _| !members.was_removed(id));
            }
            tokio::select! {
                changed = clusters.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Somebody this member has not heard of yet talks to it: answers need a way back.
    fn meet_stranger(&self, source: u64, address: &str) {
        if self.links.0.lock().len() < STRANGERS_MAX
            && let Err(problem) = self.connect(source, address)
        {
            debug!(source, %problem, "no way back to a stranger");
        }
    }
}

fn client(channel: tonic::transport::Channel) -> RaftClient<tonic::transport::Channel> {
    RaftClient::new(channel)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
}

#[derive(Clone)]
struct Link {
    cluster: String,
    source: u64,
    address: String,
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
                Ok(Err(status)) if status.code() == Code::FailedPrecondition => {
                    let problem = status.message().to_owned();
                    return self.handle.report(Input::Expelled(problem)).await;
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

    /// Ends when the other end of the queue is gone, with the driver or because the member was removed.
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
                if status.code() == Code::FailedPrecondition {
                    self.handle.report(Input::Removed).await;
                }
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
            address: self.address.clone(),
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
    carrier: Carrier,
    stop: CancellationToken,
}

impl Receiver {
    /// The service of this member.
    #[must_use]
    pub fn service(carrier: Carrier, stop: CancellationToken) -> RaftServer<Receiver> {
        RaftServer::new(Receiver { carrier, stop })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn check_cluster(&self, cluster: &str) -> Result<(), Invalid> {
        let own = &self.carrier.group.cluster;
        if cluster != own {
            return Err(Invalid::new("cluster", format!("is {cluster:?}, not {own:?}")));
        }
        Ok(())
    }

    /// A source that is not known yet is heard: it may have been added while this member was away.
    fn check(&self, cluster: &str, source: u64, target: u64) -> Result<(), Status> {
        self.check_cluster(cluster)?;
        let me = self.carrier.group.me;
        if target != me {
            return Err(Invalid::new("target", format!("is {target}, not {me}")).into());
        }
        if source == me || source == 0 {
            let problem = format!("{source} is no other member of the group");
            return Err(Invalid::new("source", problem).into());
        }
        if self.carrier.handle.cluster().members.was_removed(source) {
            return Err(Status::failed_precondition(format!("member {source} was removed")));
        }
        Ok(())
    }

    fn open(&self, envelope: &v1::RaftEnvelope) -> Result<Message, Status> {
        self.check(&envelope.cluster, envelope.source, envelope.target)?;
        let message = Message::parse_from_bytes(&envelope.message)
            .map_err(|error| Invalid::new("message", error.to_string()))?;
        if message.from != envelope.source || message.to != envelope.target {
            return Err(Invalid::new("message", "is not from the source to the target").into());
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
        let mut known = false;
        loop {
            let envelope = tokio::select! {
                envelope = stream.message() => envelope?,
                () = self.stop.cancelled() => None,
            };
            let Some(envelope) = envelope else { return Ok(Response::new(v1::DeliverReply {})) };
            let message = self.open(&envelope).inspect_err(|status| {
                let problem = status.message();
                warn!(problem, source = envelope.source, "refused a raft message");
            })?;
            if !std::mem::replace(&mut known, true) {
                self.carrier.meet_stranger(envelope.source, &envelope.address);
            }
            self.carrier.handle.deliver(message, envelope.birth).await;
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
        let told = self.carrier.handle.meet(source, birth).await;
        let Told { term, commit } = told.map_err(|error| match error {
            Error::Refused(refused) => Status::failed_precondition(refused.to_string()),
            error => Status::unavailable(error.to_string()),
        })?;
        Ok(Response::new(v1::MeetReply { term, commit }))
    }

    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::JoinReply>, Status> {
        let request = request.into_inner();
        self.check_cluster(&request.cluster)?;
        let Carrier { group, handle, .. } = &self.carrier;
        let begun = handle.propose(Body::BeginMember(request)).await;
        let reply = begun.map_err(|error| status::of(error, &handle.cluster(), group))?;
        let Reply::Member { id: member, .. } = reply else { return Err(status::mismatch(&reply)) };
        let members = group.now(&handle.cluster()).list.into_iter();
        let members = members.map(|(id, member)| v1::GroupMember { id, address: member.address });
        let (founders, members) = (group.founders.clone(), members.collect());
        Ok(Response::new(v1::JoinReply { member, founders, members }))
    }
}
