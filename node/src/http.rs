//! The HTTP endpoint of a process: `/metrics`, `/healthz` (the process is alive), `/readyz` (it may be sent work).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::metrics;

/// The check that fails until a process has added its own.
const STARTED: &str = "started";

type Check = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What must hold before a process may be sent work. Cheap to clone; ready when every check passes, so without any at once.
#[derive(Clone, Default)]
pub struct Readiness {
    checks: Arc<Mutex<BTreeMap<&'static str, Check>>>,
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Readiness").field(&self.reasons()).finish()
    }
}

impl Readiness {
    /// Adds a check, asked on each request; its error says what is missing. Must not block.
    pub fn check(
        &self,
        name: &'static str,
        check: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner).insert(name, Box::new(check));
    }

    /// The process has added all its checks: until it says so, a process that [`crate::process::run`] runs is not ready.
    pub fn started(&self) {
        self.check(STARTED, || Ok(()));
    }

    pub(crate) fn starting(&self) {
        self.check(STARTED, || Err("starting".into()));
    }

    /// Adds a check whose outcome is set through the gate; closed at first.
    pub fn gate(&self, name: &'static str, reason: &str) -> Gate {
        let gate = Gate { closed: Arc::new(Mutex::new(Some(reason.to_owned()))) };
        let seen = gate.clone();
        self.check(name, move || seen.reason().map_or(Ok(()), Err));
        gate
    }

    /// Why the process is not ready, a line for each check that fails.
    pub fn reasons(&self) -> Vec<String> {
        let checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        checks
            .iter()
            .filter_map(|(name, check)| check().err().map(|reason| format!("{name}: {reason}")))
            .collect()
    }
}

/// One condition of readiness, opened and closed by whoever knows.
#[derive(Clone, Debug)]
pub struct Gate {
    closed: Arc<Mutex<Option<String>>>,
}

impl Gate {
    /// The condition holds.
    pub fn open(&self) {
        self.set(None);
    }

    /// The condition does not hold, and why.
    pub fn close(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    fn set(&self, reason: Option<String>) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    fn reason(&self) -> Option<String> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Serves until `stop` is cancelled.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    readiness: Readiness,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let metrics = get(async move || {
        (
            [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
            metrics::render(&registry),
        )
    });
    let ready = get(async move || match readiness.reasons() {
        reasons if reasons.is_empty() => (StatusCode::OK, "ready\n".to_owned()),
        reasons => (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n"),
    });
    let router = Router::new()
        .route("/metrics", metrics)
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", ready);
    let serving = axum::serve(listener, router);
    // Not axum's graceful shutdown: it waits for idle keep-alive connections, and a scraper has nothing to lose.
    tokio::select! {
        result = serving => result,
        () = stop.cancelled() => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn request(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("send");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("receive");
        reply
    }

    #[tokio::test]
    async fn readyz_follows_its_conditions_and_names_those_that_fail() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("bound");
        let readiness = Readiness::default();
        readiness.starting();
        let gate = readiness.gate("registered", "not registered yet");
        readiness.check("disk", || Err("full".into()));
        let registry = Registry::new();
        crate::metrics::Metrics::new(&registry).counter("downpour_test_total", "Tests");
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, registry, readiness.clone(), stop.clone()));

        let reply = request(address, "/readyz").await;
        assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
        assert!(
            reply.ends_with("disk: full\nregistered: not registered yet\nstarted: starting\n"),
            "{reply}"
        );
        readiness.started();
        gate.open();
        readiness.check("disk", || Ok(()));
        assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        gate.close("fenced");
        assert!(request(address, "/readyz").await.ends_with("registered: fenced\n"));
        assert!(request(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(request(address, "/metrics").await.ends_with("downpour_test_total 0\n"));

        stop.cancel();
        server.await.expect("no panic").expect("clean end");
    }
}
