//! The network of the system.
// tidy: not simulated: what a simulation replaces.

use std::io;

pub use std::net::TcpStream as Detached;
pub use tokio::net::{TcpListener, TcpStream};
pub use tonic::transport::server::TcpIncoming as Incoming;
use tonic::transport::{Channel, Endpoint};

/// Looks at what has arrived without taking it.
///
/// # Errors
/// The connection broke.
pub async fn peek(stream: &mut TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    stream.peek(bytes).await
}

/// Takes a connection out of its runtime.
///
/// # Errors
/// The system refuses.
pub fn detach(stream: TcpStream) -> io::Result<Detached> {
    stream.into_std()
}

/// Gives a connection to the current runtime.
///
/// # Errors
/// The system refuses.
pub fn attach(stream: Detached) -> io::Result<TcpStream> {
    TcpStream::from_std(stream)
}

/// Accepted connections without Nagle's delay.
pub(crate) fn incoming(listener: TcpListener) -> Incoming {
    Incoming::from(listener).with_nodelay(Some(true))
}

pub(crate) fn channel(endpoint: &Endpoint) -> Channel {
    endpoint.connect_lazy()
}
