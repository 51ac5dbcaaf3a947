//! One member from its options to its end.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use downpour_node::process::Node;
use downpour_proto::net::TcpListener;
use downpour_proto::{threads, transport};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Config;
use crate::liveness::Liveness;
use crate::metrics::{ClusterMetrics, RaftMetrics};
use crate::overseer;
use crate::placer::Placer;
use crate::raft::entry::{self, Directory};
use crate::raft::log::{self, Admission, Disk, Identity, Log};
use crate::raft::peers::{Carrier, Group, Links, Receiver};
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
    let directory = config.data_dir.clone();
    run_on(move || SledDisk::open(&directory), config, listener, node).await
}

/// As [`run`], with the disk that `open` gives.
///
/// # Errors
/// The same.
pub async fn run_on<D: Disk>(
    open: impl FnOnce() -> Result<D, log::Error> + Send + 'static,
    config: Config,
    listener: TcpListener,
    node: Node,
) -> anyhow::Result<()> {
    let stop = node.shutdown.token();
    let beginning = begin(open, &config, &listener);
    let Some(begun) = stop.run_until_cancelled(beginning).await else { return Ok(()) };
    let (log, group) = begun?;
    let admission = log.image().admission;
    let links = Links::default();
    let metrics = RaftMetrics::new(&node.registry);
    let options = config.raft(group.me, group.members.clone());
    let (driver, handle) = Driver::new(options, log, links.clone(), metrics)?;
    let carrier = Carrier::start(&group, &links, admission, &handle, &node.shutdown)?;
    // It blocks on its disk.
    let mut ended = threads::dedicated("raft", driver.run()).context("start raft's thread")?;

    let status = handle.watch_status();
    node.readiness.check("raft", move || match status.borrow().ready {
        true => Ok(()),
        false => Err("no leader yet, not caught up with it, or not yet told by every other member what it knows (the data directory is new)".into()),
    });
    node.readiness.started();
    let liveness = Arc::new(Mutex::new(Liveness::new(Instant::now())));
    let placer = Placer::new(handle.clone());
    let overseeing = overseer::run(
        (handle.clone(), placer.clone()),
        liveness.clone(),
        config.timeouts(),
        overseer::Moves { limits: config.limits(), rebalancing: config.rebalancing() },
        ClusterMetrics::new(&node.registry),
        stop.clone(),
    );
    node.shutdown.spawn("overseer", overseeing);

    node.shutdown
        .spawn("scribe", crate::scribe::run(handle.clone(), liveness.clone(), stop.clone()));
    node.shutdown.spawn("deleter", crate::deleter::run(handle.clone(), stop.clone()));
    let rescuing = crate::rescue::run(handle.clone(), config.patience(), stop.clone());
    node.shutdown.spawn("rescue", rescuing);

    // Raft's streams must last until leadership is handed over: they end after `stop`.
    let closed = CancellationToken::new();
    let _close = closed.clone().drop_guard();
    let (service, operator) = Service::servers(
        handle.clone(),
        liveness,
        group.clone(),
        placer,
        config.times(),
        closed.clone(),
    );
    let receiver = Receiver::service(carrier, closed.clone());
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

/// The member's log, and the group as far as known. A process that joins asks the group who it is, where its directory does not say so.
async fn begin<D: Disk>(
    open: impl FnOnce() -> Result<D, log::Error> + Send + 'static,
    config: &Config,
    listener: &TcpListener,
) -> anyhow::Result<(Log<D>, Group)> {
    let wrong = |problem| anyhow::anyhow!("{problem:?}");
    let own = match &config.common.advertise {
        Some(address) => address.clone(),
        None => listener.local_addr().context("read the address")?.to_string(),
    };
    let cluster = config.cluster.clone();
    if !config.joins().map_err(wrong)? {
        let mut members = config.members().map_err(wrong)?;
        let me = config.member(&members).map_err(wrong)?;
        let address = members.entry(me).or_insert(own).clone();
        let founders: Vec<u64> = members.keys().copied().collect();
        let identity = Identity { cluster, member: me, voters: founders.clone() };
        let group = Group { cluster: identity.cluster.clone(), me, address, members, founders };
        // Alone it can only have forgotten what nobody else knew.
        let fresh = Admission { birth: random(), joining: identity.voters.len() > 1 };
        let opening = threads::blocking(move || Log::open(open()?, &identity, fresh));
        return Ok((opening.await.context("open the log")??, group));
    }
    let (name, drawn) = (cluster.clone(), random());
    let looking = threads::blocking(move || entry::look(open()?, &name, drawn));
    let (disk, birth) = match looking.await.context("open the log")?? {
        Directory::Of(log, Identity { member: me, voters: founders, .. }) => {
            // One that founded its group alone and has others by now.
            let founder = founders.contains(&me).then(|| (me, own.clone()));
            let members = founder.into_iter().collect();
            return Ok((*log, Group { cluster, me, address: own, members, founders }));
        }
        Directory::Nobodys(disk, birth) => (disk, birth),
    };
    let group = entry::ask(&config.join, &cluster, &own, birth).await?;
    let identity = Identity { cluster, member: group.me, voters: group.founders.clone() };
    // Its number is new: there is nothing that it could have forgotten.
    let fresh = Admission { birth, joining: false };
    let opening = threads::blocking(move || Log::open(disk, &identity, fresh));
    Ok((opening.await.context("open the log")??, group))
}
