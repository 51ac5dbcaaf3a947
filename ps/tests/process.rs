//! The binary as an operator meets it.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

fn server(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_downpour-ps"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_clear();
    command
}

fn finished(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = server(args).output().expect("it starts");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn a_port_in_use_is_named_with_the_flag_to_change() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let (status, error) =
        finished(&["--name", "ps-0", "--coordinators", "127.0.0.1:1", "--listen", &address]);
    assert_eq!(status, Some(1));
    assert!(error.contains(&address) && error.contains("--listen"), "{error}");
}

#[test]
fn everything_that_is_wrong_with_the_options_is_named() {
    let (status, error) = finished(&["--name", "p s", "--backup-timeout-ms", "0"]);
    assert_eq!(status, Some(2));
    for field in ["name", "coordinators", "backup_timeout_ms"] {
        assert!(error.lines().any(|line| line.contains(field)), "{field} in {error}");
    }
}

/// Ends the child when a test fails.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

#[test]
fn sigterm_ends_a_server_cleanly_also_when_no_coordinator_answers() {
    let mut child = Guard(
        server(&["--name", "ps-0", "--coordinators", "127.0.0.1:1"]).spawn().expect("it starts"),
    );
    let log = BufReader::new(child.0.stderr.take().expect("piped"));
    let mut lines = log.lines().map_while(Result::ok);
    let asking = |line: String| line.contains("no coordinator registers this server yet");
    assert!(lines.any(asking), "it says what it waits for");
    let pid = Pid::from_child(&child.0);
    kill_process(pid, Signal::TERM).expect("it runs");
    lines.for_each(drop);
    assert_eq!(child.0.wait().expect("it ends").code(), Some(0));
}
