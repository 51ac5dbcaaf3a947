//! One child process, over several lives.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::spawner::Spawner;
use super::{Error, probe};

const POLL: Duration = Duration::from_millis(10);
/// What a program's status is when the system's loader did not find one of its libraries.
const LOADER_FAILED: i32 = 127;
const TAIL_LINES: usize = 20;
const TAIL_BYTES: u64 = 16 << 10;

/// Ends waits early; set it from a signal handler or another thread.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Set by SIGINT, SIGTERM and SIGHUP; a second signal ends this process at once with status 1, and the kernel kills its children.
    pub fn on_signals() -> io::Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // In this order, so that the first signal does not count as the second.
            flag::register_conditional_shutdown(signal, 1, interrupt.0.clone())?;
            flag::register(signal, interrupt.0.clone())?;
        }
        Ok(interrupt)
    }

    /// From now on every wait ends with [`Error::Interrupted`].
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a process runs.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) log: PathBuf,
}

/// One program under one address, which may be killed and started again. Dropped, it is killed.
#[derive(Debug)]
pub struct Process {
    program: Program,
    address: String,
    http: String,
    spawner: Spawner,
    interrupt: Interrupt,
    child: Option<Child>,
    /// How the last life ended.
    status: Option<ExitStatus>,
    /// Processor time of the lives that have ended.
    cpu: Duration,
}

impl Process {
    pub(super) fn new(
        program: Program,
        address: String,
        http: String,
        spawner: Spawner,
        interrupt: Interrupt,
    ) -> Self {
        Self {
            program,
            address,
            http,
            spawner,
            interrupt,
            child: None,
            status: None,
            cpu: Duration::ZERO,
        }
    }

    /// Unique in the cluster.
    pub fn name(&self) -> &str {
        &self.program.name
    }

    /// Where it serves gRPC; empty for a program that does not.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where it serves `/metrics` and `/readyz`; empty for a program that does not.
    pub fn http(&self) -> &str {
        &self.http
    }

    /// All its output, of all its lives.
    pub fn log(&self) -> &Path {
        &self.program.log
    }

    /// Of the life that runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// As far as [`poll`](Self::poll) last saw.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Starts it, for the first time or again. Does nothing if it runs.
    pub fn start(&mut self) -> Result<(), Error> {
        if self.poll()?.is_none() && self.is_running() {
            return Ok(());
        }
        let Program { name, path, args, log } = &self.program;
        let open = OpenOptions::new().create(true).append(true).open(log);
        let output = open.map_err(Error::io(format!("open {}", log.display())))?;
        let errors = output.try_clone().map_err(Error::io(format!("open {}", log.display())))?;
        let mut command = Command::new(path);
        command.args(args).stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = self.spawner.spawn(command);
        self.child = Some(child.map_err(Error::io(format!("start {name} ({})", path.display())))?);
        self.status = None;
        Ok(())
    }

    /// Waits until `/readyz` answers 200.
    pub fn wait_ready(&mut self, within: Duration) -> Result<(), Error> {
        let end = Instant::now() + within;
        loop {
            self.check()?;
            let reason = match probe::ready(&self.http) {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            };
            if self.interrupt.is_set() {
                return Err(Error::Interrupted);
            }
            if Instant::now() >= end {
                let (name, log) = (self.name().to_owned(), self.log().to_owned());
                return Err(Error::NotReady {
                    name,
                    waited: within,
                    reason,
                    log,
                    tail: self.tail(),
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// How the last life ended; `None` while it runs and before the first.
    pub fn poll(&mut self) -> Result<Option<ExitStatus>, Error> {
        if let Some(child) = &mut self.child {
            let pid = Pid::from_child(child);
            // Not reaped yet: what it used can still be read.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            let action = || format!("wait for {}", self.program.name);
            if waitid(WaitId::Pid(pid), options).map_err(Error::io(action()))?.is_some() {
                self.cpu += cpu_of(child.id());
                self.status = Some(child.wait().map_err(Error::io(action()))?);
                self.child = None;
            }
        }
        Ok(self.status)
    }

    /// [`Error::Crashed`] unless it runs or ended with status 0.
    pub fn check(&mut self) -> Result<(), Error> {
        match self.poll()? {
            Some(status) if self.is_crash(status) => Err(self.crashed(status)),
            _ => Ok(()),
        }
    }

    /// A server is not to end at all, whatever its status; [`kill`](Self::kill) and [`stop`](Self::stop) clear theirs.
    fn is_crash(&self, status: ExitStatus) -> bool {
        !status.success() || !self.http.is_empty()
    }

    fn crashed(&self, status: ExitStatus) -> Error {
        let tail = self.tail();
        if status.code() == Some(LOADER_FAILED) && tail.contains("libtorch") {
            return Error::NoLibTorch { name: self.name().to_owned(), tail };
        }
        Error::Crashed { name: self.name().to_owned(), status, log: self.log().to_owned(), tail }
    }

    /// Waits until it ends by itself, and for status 0.
    pub fn wait_success(&mut self, within: Duration) -> Result<(), Error> {
        let end = Instant::now() + within;
        loop {
            match self.poll()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.crashed(status)),
                None if self.interrupt.is_set() => return Err(Error::Interrupted),
                None if Instant::now() >= end => return Err(self.late(within)),
                None => std::thread::sleep(POLL),
            }
        }
    }

    /// Sends a signal: STOP and CONT pause and resume it.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        let Some(child) = &self.child else { return Ok(()) };
        kill_process(Pid::from_child(child), signal)
            .map_err(Error::io(format!("signal {}", self.name())))
    }

    /// SIGKILL, and waits until it is gone. Does nothing if it does not run.
    pub fn kill(&mut self) -> Result<(), Error> {
        let Some(child) = &mut self.child else { return Ok(()) };
        let action = format!("kill {}", self.program.name);
        child.kill().map_err(Error::io(&action))?;
        waitid(WaitId::Pid(Pid::from_child(child)), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
            .map_err(Error::io(&action))?;
        self.poll()?;
        // Wanted, so not a crash.
        self.status = None;
        Ok(())
    }

    /// Sends SIGTERM.
    pub fn ask_to_stop(&self) -> Result<(), Error> {
        self.signal(Signal::TERM)
    }

    /// SIGTERM, and SIGKILL after `deadline`. An error unless it ended with status 0 by itself. Does nothing if it does not run.
    pub fn stop(&mut self, deadline: Duration) -> Result<(), Error> {
        if self.is_running() {
            self.ask_to_stop()?;
        }
        self.wait_stopped(deadline)
    }

    /// The second half of [`stop`](Self::stop): a second SIGTERM would end a server at once and uncleanly.
    pub fn wait_stopped(&mut self, deadline: Duration) -> Result<(), Error> {
        let end = Instant::now() + deadline;
        while self.is_running() {
            match self.poll()? {
                Some(status) if status.success() => {}
                Some(status) => return Err(self.crashed(status)),
                None if Instant::now() < end => std::thread::sleep(POLL),
                None => {
                    self.kill()?;
                    return Err(self.late(deadline));
                }
            }
        }
        self.status = None;
        Ok(())
    }

    fn late(&self, waited: Duration) -> Error {
        Error::Late { name: self.name().to_owned(), waited, log: self.log().to_owned() }
    }

    /// A number that it shows on `/metrics`, of a metric without labels; none while it does not answer.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<f64> {
        let shown = probe::get(&self.http, "/metrics").ok()?;
        let mut lines = shown.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(shown, _)| *shown == name)?.1.trim().parse().ok()
    }

    /// Processor time that it has used, over all its lives.
    pub fn cpu(&self) -> Duration {
        self.cpu + self.child.as_ref().map(|child| cpu_of(child.id())).unwrap_or_default()
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        tail(self.log()).unwrap_or_else(|error| format!("(not readable: {error})"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Only a process that is gone already cannot be killed.
        let _ = self.kill();
    }
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES)))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"))
}

/// User and system time of a process, also of one that has ended and is not reaped. Zero if nobody knows.
fn cpu_of(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field is a name in parentheses that may contain anything; utime and stime are the 14th and 15th.
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: u64 =
        after_name.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Duration::from_secs(ticks)
        / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap_or(100)
}
