//! The server as a whole.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwapOption;
use downpour_checkpoint::write::Scratch;
use downpour_node::process::Node;
use downpour_node::trace;
use downpour_proto::net::TcpListener;
use downpour_proto::transport::{MESSAGE_BYTES_MAX, server_builder};
use downpour_proto::v1::clock_server::ClockServer;
use downpour_proto::v1::replica_server::ReplicaServer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::accept::{self, Takers};
use crate::bounded::BoundedServer;
use crate::config::Config;
use crate::coordinators::Coordinators;
use crate::life::Process;
use crate::membership::{self, Current, Registering};
use crate::memory::Memory;
use crate::metrics::ServerMetrics;
use crate::pace::Budget;
use crate::threads::DataThreads;
use crate::{clock, origin, replica, service};

/// Open connections get this long to notice that the server stops.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// Requests of one connection that are read and answered at once; the others wait in its windows. A stream counts only until it is open. A
/// client has at most 16 pulls on their way.
const UNARY_REQUESTS_MAX: usize = 32;

/// Largest request about clocks and rounds: the members of a round, and the shards of a job.
const REQUEST_BYTES_MAX: usize = 2 << 20;

/// Connections of gRPC that were accepted and are not served yet; more are refused.
const ACCEPTED_MAX: usize = 1024;

/// Runs a parameter server on `listener` until `node`'s token is cancelled.
///
/// # Errors
/// The coordinators cannot be addressed, or refuse this server for good.
pub async fn run(config: Config, listener: TcpListener, node: Node) -> anyhow::Result<()> {
    let address = match &config.common.advertise {
        Some(address) => address.clone(),
        None => listener.local_addr().context("read the address that was bound")?.to_string(),
    };
    let scratch = Scratch::default();
    scratch.check().with_context(|| {
        let folder = scratch.folder.display();
        format!("make a temporary file in {folder}, where shards that are saved or loaded may wait (TMPDIR names another folder)")
    })?;
    let bound = listener.local_addr().context("read the address that was bound")?;
    let registering = Registering { address, origin: origin::of(bound) };
    let coordinators = Coordinators::new(config.coordinators.clone())?;
    let metrics = ServerMetrics::new(&node.registry);
    let shutdown = node.shutdown.clone();
    let memory = Memory::new(config.memory_limit, config.data_threads())?;
    let copies = Budget::new(config.copy_bytes_per_s);
    let threads = DataThreads::start(config.data_threads(), &shutdown, DRAIN_MAX)?;
    let process = Process { config, coordinators, metrics, memory, copies, threads, shutdown };
    let process = Arc::new(process);
    if process.memory.is_limited() {
        let (process, token) = (Arc::clone(&process), node.shutdown.token());
        node.shutdown.spawn("memory", async move {
            token.run_until_cancelled(process.memory.watch()).await;
        });
    }
    let current: Current = Arc::new(ArcSwapOption::empty());
    #[cfg(downpour_sim)]
    crate::inspect::register(&process.config.name, &current);

    let seen = Arc::clone(&current);
    node.readiness.check("shards", move || match seen.load_full() {
        None => Err("not registered".into()),
        Some(life) => life.not_ready().map_or(Ok(()), Err),
    });
    node.readiness.started();
    let token = node.shutdown.token();
    let shards = service::Service { process: Arc::clone(&process), current: Arc::clone(&current) };
    let replicas = ReplicaServer::new(replica::Service { current: Arc::clone(&current) })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let clocks =
        ClockServer::new(clock::Service { current: Arc::clone(&current), stop: token.clone() })
            .max_decoding_message_size(REQUEST_BYTES_MAX);
    let (grpc, accepted) = mpsc::channel(ACCEPTED_MAX);
    let takers = Takers { process: Arc::clone(&process), current: Arc::clone(&current), grpc };
    node.shutdown.spawn("accept", accept::run(listener, takers));
    let serving = server_builder()
        .concurrency_limit_per_connection(UNARY_REQUESTS_MAX)
        .trace_fn(trace::server_span)
        .add_service(BoundedServer(shards))
        .add_service(replicas)
        .add_service(clocks)
        .serve_with_incoming_shutdown(
            ReceiverStream::new(accepted),
            token.clone().cancelled_owned(),
        );

    let living = membership::run(Arc::clone(&process), registering, current);
    node.shutdown.spawn_critical("membership", living);
    tokio::select! {
        served = serving => served.context("serve"),
        // Replication streams of other servers end when their owners notice; nothing of theirs is lost.
        () = async { token.cancelled().await; tokio::time::sleep(DRAIN_MAX).await } => Ok(()),
    }
}
