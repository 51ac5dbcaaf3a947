//! This server as a member of the cluster: it registers, heartbeats, watches, and starts anew when it was given up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use downpour_core::id::{JobId, ServerRef};
use downpour_core::view::{JobView, NodeView};
use downpour_proto::v1::operator_client::OperatorClient;
use downpour_proto::{Invalid, convert, v1};
use tokio::time::MissedTickBehavior;
use tonic::{Code, Status};
use tracing::{error, info, warn};

use crate::checkpoint::take;
use crate::for_job;
use crate::keeper;
use crate::lease::{BootTime, Lease};
use crate::life::{Life, Process};
use crate::report::Reporter;

/// Between attempts to reach a coordinator.
const PAUSE: Duration = Duration::from_millis(100);
/// A coordinator that does not commit a registration for this long is passed over.
pub(crate) const REGISTER_PATIENCE: Duration = Duration::from_secs(2);
/// A coordinator that does not answer a heartbeat for this long is passed over: short, for a leader that hangs must not cost this server its life.
const HEARTBEAT_PATIENCE: Duration = Duration::from_millis(500);
/// The incarnation that serves now, if there is one.
pub(crate) type Current = Arc<ArcSwapOption<Life>>;

/// What this process says when it registers.
#[derive(Debug)]
pub(crate) struct Registering {
    pub(crate) address: String,
    pub(crate) origin: String,
}

/// What it is told then.
struct Registered {
    me: ServerRef,
    heartbeat: Duration,
    lease: Lease,
}

/// Registers and lives, again and again, until the process stops. The first registration decides whether this server can work at all.
pub(crate) async fn run(
    process: Arc<Process>,
    registering: Registering,
    current: Current,
) -> anyhow::Result<()> {
    let token = process.shutdown.token();
    // Once: what an operator says of this process outlasts its incarnations.
    let for_job = !process.config.for_job.is_empty();
    // One that ends with its job is cordoned then, for ever.
    let mut uncordon = process.config.uncordon || for_job;
    if for_job {
        let ends = for_job::run(Arc::clone(&process), current.clone());
        let token = process.shutdown.token();
        process.shutdown.spawn("for job", async move { token.run_until_cancelled(ends).await });
    }
    while let Some(registered) = token.run_until_cancelled(register(&process, &registering)).await {
        let Registered { me, heartbeat, lease } = registered?;
        if std::mem::take(&mut uncordon) {
            process.shutdown.spawn("uncordon", open(Arc::clone(&process), me));
        }
        info!(%me, address = registering.address, "registered");
        let life = Life::new(me, lease, Arc::clone(&process));
        current.store(Some(Arc::clone(&life)));
        life.spawn("keep", keeper::run(Arc::clone(&life)));
        life.spawn("checkpoint", take::run(Arc::clone(&life)));
        life.spawn("watch", watch(Arc::clone(&life)));
        let fenced = token.run_until_cancelled(heartbeats(&life, heartbeat)).await;
        current.store(None);
        life.end();
        if fenced.is_some() {
            warn!(%me, "given up by the coordinator: registering anew, with nothing");
        }
    }
    Ok(())
}

/// Until a leader answers. An answer that asking again cannot change is an error.
async fn register(process: &Process, registering: &Registering) -> anyhow::Result<Registered> {
    let request = v1::RegisterServerRequest {
        name: process.config.name.clone(),
        address: registering.address.clone(),
        zone: process.config.zone.clone(),
        request_id: request_id(),
        origin: registering.origin.clone(),
        exclusive_name: process.config.exclusive_name,
        ..v1::RegisterServerRequest::default()
    };
    // Before the first attempt: any of them may be the one that is committed.
    let sent = BootTime::now();
    loop {
        let call = process.coordinators.call(REGISTER_PATIENCE, |mut client| {
            let request = request.clone();
            async move { client.register_server(request).await }
        });
        match call.await {
            Ok(reply) => {
                let v1::RegisterServerReply { server, heartbeat_ms, isolation_ms } =
                    reply.into_inner();
                let me = convert::server("server", server)?;
                let heartbeat = Duration::from_millis(heartbeat_ms.max(1));
                let lease = Lease::new(sent, Duration::from_millis(isolation_ms));
                return Ok(Registered { me, heartbeat, lease });
            }
            Err(status) if refused_for_good(status.code()) => {
                anyhow::bail!("register as {:?}: {}", process.config.name, status.message());
            }
            Err(status) => {
                warn!(%status, "no coordinator registers this server yet");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn refused_for_good(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Unimplemented
    )
}

/// Whether the cluster gives this server copies from now on.
pub(crate) async fn admit(
    process: &Process,
    me: ServerRef,
    admission: v1::Admission,
) -> Result<(), Status> {
    let request = v1::AdmitNodeRequest { node: me.node.0, admission: admission.into() };
    let call = process.coordinators.at_leader(REGISTER_PATIENCE, |connection| async move {
        OperatorClient::new(connection).admit_node(request).await
    });
    call.await.map(drop)
}

/// Until the cluster gives this server copies, whatever it was told of the name before.
async fn open(process: Arc<Process>, me: ServerRef) {
    let asking = async {
        loop {
            match admit(&process, me, v1::Admission::Open).await {
                Ok(()) => return info!(%me, "takes copies"),
                Err(status) => warn!(%status, "not known to take copies yet"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    process.shutdown.token().run_until_cancelled(asking).await;
}

/// Unique enough: this process, at this moment of this machine's life.
fn request_id() -> String {
    format!("{}-{:?}", std::process::id(), BootTime::now())
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(64)
        .collect()
}

/// Until the coordinator says that this incarnation is over.
async fn heartbeats(life: &Arc<Life>, interval: Duration) {
    let mut beats = tokio::time::interval(interval);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reporter = Reporter::new(Instant::now());
    loop {
        beats.tick().await;
        let (reports, load) = reporter.due(life, Instant::now());
        let request = v1::HeartbeatRequest { server: Some(life.me.into()), reports, load };
        let calling = life.process.coordinators.call(HEARTBEAT_PATIENCE, |mut client| {
            let request = request.clone();
            // Each attempt is a request of its own: the lease counts from its sending.
            let sent = BootTime::now();
            async move { Ok((sent, client.heartbeat(request).await?.into_inner())) }
        });
        match calling.await {
            Ok((_, reply)) if reply.fenced => return,
            Ok((sent, reply)) => life.lease.renew(sent, Duration::from_millis(reply.lease_ms)),
            Err(status) => warn!(%status, "no coordinator answered a heartbeat"),
        }
    }
}

/// Follows the views of jobs and nodes, at the leader while one is known: any member answers, but one that is cut off from the
/// others would have no news.
async fn watch(life: Arc<Life>) {
    let mut position = 0;
    loop {
        let mut leader = life.process.coordinators.leader();
        let address = leader.borrow_and_update().clone();
        let followed = tokio::select! {
            followed = follow(&life, &address, &mut position) => followed,
            _ = leader.changed() => continue,
        };
        if let Err(status) = followed {
            warn!(coordinator = %address, %status, "the watch ended");
        }
        life.process.coordinators.pass_over(&address);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(life: &Arc<Life>, address: &str, position: &mut u64) -> Result<(), Status> {
    let mut client = life.process.coordinators.client(address)?;
    let mut events = client.watch(v1::WatchRequest { job: 0 }).await?.into_inner();
    while let Some(event) = events.message().await? {
        // A member that lags tells the past first; what it says up to here is known.
        if event.version < *position {
            continue;
        }
        *position = event.version;
        if let Err(invalid) = take(life, event) {
            error!(%invalid, "the coordinator sent a view that cannot be read");
            return Err(invalid.into());
        }
    }
    Ok(())
}

fn take(life: &Arc<Life>, event: v1::WatchEvent) -> Result<(), Invalid> {
    life.process.coordinators.learn(event.coordinators, event.coordinators_version);
    // Nodes first: roles need addresses.
    for node in event.nodes {
        life.on_node(NodeView::try_from(node)?);
    }
    let jobs = event.jobs.into_iter().map(JobView::try_from).collect::<Result<Vec<_>, _>>()?;
    if event.whole {
        let jobs: Vec<JobId> = jobs.iter().map(|view| view.job).collect();
        life.retain_jobs(&jobs);
    }
    event.deleted_jobs.into_iter().for_each(|job| life.on_deleted(JobId(job)));
    if for_job::is_there(&jobs, life) {
        life.job_seen.store(true, Ordering::Relaxed);
    }
    jobs.into_iter().for_each(|view| life.on_view(view));
    life.heard_all.fetch_or(event.whole, Ordering::Relaxed);
    Ok(())
}
