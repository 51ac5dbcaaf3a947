//! One member from its options to its end.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use downpour_node::process::Node;
use downpour_proto::transport;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Config;
use crate::liveness::Liveness;
use crate::metrics::{ClusterMetrics, RaftMetrics};
use crate::overseer;
use crate::raft::log::{Admission, Identity, Log};
use crate::raft::peers::{self, Group, Links, Receiver};
use crate::raft::sled_disk::SledDisk;
use crate::raft::{Driver, Fatal, Handle};
use crate::service::Service;

/// How long connections have to end after their streams have ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a member until the node's shutdown token is cancelled (leadership is handed over first) or it cannot go on.
///
/// # Errors
/// The data directory cannot be used, or the member cannot keep its promises: see [`Fatal`].
pub async fn run(config: Config, listener: TcpListener, node: Node) -> anyhow::Result<()> {
    let group = group(&config, &listener)?;
    let identity = Identity {
        cluster: group.cluster.clone(),
        member: group.me,
        voters: group.members.keys().copied().collect(),
    };
    // Alone it can only have forgotten what nobody else knew.
    let fresh = Admission { birth: random(), joining: identity.voters.len() > 1 };
    let directory = config.data_dir.clone();
    let opening = tokio::task::spawn_blocking(move || {
        Log::open(SledDisk::open(&directory)?, &identity, fresh)
    });
    let log = opening.await.context("open the log")??;
    let admission = log.image().admission;
    let (links, link_ends) = peers::links(&group);
    let metrics = RaftMetrics::new(&node.registry);
    let (driver, handle) = Driver::new(config.raft(), log, links, metrics)?;
    let mut ended = spawn_driver(driver)?;

    let status = handle.watch_status();
    node.readiness.check("raft", move || match status.borrow().ready {
        true => Ok(()),
        false => Err("no leader yet, not caught up with it, or not yet told by every other member what it knows (the data directory is new)".into()),
    });
    node.readiness.started();
    let stop = node.shutdown.token();
    link_ends.start(&group, admission, &handle, &node.shutdown)?;
    let liveness = Arc::new(Mutex::new(Liveness::new(Instant::now())));
    let overseeing = overseer::run(
        handle.clone(),
        liveness.clone(),
        config.timeouts(),
        overseer::Moves { limits: config.limits(), rebalancing: config.rebalancing() },
        ClusterMetrics::new(&node.registry),
        stop.clone(),
    );
    node.shutdown.spawn("overseer", overseeing);

    node.shutdown.spawn("scribe", crate::scribe::run(handle.clone(), stop.clone()));
    let rescuing = crate::rescue::run(handle.clone(), config.patience(), stop.clone());
    node.shutdown.spawn("rescue", rescuing);

    // Raft's streams must last until leadership is handed over: they end after `stop`.
    let closed = CancellationToken::new();
    let _close = closed.clone().drop_guard();
    let (service, operator) =
        Service::servers(handle.clone(), liveness, group.clone(), config.times(), closed.clone());
    let receiver = Receiver::service(group.clone(), handle.clone(), closed.clone());
    let serving = transport::server_builder()
        .trace_fn(downpour_node::trace::server_span)
        .add_service(service)
        .add_service(operator)
        .add_service(receiver)
        .serve_with_incoming_shutdown(
            transport::incoming(listener),
            closed.clone().cancelled_owned(),
        );
    let serving = node.shutdown.spawn("gRPC", serving);
    info!(member = group.me, members = ?group.members, cluster = group.cluster, "serving");

    let result = tokio::select! {
        ended = &mut ended => ended.context("raft's thread panicked").flatten_fatal(),
        () = stop.cancelled() => leave(&handle, ended).await,
    };
    closed.cancel();
    match tokio::time::timeout(CLOSE_TIMEOUT, serving).await {
        Ok(served) => served.context("gRPC")?.context("serve gRPC")?,
        Err(_) => warn!("some connections did not close in time"),
    }
    result
}

/// Not 0, and different in all likelihood each time: each of the standard library's hash builders has a key of its own, from the system.
fn random() -> u64 {
    RandomState::new().hash_one(std::process::id()) | 1
}

async fn leave(handle: &Handle, ended: oneshot::Receiver<Result<(), Fatal>>) -> anyhow::Result<()> {
    handle.leave().await;
    ended.await.context("raft's thread panicked").flatten_fatal()
}

trait FlattenFatal {
    fn flatten_fatal(self) -> anyhow::Result<()>;
}

impl FlattenFatal for anyhow::Result<Result<(), Fatal>> {
    fn flatten_fatal(self) -> anyhow::Result<()> {
        Ok(self??)
    }
}

fn group(config: &Config, listener: &TcpListener) -> anyhow::Result<Group> {
    let mut members = config.members().map_err(|problem| anyhow::anyhow!("{problem:?}"))?;
    if members.is_empty() {
        let address = match &config.common.advertise {
            Some(address) => address.clone(),
            None => listener.local_addr().context("read the address")?.to_string(),
        };
        members.insert(config.id, address);
    }
    Ok(Group { cluster: config.cluster.clone(), me: config.id, members })
}

/// The driver blocks on its disk: it gets a thread of its own.
fn spawn_driver(
    driver: Driver<SledDisk, Links>,
) -> anyhow::Result<oneshot::Receiver<Result<(), Fatal>>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .context("start raft's runtime")?;
    let (end, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("raft".into())
        .spawn(move || {
            let result = runtime.block_on(driver.run());
            // Nobody waits any more where the whole process is going down.
            let _ = end.send(result);
        })
        .context("start raft's thread")?;
    Ok(ended)
}
