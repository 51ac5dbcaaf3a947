//! Hosts on one machine: network namespaces, each with an address and a link of its own to one bridge, through which this process speaks to them.
//!
//! What the kernel's own TCP does when a link is down or frames get lost is in the tests that use them, and in none of those behind a [`proxy`](crate::proxy). A link that is down cuts
//! both directions. One direction is cut by telling a host a wrong hardware address for everybody: what it sends goes to nobody, without an error, and it hears the others on. That works
//! on every kernel with namespaces; filters of `tc` and `iptables` do not.

use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};

/// For the benchmarks of network devices (RFC 2544), and so for nobody's machines.
const NETWORK: &str = "198.18";
/// Nobody's: locally administered.
const NOWHERE: &str = "02:00:00:00:00:01";
const PREFIX_BITS: u32 = 24;
const GATEWAY: usize = 254;

/// Hosts that go when this is dropped.
#[derive(Debug)]
pub struct Hosts {
    /// Of this process.
    mark: String,
    subnet: String,
    count: usize,
}

impl Hosts {
    /// So many hosts, numbered from 0.
    ///
    /// # Errors
    /// This process may not make network namespaces, or the machine lacks `ip` or a device for them: the message says which.
    pub fn new(count: usize) -> Result<Self> {
        let pid = std::process::id();
        let hosts =
            Hosts { mark: format!("dp{pid}"), subnet: format!("{NETWORK}.{}", pid % 256), count };
        let (bridge, own) = (hosts.bridge(), hosts.with_prefix(&hosts.address_of(GATEWAY)));
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &own, "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for host in 0..count {
            let (name, link) = (hosts.name(host), hosts.link(host));
            let address = hosts.with_prefix(&hosts.address(host));
            ip(&["netns", "add", &name])?;
            ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["link", "set", &link, "master", &bridge, "up"])?;
            ip(&["-n", &name, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    /// Its address.
    #[must_use]
    pub fn address(&self, host: usize) -> String {
        self.address_of(host + 1)
    }

    /// Starts a program on a host, with its stderr in a file.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, host: usize, program: &str, args: &[String], log: &str) -> Result<Program> {
        let said = fs::OpenOptions::new().create(true).append(true).open(log);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(host), program]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.context("make a log")?);
        Ok(Program(command.spawn().with_context(|| format!("start {program}"))?))
    }

    /// From now on nothing passes to or from a host, or everything again.
    ///
    /// # Errors
    /// The system does not let it.
    pub fn cut_off(&self, host: usize, cut_off: bool) -> Result<()> {
        ip(&["link", "set", &self.link(host), if cut_off { "down" } else { "up" }])
    }

    /// From now on nobody hears a host, which hears the others, or all hear it again.
    ///
    /// # Errors
    /// The system does not let it.
    pub fn mute(&self, host: usize, mute: bool) -> Result<()> {
        let name = self.name(host);
        let others = (0..self.count).filter(|&other| other != host).map(|other| other + 1);
        for other in others.chain([GATEWAY]) {
            let address = self.address_of(other);
            if mute {
                let wrong = ["lladdr", NOWHERE, "nud", "permanent", "dev", "eth0"];
                ip(&[&["-n", &name, "neigh", "replace", &address][..], &wrong].concat())?;
            } else {
                ip(&["-n", &name, "neigh", "del", &address, "dev", "eth0"])?;
            }
        }
        Ok(())
    }

    fn address_of(&self, number: usize) -> String {
        format!("{}.{number}", self.subnet)
    }

    fn with_prefix(&self, address: &str) -> String {
        format!("{address}/{PREFIX_BITS}")
    }

    fn bridge(&self) -> String {
        format!("{}b", self.mark)
    }

    fn name(&self, host: usize) -> String {
        format!("{}-{host}", self.mark)
    }

    fn link(&self, host: usize) -> String {
        format!("{}v{host}", self.mark)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // What was not made, or is gone already, needs no word.
        for host in 0..self.count {
            _ = ip(&["link", "del", &self.link(host)]);
            _ = ip(&["netns", "del", &self.name(host)]);
        }
        _ = ip(&["link", "del", &self.bridge()]);
    }
}

/// A program on a host. Dropped, it is killed.
#[derive(Debug)]
pub struct Program(Child);

impl Program {
    /// Fails when it has ended.
    ///
    /// # Errors
    /// It has.
    pub fn check(&mut self) -> Result<()> {
        let ended = self.0.try_wait().context("look at a process")?;
        ensure!(ended.is_none(), "a program ended: {ended:?}");
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn ip(args: &[&str]) -> Result<()> {
    // The kernel takes a namespace down in the background, and may not be done with one of the run before.
    for attempt in 0.. {
        let output = Command::new("ip").args(args).output().context("run ip (of iproute2)")?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(attempt < 3 && said.contains("busy"), "ip {}: {}", args.join(" "), said.trim());
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
