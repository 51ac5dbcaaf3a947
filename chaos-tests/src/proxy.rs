//! A slow network: a TCP proxy in front of a server, which gives every byte a delay and counts the requests that are under way.
//!
//! A server that is told to `--advertise` the proxy's address is reached through it by all clients. Proxies that share a
//! [`Network`] also hold back what [`crate::network`] does not let through.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Buf as _, BytesMut};
use downpour_proto::frame::{self, HELLO_BYTES, Kind, MAGIC};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use crate::network::{self, Network, Passages};

/// After so long a segment that was lost is sent again (Linux: 200 ms at least).
const RETRANSMISSION: Duration = Duration::from_millis(200);
const BACKLOG: u32 = 1024;

/// The proxy, with a runtime of its own or that of its network. Dropped, it takes no more connections; those that are there end with the runtime.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: AbortHandle,
    _runtime: Arc<Runtime>,
}

struct Shared {
    /// Whom it is in front of, as the network knows it.
    name: Mutex<String>,
    network: Option<Passages>,
    delay: Duration,
    target: watch::Sender<Option<String>>,
    traffic: Mutex<Traffic>,
    /// Answers pass.
    open: watch::Sender<bool>,
    /// Connections are taken.
    listens: watch::Sender<bool>,
}

/// Requests in frames; what travels as gRPC passes uncounted.
#[derive(Default)]
struct Traffic {
    /// (connection, number) of each.
    under_way: HashSet<(u64, u64)>,
    most: usize,
    answers_from: usize,
}

impl Proxy {
    /// Listens (`127.0.0.1:0`: on a free port). Connections wait until [`Proxy::forward_to`] names their target.
    ///
    /// # Errors
    /// The address is taken.
    pub fn start(listen: &str, delay: Duration) -> Result<Self> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().context("start a runtime")?;
        Self::on(Arc::new(runtime), listen, String::new(), None, delay)
    }

    /// On a free port, in front of the process of this name.
    ///
    /// # Errors
    /// There is no free port.
    pub fn in_network(network: &Network, name: String) -> Result<Self> {
        let passages = Some(network.passages());
        Self::on(network.runtime(), "127.0.0.1:0", name, passages, Duration::ZERO)
    }

    fn on(
        runtime: Arc<Runtime>,
        listen: &str,
        name: String,
        network: Option<Passages>,
        delay: Duration,
    ) -> Result<Self> {
        let listener = runtime.block_on(TcpListener::bind(listen)).context("listen")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            name: Mutex::new(name),
            network,
            delay,
            target: watch::Sender::new(None),
            traffic: Mutex::default(),
            open: watch::Sender::new(true),
            listens: watch::Sender::new(true),
        });
        let accepting = runtime.spawn(accept(listener, shared.clone())).abort_handle();
        Ok(Self { address, shared, accepting, _runtime: runtime })
    }

    /// Where clients shall connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whom connections reach, also those that wait.
    pub fn forward_to(&self, target: &str) {
        self.shared.target.send_replace(Some(target.to_owned()));
    }

    /// New connections reach another process from now on, of this name in the network.
    pub fn move_to(&self, name: &str, target: &str) {
        *self.shared.name.lock().unwrap_or_else(PoisonError::into_inner) = name.to_owned();
        self.forward_to(target);
    }

    /// Refuses connections, as the system does where nobody listens, or takes them again.
    pub fn refuse(&self, refuse: bool) {
        self.shared.listens.send_replace(!refuse);
    }

    /// Holds all answers back until so many requests are under way at once, and never again after.
    pub fn hold_answers_until(&self, requests: usize) {
        let mut traffic = self.shared.traffic();
        traffic.answers_from = requests;
        traffic.most = 0;
        self.shared.open.send_replace(false);
    }

    /// Most requests that were under way at once, since the answers were last held.
    #[must_use]
    pub fn most_under_way(&self) -> usize {
        self.shared.traffic().most
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    fn traffic(&self) -> MutexGuard<'_, Traffic> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self) -> String {
        self.name.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn saw(&self, request: (u64, u64), kind: Kind) {
        let mut traffic = self.traffic();
        match kind {
            Kind::Pull | Kind::Push => _ = traffic.under_way.insert(request),
            Kind::Pulled | Kind::Pushed | Kind::Failed => _ = traffic.under_way.remove(&request),
            // Servers among themselves.
            Kind::Replicate | Kind::Replicated => {}
        }
        traffic.most = traffic.most.max(traffic.under_way.len());
        if traffic.most >= traffic.answers_from {
            self.open.send_replace(true);
        }
    }
}

async fn accept(mut listener: TcpListener, shared: Arc<Shared>) -> std::io::Result<()> {
    let address = listener.local_addr()?;
    let mut listens = shared.listens.subscribe();
    let mut connection = 0;
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (client, from) = accepted?;
                connection += 1;
                tokio::spawn(forward(client, from.port(), connection, shared.clone()));
            }
            () = async { _ = listens.wait_for(|listens| !listens).await } => {
                drop(listener);
                // Bound, nobody else takes the port; not listening, the system refuses.
                let socket = TcpSocket::new_v4()?;
                socket.set_reuseaddr(true)?;
                socket.bind(address)?;
                _ = listens.wait_for(|listens| *listens).await;
                listener = socket.listen(BACKLOG)?;
            }
        }
    }
}

/// Ends with the connection, whoever closes it.
async fn forward(
    client: TcpStream,
    port: u16,
    connection: u64,
    shared: Arc<Shared>,
) -> std::io::Result<()> {
    let source = match &shared.network {
        Some(_) => network::process_at(port, client.local_addr()?.port()),
        None => String::new(),
    };
    let mut target = shared.target.subscribe();
    let Ok(address) = target.wait_for(Option::is_some).await.map(|target| target.clone()) else {
        return Ok(());
    };
    let server = TcpStream::connect(address.unwrap_or_default()).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let framed = AtomicBool::new(false);
    let frames = |requests| Frames {
        connection,
        requests,
        framed: &framed,
        started: false,
        buffer: BytesMut::new(),
    };
    let name = shared.name();
    let both = async {
        tokio::try_join!(
            carry(from_client, to_server, frames(true), &shared, (&source, &name)),
            carry(from_server, to_client, frames(false), &shared, (&name, &source)),
        )
    };
    let Some(network) = &shared.network else { return both.await.map(drop) };
    tokio::select! {
        ended = both => ended.map(drop),
        // What is dropped with unread bytes is reset.
        () = network.break_of([&source, &name]) => Ok(()),
    }
}

/// Reads what comes, and writes it a delay later.
async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut frames: Frames<'_>,
    shared: &Shared,
    (source, target): (&str, &str),
) -> std::io::Result<()> {
    let (sender, mut late) = mpsc::unbounded_channel();
    let read = async move {
        let mut buffer = BytesMut::new();
        let mut again = Instant::now();
        loop {
            buffer.reserve(1 << 16);
            if from.read_buf(&mut buffer).await? == 0 {
                return Ok::<_, std::io::Error>(());
            }
            // When nobody takes it, the other half has ended with an error.
            let delay =
                shared.delay + shared.network.as_ref().map_or(Duration::ZERO, Passages::delay);
            let now = Instant::now();
            if now >= again && shared.network.as_ref().is_some_and(Passages::loses) {
                again = now + RETRANSMISSION;
            }
            _ = sender.send(((now + delay).max(again), buffer.split()));
        }
    };
    let write = async {
        let mut open = shared.open.subscribe();
        while let Some((at, bytes)) = late.recv().await {
            sleep_until(at).await;
            if let Some(network) = &shared.network {
                network.passage(source, target).await;
            }
            if !frames.requests {
                _ = open.wait_for(|open| *open).await;
            }
            frames.each(&bytes, |request, kind| shared.saw(request, kind));
            to.write_all(&bytes).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(drop)
}

/// The frames of one direction of a connection.
struct Frames<'a> {
    connection: u64,
    requests: bool,
    /// The client began as framed connections begin.
    framed: &'a AtomicBool,
    started: bool,
    /// The beginning of the next frame.
    buffer: BytesMut,
}

impl Frames<'_> {
    fn each(&mut self, bytes: &[u8], mut each: impl FnMut((u64, u64), Kind)) {
        self.buffer.extend_from_slice(bytes);
        if self.requests && !self.started {
            let Some((hello, _)) = self.buffer.split_at_checked(HELLO_BYTES) else { return };
            self.framed.store(hello.starts_with(&MAGIC), Ordering::Relaxed);
            self.started = true;
            self.buffer.advance(HELLO_BYTES);
        }
        if !self.framed.load(Ordering::Relaxed) {
            return self.buffer.clear();
        }
        while let Ok(Ok(frame)) = frame::take(&mut self.buffer) {
            each((self.connection, frame.request), frame.kind);
        }
    }
}
