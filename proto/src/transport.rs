//! Settings of gRPC that both ends must agree on, in one place.
//!
//! The defaults throttle bulk data: 64 KiB windows, 16 KiB frames, 4 MiB messages, Nagle on accepted sockets. A partition leaves a dead
//! connection without a word, so both sides send keepalives and connecting has a time limit.

use std::io;
use std::time::Duration;

#[cfg(not(downpour_sim))]
use socket2::{SockRef, TcpKeepalive};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Server};

use crate::Invalid;
use crate::net::{self, Incoming, TcpListener, TcpStream};

/// Largest message that anyone sends or accepts. Set it on every generated client and server (`max_decoding_message_size`,
/// `max_encoding_message_size`).
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Size that a sender of bulk data aims at: larger unary messages are slower.
pub const MESSAGE_BYTES_TARGET: usize = 1 << 20;

/// Metadata of a refusal by a coordinator that does not lead: host:port of the one that does (see `coordinator.proto`).
pub const LEADER_METADATA: &str = "downpour-leader";

const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
const FRAME_BYTES: u32 = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// A gRPC server with our windows and keepalives.
#[must_use]
pub fn server_builder() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// Settings of a socket that carries frames: no Nagle, and a peer that is cut off without a word is noticed within about [`KEEPALIVE_TIMEOUT`]
/// and [`KEEPALIVE_INTERVAL`] together.
///
/// # Errors
/// The system refuses.
#[cfg(not(downpour_sim))]
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(KEEPALIVE_INTERVAL).with_interval(KEEPALIVE_TIMEOUT);
    socket.set_tcp_keepalive(&probes.with_retries(1))?;
    socket.set_tcp_user_timeout(Some(KEEPALIVE_INTERVAL + KEEPALIVE_TIMEOUT))
}

/// A simulated connection is so anyway: see [`net`].
///
/// # Errors
/// None.
#[cfg(downpour_sim)]
pub fn tune(_: &TcpStream) -> io::Result<()> {
    Ok(())
}

/// A connection for frames to `address` (host:port). The magic is for the caller to send.
///
/// # Errors
/// Nobody answers there in time.
pub async fn connect(address: &str) -> io::Result<TcpStream> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("{address} does not answer"));
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await.map_err(late)??;
    tune(&stream)?;
    Ok(stream)
}

/// Accepted connections without Nagle's delay (`serve_with_incoming` ignores the builder's own setting).
#[must_use]
pub fn incoming(listener: TcpListener) -> Incoming {
    net::incoming(listener)
}

/// A connection to `address` (host:port), made when it is first used and made again when it breaks. Must be called inside a runtime.
///
/// # Errors
/// The address is not `host:port`.
pub fn channel(address: &str) -> Result<Channel, Invalid> {
    let invalid = |problem: String| Invalid::new("address", format!("{address:?} {problem}"));
    let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    if !matches!(port, Some(Ok(1..))) {
        return Err(invalid("is not host:port".into()));
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| invalid(format!("is not an address: {error}")))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(net::channel(&endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_not_host_and_port_is_refused() {
        assert!(channel("127.0.0.1:7070").is_ok());
        assert!(channel("[::1]:7070").is_ok());
        for address in ["", "host", "host:", "host:99999", "host:0", "ho st:1", "http://host"] {
            assert_eq!(channel(address).unwrap_err().field, "address", "{address}");
        }
    }
}
