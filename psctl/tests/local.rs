//! `psctl local` with stand-ins for the other binaries: each is this test program again, in the role of a server or a worker.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(30);

/// What a stand-in of a worker does: the environment variable `STAND_IN_WORKER`.
const FINISH: &str = "finish";
const FAIL: &str = "fail";
const HANG: &str = "hang";

/// The role, not a test: started by the scripts that [`Place::new`] writes.
#[test]
#[ignore = "a process of the other tests"]
fn stand_in() {
    let Ok(line) = std::env::var("STAND_IN_ARGS") else { return };
    let args: Vec<&str> = line.split_whitespace().collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| *arg == name)?;
        args.get(at + 1).copied()
    };
    let pids = PathBuf::from(std::env::var_os("STAND_IN_PIDS").expect("set by the test"));
    fs::write(pids.join(std::process::id().to_string()), &line).expect("write");
    let terminated = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, terminated.clone()).expect("handler");
    if let Some(http) = value("--http") {
        let listener = TcpListener::bind(http).expect("bind");
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            }
        });
    } else if args[0] == "evaluate" {
        fs::write(
            value("--report").expect("a report"),
            "{\"auc\":0.75,\"logloss\":0.5,\"rows\":9}",
        )
        .expect("write");
        std::process::exit(0);
    } else {
        match std::env::var("STAND_IN_WORKER").expect("set by the test").as_str() {
            FAIL if value("--worker-index") == Some("1") => {
                println!("error: no such column");
                std::process::exit(3);
            }
            FINISH => {
                let line =
                    "{\"clock\":7,\"samples\":1,\"total_samples\":1500,\"samples_per_s\":10}\n";
                let out = Path::new(value("--out").expect("a directory"));
                fs::write(out.join("metrics.jsonl"), line).expect("write");
                std::process::exit(0);
            }
            _ => {}
        }
    }
    while !terminated.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::process::exit(0);
}

/// The directories of one test.
struct Place {
    bin: TempDir,
    temporary: TempDir,
    pids: TempDir,
}

impl Place {
    fn new() -> Self {
        let new = || tempfile::tempdir().expect("directory");
        let place = Self { bin: new(), temporary: new(), pids: new() };
        let this = std::env::current_exe().expect("this program");
        for name in ["downpour-coordinator", "downpour-ps", "downpour-worker"] {
            let this = this.display();
            let script = format!(
                "#!/bin/sh\nSTAND_IN_ARGS=\"$*\" exec '{this}' --exact stand_in --ignored --nocapture\n"
            );
            let path = place.bin.path().join(name);
            fs::write(&path, script).expect("write");
            let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(&path, executable).expect("executable");
        }
        place
    }

    /// `psctl` before the command line's `--`, one coordinator, one server, two workers.
    fn psctl(&self, workers_do: &str, command: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_psctl"))
            .args(["-o", "json", "local", "--coordinators", "1", "--servers", "1", "--bin-dir"])
            .arg(self.bin.path())
            .args(command.split_whitespace())
            .env("TMPDIR", self.temporary.path())
            .env("STAND_IN_PIDS", self.pids.path())
            .env("STAND_IN_WORKER", workers_do)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("psctl starts")
    }

    /// Command lines of the stand-ins by process, dead or alive.
    fn started(&self) -> Vec<(i32, String)> {
        let entries = fs::read_dir(self.pids.path()).expect("list").flatten();
        let entries = entries.map(|entry| {
            let pid = entry.file_name().to_string_lossy().parse().expect("a number");
            (pid, fs::read_to_string(entry.path()).expect("read"))
        });
        entries.collect()
    }

    fn alive(&self) -> Vec<(i32, String)> {
        let mut started = self.started();
        started.retain(|(pid, _)| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
        });
        started
    }

    fn left_in_temporary(&self) -> usize {
        fs::read_dir(self.temporary.path()).expect("list").count()
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Exit status, stdout, stderr.
fn output(child: Child) -> (Option<i32>, String, String) {
    let output = child.wait_with_output().expect("psctl ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_training_ends_with_one_object_and_leaves_nothing_behind() {
    let place = Place::new();
    let train = "-- train --model lr --train data/census/train.csv --test test.csv";
    let (status, stdout, stderr) = output(place.psctl(FINISH, train));
    assert_eq!(status, Some(0), "{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).expect("one JSON value");
    let mut fields: Vec<&str> =
        report.as_object().expect("an object").keys().map(String::as_str).collect();
    fields.sort_unstable();
    let promised = "cpu_s_per_msample dataset mode model samples samples_per_s servers test_auc test_logloss wall_s workers";
    assert_eq!(fields.join(" "), promised);
    assert_eq!((&report["dataset"], &report["model"]), (&"census".into(), &"lr".into()));
    assert_eq!((&report["samples"], &report["workers"]), (&3000.into(), &2.into()));
    assert_eq!((&report["test_auc"], &report["test_logloss"]), (&0.75.into(), &0.5.into()));
    assert_eq!(place.left_in_temporary(), 0);
    assert_eq!(place.alive(), []);
    assert_eq!(place.started().len(), 5, "coordinator, server, two workers, evaluation");
}

#[test]
fn a_worker_that_fails_is_named_with_its_status_and_log() {
    let place = Place::new();
    let (status, stdout, stderr) = output(place.psctl(FAIL, "-- train --model lr"));
    assert_eq!((status, stdout.as_str()), (Some(1), ""), "{stderr}");
    for part in
        ["worker-1 ended (exit status: 3)", "error: no such column", "logs and metrics are in"]
    {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    assert_eq!(place.left_in_temporary(), 1, "the logs stay");
    assert_eq!(place.alive(), []);
}

#[test]
fn an_interrupt_ends_every_process() {
    let place = Place::new();
    let child = place.psctl(HANG, "-- train --model lr");
    wait_for("everything runs", || place.started().len() == 4);
    kill_process(Pid::from_child(&child), Signal::INT).expect("signal");
    let (status, _, stderr) = output(child);
    assert_eq!(status, Some(1));
    assert!(stderr.contains("psctl: interrupted"), "{stderr}");
    assert_eq!(place.left_in_temporary(), 0);
    assert_eq!(place.alive(), []);
}

#[test]
fn nothing_outlives_a_killed_psctl() {
    let place = Place::new();
    let mut child = place.psctl(HANG, "-- train --model lr");
    wait_for("everything runs", || place.started().len() == 4);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    wait_for("all of them are gone", || place.alive().is_empty());
}

#[test]
fn an_idle_cluster_says_where_it_is_and_ends_cleanly() {
    let place = Place::new();
    let child = place.psctl(HANG, "");
    wait_for("everything runs", || place.started().len() == 2);
    kill_process(Pid::from_child(&child), Signal::TERM).expect("signal");
    let (status, stdout, stderr) = output(child);
    // The signal may have come before the cluster was ready.
    if status == Some(0) {
        let addresses: serde_json::Value = serde_json::from_str(&stdout).expect("one JSON value");
        assert_eq!(addresses["servers"][0]["name"], "ps-0");
        assert_eq!(place.left_in_temporary(), 0);
    } else {
        assert!(stderr.contains("interrupted"), "{stderr}");
    }
    assert_eq!(place.alive(), []);
}

#[test]
fn exit_status_tells_wrong_usage_from_failure() {
    let psctl = |args: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_psctl"));
        command.args(args.split_whitespace()).stdin(Stdio::null()).output().expect("runs")
    };
    assert_eq!(psctl("local -- evaluate").status.code(), Some(2));
    assert_eq!(psctl("node list --coordinators ,").status.code(), Some(2));
    assert_eq!(psctl("nonsense").status.code(), Some(2));
    // Nobody listens on port 1.
    let failed = psctl("node list --coordinators 127.0.0.1:1 --timeout 300ms");
    assert_eq!((failed.status.code(), failed.stdout.len()), (Some(1), 0));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("127.0.0.1:1"), "{failed:?}");
}
