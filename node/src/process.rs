//! A server process from its options to its exit status.

use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use prometheus::Registry;
use tracing::{error, info};

use crate::config::Common;
use crate::http::{self, Readiness};
use crate::shutdown::Shutdown;
use crate::{listen, telemetry};

/// What the shell hands to the binary's own code.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// When to stop, and who is waited for.
    pub shutdown: Shutdown,
    /// What `/readyz` says. A check "shutdown" is there already; once the others are, say [`Readiness::started`].
    pub readiness: Readiness,
    /// What `/metrics` shows.
    pub registry: Registry,
}

/// Runs `serve` as the process `service`: multi-thread runtime, telemetry, signals, HTTP endpoint. When `serve` returns the
/// process stops (its error is the reason): tasks spawned on the [`Shutdown`] get `shutdown_ms` to end, traces are flushed. Status 0 after
/// a clean end, 1 otherwise, with the error on stderr.
pub fn run<F, S>(service: &'static str, common: &Common, serve: S) -> ExitCode
where
    S: FnOnce(Node) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    let ended = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(run_async(service, common, serve)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{service}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run_async<F, S>(service: &'static str, common: &Common, serve: S) -> anyhow::Result<()>
where
    S: FnOnce(Node) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    let guard = telemetry::init(service, common)?;
    let node = Node::default();
    let ended = serve_and_stop(service, common, node, serve).await;
    match &ended {
        Ok(()) => info!(service, "stopped"),
        Err(error) => error!(service, error = format!("{error:#}"), "stopped"),
    }
    guard.flush().await;
    ended
}

async fn serve_and_stop<F, S>(
    service: &'static str,
    common: &Common,
    node: Node,
    serve: S,
) -> anyhow::Result<()>
where
    S: FnOnce(Node) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    let Node { shutdown, readiness, registry } = node.clone();
    shutdown.on_signals().context("handle signals")?;
    let token = shutdown.token();
    readiness.starting();
    readiness.check(
        "shutdown",
        move || if token.is_cancelled() { Err("stopping".into()) } else { Ok(()) },
    );
    if let Some(address) = &common.http {
        let listener = listen::bind("http", address, common.insecure).await?;
        info!(address = %listener.local_addr()?, "serving /metrics, /healthz and /readyz");
        // Not tracked: it answers until the very end, so that a prober sees "stopping" and not a refused connection.
        tokio::spawn(http::serve(listener, registry, readiness, Default::default()));
    }
    info!(service, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "started");
    let served = serve(node).await;
    shutdown.token().cancel();
    let finished = shutdown.finish(Duration::from_millis(common.shutdown_ms)).await;
    served.and(finished)
}
