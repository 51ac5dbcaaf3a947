//! Calls to the coordinators: whoever answers says where the leader is.

use std::collections::HashMap;
use std::time::Duration;

use downpour_proto::transport::{LEADER_METADATA, MESSAGE_BYTES_MAX, channel};
use downpour_proto::v1::coordinator_client::CoordinatorClient;
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A client of the coordinators as a group.
#[derive(Debug)]
pub(crate) struct Coordinators {
    addresses: Vec<String>,
    channels: Mutex<HashMap<String, Channel>>,
    /// Who is asked first.
    leader: watch::Sender<String>,
}

impl Coordinators {
    /// # Errors
    /// No address is given, or one is not host:port.
    pub(crate) fn new(addresses: Vec<String>) -> anyhow::Result<Self> {
        for address in &addresses {
            channel(address)?;
        }
        let first = addresses.first().cloned();
        let first = first.ok_or_else(|| anyhow::anyhow!("coordinators: none is given"))?;
        let leader = watch::Sender::new(first);
        Ok(Coordinators { addresses, channels: Mutex::default(), leader })
    }

    /// The leader as far as known, and its changes.
    pub(crate) fn leader(&self) -> watch::Receiver<String> {
        self.leader.subscribe()
    }

    /// A client of one member.
    pub(crate) fn client(&self, address: &str) -> Result<CoordinatorClient<Channel>, Status> {
        Ok(client(self.channel(address)?))
    }

    fn channel(&self, address: &str) -> Result<Channel, Status> {
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = channel(address)?;
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// Asks the next member from now on, after `failed` did not answer.
    pub(crate) fn pass_over(&self, failed: &str) {
        let index = self.addresses.iter().position(|address| address == failed);
        let next = index.map_or(0, |index| (index + 1) % self.addresses.len());
        self.follow(failed, &self.addresses[next]);
    }

    /// One call, at the leader: each member is tried about once, and passed over when it is silent for `patience`. What is retried, and for how
    /// long, is the caller's to say.
    ///
    /// # Errors
    /// The leader's refusal, or the last failure to reach one.
    pub(crate) async fn call<T, F>(
        &self,
        patience: Duration,
        call: impl Fn(CoordinatorClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.at_leader(patience, |channel| call(client(channel))).await
    }

    /// As [`call`](Self::call), to another service of the same members.
    pub(crate) async fn at_leader<T, F>(
        &self,
        patience: Duration,
        call: impl Fn(Channel) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut last = Status::unavailable("no coordinator was asked");
        for _ in 0..=self.addresses.len() {
            let address = self.leader.borrow().clone();
            let called = tokio::time::timeout(patience, call(self.channel(&address)?)).await;
            last = match called {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("coordinator {address} is silent")),
            };
            match last.code() {
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {}
                // What tonic makes of a connection that broke in the middle.
                Code::Unknown | Code::Internal => {}
                _ => return Err(last),
            }
            match last.metadata().get(LEADER_METADATA).and_then(|leader| leader.to_str().ok()) {
                Some(leader) if leader != address && channel(leader).is_ok() => {
                    self.follow(&address, leader);
                }
                _ => self.pass_over(&address),
            }
        }
        Err(last)
    }

    /// Unless another call changed it meanwhile.
    fn follow(&self, from: &str, to: &str) {
        self.leader.send_if_modified(|leader| {
            let change = leader == from && leader != to;
            if change {
                to.clone_into(leader);
            }
            change
        });
    }
}

fn client(channel: Channel) -> CoordinatorClient<Channel> {
    CoordinatorClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}
