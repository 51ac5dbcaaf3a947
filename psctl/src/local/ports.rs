//! Free ports on loopback.

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

use super::Error;

/// Below the range from which the system gives ports to outgoing connections: such a connection could take the port
/// of a process that is down for a moment, and it could not come back.
const LOWEST: u16 = 10_000;

/// A port that nobody else is given as long as this is there, also while the process that listens on it is down.
#[derive(Debug)]
pub(super) struct Port {
    number: u16,
    _held: OwnedFd,
}

impl Port {
    /// Takes it, unless somebody has it. A socket that is bound and does not listen keeps away who asks without the right to share; programs ask with it, and may listen.
    fn take(number: u16) -> Option<Port> {
        let socket =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let held = socket.ok()?;
        bind(&held, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, number)).ok()?;
        set_socket_reuseaddr(&held, true).ok()?;
        Some(Port { number, _held: held })
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.number)
    }
}

/// `count` ports that nobody has. The search begins at a different place each time.
pub(super) fn free(count: usize) -> Result<Vec<Port>, Error> {
    let highest = first_ephemeral().filter(|first| *first > LOWEST + 1_000).unwrap_or(32_768);
    let span = u32::from(highest - LOWEST);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let start = (now ^ std::process::id().rotate_left(16)).wrapping_mul(0x9E37_79B1) % span;
    let numbers = (0..span).map(|offset| LOWEST + ((start + offset) % span) as u16);
    let ports: Vec<Port> = numbers.filter_map(Port::take).take(count).collect();
    if ports.len() < count {
        let none = std::io::Error::from(ErrorKind::AddrInUse);
        return Err(Error::io(format!("find {count} free ports from {LOWEST} to {highest}"))(none));
    }
    Ok(ports)
}

fn first_ephemeral() -> Option<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    range.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn ports_are_distinct_free_and_not_ephemeral() {
        let ports = free(20).expect("20 free ports");
        let numbers: BTreeSet<u16> = ports.iter().map(|port| port.number).collect();
        assert_eq!(numbers.len(), 20);
        let first_ephemeral = first_ephemeral().unwrap_or(32_768);
        for port in numbers {
            assert!(port >= LOWEST && port < first_ephemeral.max(32_768), "{port}");
        }
    }

    #[test]
    fn a_port_is_nobody_elses_also_while_its_process_is_down() {
        let port = free(1).expect("a free port").remove(0);
        for _ in 0..2 {
            assert!(Port::take(port.number).is_none(), "nobody listens");
            let listener = TcpListener::bind(port.address()).expect("its process may");
            let stream = TcpStream::connect(port.address()).expect("it listens");
            assert!(Port::take(port.number).is_none());
            drop((listener, stream));
            let refused = TcpStream::connect(port.address()).expect_err("it is down");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
    }
}
