//! The network of a simulation: turmoil's, and above it what the kernel does for a connection whose peer is silent. A message that a partition
//! swallows is gone, and the connection stays open without a word: keepalives find that out, as those of the kernel do.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::{BoxStream, unfold};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf, split};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Uri};
use turmoil::ToSocketAddrs;
use turmoil::net;

/// What [`crate::transport::tune`] asks of the kernel, and how long a peer may say nothing.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const SILENCE_MAX: Duration = Duration::from_millis(4500);
/// A chunk is its length and so many bytes at most; a keepalive is one of length 0.
const CHUNK_BYTES_MAX: usize = 64 << 10;
const HEADER_BYTES: usize = 4;

/// Accepted connections.
pub type Incoming = BoxStream<'static, io::Result<TcpStream>>;
/// A connection on its way between runtimes: here there is one.
pub type Detached = TcpStream;

/// How often the connections between two hosts were broken.
static RESETS: Mutex<BTreeMap<(IpAddr, IpAddr), u64>> = Mutex::new(BTreeMap::new());

/// Breaks all connections between two hosts, as a middlebox does that forgets them.
pub fn reset(one: IpAddr, other: IpAddr) {
    let mut resets = RESETS.lock().unwrap_or_else(PoisonError::into_inner);
    *resets.entry((one.min(other), one.max(other))).or_default() += 1;
}

fn resets(inner: &net::TcpStream) -> io::Result<u64> {
    let (one, other) = (inner.local_addr()?.ip(), inner.peer_addr()?.ip());
    let resets = RESETS.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(resets.get(&(one.min(other), one.max(other))).copied().unwrap_or(0))
}

/// A simulated connection.
#[derive(Debug)]
pub struct TcpStream {
    inner: net::TcpStream,
    /// Of its hosts, when it was made.
    resets: u64,
    /// As it came in.
    raw: BytesMut,
    /// Without headers.
    received: BytesMut,
    heard: Instant,
    keepalive: Pin<Box<Sleep>>,
}

impl TcpStream {
    fn new(inner: net::TcpStream) -> Self {
        let now = Instant::now();
        let keepalive = Box::pin(sleep_until(now + KEEPALIVE_INTERVAL));
        let resets = resets(&inner).unwrap_or(0);
        let (raw, received) = (BytesMut::new(), BytesMut::new());
        TcpStream { inner, resets, raw, received, heard: now, keepalive }
    }

    fn check(&self) -> io::Result<()> {
        let same = resets(&self.inner)? == self.resets;
        if same { Ok(()) } else { Err(io::ErrorKind::ConnectionReset.into()) }
    }

    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there.
    pub async fn connect<A: ToSocketAddrs>(address: A) -> io::Result<Self> {
        net::TcpStream::connect(address).await.map(Self::new)
    }

    /// Both directions, to be used at once.
    pub fn split(&mut self) -> (ReadHalf<&mut Self>, WriteHalf<&mut Self>) {
        split(self)
    }

    /// Waits until something has arrived; false: nothing more will.
    fn poll_received(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.check()?;
        while self.received.is_empty() {
            while self.keepalive.as_mut().poll(cx).is_ready() {
                let now = Instant::now();
                if now - self.heard > SILENCE_MAX {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                // A full connection says enough.
                _ = self.inner.try_write(&[0; HEADER_BYTES]);
                self.keepalive.as_mut().reset(now + KEEPALIVE_INTERVAL);
            }
            let mut chunk = vec![0; CHUNK_BYTES_MAX];
            let mut buffer = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(false));
            }
            self.heard = Instant::now();
            self.raw.extend_from_slice(buffer.filled());
            while let Some(body) = take_chunk(&mut self.raw) {
                self.received.extend_from_slice(&body);
            }
        }
        Poll::Ready(Ok(true))
    }
}

fn take_chunk(raw: &mut BytesMut) -> Option<Bytes> {
    let bytes = u32::from_be_bytes(*raw.first_chunk()?) as usize;
    if raw.len() < HEADER_BYTES + bytes {
        return None;
    }
    raw.advance(HEADER_BYTES);
    Some(raw.split_to(bytes).freeze())
}

impl AsyncRead for TcpStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if ready!(self.poll_received(cx))? {
            let bytes = self.received.len().min(buffer.remaining());
            buffer.put_slice(&self.received.split_to(bytes));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        let bytes = &bytes[..bytes.len().min(CHUNK_BYTES_MAX)];
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut chunk = BytesMut::with_capacity(HEADER_BYTES + bytes.len());
        chunk.put_u32(bytes.len() as u32);
        chunk.put_slice(bytes);
        // It takes all or nothing.
        ready!(Pin::new(&mut self.inner).poll_write(cx, &chunk))?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Connected for TcpStream {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// A simulated port.
pub struct TcpListener(net::TcpListener);

impl TcpListener {
    /// Listens.
    ///
    /// # Errors
    /// Somebody else does.
    pub async fn bind<A: ToSocketAddrs>(address: A) -> io::Result<Self> {
        net::TcpListener::bind(address).await.map(TcpListener)
    }

    /// The next connection.
    ///
    /// # Errors
    /// None.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, from) = self.0.accept().await?;
        Ok((TcpStream::new(stream), from))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// None.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Looks at what has arrived without taking it.
///
/// # Errors
/// The connection broke.
pub async fn peek(stream: &mut TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    poll_fn(|cx| stream.poll_received(cx)).await?;
    let count = bytes.len().min(stream.received.len());
    bytes[..count].copy_from_slice(&stream.received[..count]);
    Ok(count)
}

/// As it is.
///
/// # Errors
/// None.
pub fn detach(stream: TcpStream) -> io::Result<Detached> {
    Ok(stream)
}

/// As it is.
///
/// # Errors
/// None.
pub fn attach(stream: Detached) -> io::Result<TcpStream> {
    Ok(stream)
}

/// What the kernel does for a socket that is tuned, a simulated one does unasked.
pub(crate) fn incoming(listener: TcpListener) -> Incoming {
    let accept = |listener: TcpListener| async move {
        let accepted = listener.accept().await;
        Some((accepted.map(|(stream, _)| stream), listener))
    };
    unfold(listener, accept).boxed()
}

pub(crate) fn channel(endpoint: &Endpoint) -> Channel {
    let connect = |uri: Uri| async move {
        let address = uri.authority().map_or("", |authority| authority.as_str());
        TcpStream::connect(address).await.map(TokioIo::new)
    };
    endpoint.connect_with_connector_lazy(tower::service_fn(connect))
}
