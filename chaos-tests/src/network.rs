//! A network between processes that can be cut and slowed: what all [proxies](crate::proxy) of a cluster share.
//!
//! Bytes that may not pass wait, as TCP's do until it has sent them again: a connection outlives a short partition, and what was sent
//! meanwhile arrives late. A proxy learns who connects from the kernel: the socket's inode, and whose it is among this process's children.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use downpour_core::mix::mix64;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// A direction in which nothing passes; `None` is everybody.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    /// Who is not heard.
    pub from: Option<String>,
    /// Who does not hear.
    pub to: Option<String>,
}

#[derive(Clone, Debug, Default)]
struct Weather {
    cuts: BTreeSet<Cut>,
    delay: Duration,
    /// Of a thousand segments.
    lost_permille: u64,
    /// How often the connections of each were broken.
    broken: BTreeMap<String, u64>,
}

impl Weather {
    fn passes(&self, from: &str, to: &str) -> bool {
        let is = |end: &Option<String>, name: &str| end.as_ref().is_none_or(|end| end == name);
        !self.cuts.iter().any(|cut| is(&cut.from, from) && is(&cut.to, to))
    }
}

/// See the module. Clones are the same network.
#[derive(Clone)]
pub struct Network {
    passages: Passages,
    runtime: Arc<Runtime>,
}

/// What proxies ask.
#[derive(Clone, Default)]
pub(crate) struct Passages {
    weather: Arc<watch::Sender<Weather>>,
    /// That passed so far.
    segments: Arc<AtomicU64>,
}

impl Passages {
    pub(crate) fn delay(&self) -> Duration {
        self.weather.borrow().delay
    }

    /// Whether a segment is lost, and has to be sent again.
    pub(crate) fn loses(&self) -> bool {
        let permille = self.weather.borrow().lost_permille;
        let segment = |segments: &AtomicU64| segments.fetch_add(1, Ordering::Relaxed);
        permille > 0 && mix64(segment(&self.segments)) % 1000 < permille
    }

    /// Returns when the connections of one of these are broken.
    pub(crate) async fn break_of(&self, ends: [&str; 2]) {
        let mut weather = self.weather.subscribe();
        let count = |weather: &Weather| ends.map(|end| weather.broken.get(end).copied());
        let before = count(&weather.borrow_and_update());
        // The sender lives in `self`.
        _ = weather.wait_for(|weather| count(weather) != before).await;
    }

    pub(crate) async fn passage(&self, from: &str, to: &str) {
        let mut weather = self.weather.subscribe();
        // The sender lives in `self`.
        _ = weather.wait_for(|weather| weather.passes(from, to)).await;
    }
}

impl Network {
    /// Everything passes at once.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new() -> Result<Self> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().context("start a runtime")?;
        Ok(Self { passages: Passages::default(), runtime: Arc::new(runtime) })
    }

    pub(crate) fn runtime(&self) -> Arc<Runtime> {
        self.runtime.clone()
    }

    pub(crate) fn passages(&self) -> Passages {
        self.passages.clone()
    }

    /// From now on nothing passes there.
    pub fn cut(&self, cut: Cut) {
        self.passages.weather.send_modify(|weather| _ = weather.cuts.insert(cut));
    }

    /// From now on everything passes there again, first what waited.
    pub fn heal(&self, cut: &Cut) {
        self.passages.weather.send_modify(|weather| _ = weather.cuts.remove(cut));
    }

    /// How long every byte takes from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.passages.weather.send_modify(|weather| weather.delay = delay);
    }

    /// How many of a thousand segments are lost from now on. A proxy of streams cannot lose bytes: what follows a lost segment waits with it until TCP has sent it again.
    pub fn set_loss(&self, permille: u64) {
        self.passages.weather.send_modify(|weather| weather.lost_permille = permille);
    }

    /// Breaks every connection to and from a process; new ones are taken.
    pub fn break_connections(&self, name: &str) {
        let broken = |weather: &mut Weather| *weather.broken.entry(name.into()).or_default() += 1;
        self.passages.weather.send_modify(broken);
    }
}

/// Which process has the connection from this port to that one on loopback: the `--name` of a child of this process, or `coordinator-` and the last part of its `--data-dir`, or nobody, `""`: this process itself, and who has ended meanwhile.
pub(crate) fn process_at(from: u16, to: u16) -> String {
    let found = inode(from, to).and_then(|inode| {
        let socket = format!("socket:[{inode}]");
        children().into_iter().find(|pid| has_open(pid, &socket))
    });
    found.and_then(|pid| name_of(&pid)).unwrap_or_default()
}

fn inode(from: u16, to: u16) -> Option<String> {
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = |field: &str| u16::from_str_radix(field.split_once(':')?.1, 16).ok();
        let is = port(fields.get(1)?) == Some(from) && port(fields.get(2)?) == Some(to);
        is.then(|| fields.get(9).map(ToString::to_string))?
    })
}

/// Of all threads of this process.
fn children() -> Vec<String> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(String::from).collect::<Vec<_>>()).collect()
}

fn has_open(pid: &str, socket: &str) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    { files }.any(|file| fs::read_link(file.path()).is_ok_and(|target| target == Path::new(socket)))
}

fn name_of(pid: &str) -> Option<String> {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments: Vec<&str> = line.split('\0').collect();
    let after = |flag| Some(*arguments.get(arguments.iter().position(|&at| at == flag)? + 1)?);
    let coordinator = || {
        let number = Path::new(after("--data-dir")?).file_name()?.to_str()?;
        Some(format!("coordinator-{number}"))
    };
    after("--name").map(ToOwned::to_owned).or_else(coordinator)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(from: Option<&str>, to: Option<&str>) -> Cut {
        Cut { from: from.map(Into::into), to: to.map(Into::into) }
    }

    #[test]
    fn a_cut_stops_one_direction_and_healing_opens_it() {
        let network = Network::new().unwrap();
        let passes = |from, to| network.passages.weather.borrow().passes(from, to);
        network.cut(cut(Some("a"), Some("b")));
        assert!(!passes("a", "b") && passes("b", "a") && passes("a", "c"));
        network.cut(cut(None, Some("c")));
        assert!(!passes("a", "c") && !passes("", "c") && passes("c", "a"));
        network.heal(&cut(Some("a"), Some("b")));
        assert!(passes("a", "b") && !passes("a", "c"));
    }

    #[test]
    fn about_as_many_segments_are_lost_as_shall_be_and_none_later() {
        let network = Network::new().unwrap();
        let lost = || (0..10_000).filter(|_| network.passages.loses()).count();
        network.set_loss(30);
        assert!((200..400).contains(&lost()));
        network.set_loss(0);
        assert_eq!(lost(), 0);
    }

    #[test]
    fn a_connection_of_this_process_is_nobodys() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let connection = std::net::TcpStream::connect(to).unwrap();
        let from = connection.local_addr().unwrap().port();
        assert!(inode(from, to.port()).is_some(), "the kernel does not list it");
        assert_eq!(process_at(from, to.port()), "");
    }
}
