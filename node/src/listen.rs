//! Opening a port, with an error that says what to change.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;

/// Why a port is not open.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else listens there.
    #[error("{address} (--{flag}) is in use by another process: choose another port with --{flag}")]
    InUse {
        /// As given.
        address: String,
        /// Without dashes.
        flag: &'static str,
    },
    /// Others could reach it, and there is neither encryption nor authentication.
    #[error(
        "{address} (--{flag}) can be reached from other machines without encryption or authentication: pass --insecure to allow that"
    )]
    NotLoopback {
        /// As given.
        address: String,
        /// Without dashes.
        flag: &'static str,
    },
    /// Anything else: no such name, no such interface, a privileged port.
    #[error("listen on {address} (--{flag}): {source}")]
    Other {
        /// As given.
        address: String,
        /// Without dashes.
        flag: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Listens on `address` (host:port), which the flag `flag` (without dashes) gave. Beyond loopback only if `insecure`.
pub async fn bind(flag: &'static str, address: &str, insecure: bool) -> Result<TcpListener, Error> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => Error::InUse { address: address.to_owned(), flag },
        _ => Error::Other { address: address.to_owned(), flag, source },
    };
    let resolved: Vec<SocketAddr> =
        tokio::net::lookup_host(address).await.map_err(failed)?.collect();
    if !insecure && resolved.iter().any(|address| !address.ip().is_loopback()) {
        return Err(Error::NotLoopback { address: address.to_owned(), flag });
    }
    TcpListener::bind(resolved.as_slice()).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_in_use_is_named_with_its_flag() {
        let first = bind("listen", "127.0.0.1:0", false).await.expect("a free port");
        let address = first.local_addr().expect("bound").to_string();
        let error = bind("listen", &address, false).await.expect_err("taken");
        assert!(matches!(error, Error::InUse { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&address) && text.contains("--listen"), "{text}");
    }

    #[tokio::test]
    async fn beyond_loopback_only_when_told() {
        let error = bind("http", "0.0.0.0:0", false).await.expect_err("refused");
        assert!(error.to_string().contains("--insecure"), "{error}");
        bind("http", "0.0.0.0:0", true).await.expect("allowed");
    }
}
