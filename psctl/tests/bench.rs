//! `psctl bench` with the real binaries, beside psctl: `cargo build --bins` makes them.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(30);
const SMALL: &str = "--rows 2000 --dim 4 --steps 5 --ids-per-step 600 --repeats 2 --shards 8";

fn psctl(temporary: &TempDir, line: &str) -> Command {
    let mut psctl = Command::new(env!("CARGO_BIN_EXE_psctl"));
    psctl.args(line.split_whitespace()).env("TMPDIR", temporary.path()).stdin(Stdio::null());
    psctl
}

fn run(line: &str) -> Output {
    let temporary = tempfile::tempdir().expect("directory");
    let output = psctl(&temporary, line).output().expect("psctl starts");
    assert!(is_empty(temporary.path()), "`{line}` leaves files behind");
    output
}

fn json(line: &str) -> Value {
    let output = run(line);
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{line}`: {}\n{progress}", output.status);
    serde_json::from_slice(&output.stdout).expect("JSON on stdout and nothing else")
}

fn is_empty(dir: &Path) -> bool {
    dir.read_dir().expect("list").next().is_none()
}

fn number(report: &Value, field: &str) -> f64 {
    report[field].as_f64().unwrap_or_else(|| panic!("no number {field} in {report}"))
}

#[test]
fn two_workers_and_two_servers_leave_the_rows_as_they_must_be() {
    for (optimizer, transport) in [("sgd", "framed"), ("adagrad", "grpc")] {
        let report = json(&format!(
            "-o json bench sparse --local --servers 2 --workers 2 --optimizer {optimizer} \
             --transport {transport} {SMALL}"
        ));
        for rate in ["steps_s", "rows_s", "payload_mb_s", "p50_ms", "p99_ms", "p999_ms"] {
            assert!(number(&report, rate) > 0.0, "{rate}: {report}");
        }
        for rate in ["steps_s", "rows_s"] {
            let [min, max] = ["min", "max"].map(|end| number(&report, &format!("{rate}_{end}")));
            assert!((min..=max).contains(&number(&report, rate)), "{report}");
        }
        for used in ["cpu_server_s_per_mrow", "cpu_worker_s_per_mrow"] {
            assert!(number(&report, used) >= 0.0, "{used}: {report}");
        }
        assert!(number(&report, "check_err") < 1e-4, "{report}");
        assert_eq!(report["workload"], "S2-4");
        assert_eq!((&report["servers"], &report["repeats"]), (&2.into(), &2.into()));
    }
}

#[test]
fn a_tensor_is_what_it_must_be_and_all_of_it_travels() {
    let report = json("-o json bench dense --local --mb 1 --steps 3 --block-floats 1000");
    assert!(number(&report, "pull_gb_s") > 0.0 && number(&report, "push_gb_s") > 0.0, "{report}");
    assert!(number(&report, "check_err") < 1e-6, "{report}");
}

#[test]
fn the_floor_serves_one_worker_without_losing_anything() {
    let reports = json("-o json bench floor S-16 --repeats 1");
    assert_eq!(reports[0]["workload"], "S-16");
    assert!(number(&reports[0], "check_err") < 1e-4, "{reports}");
}

/// A stand-in of the worker speaks the lines that `downpour_bench::train` describes.
#[test]
fn a_training_is_timed_from_the_first_start_to_the_last_end() {
    let bin = tempfile::tempdir().expect("directory");
    let psctl = Path::new(env!("CARGO_BIN_EXE_psctl"));
    for name in ["downpour-coordinator", "downpour-ps"] {
        symlink(psctl.with_file_name(name), bin.path().join(name)).expect("link");
    }
    let worker = bin.path().join("downpour-worker");
    let script = r#"#!/bin/sh
        [ "$1 $6 $7 $9" = "bench-click --data $7 $9" ] && [ "$8" = --worker ] && [ -f "$7/e_emb_init.f32" ] || exit 9
        echo '{"ready":true}'; read go
        echo "{\"start_s\":1$9,\"end_s\":2$9,\"samples\":110,\"wait_s\":2}"
        [ "$9" = 1 ] || { read go; echo '{"auc":0.75,"logloss":0.5}'; }
"#;
    std::fs::write(&worker, script).expect("write");
    std::fs::set_permissions(&worker, PermissionsExt::from_mode(0o755)).expect("executable");
    let line = "-o json bench train --local --batches 22 --repeats 1 --bin-dir";
    let report = json(&format!("{line} {}", bin.path().display()));
    assert_eq!((number(&report, "samples_s"), number(&report, "wait_share")), (20.0, 0.2));
    assert_eq!((number(&report, "auc"), number(&report, "logloss")), (0.75, 0.5));
}

#[test]
fn your_own_ids_must_be_rows() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("ids");
    let write = |ids: &[u32]| {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        std::fs::write(&path, bytes).expect("write");
    };
    let line = format!(
        "-o json bench sparse --local --rows 10 --dim 2 --steps 2 --ids-per-step 3 --repeats 1 --ids {}",
        path.display()
    );
    write(&[9, 0, 9, 4, 4, 4]);
    assert_eq!(
        number(&json(&line), "check_err").partial_cmp(&1e-6),
        Some(std::cmp::Ordering::Less)
    );
    for (ids, problem) in [(&[9, 0, 9, 4, 10, 4][..], "id 10"), (&[1, 2], "holds 2 ids")] {
        write(ids);
        let output = run(&line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains("--ids") && error.contains(problem), "{error}");
    }
}

#[test]
fn an_option_that_makes_no_sense_is_named() {
    for (line, option) in [
        ("bench sparse", "--local"),
        ("bench sparse --local --coordinators a:1", "--coordinators"),
        ("bench sparse --coordinators a:1 --servers 2", "--servers"),
        ("bench sparse --local --dim 0", "--dim"),
        ("bench sparse --local --steps 5 --warm-up 6", "--warm-up"),
        ("bench sparse --local --workers 2 --ids one", "--ids"),
        ("bench sparse --local --optimizer magic", "--optimizer"),
        ("bench dense --local --mb 0", "--mb"),
        ("bench train --local --tables 25", "--tables"),
        ("bench train --local --bin-dir /dev", "--bin-dir"),
        ("bench table --bin-dir /dev", "--bin-dir"),
        ("bench floor S-17", "S-17"),
        ("bench all --local --quick --repeats 2", "--repeats"),
    ] {
        let output = run(line);
        let error = String::from_utf8_lossy(&output.stderr);
        let status = if line.contains("/dev") { 1 } else { 2 };
        assert_eq!(output.status.code(), Some(status), "`{line}`: {error}");
        assert!(error.contains(option), "`{line}`: {error}");
    }
}

#[test]
fn a_signal_ends_everything_and_leaves_nothing() {
    for signal in [Signal::INT, Signal::TERM] {
        let temporary = tempfile::tempdir().expect("directory");
        let line = format!("bench sparse --local {SMALL} --workers 2")
            .replace("2 --shards", "1000000 --shards");
        let mut psctl = psctl(&temporary, &line).stderr(Stdio::piped()).spawn().expect("starts");
        let mut progress = BufReader::new(psctl.stderr.take().expect("piped")).lines();
        let repeats =
            progress.find(|line| line.as_ref().is_ok_and(|line| line.contains("repeat 2")));
        assert!(repeats.is_some(), "it ended before it was told to");
        let children = descendants(&psctl);
        assert!(children.len() >= 4, "a coordinator, a server, two workers: {children:?}");
        kill_process(Pid::from_child(&psctl), signal).expect("signal");
        let rest: Vec<String> = progress.map_while(Result::ok).collect();
        assert_eq!(psctl.wait().expect("wait").code(), Some(1), "{rest:?}");
        assert!(is_empty(temporary.path()), "{signal:?} leaves files behind: {rest:?}");
        await_gone(&children);
    }
}

#[test]
fn nothing_outlives_a_psctl_that_is_killed() {
    let temporary = tempfile::tempdir().expect("directory");
    let line = format!("bench sparse --local {SMALL}").replace("2 --shards", "1000000 --shards");
    let mut psctl = psctl(&temporary, &line).stderr(Stdio::piped()).spawn().expect("starts");
    let mut progress = BufReader::new(psctl.stderr.take().expect("piped")).lines();
    progress.find(|line| line.as_ref().is_ok_and(|line| line.contains("repeat 2")));
    let children = descendants(&psctl);
    psctl.kill().expect("kill");
    psctl.wait().expect("wait");
    await_gone(&children);
}

/// Processes whose parent it is.
fn descendants(psctl: &Child) -> Vec<String> {
    let own = psctl.id().to_string();
    let processes = Path::new("/proc").read_dir().expect("list").flatten();
    let numbers = processes.map(|entry| entry.file_name().to_string_lossy().into_owned());
    numbers.filter(|number| parent(number).is_some_and(|parent| parent == own)).collect()
}

fn parent(process: &str) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut fields = after_name.split(' ');
    // One that has ended and waits for its parent is gone.
    (fields.next() != Some("Z")).then(|| fields.next().map(str::to_owned))?
}

fn await_gone(processes: &[String]) {
    let end = Instant::now() + DEADLINE;
    while processes.iter().any(|process| parent(process).is_some()) {
        assert!(Instant::now() < end, "some of {processes:?} are still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn nobody_is_further_ahead_than_the_mode_allows_and_rounds_take_everybody_along() {
    let reports = json(
        "-o json bench consistency --local --servers 2 --shards 4 --replicas 2 --workers 3 --stalls one \
         --modes async,ssp(1),sync,sync(1) --step 20ms --duration 1500ms",
    );
    let of = |at: usize| &reports[at];
    for (at, most) in [(0, 0.0), (1, 1.0), (2, 0.0), (3, 0.0)] {
        assert!(number(of(at), "ahead_max") <= most, "{}", of(at));
        assert!(number(of(at), "steps_s") > 0.0, "{}", of(at));
    }
    let steps = |at: usize| -> Vec<u64> {
        let steps = of(at)["steps"].as_array().expect("a list");
        steps.iter().map(|steps| steps.as_u64().expect("a number")).collect()
    };
    let sync = steps(2);
    assert!(sync.iter().all(|steps| *steps == sync[0]), "{sync:?}");
    let dropped = of(3)["dropped"].as_array().expect("a list");
    assert!(dropped.iter().any(|count| count.as_u64() > Some(0)), "{}", of(3));
    assert!(steps(0)[0] > steps(2)[0], "who does not wait is faster");
}
