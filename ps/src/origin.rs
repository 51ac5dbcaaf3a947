//! What only one process at a time can say of itself (docs/protocol.md 8.7): where it listens, to the letter.

use std::net::SocketAddr;

/// The boot of the system, the network that the process is in, and the address that it has bound there: whoever has it next knows that the process
/// before has let go of it. Empty where the system does not tell.
pub(crate) fn of(bound: SocketAddr) -> String {
    system().map_or_else(String::new, |system| format!("{system}/{bound}"))
}

#[cfg(not(downpour_sim))]
fn system() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let network = std::fs::read_link("/proc/self/ns/net").ok()?;
    Some(format!("{}/{}", boot.trim(), network.display()))
}

/// Each host has an address of its own, and never two systems.
#[cfg(downpour_sim)]
fn system() -> Option<String> {
    Some("simulated".into())
}

#[cfg(test)]
mod tests {
    use super::of;

    #[test]
    fn a_process_that_listens_where_another_did_says_the_same_and_no_other_does() {
        let at = |address: &str| of(address.parse().expect("an address"));
        assert!(at("127.0.0.1:7170").ends_with("/127.0.0.1:7170"));
        assert_eq!(at("127.0.0.1:7170"), at("127.0.0.1:7170"));
        assert_ne!(at("127.0.0.1:7170"), at("127.0.0.1:7171"));
        assert_ne!(at("127.0.0.1:7170"), at("0.0.0.0:7170"));
    }
}
