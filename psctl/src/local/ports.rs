//! Free ports on loopback.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{SystemTime, UNIX_EPOCH};

use super::Error;

/// Below the range from which the system gives ports to outgoing connections: such a connection could take the port
/// of a process that is down for a moment, and it could not come back.
const LOWEST: u16 = 10_000;

/// `count` ports that nobody listens on. Another process may take one before it is used; that is as good as it gets without the listeners
/// themselves, so the search begins at a different place each time.
pub(super) fn free(count: usize) -> Result<Vec<u16>, Error> {
    let highest = first_ephemeral().filter(|first| *first > LOWEST + 1_000).unwrap_or(32_768);
    let span = u32::from(highest - LOWEST);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let start = (now ^ std::process::id().rotate_left(16)).wrapping_mul(0x9E37_79B1) % span;
    let mut held = Vec::with_capacity(count);
    for offset in 0..span {
        if held.len() == count {
            break;
        }
        let port = LOWEST + ((start + offset) % span) as u16;
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            held.push((port, listener));
        }
    }
    if held.len() < count {
        let none = std::io::Error::from(std::io::ErrorKind::AddrInUse);
        return Err(Error::io(format!("find {count} free ports from {LOWEST} to {highest}"))(none));
    }
    Ok(held.into_iter().map(|(port, _)| port).collect())
}

fn first_ephemeral() -> Option<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    range.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ports_are_distinct_free_and_not_ephemeral() {
        let ports = free(20).expect("20 free ports");
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 20);
        let first_ephemeral = first_ephemeral().unwrap_or(32_768);
        for port in ports {
            assert!(port >= LOWEST && port < first_ephemeral.max(32_768), "{port}");
        }
    }
}
