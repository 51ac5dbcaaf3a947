//! The binary: options, exit statuses, signals.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use downpour_proto::transport;
use downpour_proto::v1;
use downpour_proto::v1::coordinator_client::CoordinatorClient;

const DEADLINE: Duration = Duration::from_secs(30);

fn coordinator(data: &Path, listen: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_downpour-coordinator"));
    command.arg("--data-dir").arg(data).args(["--listen", listen]).stderr(Stdio::piped());
    command
}

/// Killed at the end of its test, however that ends.
struct Process(Child);

impl Process {
    fn spawn(command: &mut Command) -> Process {
        Process(command.stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Waits for its end; gives its status and what it wrote.
    fn end(mut self) -> (i32, String, String) {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status.code().expect("not killed");
            }
            assert!(started.elapsed() < DEADLINE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let (mut out, mut err) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (status, out, err)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn get(address: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply)
}

fn ready(http: &str) -> String {
    let started = Instant::now();
    loop {
        match get(http, "/readyz") {
            Ok(reply) if reply.starts_with("HTTP/1.1 200") => return reply,
            other => assert!(started.elapsed() < DEADLINE, "not ready: {other:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_becomes_ready_shows_metrics_and_ends_cleanly_on_sigterm() {
    let (data, http) = (tempfile::tempdir().unwrap(), free_address());
    let process = Process::spawn(coordinator(data.path(), "127.0.0.1:0").args(["--http", &http]));
    ready(&http);
    let metrics = get(&http, "/metrics").unwrap();
    for wanted in ["raft_leads 1", "raft_term 1", "raft_persist_seconds_bucket", "shards_lost 0"] {
        assert!(metrics.contains(&format!("downpour_coordinator_{wanted}")), "{metrics}");
    }
    let pid = rustix::process::Pid::from_child(&process.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let (status, _, text) = process.end();
    assert_eq!(status, 0, "{text}");
}

#[tokio::test]
async fn what_was_answered_survives_sigkill() {
    let data = tempfile::tempdir().unwrap();
    let (listen, http) = (free_address(), free_address());
    let mut last = 0;
    for round in 0..3 {
        let _process = Process::spawn(coordinator(data.path(), &listen).args(["--http", &http]));
        ready(&http);
        let mut client = CoordinatorClient::new(transport::channel(&listen).unwrap());
        let cluster = client.get_cluster(v1::GetClusterRequest {}).await.unwrap().into_inner();
        let newest = cluster.nodes.iter().map(|node| node.incarnation).max();
        assert_eq!((cluster.nodes.len(), newest.unwrap_or(0)), (20 * round, last));
        for number in 0..20 {
            let name = format!("ps-{round}-{number}");
            let (address, zone) = ("127.0.0.1:9".to_owned(), String::new());
            let request_id = name.clone();
            let request =
                v1::RegisterServerRequest { name, address, zone, request_id, ..Default::default() };
            let reply = client.register_server(request).await.unwrap().into_inner();
            last = reply.server.unwrap().incarnation;
        }
    }
}

#[test]
fn a_port_in_use_is_an_error_that_names_it() {
    let data = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (status, _, text) = Process::spawn(&mut coordinator(data.path(), &address)).end();
    assert_eq!(status, 1);
    assert!(text.contains(&address) && text.contains("in use"), "{text}");
}

#[test]
fn a_data_directory_in_use_or_of_another_member_is_an_error_that_says_so() {
    let (data, http) = (tempfile::tempdir().unwrap(), free_address());
    let first = Process::spawn(coordinator(data.path(), "127.0.0.1:0").args(["--http", &http]));
    ready(&http);
    let second = Process::spawn(&mut coordinator(data.path(), "127.0.0.1:0"));
    let (status, _, text) = second.end();
    assert_eq!(status, 1);
    assert!(text.contains("another process is using it"), "{text}");
    drop(first);
    let other = Process::spawn(coordinator(data.path(), "127.0.0.1:0").args(["--id", "2"]));
    let (status, _, text) = other.end();
    assert_eq!(status, 1);
    assert!(text.contains("belongs to member 1"), "{text}");
}

#[test]
fn wrong_options_are_usage_errors_by_name() {
    let data = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &str); 5] = [
        (&["--peers", "1=127.0.0.1:1,2"], "peers"),
        (&["--peers", "2=127.0.0.1:1"], "id is needed"),
        (&["--id", "1", "--peers", "2=127.0.0.1:1"], "must have this member's id"),
        (&["--lease-ms", "100"], "lease_ms"),
        (&["--failure-timeout-ms", "100"], "failure_timeout_ms"),
    ];
    for (args, wanted) in cases {
        let mut command = coordinator(data.path(), "127.0.0.1:0");
        let (status, _, text) = Process::spawn(command.args(args)).end();
        assert_eq!(status, 2);
        assert!(text.contains(wanted), "{text}");
    }
}

#[test]
fn the_configuration_can_be_printed() {
    let data = tempfile::tempdir().unwrap();
    let mut command = coordinator(data.path(), "127.0.0.1:0");
    command.args(["--id", "2", "--dump-config"]);
    command.args(["--peers", "1=127.0.0.1:1,2=127.0.0.1:2,3=127.0.0.1:3"]);
    let (status, text, _) = Process::spawn(&mut command).end();
    assert_eq!(status, 0);
    for wanted in ["failure_timeout_ms = 1500", "2=127.0.0.1:2"] {
        assert!(text.contains(wanted), "{text}");
    }
}
