//! Calls to the coordinators: whoever answers says where the leader is.

use std::collections::HashMap;
use std::time::Duration;

use downpour_proto::group::{Connection, Known};
use downpour_proto::transport::{LEADER_METADATA, MESSAGE_BYTES_MAX, channel};
use downpour_proto::v1::coordinator_client::CoordinatorClient;
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A client of the coordinators as a group.
#[derive(Debug)]
pub(crate) struct Coordinators {
    given: Vec<String>,
    members: Mutex<Members>,
    channels: Mutex<HashMap<String, Channel>>,
    /// Told with each call: who knows less of the group refuses it.
    known: Known,
    /// Who is asked first.
    leader: watch::Sender<String>,
}

/// Where they are.
#[derive(Debug)]
struct Members {
    /// As the group last said, then those that were given and it did not name.
    addresses: Vec<String>,
    /// Position in the coordinators' log of what it said.
    version: u64,
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
        let members = Mutex::new(Members { addresses: addresses.clone(), version: 0 });
        let known = Known::default();
        Ok(Coordinators { given: addresses, members, channels: Mutex::default(), known, leader })
    }

    /// The group says where its members are, as of this position in its log.
    pub(crate) fn learn(&self, addresses: Vec<String>, version: u64) {
        let known = addresses.into_iter().filter(|address| channel(address).is_ok());
        let mut addresses: Vec<String> = known.collect();
        let mut members = self.members.lock();
        if addresses.is_empty() || version < members.version {
            return;
        }
        // Those that were given come last: who was replaced one by one is found there at worst.
        let given = self.given.iter().filter(|one| !addresses.contains(one)).cloned();
        let given: Vec<String> = given.collect();
        addresses.extend(given);
        *members = Members { addresses, version };
        self.known.raise(version);
        let Members { addresses, .. } = &*members;
        let leader = self.leader.borrow().clone();
        self.channels.lock().retain(|one, _| addresses.contains(one) || *one == leader);
    }

    /// The leader as far as known, and its changes.
    pub(crate) fn leader(&self) -> watch::Receiver<String> {
        self.leader.subscribe()
    }

    /// A client of one member.
    pub(crate) fn client(&self, address: &str) -> Result<CoordinatorClient<Connection>, Status> {
        Ok(client(self.connection(address)?))
    }

    fn connection(&self, address: &str) -> Result<Connection, Status> {
        let mut channels = self.channels.lock();
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => channel(address)?,
        };
        channels.insert(address.to_owned(), channel.clone());
        Ok(self.known.over(channel))
    }

    /// Asks the next member from now on, after `failed` did not answer.
    pub(crate) fn pass_over(&self, failed: &str) {
        let next = {
            let addresses = &self.members.lock().addresses;
            let index = addresses.iter().position(|address| address == failed);
            addresses[index.map_or(0, |index| (index + 1) % addresses.len())].clone()
        };
        self.follow(failed, &next);
    }

    /// One call, at the leader: each member is tried about once, and passed over when it is silent for `patience`. What is retried, and for how
    /// long, is the caller's to say.
    ///
    /// # Errors
    /// The leader's refusal, or the last failure to reach one.
    pub(crate) async fn call<T, F>(
        &self,
        patience: Duration,
        call: impl Fn(CoordinatorClient<Connection>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.at_leader(patience, |connection| call(client(connection))).await
    }

    /// As [`call`](Self::call), to another service of the same members.
    pub(crate) async fn at_leader<T, F>(
        &self,
        patience: Duration,
        call: impl Fn(Connection) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut last = Status::unavailable("no coordinator was asked");
        let count = self.members.lock().addresses.len();
        for _ in 0..=count {
            let address = self.leader.borrow().clone();
            let called = tokio::time::timeout(patience, call(self.connection(&address)?)).await;
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

fn client(connection: Connection) -> CoordinatorClient<Connection> {
    CoordinatorClient::new(connection)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn members_that_were_replaced_are_asked_last_and_old_news_of_them_is_no_news() {
        let coordinators = Coordinators::new(vec!["a:1".into(), "b:1".into()]).expect("addresses");
        let known = || coordinators.members.lock().addresses.clone();
        coordinators.learn(vec!["b:1".into(), "c:1".into(), "no address".into()], 7);
        assert_eq!(known(), ["b:1", "c:1", "a:1"]);
        coordinators.learn(vec!["a:1".into()], 6);
        coordinators.learn(Vec::new(), 9);
        assert_eq!(known(), ["b:1", "c:1", "a:1"]);
        assert_eq!(coordinators.known.now(), 7, "whoever knows less is not believed");
        coordinators.pass_over("a:1");
        assert_eq!(*coordinators.leader().borrow(), "b:1");
    }
}
