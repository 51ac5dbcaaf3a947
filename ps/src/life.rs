//! One incarnation of this server: everything that it forgets when it is fenced.
//!
//! The state machines decide; [`Life::with`] runs one call of one of them and carries out the effects.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::{DashMap, Entry};
use downpour_core::id::{Epoch, JobId, NodeId, ServerRef, ShardId};
use downpour_core::optimizer::Staleness;
use downpour_core::routing::ShardRoute;
use downpour_core::view::{JobView, NodeView};
use downpour_node::shutdown::Shutdown;
use downpour_proto::net::TcpStream;
use downpour_proto::transport::{MESSAGE_BYTES_MAX, channel};
use downpour_proto::v1::RetryReason;
use downpour_proto::v1::replica_client::ReplicaClient;
use downpour_proto::{threads, v1};
use foldhash::fast::FixedState;
use parking_lot::RwLock;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{info, warn};

use crate::checkpoint::restore;
use crate::config::Config;
use crate::coordinators::Coordinators;
use crate::hosted::{Hosted, ShardKey};
use crate::lease::{BootTime, Lease};
use crate::link::{Link, lane_of};
use crate::memory::Memory;
use crate::metrics::ServerMetrics;
use crate::pace::Budget;
use crate::rounds_known::RoundsKnown;
use crate::shard::{Declined, Redirect, Role, Shard};
use crate::staleness::StalenessMetrics;
use crate::state::{ShardState, WithoutRoom};
use crate::threads::DataThreads;
use crate::{join, promote};

/// What the lives of one process share.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) config: Config,
    pub(crate) coordinators: Coordinators,
    pub(crate) metrics: ServerMetrics,
    pub(crate) memory: Memory,
    /// Bytes of copies that it sends.
    pub(crate) copies: Budget,
    /// For connections of frames.
    pub(crate) threads: DataThreads,
    pub(crate) shutdown: Shutdown,
}

/// One incarnation of this server.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) me: ServerRef,
    pub(crate) process: Arc<Process>,
    pub(crate) lease: Lease,
    /// Bytes of the records that all shards keep.
    log_bytes: AtomicUsize,
    /// Bytes of contributions to rounds that they keep.
    contributed: AtomicUsize,
    /// What the clocks' shards of jobs said last of their rounds.
    pub(crate) rounds: RoundsKnown,
    /// Cancelled when this incarnation ends.
    pub(crate) token: CancellationToken,
    /// Looked up for each part of a request: names are few and come from the coordinators, so that a simple hash will do.
    shards: DashMap<ShardKey, Arc<Hosted>, FixedState>,
    jobs: RwLock<HashMap<JobId, Arc<JobView>>>,
    /// The watch has said everything that there is.
    pub(crate) heard_all: AtomicBool,
    /// The job that this server is for was there, if only between two looks.
    pub(crate) job_seen: AtomicBool,
    nodes: RwLock<HashMap<NodeId, NodeView>>,
    /// By lane.
    links: DashMap<(ServerRef, u32), Arc<Link>>,
    /// Connections to other servers, by address.
    channels: DashMap<String, Channel>,
    /// Replicas that this incarnation dropped, with the epoch: it can never again be in sync by itself.
    dropped: DashMap<ShardKey, Epoch>,
    /// Shards that are being loaded from a checkpoint.
    restoring: DashMap<(ShardKey, Epoch), ()>,
    /// Turns for those who load.
    pub(crate) loads: Semaphore,
}

impl Life {
    pub(crate) fn new(me: ServerRef, lease: Lease, process: Arc<Process>) -> Arc<Self> {
        let token = process.shutdown.token().child_token();
        Arc::new(Life {
            me,
            process,
            lease,
            log_bytes: AtomicUsize::new(0),
            contributed: AtomicUsize::new(0),
            rounds: RoundsKnown::default(),
            token,
            shards: DashMap::default(),
            jobs: RwLock::default(),
            heard_all: AtomicBool::new(false),
            job_seen: AtomicBool::new(false),
            nodes: RwLock::default(),
            links: DashMap::new(),
            channels: DashMap::new(),
            dropped: DashMap::new(),
            restoring: DashMap::new(),
            loads: Semaphore::new(restore::LOADS_MAX),
        })
    }

    /// Runs a task that ends with this incarnation.
    pub(crate) fn spawn(&self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        let token = self.token.clone();
        self.process.shutdown.spawn(name, async move {
            token.run_until_cancelled(task).await;
        });
    }

    pub(crate) fn hosted(&self, key: ShardKey) -> Option<Arc<Hosted>> {
        self.shards.get(&key).map(|hosted| Arc::clone(&hosted))
    }

    /// All shards, in no order.
    pub(crate) fn all(&self) -> Vec<Arc<Hosted>> {
        self.shards.iter().map(|hosted| Arc::clone(&hosted)).collect()
    }

    /// Whether the records that are kept leave no room for more.
    pub(crate) fn log_is_full(&self) -> bool {
        let kept = self.log_bytes.load(Ordering::Relaxed);
        kept >= self.process.config.log_bytes_max || (kept > 0 && self.process.memory.is_full())
    }

    /// Bytes of contributions to rounds that are open, of all shards or of those of one job.
    pub(crate) fn contributed(&self, job: Option<JobId>) -> usize {
        let Some(job) = job else { return self.contributed.load(Ordering::Relaxed) };
        let of_job = self.shards.iter().filter(|hosted| hosted.key.job == job);
        of_job.map(|hosted| hosted.contributed.load(Ordering::Relaxed)).sum()
    }

    /// Whether contributions of a job with a lower number are kept here.
    pub(crate) fn contributes_before(&self, job: JobId) -> bool {
        let keeps = |hosted: &Hosted| hosted.contributed.load(Ordering::Relaxed) > 0;
        self.shards.iter().any(|hosted| hosted.key.job < job && keeps(&hosted))
    }

    /// A push told what its gradients were computed with.
    pub(crate) fn measured(&self, hosted: &Hosted, staleness: Staleness) {
        let of_job = || {
            let name = self.view(hosted.key.job).map(|view| view.spec.name.clone());
            StalenessMetrics::of_job(&self.process.metrics, &name.unwrap_or_default())
        };
        hosted.staleness.get_or_init(of_job).observe(staleness);
    }

    /// Whether who joins should no longer have records kept for it.
    pub(crate) fn log_is_half_full(&self) -> bool {
        self.log_bytes.load(Ordering::Relaxed) >= self.process.config.log_bytes_max / 2
    }

    /// What a request gets for a shard that is not here.
    pub(crate) fn elsewhere(&self, key: ShardKey) -> Declined {
        let route = self.jobs.read().get(&key.job).and_then(|view| view.route(key.shard).cloned());
        match route {
            Some(ShardRoute { primary: None, .. }) => Declined::Retry(RetryReason::Lost),
            Some(ShardRoute { epoch, primary, .. }) if primary != Some(self.me) => {
                Declined::Redirect(Redirect { epoch, primary })
            }
            _ => Declined::Retry(RetryReason::NotReady),
        }
    }

    /// What a request for another incarnation gets.
    pub(crate) fn another_life(&self, key: ShardKey) -> Redirect {
        let route = self.jobs.read().get(&key.job).and_then(|view| view.route(key.shard).cloned());
        let redirect = |route: ShardRoute| Redirect { epoch: route.epoch, primary: route.primary };
        route.map_or(Redirect::UNKNOWN, redirect)
    }

    /// Where a server is, unless its incarnation is known to be over.
    pub(crate) fn address(&self, server: ServerRef) -> Option<String> {
        let nodes = self.nodes.read();
        let node = nodes.get(&server.node)?;
        (node.server == server).then(|| node.address.clone())
    }

    /// Whether a newer incarnation of the server's node has registered.
    pub(crate) fn replaced(&self, server: ServerRef) -> bool {
        let newest = self.nodes.read().get(&server.node).map(|node| node.server.incarnation);
        newest.is_some_and(|newest| newest > server.incarnation)
    }

    /// Whether the coordinator judged this life of a server dead.
    pub(crate) fn judged(&self, server: ServerRef) -> bool {
        let nodes = self.nodes.read();
        nodes.get(&server.node).is_some_and(|node| node.server == server && !node.alive)
    }

    /// A client of the `Replica` service at `address`.
    pub(crate) fn replica(&self, address: &str) -> Result<ReplicaClient<Channel>, tonic::Status> {
        let channel = match self.channels.get(address).map(|channel| channel.clone()) {
            Some(channel) => channel,
            None => {
                let channel = channel(address)?;
                self.channels.insert(address.to_owned(), channel.clone());
                channel
            }
        };
        Ok(ReplicaClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    pub(crate) fn on_node(&self, node: NodeView) {
        let mut nodes = self.nodes.write();
        let known = nodes.get(&node.server.node).map(|node| node.server.incarnation);
        if known.is_none_or(|known| known <= node.server.incarnation) {
            nodes.insert(node.server.node, node);
        }
    }

    /// The jobs that exist, after the watch said everything: those not in `jobs` were deleted.
    pub(crate) fn retain_jobs(self: &Arc<Self>, jobs: &[JobId]) {
        let gone: Vec<JobId> =
            self.jobs.read().keys().filter(|job| !jobs.contains(job)).copied().collect();
        gone.into_iter().for_each(|job| self.on_deleted(job));
    }

    /// A job was deleted: its shards go.
    pub(crate) fn on_deleted(self: &Arc<Self>, job: JobId) {
        let gone = self.jobs.write().remove(&job);
        if let Some(view) = gone {
            info!(%job, "job deleted");
            StalenessMetrics::forget(&self.process.metrics, &view.spec.name);
        }
        self.rounds.forget(job);
        for hosted in self.all().into_iter().filter(|hosted| hosted.key.job == job) {
            self.with(&hosted, Shard::remove);
        }
        self.dropped.retain(|key, _| key.job != job);
    }

    /// The newest view of a job: shards come, change their roles, and go.
    pub(crate) fn on_view(self: &Arc<Self>, view: JobView) {
        let view = Arc::new(view);
        {
            let mut jobs = self.jobs.write();
            if jobs.get(&view.job).is_some_and(|known| known.version > view.version) {
                return;
            }
            jobs.insert(view.job, Arc::clone(&view));
        }
        for (shard, route) in (0..).map(ShardId).zip(&view.shards) {
            let key = ShardKey { job: view.job, shard };
            if let Some(hosted) = self.hosted(key) {
                self.with(&hosted, |shard| shard.on_view(Arc::clone(&view)));
            }
            // Also one that was just removed, to begin again from a checkpoint.
            if route.in_sync.contains(&self.me) && self.hosted(key).is_none() {
                self.create(key, &view, route);
            }
        }
    }

    /// The newest views of all jobs.
    pub(crate) fn views(&self) -> Vec<Arc<JobView>> {
        self.jobs.read().values().map(Arc::clone).collect()
    }

    /// Whether a shard still has to be loaded here.
    pub(crate) fn wants_restored(&self, key: ShardKey, epoch: Epoch) -> bool {
        let view = self.jobs.read().get(&key.job).map(Arc::clone);
        let order = view.and_then(|view| restore::order(&view, key.shard, self.me));
        let wanted = order.is_some_and(|order| order.epoch == epoch);
        if !wanted {
            self.restoring.remove(&(key, epoch));
        }
        wanted
    }

    /// A shard was loaded: it is served from here on, if it is still this server's to serve.
    pub(crate) fn restored(self: &Arc<Self>, key: ShardKey, epoch: Epoch, state: ShardState) {
        // Under the lock on views, so that none comes between the look and the insertion.
        let jobs = self.jobs.read();
        let view = jobs.get(&key.job).filter(|_| !self.token.is_cancelled());
        if let Some(view) = view
            && restore::order(view, key.shard, self.me).is_some_and(|order| order.epoch == epoch)
        {
            let log_bytes_max = self.process.config.shard_log_bytes_max;
            let shard = Shard::restored(self.me, key.shard, log_bytes_max, Arc::clone(view), state);
            self.shards.insert(key, Hosted::new(key, shard));
            self.dropped.remove(&key);
        }
        drop(jobs);
        self.restoring.remove(&(key, epoch));
        if let Some(hosted) = self.hosted(key) {
            self.with(&hosted, |_| ());
        }
    }

    fn create(self: &Arc<Self>, key: ShardKey, view: &Arc<JobView>, route: &ShardRoute) {
        let dropped = self.dropped.get(&key).map(|epoch| *epoch);
        if let Some(order) = restore::order(view, key.shard, self.me)
            && dropped.is_none_or(|dropped| dropped < order.epoch)
        {
            if self.restoring.insert((key, order.epoch), ()).is_none() {
                restore::start(self, key, view, order);
            }
            return;
        }
        if let Some(epoch) = dropped {
            // Whoever leads the shard gets no answer for it from here, and has this replica removed.
            warn!(job = %key.job, shard = %key.shard, %epoch, route = %route.epoch,
                "listed as in sync, but this replica was dropped: refused");
            return;
        }
        let log_bytes_max = self.process.config.shard_log_bytes_max;
        let shard = Shard::new(self.me, key.shard, log_bytes_max, Arc::clone(view));
        let hosted = Hosted::new(key, shard);
        self.shards.insert(key, Arc::clone(&hosted));
        self.with(&hosted, |_| ());
    }

    /// One call of a shard's state machine, and what follows from it.
    pub(crate) fn with<T>(
        self: &Arc<Self>,
        hosted: &Arc<Hosted>,
        call: impl FnOnce(&mut Shard) -> T,
    ) -> T {
        let mut shard = hosted.shard.lock();
        let (_, kept) = shard.log_size();
        let result = call(&mut shard);
        // Wraps around on the way and never in the sum.
        let grown = shard.log_size().1.wrapping_sub(kept);
        self.log_bytes.fetch_add(grown, Ordering::Relaxed);
        // Most shards are in no round, ever.
        let contributed = shard.state().contributed_bytes();
        let before = hosted.contributed.load(Ordering::Relaxed);
        if contributed != before {
            hosted.contributed.store(contributed, Ordering::Relaxed);
            self.contributed.fetch_add(contributed.wrapping_sub(before), Ordering::Relaxed);
        }
        let effects = shard.take_effects();
        let members: Vec<ServerRef> = match shard.wait_set() {
            Some(_) if effects.send => shard.peers().map(|(peer, _)| peer).collect(),
            _ => Vec::new(),
        };
        let epoch = shard.epoch();
        drop(shard);
        self.process.metrics.not_stored_elements.inc_by(effects.not_stored);
        if let Some(without_room) = effects.without_room {
            self.count_refused(hosted.key, without_room);
        }
        for member in members {
            self.link(member, hosted.key).mark(hosted.key);
        }
        if effects.settle || effects.promote || effects.removed {
            hosted.changed.send_replace(());
        }
        if effects.clocks {
            hosted.clocks.send_replace(());
        }
        if effects.serving {
            info!(job = %hosted.key.job, shard = %hosted.key.shard, %epoch, "serving");
            self.process.metrics.promotions.inc();
        }
        if effects.promote {
            promote::start(self, hosted);
        }
        if effects.copy {
            join::copy(self, hosted);
        }
        if effects.propose {
            join::propose(self, hosted);
        }
        if effects.removed {
            self.drop_replica(hosted, epoch);
        }
        result
    }

    fn count_refused(&self, key: ShardKey, without_room: WithoutRoom) {
        let (variable, example) = without_room.first;
        let view = self.jobs.read().get(&key.job).cloned();
        let variable = view.as_ref().and_then(|view| view.variables.get(variable.0 as usize - 1));
        let name = variable.map_or("", |variable| variable.spec.name.as_str());
        self.process.metrics.refused_keys.inc_by(without_room.keys);
        let job = key.job;
        self.process
            .memory
            .refused(without_room.keys, || format!("{example} of {name:?} of job {job}"));
    }

    fn drop_replica(self: &Arc<Self>, hosted: &Arc<Hosted>, epoch: Epoch) {
        let key = hosted.key;
        // A newer copy may have its place. It is in one of both at any time: a view that finds it in neither would begin with an empty one.
        let drops = |_: &ShardKey, here: &Arc<Hosted>| {
            let same = Arc::ptr_eq(here, hosted);
            if same {
                self.dropped.insert(key, epoch);
            }
            same
        };
        if self.shards.remove_if(&key, drops).is_some() {
            info!(job = %key.job, shard = %key.shard, %epoch, "replica dropped");
        }
        // Millions of rows, whoever else still holds the shell: not on a thread that serves.
        let memory = self.with(hosted, Shard::take_memory);
        threads::blocking(move || drop(memory));
    }

    /// The newest view of a job.
    pub(crate) fn view(&self, job: JobId) -> Option<Arc<JobView>> {
        self.jobs.read().get(&job).cloned()
    }

    /// Makes room for a copy: what is left of one before it goes.
    ///
    /// # Errors
    /// The replica here is a member, or newer than the copy.
    pub(crate) fn clear_for_copy(
        self: &Arc<Self>,
        key: ShardKey,
        epoch: Epoch,
        attempt: u64,
    ) -> Result<(), tonic::Status> {
        if self.dropped.get(&key).is_some_and(|dropped| *dropped > epoch) {
            return Err(tonic::Status::aborted("a later epoch is known here"));
        }
        let Some(hosted) = self.hosted(key) else { return Ok(()) };
        if !hosted.gives_way_to(epoch, attempt) {
            return Err(tonic::Status::already_exists("a member, or a newer copy, is here"));
        }
        self.with(&hosted, Shard::remove);
        Ok(())
    }

    /// Hosts a copy. It may come back into a set although this incarnation dropped the replica before: it is another one.
    ///
    /// # Errors
    /// The replica here is a member, or newer than the copy; or the copy is not wanted any more.
    pub(crate) fn install(
        self: &Arc<Self>,
        hosted: Arc<Hosted>,
        (epoch, attempt): (Epoch, u64),
    ) -> Result<(), tonic::Status> {
        let key = hosted.key;
        self.clear_for_copy(key, epoch, attempt)?;
        match self.shards.entry(key) {
            Entry::Occupied(_) => return Err(tonic::Status::aborted("another copy is here")),
            Entry::Vacant(place) => {
                // Before others see it: they may drop it at once.
                self.dropped.remove(&key);
                drop(place.insert(Arc::clone(&hosted)));
            }
        }
        // What the watch said meanwhile found nothing to tell it to.
        match self.view(key.job) {
            Some(view) => self.with(&hosted, |shard| shard.on_view(view)),
            None => self.with(&hosted, Shard::remove),
        }
        if matches!(hosted.shard.lock().role(), Role::Removed) {
            return Err(tonic::Status::aborted("the shard is not to be copied here any more"));
        }
        Ok(())
    }

    /// The link to a member that a shard keeps to, made on first use.
    pub(crate) fn link(self: &Arc<Self>, peer: ServerRef, key: ShardKey) -> Arc<Link> {
        let lane = lane_of(key);
        if let Some(link) = self.links.get(&(peer, lane)) {
            return Arc::clone(&link);
        }
        let entry = self.links.entry((peer, lane));
        Arc::clone(&entry.or_insert_with(|| Link::start(self, peer, lane)))
    }

    /// A link whose peer is gone and that nobody needs.
    pub(crate) fn unlink(&self, peer: ServerRef, lane: u32) {
        self.links.remove(&(peer, lane));
    }

    /// Has the coordinator remove a member from a shard's in-sync set. Returns at once; the set changes when the committed route was read back.
    pub(crate) fn remove_member(self: &Arc<Self>, hosted: &Arc<Hosted>, member: ServerRef) {
        if hosted.shrinking.swap(true, Ordering::AcqRel) {
            return;
        }
        let (life, hosted) = (Arc::clone(self), Arc::clone(hosted));
        self.spawn("change in-sync set", async move {
            if let Err(status) = life.remove_from_set(&hosted, member).await {
                warn!(job = %hosted.key.job, shard = %hosted.key.shard, %member, %status,
                    "the in-sync set could not be changed");
                // The next round asks again; not at once, for the coordinators may be electing.
                tokio::time::sleep(CHANGE_PAUSE).await;
            }
            hosted.shrinking.store(false, Ordering::Release);
        });
    }

    async fn remove_from_set(
        self: &Arc<Self>,
        hosted: &Arc<Hosted>,
        member: ServerRef,
    ) -> Result<(), tonic::Status> {
        let (mut request, last) = {
            let shard = hosted.shard.lock();
            if !shard.involves(member) {
                return Ok(());
            }
            let last = shard.members().all(|(other, _)| other == member);
            let request = v1::ChangeInSyncRequest {
                job: hosted.key.job.0,
                shard: hosted.key.shard.0,
                epoch: shard.epoch().0,
                set_version: shard.set_version(),
                primary: Some(self.me.into()),
                add: Vec::new(),
                remove: vec![member.into()],
                unreachable: false,
            };
            (request, last)
        };
        if let Some(address) = self.address(member).filter(|_| last) {
            request.unreachable = unreachable(&address).await;
        }
        if self.change_in_sync(hosted, request).await? {
            info!(job = %hosted.key.job, shard = %hosted.key.shard, %member, "removed from the in-sync set");
            self.process.metrics.removed_members.inc();
        }
        Ok(())
    }

    /// Has the coordinator change the set, and takes note of what it is then. True if this request changed it.
    pub(crate) async fn change_in_sync(
        self: &Arc<Self>,
        hosted: &Arc<Hosted>,
        request: v1::ChangeInSyncRequest,
    ) -> Result<bool, tonic::Status> {
        let sent = BootTime::now();
        let reply = (self.process.coordinators)
            .call(CHANGE_PATIENCE, |mut client| {
                let request = request.clone();
                async move { client.change_in_sync(request).await }
            })
            .await?
            .into_inner();
        // The lease first: a primary that is alone from here on needs it.
        self.lease.renew(sent, Duration::from_millis(reply.lease_ms));
        let route = reply.route.ok_or_else(|| tonic::Status::internal("the reply has no route"))?;
        let route = ShardRoute::try_from(route)?;
        self.with(hosted, |shard| shard.on_route(&route));
        Ok(reply.changed)
    }

    /// Why this server is not ready, if it is not.
    pub(crate) fn not_ready(&self) -> Option<String> {
        let waiting =
            |hosted: &Arc<Hosted>| matches!(hosted.shard.lock().role(), Role::Promoting(_));
        let count = self.all().iter().filter(|hosted| waiting(hosted)).count();
        (count > 0).then(|| format!("{count} shards are being promoted"))
    }

    /// This incarnation is over: tasks end, memory is freed.
    pub(crate) fn end(self: Arc<Self>) {
        self.token.cancel();
        for hosted in self.all() {
            self.with(&hosted, Shard::remove);
        }
        self.links.clear();
    }
}

/// Whether no connection to `address` can be made. A stopped process takes connections, and one that is gone has them refused: both are reached.
async fn unreachable(address: &str) -> bool {
    match tokio::time::timeout(REACH_MAX, TcpStream::connect(address)).await {
        Ok(Ok(_)) => false,
        Ok(Err(error)) => error.kind() != io::ErrorKind::ConnectionRefused,
        Err(_) => true,
    }
}

/// Making a connection takes a round trip.
const REACH_MAX: Duration = Duration::from_millis(500);
/// A coordinator that does not commit a change for this long is passed over.
const CHANGE_PATIENCE: Duration = Duration::from_secs(2);
/// Between attempts to change an in-sync set.
const CHANGE_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::unreachable;

    #[tokio::test]
    async fn who_takes_or_refuses_a_connection_is_reached() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        assert!(!unreachable(&address).await, "it never accepts, as one that is stopped");
        drop(listener);
        assert!(!unreachable(&address).await, "nobody listens");
    }
}
