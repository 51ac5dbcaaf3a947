//! Asks a process whether it is ready.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(1);
const REPLY_BYTES_MAX: u64 = 1 << 20;

/// `GET /readyz`: `Err` says why not, in the words of the process where it has any.
pub(super) fn ready(http: &str) -> Result<(), String> {
    let reply = get(http, "/readyz").map_err(|error| format!("{http}: {error}"))?;
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    match head.split_whitespace().nth(1) {
        Some("200") => Ok(()),
        Some("503") => Err(body.trim().replace('\n', ", ")),
        _ => Err(format!("{http} answers {:?}", head.lines().next().unwrap_or_default())),
    }
}

/// The reply to `GET path`, head and all.
pub(super) fn get(http: &str, path: &str) -> std::io::Result<String> {
    let address: SocketAddr = http.parse().map_err(std::io::Error::other)?;
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut reply = Vec::new();
    stream.take(REPLY_BYTES_MAX).read_to_end(&mut reply)?;
    Ok(String::from_utf8_lossy(&reply).into_owned())
}
