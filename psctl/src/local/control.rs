//! How a second psctl asks the one that owns a cluster's processes: over a unix socket in the cluster's directory, one line of JSON each way.
//!
//! [`Control`] is the owner's side: it never waits for who asks, and it serves one at a time, for as long as that one stays connected, so
//! that two cannot scale against each other. [`Ask`] is the other side.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Error, LocalCluster, Process};

/// The socket's name in the directory.
const SOCKET: &str = "control.sock";
const REQUEST_BYTES_MAX: usize = 1 << 10;
/// A cluster of 64 servers says who they are in a tenth of it.
const REPLY_BYTES_MAX: u64 = 1 << 20;
/// Connections that wait to be looked at.
const BACKLOG: i32 = 8;
/// How long a server may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Show {},
    Start {},
    Stop { server: String },
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Reply<T> {
    Done(T),
    Refused(String),
}

/// A cluster, as its owner sees it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Shown {
    /// Addresses of all, as `--coordinators` takes them.
    pub coordinators: String,
    /// In the order in which they were started.
    pub servers: Vec<Server>,
}

/// A server's process.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Server {
    /// Its name in the cluster.
    pub name: String,
    /// Of its process, if that runs.
    pub pid: Option<u32>,
    /// All its output.
    pub log: PathBuf,
}

impl From<&Process> for Server {
    fn from(process: &Process) -> Self {
        let (name, pid) = (process.name().to_owned(), process.pid());
        Self { name, pid, log: process.log().to_owned() }
    }
}

/// The owner's side. Dropped, the socket is gone.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    listener: UnixListener,
    client: Option<Client>,
    ready_within: Duration,
}

/// Who is served, and what it has sent of its next line.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Control {
    /// Only this user can connect. A server that is started may take `ready_within` until it is ready.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(cluster: &LocalCluster, ready_within: Duration) -> Result<Self, Error> {
        let path = cluster.dir().join(SOCKET);
        let listener =
            listener(cluster.dir()).map_err(Error::io(format!("listen on {}", path.display())))?;
        Ok(Self { path, listener, client: None, ready_within })
    }

    /// Does what was asked for since the last call; says what that was. Waits for processes, and not for who asks.
    pub fn serve(&mut self, cluster: &mut LocalCluster) -> Vec<String> {
        let mut done = Vec::new();
        loop {
            self.answer(cluster, &mut done);
            let Ok((mut stream, _)) = self.listener.accept() else { return done };
            if self.client.is_some() {
                // What it does not read it does not get.
                _ = write_line(&mut stream, &busy());
            } else if stream.set_nonblocking(true).is_ok() {
                self.client = Some(Client { stream, line: Vec::new() });
            }
        }
    }

    /// All whole lines that have come.
    fn answer(&mut self, cluster: &mut LocalCluster, done: &mut Vec<String>) {
        let Some(mut client) = self.client.take() else { return };
        loop {
            while let Some(end) = client.line.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = client.line.drain(..=end).collect();
                let reply = match serde_json::from_slice(&line) {
                    Ok(request) => carry_out(request, cluster, self.ready_within, done),
                    Err(error) => refused(format!("not a request: {error}")),
                };
                // A reply is small, and the one before it has been read: it fits, or the other side is not psctl.
                if write_line(&mut client.stream, &reply).is_err() {
                    return;
                }
            }
            let mut some = [0; 512];
            match client.stream.read(&mut some) {
                Ok(0) => return,
                Ok(_) if client.line.len() > REQUEST_BYTES_MAX => return,
                Ok(count) => client.line.extend(&some[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return,
            }
        }
        self.client = Some(client);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Only one that is gone already cannot be removed.
        _ = std::fs::remove_file(&self.path);
    }
}

type Json = serde_json::Value;

fn carry_out(
    request: Request,
    cluster: &mut LocalCluster,
    ready_within: Duration,
    done: &mut Vec<String>,
) -> Json {
    match request {
        Request::Show {} => finished(&Shown {
            coordinators: cluster.coordinator_addresses(),
            servers: cluster.servers.iter().map(Server::from).collect(),
        }),
        Request::Start {} => match cluster.add_server(ready_within) {
            Ok(server) => {
                done.push(format!("{} started", server.name()));
                finished(&Server::from(server))
            }
            Err(error) => refused(error.to_string()),
        },
        Request::Stop { server } => match cluster.remove_server(&server, STOP_DEADLINE) {
            Ok(()) => {
                done.push(format!("{server} ended"));
                finished(&())
            }
            Err(error) => refused(error.to_string()),
        },
    }
}

fn finished(value: &impl Serialize) -> Json {
    serde_json::to_value(Reply::Done(value)).unwrap_or_else(|error| refused(error.to_string()))
}

fn refused(problem: String) -> Json {
    serde_json::json!({ "refused": problem })
}

fn busy() -> Json {
    refused("another psctl scales this cluster: wait until it is done, or end it".into())
}

fn write_line(stream: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    stream.write_all(format!("{}\n", serde_json::to_string(value)?).as_bytes())
}

/// The socket by way of its directory: a path of any length, where a socket's address has room for about a hundred bytes.
fn short_path(dir: &File) -> String {
    format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd())
}

fn listener(dir: &Path) -> io::Result<UnixListener> {
    let dir = File::open(dir)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before it is bound, so that it never has other permissions.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(short_path(&dir))?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// The other side: nobody else scales the cluster while this is there.
#[derive(Debug)]
pub struct Ask {
    stream: BufReader<UnixStream>,
    dir: PathBuf,
}

impl Ask {
    /// Connects to the owner of the cluster in `dir`, each of whose answers may take `patience`.
    ///
    /// # Errors
    /// There is no cluster, or it was killed.
    pub fn connect(dir: &Path, patience: Duration) -> Result<Self, Error> {
        let no_cluster = || Error::NoCluster { dir: dir.to_owned() };
        let opened = File::open(dir).map_err(|error| match error.kind() {
            ErrorKind::NotFound => no_cluster(),
            _ => Error::io(format!("open {}", dir.display()))(error),
        })?;
        let stream =
            UnixStream::connect(short_path(&opened)).map_err(|error| match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => no_cluster(),
                ErrorKind::ConnectionRefused => Error::ClusterKilled { dir: dir.to_owned() },
                _ => Error::io(format!("connect to {}", dir.join(SOCKET).display()))(error),
            })?;
        stream.set_read_timeout(Some(patience)).map_err(Error::io("set a time limit"))?;
        Ok(Self { stream: BufReader::new(stream), dir: dir.to_owned() })
    }

    /// What runs.
    ///
    /// # Errors
    /// The owner has ended, or serves another psctl.
    pub fn show(&mut self) -> Result<Shown, Error> {
        self.ask(&Request::Show {})
    }

    /// One more server, which is ready.
    ///
    /// # Errors
    /// It did not get ready, and is gone again.
    pub fn start(&mut self) -> Result<Server, Error> {
        self.ask(&Request::Start {})
    }

    /// Ends a server's process with SIGTERM.
    ///
    /// # Errors
    /// There is none of this name, or it had to be killed.
    pub fn stop(&mut self, server: &str) -> Result<(), Error> {
        self.ask(&Request::Stop { server: server.to_owned() })
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, Error> {
        // Who is refused finds the connection closed, and why in what was sent before.
        let sent = write_line(self.stream.get_mut(), request);
        let mut line = String::new();
        let read = (&mut self.stream).take(REPLY_BYTES_MAX).read_line(&mut line);
        match sent.and(read).map_err(|error| error.kind()) {
            _ if line.ends_with('\n') => {}
            Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(Error::OwnerSilent { dir: self.dir.clone() });
            }
            _ => return Err(Error::OwnerEnded { dir: self.dir.clone() }),
        }
        match serde_json::from_str(&line) {
            Ok(Reply::Done(value)) => Ok(value),
            Ok(Reply::Refused(problem)) => Err(Error::Refused(problem)),
            Err(error) => Err(Error::io("read the answer")(error)),
        }
    }
}

impl Drop for Ask {
    fn drop(&mut self) {
        // A process that is being started at this moment holds the connection too, until it is a program of its own.
        _ = self.stream.get_ref().shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::local::Options;

    /// A cluster without any process.
    fn empty(dir: &Path) -> LocalCluster {
        let nobody = Options {
            coordinators: 0,
            servers: 0,
            bin_dir: Some("/nowhere".into()),
            dir: Some(dir.to_owned()),
            ..Options::default()
        };
        LocalCluster::start(nobody).expect("nothing to start")
    }

    /// What one asks while the other serves.
    fn served<T: Send>(
        control: &mut Control,
        cluster: &mut LocalCluster,
        ask: impl FnOnce() -> T + Send,
    ) -> T {
        std::thread::scope(|scope| {
            let asking = scope.spawn(ask);
            while !asking.is_finished() {
                control.serve(cluster);
                std::thread::sleep(Duration::from_millis(1));
            }
            asking.join().expect("no panic")
        })
    }

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn one_is_served_at_a_time_by_an_owner_of_any_path_and_only_its_user_may() {
        let root = tempfile::tempdir().expect("directory");
        let dir = root.path().join("x".repeat(200));
        let mut cluster = empty(&dir);
        let mut control = Control::open(&cluster, PATIENCE).expect("listens");
        let socket = dir.join(SOCKET);
        let mode = socket.metadata().expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut held = None;
        served(&mut control, &mut cluster, || {
            let mut first = Ask::connect(&dir, PATIENCE).expect("connects");
            assert!(first.show().expect("answered").servers.is_empty());
            let second = Ask::connect(&dir, PATIENCE).expect("connects").show();
            assert!(second.expect_err("busy").to_string().contains("another psctl"));
            let missing = first.stop("ps-9").expect_err("no such server").to_string();
            assert!(missing.contains("ps-9"), "{missing}");
            let missing = first.start().expect_err("no binary").to_string();
            assert!(missing.contains("downpour-ps"), "{missing}");
            held = Some(first.stream.get_ref().try_clone().expect("as a child has it"));
        });
        let after = || Ask::connect(&dir, PATIENCE).expect("connects").show();
        served(&mut control, &mut cluster, after).expect("the first has gone");
        drop(held);
        drop(control);
        assert!(!socket.exists());
        assert!(matches!(Ask::connect(&dir, PATIENCE), Err(Error::NoCluster { .. })));
    }

    #[test]
    fn what_is_no_request_is_refused_and_what_has_no_end_is_left() {
        let root = tempfile::tempdir().expect("directory");
        let dir = root.path().join("cluster");
        let mut cluster = empty(&dir);
        let mut control = Control::open(&cluster, PATIENCE).expect("listens");
        let raw = |bytes: &[u8]| {
            let mut stream = UnixStream::connect(dir.join(SOCKET)).expect("connects");
            // A connection that is closed meanwhile takes no more.
            _ = stream.write_all(bytes);
            let mut reply = String::new();
            _ = BufReader::new(&stream).read_line(&mut reply);
            // Another test may start a process now, which has the connection for a moment.
            _ = stream.shutdown(Shutdown::Both);
            reply
        };
        for bad in ["{}", "null", "{\"do\":\"stop\"}", "{\"do\":\"show\",\"more\":1}", "\u{0}"] {
            let reply = served(&mut control, &mut cluster, || raw(format!("{bad}\n").as_bytes()));
            assert!(reply.starts_with("{\"refused\":\"not a request"), "{bad}: {reply}");
        }
        let endless = served(&mut control, &mut cluster, || raw(&vec![b'x'; 1 << 20]));
        assert_eq!(endless, "");
    }

    #[test]
    fn a_socket_that_a_killed_owner_left_is_told_from_none() {
        let dir = tempfile::tempdir().expect("directory");
        // Closed, not removed.
        drop(listener(dir.path()).expect("listens"));
        let error = Ask::connect(dir.path(), PATIENCE).expect_err("nobody listens");
        assert!(matches!(error, Error::ClusterKilled { .. }), "{error}");
        assert!(matches!(
            Ask::connect(&dir.path().join("none"), PATIENCE),
            Err(Error::NoCluster { .. })
        ));
    }
}
