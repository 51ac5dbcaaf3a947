//! A cluster of real processes on loopback, for a demonstration, for development and for tests that kill things.
//!
//! [`LocalCluster::start`] picks free [`ports`], starts coordinators and then servers, each a [`Process`], and waits until `/readyz` of each
//! says so. Each process can then be killed, stopped, paused and started again under its old address.
//!
//! Nothing is left behind: dropping the cluster kills what still runs, and the kernel does so when this process dies without
//! a chance to drop anything ([`spawner`]). The price is one thread that lives as long as the cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub mod control;
mod error;
mod ports;
mod probe;
mod process;
mod spawner;
#[cfg(test)]
mod tests;

pub use error::Error;
use ports::Port;
use process::Program;
pub use process::{Interrupt, Process};
use spawner::Spawner;

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// Members of the coordinator group.
    pub coordinators: usize,
    /// Parameter servers.
    pub servers: usize,
    /// Where the binaries are. `None`: beside this executable.
    pub bin_dir: Option<PathBuf>,
    /// Where logs and data go; must be empty or absent. `None`: a temporary directory, removed at the end unless something failed.
    pub dir: Option<PathBuf>,
    /// Further arguments of each coordinator.
    pub coordinator_args: Vec<String>,
    /// Further arguments of each server.
    pub server_args: Vec<String>,
    /// Where others reach the processes, coordinators first: a proxy before each. Empty: where they listen.
    pub advertise: Vec<String>,
    /// How long a process may take until it is ready.
    pub ready_within: Duration,
    /// Ends every wait early.
    pub interrupt: Interrupt,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            coordinators: 3,
            servers: 2,
            bin_dir: None,
            dir: None,
            coordinator_args: Vec::new(),
            server_args: Vec::new(),
            advertise: Vec::new(),
            ready_within: Duration::from_secs(30),
            interrupt: Interrupt::default(),
        }
    }
}

/// A running cluster. Dropped, it kills everything; [`stop`](Self::stop) ends it in order.
#[derive(Debug)]
pub struct LocalCluster {
    /// `coordinator-1` and so on: number `i` has id `i + 1`.
    pub coordinators: Vec<Process>,
    /// `ps-0` and so on.
    pub servers: Vec<Process>,
    /// Where each coordinator is reached, where that is not where it listens.
    advertise: Vec<String>,
    coordinator_args: Vec<String>,
    server_args: Vec<String>,
    /// Processor time of the servers that were removed.
    removed_cpu: Duration,
    spawner: Spawner,
    bin_dir: PathBuf,
    interrupt: Interrupt,
    /// Of all processes there ever were.
    ports: Vec<Port>,
    // Last: the processes must be gone before their directory.
    dir: Directory,
}

impl LocalCluster {
    /// Starts everything and waits until each process is ready.
    pub fn start(options: Options) -> Result<Self, Error> {
        let mut cluster = Self::lay_out(&options)?;
        cluster.start_all(options.ready_within)?;
        Ok(cluster)
    }

    /// Everything but the processes themselves: [`start_all`](Self::start_all) starts them.
    pub fn lay_out(options: &Options) -> Result<Self, Error> {
        let bin_dir = match &options.bin_dir {
            Some(dir) => dir.clone(),
            None => beside_this_executable()?,
        };
        let dir = Directory::new(options.dir.as_deref())?;
        let mut cluster = Self {
            coordinators: Vec::new(),
            servers: Vec::new(),
            advertise: options.advertise.iter().take(options.coordinators).cloned().collect(),
            coordinator_args: options.coordinator_args.clone(),
            server_args: options.server_args.clone(),
            removed_cpu: Duration::ZERO,
            spawner: Spawner::new().map_err(Error::io("start a thread"))?,
            bin_dir,
            interrupt: options.interrupt.clone(),
            ports: Vec::new(),
            dir,
        };
        let addresses = cluster.addresses(2 * (options.coordinators + options.servers))?;
        let mut addresses = addresses.into_iter();
        let mut next = || addresses.next().expect("two addresses for each process");

        let members: Vec<(String, String)> =
            (0..options.coordinators).map(|_| (next(), next())).collect();
        let reached = |at: usize, address: &str| {
            options.advertise.get(at).map_or_else(|| address.to_owned(), Clone::clone)
        };
        let peers: Vec<String> = members
            .iter()
            .enumerate()
            .map(|(i, (address, _))| format!("{}={}", i + 1, reached(i, address)))
            .collect();
        for (i, (address, http)) in members.iter().enumerate() {
            let id = (i + 1).to_string();
            let data_dir = cluster.subdir(&format!("coordinators/{id}"))?;
            let mut args = strings(&[
                "--id",
                &id,
                "--cluster",
                "local",
                "--peers",
                &peers.join(","),
                "--data-dir",
            ]);
            args.push(data_dir.to_string_lossy().into_owned());
            args.extend(options.coordinator_args.iter().cloned());
            let process = cluster.server_process(
                format!("coordinator-{id}"),
                "downpour-coordinator",
                args,
                address,
                http,
            )?;
            cluster.coordinators.push(process);
        }
        for i in 0..options.servers {
            let advertise = options.advertise.get(options.coordinators + i);
            let server = cluster.ps(i, advertise, &next(), &next())?;
            cluster.servers.push(server);
        }
        Ok(cluster)
    }

    /// On ports that stay this cluster's.
    fn addresses(&mut self, count: usize) -> Result<Vec<String>, Error> {
        let ports = ports::free(count)?;
        let addresses = ports.iter().map(Port::address).collect();
        self.ports.extend(ports);
        Ok(addresses)
    }

    /// For gRPC and for HTTP.
    fn two_addresses(&mut self) -> Result<(String, String), Error> {
        let mut addresses = self.addresses(2)?.into_iter();
        let mut next = || addresses.next().expect("as many as were asked for");
        Ok((next(), next()))
    }

    fn ps(
        &self,
        number: usize,
        advertise: Option<&String>,
        address: &str,
        http: &str,
    ) -> Result<Process, Error> {
        let name = format!("ps-{number}");
        let mut args = strings(&["--name", &name, "--coordinators", &self.coordinator_addresses()]);
        args.extend(self.server_args.iter().cloned());
        if let Some(address) = advertise {
            args.extend(strings(&["--advertise", address]));
        }
        self.server_process(name, "downpour-ps", args, address, http)
    }

    /// The number of the next coordinator that joins, of its name and its directory.
    pub fn next_coordinator(&self) -> usize {
        let number = |process: &Process| process.name().rsplit('-').next()?.parse::<usize>().ok();
        self.coordinators.iter().filter_map(number).max().unwrap_or(0) + 1
    }

    /// Starts one more coordinator, which joins the group once it is let in there. It is not waited for. `advertise`: where it is reached, given for all of them or for none.
    pub fn join_coordinator(&mut self, advertise: Option<String>) -> Result<&Process, Error> {
        let number = self.next_coordinator();
        let (address, http) = self.two_addresses()?;
        let data_dir = self.subdir(&format!("coordinators/{number}"))?;
        let mut all = strings(&["--cluster", "local", "--join", &self.coordinator_addresses()]);
        all.extend(["--data-dir".to_owned(), data_dir.to_string_lossy().into_owned()]);
        all.extend(self.coordinator_args.iter().cloned());
        all.extend(advertise.iter().flat_map(|at| ["--advertise".to_owned(), at.clone()]));
        let name = format!("coordinator-{number}");
        let mut process =
            self.server_process(name, "downpour-coordinator", all, &address, &http)?;
        process.start()?;
        self.advertise.extend(advertise);
        self.coordinators.push(process);
        Ok(&self.coordinators[self.coordinators.len() - 1])
    }

    /// Leaves a coordinator that was removed from the group to the caller.
    pub fn forget_coordinator(&mut self, at: usize) -> Process {
        if !self.advertise.is_empty() {
            self.advertise.remove(at);
        }
        self.coordinators.remove(at)
    }

    /// Forgets coordinators that have ended with status 0 and are no members of the group any more: their names. `is_member` asks the others, of addresses
    /// with commas between them, for the one with an address.
    pub fn forget_removed(
        &mut self,
        is_member: impl Fn(&str, &str) -> bool,
    ) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        for at in (0..self.coordinators.len()).rev() {
            if !self.coordinators[at].poll()?.is_some_and(|status| status.success()) {
                continue;
            }
            let others = (0..self.coordinators.len()).filter(|other| *other != at);
            let others: Vec<_> = others.map(|other| self.coordinators[other].address()).collect();
            if others.is_empty() || is_member(&others.join(","), self.coordinators[at].address()) {
                continue;
            }
            let process = self.forget_coordinator(at);
            self.removed_cpu += process.cpu();
            names.push(process.name().to_owned());
        }
        Ok(names)
    }

    /// Starts one more server with the settings of the others, under the lowest number that is free, and waits until it is ready. One that
    /// does not get ready is gone again.
    pub fn add_server(&mut self, ready_within: Duration) -> Result<&Process, Error> {
        let taken = |number: &usize| {
            let name = format!("ps-{number}");
            self.servers.iter().any(|server| server.name() == name)
        };
        let number = (0..self.servers.len()).find(|number| !taken(number));
        let (address, http) = self.two_addresses()?;
        let number = number.unwrap_or(self.servers.len());
        let mut server = self.ps(number, None, &address, &http)?;
        server.start()?;
        server.wait_ready(ready_within)?;
        self.servers.push(server);
        Ok(&self.servers[self.servers.len() - 1])
    }

    /// Ends a server as [`Process::stop`] does, and forgets it. What it holds is the caller's business.
    pub fn remove_server(&mut self, name: &str, deadline: Duration) -> Result<(), Error> {
        let at = self.servers.iter().position(|server| server.name() == name);
        let mut server = self.servers.remove(at.ok_or_else(|| Error::NoServer(name.to_owned()))?);
        let stopped = server.stop(deadline);
        self.removed_cpu += server.cpu();
        stopped
    }

    fn server_process(
        &self,
        name: String,
        binary: &str,
        mut args: Vec<String>,
        address: &str,
        http: &str,
    ) -> Result<Process, Error> {
        args.extend(strings(&["--listen", address, "--http", http]));
        let program = self.program(name, binary, args)?;
        Ok(Process::new(
            program,
            address.to_owned(),
            http.to_owned(),
            self.spawner.clone(),
            self.interrupt.clone(),
        ))
    }

    fn program(&self, name: String, binary: &str, args: Vec<String>) -> Result<Program, Error> {
        let path = self::binary(binary, Some(&self.bin_dir))?;
        let log = self.log_dir().join(format!("{name}.log"));
        Ok(Program { name, path, args, log })
    }

    /// Starts every process and waits until each is ready.
    pub fn start_all(&mut self, ready_within: Duration) -> Result<(), Error> {
        self.start_some(usize::MAX, ready_within)
    }

    /// Starts the coordinators and the first `servers` servers, and waits until each is ready.
    pub fn start_some(&mut self, servers: usize, ready_within: Duration) -> Result<(), Error> {
        let started = self.start_processes(servers, ready_within);
        // Any other error names a log in it.
        if started.as_ref().is_err_and(|error| !matches!(error, Error::Interrupted)) {
            self.keep_dir();
        }
        started
    }

    fn start_processes(&mut self, servers: usize, ready_within: Duration) -> Result<(), Error> {
        let servers = servers.min(self.servers.len());
        // A coordinator is ready when there is a leader, so all of them start before any is waited for.
        for group in [&mut self.coordinators[..], &mut self.servers[..servers]] {
            group.iter_mut().try_for_each(Process::start)?;
            group.iter_mut().try_for_each(|process| process.wait_ready(ready_within))?;
        }
        Ok(())
    }

    /// Starts a further program of the same directory, a worker for example; its log joins the others.
    pub fn run(&self, name: &str, binary: &str, args: Vec<String>) -> Result<Process, Error> {
        let program = self.program(name.to_owned(), binary, args)?;
        let mut process = Process::new(
            program,
            String::new(),
            String::new(),
            self.spawner.clone(),
            self.interrupt.clone(),
        );
        process.start()?;
        Ok(process)
    }

    /// Addresses of all coordinators, as `--coordinators` takes them.
    pub fn coordinator_addresses(&self) -> String {
        match self.advertise.as_slice() {
            [] => self.coordinators.iter().map(Process::address).collect::<Vec<_>>().join(","),
            advertised => advertised.join(","),
        }
    }

    /// Every process of the cluster, in the order in which they were started.
    pub fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        self.coordinators.iter_mut().chain(&mut self.servers)
    }

    /// [`Error::Crashed`] if a process that was not told to end has ended.
    pub fn check(&mut self) -> Result<(), Error> {
        self.processes().try_for_each(Process::check)
    }

    /// Processor time that all processes have used, ended lives and removed servers included.
    pub fn cpu(&self) -> Duration {
        let processes = self.coordinators.iter().chain(&self.servers);
        self.removed_cpu + processes.map(Process::cpu).sum::<Duration>()
    }

    /// Ends servers and then coordinators with SIGTERM, those that take longer than `deadline` with SIGKILL. The errors say who did not
    /// end cleanly.
    pub fn stop(&mut self, deadline: Duration) -> Vec<Error> {
        let mut errors = stop_all(self.servers.iter_mut(), deadline);
        errors.extend(stop_all(self.coordinators.iter_mut(), deadline));
        errors
    }

    /// Where everything is.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where the logs are, one for each process.
    pub fn log_dir(&self) -> PathBuf {
        self.dir().join("logs")
    }

    /// A directory below [`dir`](Self::dir), made if absent.
    pub fn subdir(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.dir().join(name);
        fs::create_dir_all(&path).map_err(Error::io(format!("create {}", path.display())))?;
        Ok(path)
    }

    /// The directory stays when the cluster is gone.
    pub fn keep_dir(&mut self) {
        self.dir.keep();
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        // A failed test needs the logs.
        if std::thread::panicking() {
            self.keep_dir();
            eprintln!("the logs of the cluster are in {}", self.log_dir().display());
        }
    }
}

/// Ends processes with SIGTERM, all at once, those that take longer than `deadline` with SIGKILL. The errors say who did not end cleanly.
pub fn stop_all<'a>(
    processes: impl Iterator<Item = &'a mut Process>,
    deadline: Duration,
) -> Vec<Error> {
    let mut processes: Vec<&mut Process> =
        processes.filter(|process| process.is_running()).collect();
    let asked: Vec<_> = processes.iter().map(|process| process.ask_to_stop()).collect();
    let end = Instant::now() + deadline;
    let left = || end.saturating_duration_since(Instant::now());
    let ended = processes.iter_mut().map(|process| process.wait_stopped(left()));
    asked.into_iter().chain(ended).filter_map(Result::err).collect()
}

/// A binary of this project: in `dir`, or beside this executable.
pub fn binary(name: &str, dir: Option<&Path>) -> Result<PathBuf, Error> {
    let dir = dir.map_or_else(beside_this_executable, |dir| Ok(dir.to_owned()))?;
    let path = dir.join(name);
    if path.is_file() { Ok(path) } else { Err(Error::NoBinary { binary: name.to_owned(), dir }) }
}

/// The executable's directory; for a test, which cargo puts into `deps`, the one above.
fn beside_this_executable() -> Result<PathBuf, Error> {
    let executable = std::env::current_exe().map_err(Error::io("find this executable"))?;
    let dir = executable.parent().unwrap_or_else(|| Path::new("."));
    Ok(if dir.ends_with("deps") { dir.join("..") } else { dir.to_owned() })
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(ToString::to_string).collect()
}

/// Where a cluster lives.
#[derive(Debug)]
enum Directory {
    Temporary(TempDir),
    Kept(PathBuf),
}

impl Directory {
    fn new(given: Option<&Path>) -> Result<Self, Error> {
        let directory = match given {
            None => {
                let made = tempfile::Builder::new().prefix("downpour-").tempdir();
                Self::Temporary(made.map_err(Error::io("create a temporary directory"))?)
            }
            Some(path) => {
                fs::create_dir_all(path)
                    .map_err(Error::io(format!("create {}", path.display())))?;
                let path =
                    path.canonicalize().map_err(Error::io(format!("open {}", path.display())))?;
                let mut entries =
                    fs::read_dir(&path).map_err(Error::io(format!("list {}", path.display())))?;
                if entries.next().is_some() {
                    return Err(Error::DirectoryInUse { dir: path });
                }
                Self::Kept(path)
            }
        };
        let logs = directory.path().join("logs");
        fs::create_dir(&logs).map_err(Error::io(format!("create {}", logs.display())))?;
        Ok(directory)
    }

    fn path(&self) -> &Path {
        match self {
            Self::Temporary(dir) => dir.path(),
            Self::Kept(path) => path,
        }
    }

    fn keep(&mut self) {
        if let Self::Temporary(dir) = self {
            dir.disable_cleanup(true);
        }
    }
}
