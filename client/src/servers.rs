//! Connections to servers, one set for each life of a server.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;

use downpour_core::id::{ServerRef, SessionId};
use downpour_proto::frame::{Hello, LANES};
use downpour_proto::transport::{self, MESSAGE_BYTES_MAX};
use downpour_proto::v1;
use downpour_proto::v1::shard_client::ShardClient;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use crate::Error;
use crate::framed;
use crate::state::JobState;

/// How pulls and pushes travel. Both carry the same messages to the same port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Frames on plain TCP connections: the faster one.
    #[default]
    Framed,
    /// gRPC, for networks that route HTTP/2 and nothing else.
    Grpc,
}

impl Transport {
    /// Streams to one server that shards are dealt to.
    pub(crate) fn lanes(self) -> u32 {
        match self {
            Transport::Framed => LANES,
            Transport::Grpc => 1,
        }
    }

    /// Size that messages aim at (docs/performance.md has the measurements).
    pub(crate) fn message_bytes(self) -> usize {
        match self {
            Transport::Framed => 64 << 10,
            Transport::Grpc => 1 << 20,
        }
    }
}

impl FromStr for Transport {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "framed" => Ok(Transport::Framed),
            "grpc" => Ok(Transport::Grpc),
            _ => Err(Error::invalid("transport", format!("{name:?} is neither framed nor grpc"))),
        }
    }
}

/// Made when they are first used, dropped when their server is replaced.
#[derive(Debug)]
pub(crate) struct Servers {
    session: SessionId,
    transport: Transport,
    known: Mutex<HashMap<ServerRef, Server>>,
}

/// One life of a server. A cheap clone.
#[derive(Clone, Debug)]
pub(crate) enum Server {
    Framed(Arc<Framed>),
    Grpc(ShardClient<Channel>),
}

#[derive(Debug)]
pub(crate) struct Framed {
    address: String,
    session: SessionId,
    /// By lane.
    pulls: [framed::Pulls; LANES as usize],
}

impl Servers {
    pub(crate) fn new(session: SessionId, transport: Transport) -> Self {
        Servers { session, transport, known: Mutex::default() }
    }

    /// See [`Transport::lanes`].
    pub(crate) fn lanes(&self) -> u32 {
        self.transport.lanes()
    }

    /// Size that messages aim at.
    pub(crate) fn message_bytes(&self) -> usize {
        self.transport.message_bytes()
    }

    /// `None` while the address of this life of the server is unknown.
    pub(crate) fn get(&self, state: &JobState, server: ServerRef) -> Option<Server> {
        let address = state.address(server)?;
        let mut known = self.known.lock();
        if let Some(connected) = known.get(&server) {
            return Some(connected.clone());
        }
        let connected = match self.transport {
            Transport::Framed => {
                let (address, session) = (address.to_owned(), self.session);
                let pulls = Default::default();
                Server::Framed(Arc::new(Framed { address, session, pulls }))
            }
            Transport::Grpc => Server::Grpc(
                ShardClient::new(transport::channel(address).ok()?)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            ),
        };
        known.retain(|&server, _| state.address(server).is_some());
        known.insert(server, connected.clone());
        Some(connected)
    }
}

impl Framed {
    fn hello(&self, lane: u32) -> Hello {
        Hello { session: self.session.0, lane }
    }
}

impl Server {
    /// One pull, of shards of one lane.
    ///
    /// # Errors
    /// What the server says, or that it cannot be reached.
    pub(crate) async fn pull(
        &mut self,
        lane: u32,
        request: v1::PullRequest,
    ) -> Result<v1::PullReply, Status> {
        match self {
            Server::Framed(server) => {
                let pulls = &server.pulls[lane as usize % server.pulls.len()];
                pulls.pull(&server.address, server.hello(lane), request).await
            }
            Server::Grpc(client) => Ok(client.pull(request).await?.into_inner()),
        }
    }

    /// Sends pushes of shards of one lane in order until the connection or the queue ends; `report` gets the replies. Returns why it ended.
    pub(crate) async fn push(
        self,
        lane: u32,
        requests: mpsc::UnboundedReceiver<v1::PushRequest>,
        mut report: impl FnMut(v1::PushReply),
    ) -> Status {
        match self {
            Server::Framed(server) => {
                framed::push(&server.address, server.hello(lane), requests, report).await
            }
            Server::Grpc(mut client) => {
                let replies = client.push(UnboundedReceiverStream::new(requests)).await;
                let mut replies = match replies {
                    Ok(replies) => replies.into_inner(),
                    Err(status) => return status,
                };
                loop {
                    match replies.message().await {
                        Ok(Some(reply)) => report(reply),
                        Ok(None) => return Status::unavailable("the stream ended"),
                        Err(status) => return status,
                    }
                }
            }
        }
    }
}
