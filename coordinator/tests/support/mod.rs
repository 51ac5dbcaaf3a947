//! A coordinator group in one process: real gRPC on loopback, real logs in temporary directories, and a proxy on each link between two
//! members that can be cut.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use downpour_coordinator::Config;
use downpour_node::config::Common;
use downpour_node::process::Node;
use downpour_proto::group::{Connection, Known};
use downpour_proto::transport;
use downpour_proto::v1;
use downpour_proto::v1::coordinator_client::CoordinatorClient;
use downpour_proto::v1::operator_client::OperatorClient;
use downpour_proto::v1::raft_client::RaftClient;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

pub type Client = CoordinatorClient<Connection>;

/// Longest wait for anything. No test waits for this long where all is well.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A one-way link: source connects here instead of to the target.
struct Link {
    address: String,
    up: watch::Sender<bool>,
}

impl Link {
    async fn new(target: String) -> Link {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (up, seen) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((mut incoming, _)) = listener.accept().await {
                let (mut seen, target) = (seen.clone(), target.clone());
                tokio::spawn(async move {
                    if !*seen.borrow_and_update() {
                        return;
                    }
                    let Ok(mut outgoing) = TcpStream::connect(&target).await else { return };
                    let _ = outgoing.set_nodelay(true);
                    let _ = incoming.set_nodelay(true);
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut incoming, &mut outgoing) => {}
                        // A cut link drops its connections.
                        _ = seen.wait_for(|up| !up) => {}
                    }
                });
            }
        });
        Link { address, up }
    }
}

struct Running {
    node: Node,
    task: JoinHandle<anyhow::Result<()>>,
}

struct Member {
    address: String,
    config: Config,
    running: Option<Running>,
}

pub struct Group {
    members: BTreeMap<u64, Member>,
    links: BTreeMap<(u64, u64), Link>,
    directory: TempDir,
    /// Where all servers that are registered listen, and say nothing.
    servers: std::net::TcpListener,
}

impl Group {
    /// Starts `count` members.
    pub async fn start(count: u64) -> Group {
        Self::start_with(count, |_| {}).await
    }

    /// Starts `count` members with other options than the tests' own.
    pub async fn start_with(count: u64, adjust: impl Fn(&mut Config)) -> Group {
        let directory = tempfile::tempdir().unwrap();
        let mut listeners = BTreeMap::new();
        for id in 1..=count {
            listeners.insert(id, TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: BTreeMap<u64, String> = (listeners.iter())
            .map(|(&id, listener)| (id, listener.local_addr().unwrap().to_string()))
            .collect();
        let mut links = BTreeMap::new();
        for source in 1..=count {
            for target in (1..=count).filter(|&target| target != source) {
                links.insert((source, target), Link::new(addresses[&target].clone()).await);
            }
        }
        let mut members = BTreeMap::new();
        for id in 1..=count {
            let reach = |other: &u64| match links.get(&(id, *other)) {
                Some(link) => link.address.clone(),
                None => addresses[other].clone(),
            };
            let mut config = Config {
                id,
                peers: addresses.keys().map(|other| format!("{other}={}", reach(other))).collect(),
                data_dir: PathBuf::from(directory.path()).join(id.to_string()),
                raft_tick_ms: 15,
                common: Common { listen: addresses[&id].clone(), ..Common::default() },
                ..Config::default()
            };
            adjust(&mut config);
            let address = addresses[&id].clone();
            members.insert(id, Member { address, config, running: None });
        }
        let servers = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut group = Group { members, links, directory, servers };
        for (id, listener) in listeners {
            group.run(id, listener);
        }
        group
    }

    fn run(&mut self, id: u64, listener: TcpListener) {
        let member = self.members.get_mut(&id).unwrap();
        let (node, config) = (Node::default(), member.config.clone());
        let running = node.clone();
        let task = tokio::spawn(async move {
            let result = downpour_coordinator::run(config, listener, running).await;
            if let Err(error) = &result {
                eprintln!("member {id}: {error:#}");
            }
            result
        });
        member.running = Some(Running { node, task });
    }

    /// Starts a process that joins the group of the others, with a directory of its own; gives its address.
    pub async fn join(&mut self, id: u64) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let config = Config {
            join: self.members.values().map(|member| member.address.clone()).collect(),
            data_dir: PathBuf::from(self.directory.path()).join(id.to_string()),
            raft_tick_ms: 15,
            common: Common { listen: address.clone(), ..Common::default() },
            ..Config::default()
        };
        self.members.insert(id, Member { address: address.clone(), config, running: None });
        self.run(id, listener);
        address
    }

    pub fn ids(&self) -> Vec<u64> {
        self.members.keys().copied().collect()
    }

    /// Ends a member as SIGTERM does.
    pub async fn stop(&mut self, id: u64) -> anyhow::Result<()> {
        let running = self.members.get_mut(&id).unwrap().running.take().unwrap();
        running.node.shutdown.token().cancel();
        let result = tokio::time::timeout(DEADLINE, running.task).await.expect("stops in time");
        tokio::time::timeout(DEADLINE, running.node.shutdown.finish(DEADLINE)).await.unwrap()?;
        result.unwrap()
    }

    /// Gives a member other options, from its next start on.
    pub fn adjust(&mut self, id: u64, adjust: impl FnOnce(&mut Config)) {
        adjust(&mut self.members.get_mut(&id).unwrap().config);
    }

    /// How a member that cannot go on ended.
    pub async fn ended(&mut self, id: u64) -> anyhow::Result<()> {
        let running = self.members.get_mut(&id).unwrap().running.take().unwrap();
        tokio::time::timeout(DEADLINE, running.task).await.expect("ends in time").unwrap()
    }

    /// Starts a member that was stopped, where it was.
    pub async fn restart(&mut self, id: u64) {
        let address = self.members[&id].address.clone();
        let listener = eventually("the port is free", || TcpListener::bind(&address)).await;
        self.run(id, listener);
    }

    /// Waits until a member says that it is ready.
    pub async fn ready(&self, id: u64) {
        let running = self.members[&id].running.as_ref().unwrap();
        let ready = || async {
            let reasons = running.node.readiness.reasons();
            if reasons.is_empty() { Ok(()) } else { Err(reasons) }
        };
        eventually("it is ready", ready).await;
    }

    pub fn data_dir(&self, id: u64) -> PathBuf {
        self.members[&id].config.data_dir.clone()
    }

    /// Cuts or restores both links between two members.
    pub fn link(&self, one: u64, other: u64, up: bool) {
        for ends in [(one, other), (other, one)] {
            self.links[&ends].up.send_replace(up);
        }
    }

    /// Cuts or restores all links of a member.
    pub fn isolate(&self, id: u64, isolated: bool) {
        for other in self.ids().into_iter().filter(|&other| other != id) {
            self.link(id, other, !isolated);
        }
    }

    pub fn client(&self, id: u64) -> Client {
        self.client_that_knows(id, 0)
    }

    /// Of a caller that heard of a change of the group at this position.
    pub fn client_that_knows(&self, id: u64, version: u64) -> Client {
        let channel = transport::channel(&self.members[&id].address).unwrap();
        let known = Known::default();
        known.raise(version);
        CoordinatorClient::new(known.over(channel))
            .max_decoding_message_size(transport::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(transport::MESSAGE_BYTES_MAX)
    }

    pub fn operator(&self, id: u64) -> OperatorClient<Channel> {
        OperatorClient::new(transport::channel(&self.members[&id].address).unwrap())
    }

    /// Asks all members in turn until one answers otherwise than UNAVAILABLE.
    pub async fn operate<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(
        &self,
        request: impl Fn(OperatorClient<Channel>) -> F,
    ) -> Result<T, Status> {
        let running = self.members.iter().filter(|(_, member)| member.running.is_some());
        let clients: Vec<_> = running.map(|(&id, _)| self.operator(id)).collect();
        eventually("somebody answers", || async {
            for client in &clients {
                match request(client.clone()).await {
                    Ok(reply) => return Ok(Ok(reply.into_inner())),
                    Err(status) if transient(&status) => {}
                    Err(status) => return Ok(Err(status)),
                }
            }
            Err("all are unavailable")
        })
        .await
    }

    pub fn raft_client(&self, id: u64) -> RaftClient<Channel> {
        RaftClient::new(transport::channel(&self.members[&id].address).unwrap())
    }

    /// Which member leads, once one among these answers a linearizable read.
    pub async fn leader_among(&self, ids: &[u64]) -> u64 {
        let clients: Vec<(u64, Client)> = ids.iter().map(|&id| (id, self.client(id))).collect();
        eventually("a leader answers", || async {
            for (id, client) in &clients {
                if get_cluster(client).await.is_ok() {
                    return Ok(*id);
                }
            }
            Err("nobody leads")
        })
        .await
    }

    pub async fn leader(&self) -> u64 {
        self.leader_among(&self.ids()).await
    }

    /// Asks all members in turn until one answers otherwise than UNAVAILABLE.
    pub async fn ask<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(
        &self,
        request: impl Fn(Client) -> F,
    ) -> Result<T, Status> {
        let clients: Vec<Client> = self.ids().iter().map(|&id| self.client(id)).collect();
        eventually("somebody answers", || async {
            for client in &clients {
                match request(client.clone()).await {
                    Ok(reply) => return Ok(Ok(reply.into_inner())),
                    Err(status) if transient(&status) => {}
                    Err(status) => return Ok(Err(status)),
                }
            }
            Err("all are unavailable")
        })
        .await
    }

    pub async fn register(&self, name: &str, zone: &str) -> v1::ServerRef {
        let request = v1::RegisterServerRequest {
            name: name.into(),
            address: self.servers.local_addr().unwrap().to_string(),
            zone: zone.into(),
            request_id: unique(),
            origin: "here".into(),
            ..Default::default()
        };
        let reply = self.ask(async |mut client| client.register_server(request.clone()).await);
        reply.await.unwrap().server.unwrap()
    }

    /// From now on connections to the servers are refused.
    pub fn close_servers(&mut self) {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        self.servers = nobody;
    }

    pub async fn create_job(&self, name: &str, shards: u32, replicas: u32) -> v1::JobView {
        let spec = v1::JobSpec { name: name.into(), shards, replicas, min_in_sync: 1, seed: 1 };
        let request = v1::CreateJobRequest { spec: Some(spec) };
        let reply = self.ask(async |mut client| client.create_job(request.clone()).await);
        reply.await.unwrap().view.unwrap()
    }
}

pub async fn get_cluster(client: &Client) -> Result<v1::GetClusterReply, Status> {
    client.clone().get_cluster(v1::GetClusterRequest {}).await.map(tonic::Response::into_inner)
}

/// Whether asking again may help.
pub fn transient(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
    )
}

/// An id that no other call in this process has.
pub fn unique() -> String {
    static LAST: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    format!("request-{}", LAST.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
}

/// Tries until it succeeds.
pub async fn eventually<T, E: std::fmt::Debug, F: Future<Output = Result<T, E>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let started = tokio::time::Instant::now();
    loop {
        match tokio::time::timeout_at(started + DEADLINE, attempt()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(error)) if started.elapsed() > DEADLINE => panic!("{what}: {error:?}"),
            Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(_) => panic!("{what}: no answer in time"),
        }
    }
}
