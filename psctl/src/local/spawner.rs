//! Starts children that cannot outlive this process, whatever kills it.
//!
//! Linux sends a child its "parent death signal" when the *thread* that started it ends, so all children are started by one thread,
//! which ends when the last [`Spawner`] is gone; each [`Process`](super::Process) holds one.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver, Sender};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

type Request = (Command, Sender<io::Result<Child>>);

/// A cheap clone of the way to the thread.
#[derive(Clone, Debug)]
pub(super) struct Spawner {
    requests: Sender<Request>,
}

impl Spawner {
    pub(super) fn new() -> io::Result<Self> {
        let (requests, inbox): (Sender<Request>, Receiver<Request>) = mpsc::channel();
        std::thread::Builder::new().name("spawner".into()).spawn(move || {
            for (mut command, reply) in inbox {
                // The asker waits for the reply; if it is gone its child is not wanted.
                let _ = reply.send(command.spawn());
            }
        })?;
        Ok(Self { requests })
    }

    /// Starts `command` in a process group of its own (a Ctrl-C of the terminal reaches this process alone, which ends the children in
    /// order), to be killed when this process ends.
    pub(super) fn spawn(&self, mut command: Command) -> io::Result<Child> {
        command.process_group(0);
        die_with_parent(&mut command);
        let (reply, answer) = mpsc::channel();
        let gone = |_| io::Error::other("the spawner thread is gone");
        self.requests
            .send((command, reply))
            .map_err(|_| io::Error::other("the spawner thread is gone"))?;
        answer.recv().map_err(gone)?
    }
}

#[allow(unsafe_code)]
fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let before_exec = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have died between fork and here, and nobody would ever send the signal.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from(rustix::io::Errno::SRCH))
        }
    };
    // SAFETY: between fork and exec the closure makes two system calls (prctl, getppid) and nothing else: it takes no lock, allocates
    // nothing (an `io::Error` of an errno is a number) and touches no memory but its own stack and the copied `parent`.
    unsafe { command.pre_exec(before_exec) };
}
