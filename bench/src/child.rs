//! Processes that measure: the parent's end of [`crate::protocol`].

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{self, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use serde::{Serialize, de::DeserializeOwned};

use crate::protocol::{Answer, Role};
use crate::{System, protocol};

/// How often the system under measurement is looked at while a child works.
const LOOK: Duration = Duration::from_millis(100);
/// How long a child may take to end by itself.
const GRACE: Duration = Duration::from_secs(6);
const POLL: Duration = Duration::from_millis(5);

/// A program that speaks JSON, a line each way. Dropped, its stdin ends; it is killed if it does not end then.
#[derive(Debug)]
pub struct Child {
    name: String,
    process: process::Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Child {
    /// Starts a program. `name` is for people.
    ///
    /// # Errors
    /// The system refuses.
    pub fn start(name: &str, program: PathBuf, args: Vec<OsString>) -> anyhow::Result<Self> {
        let mut command = process::Command::new(&program);
        // A Ctrl-C of the terminal is for the parent, which ends its children in order.
        command.args(args).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let started = command.spawn();
        let mut process =
            started.with_context(|| format!("start {name} ({})", program.display()))?;
        let (sender, lines) = mpsc::channel();
        let stdout = process.stdout.take().context("a pipe to read from")?;
        std::thread::Builder::new().name(name.into()).spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines.map_while(|line| sender.send(line).ok()).for_each(drop);
        })?;
        Ok(Self { name: name.into(), stdin: process.stdin.take(), process, lines })
    }

    /// Starts this program again in a role; [`crate::child_main`] is what it must come to.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn in_role(
        name: &str,
        role: &Role,
        system: &mut dyn System,
    ) -> anyhow::Result<(Self, Option<String>)> {
        let this = std::env::current_exe().context("find this program")?;
        let args = CHILD_ARGS.iter().map(OsString::from).collect();
        let mut child = Self::start(name, this, args)?;
        child.say(role)?;
        match child.answer(system)? {
            Answer::Ready { address } => Ok((child, address)),
            other => Err(child.unexpected(&other)),
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends a line.
    ///
    /// # Errors
    /// It has ended.
    pub fn say<T: Serialize>(&mut self, line: &T) -> anyhow::Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.say_text(&text)
    }

    /// Sends text as it is.
    ///
    /// # Errors
    /// It has ended.
    pub fn say_text(&mut self, text: &str) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("its stdin")?;
        // A child that has ended says why in its last answer, which is read next.
        match stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(error).with_context(|| format!("tell {}", self.name))
            }
            _ => Ok(()),
        }
    }

    /// The next line that it says.
    ///
    /// # Errors
    /// It ends instead, says nothing of this kind, or the system under measurement cannot go on.
    pub fn hear<T: DeserializeOwned>(&mut self, system: &mut dyn System) -> anyhow::Result<T> {
        loop {
            system.check()?;
            match self.lines.recv_timeout(LOOK) {
                Ok(line) => {
                    return protocol::parse(&line).with_context(|| format!("hear {}", self.name));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.process.wait().context("wait for a child")?;
                    bail!("{} ended ({status})", self.name);
                }
            }
        }
    }

    /// The next answer.
    ///
    /// # Errors
    /// It failed; see [`hear`](Self::hear) too.
    pub fn answer(&mut self, system: &mut dyn System) -> anyhow::Result<Answer> {
        match self.hear(system)? {
            Answer::Failed { error } => Err(anyhow!("{}: {error}", self.name)),
            answer => Ok(answer),
        }
    }

    /// The error of an answer to another question.
    pub(crate) fn unexpected(&self, answer: &Answer) -> anyhow::Error {
        anyhow!("{} answers {answer:?}", self.name)
    }

    /// Waits until it has ended by itself, with status 0.
    ///
    /// # Errors
    /// It has not.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.stdin = None;
        match self.ended_within(GRACE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{} ended ({status})", self.name),
            None => bail!("{} did not end within {GRACE:?}", self.name),
        }
    }

    fn ended_within(&mut self, within: Duration) -> std::io::Result<Option<process::ExitStatus>> {
        let end = Instant::now() + within;
        loop {
            let status = self.process.try_wait()?;
            if status.is_some() || Instant::now() >= end {
                return Ok(status);
            }
            std::thread::sleep(POLL);
        }
    }
}

/// The command line that makes this program a child.
pub const CHILD_ARGS: [&str; 2] = ["bench", "child"];

impl Drop for Child {
    fn drop(&mut self) {
        self.stdin = None;
        if !matches!(self.ended_within(GRACE), Ok(Some(_))) {
            // It can only be gone already.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}
