use std::io::BufRead as _;
use std::process::{Command, Stdio};

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

fn shell(dir: &Path, script: &str) -> Process {
    let program = Program {
        name: "example".into(),
        path: "/bin/sh".into(),
        args: strings(&["-c", script]),
        log: dir.join("log"),
    };
    let spawner = Spawner::new().expect("a thread");
    Process::new(program, String::new(), String::new(), spawner, Interrupt::default())
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_crash_names_the_process_its_status_and_the_end_of_its_log() {
    let dir = tempfile::tempdir().expect("directory");
    let mut process = shell(dir.path(), "for i in $(seq 1 100); do echo line $i; done; exit 7");
    process.start().expect("starts");
    wait_for("it ends", || process.poll().expect("poll").is_some());
    let text = process.check().expect_err("a crash").to_string();
    assert!(text.starts_with("example ended (exit status: 7)"), "{text}");
    assert!(
        text.contains("line 100") && text.contains("line 81") && !text.contains("line 80"),
        "{text}"
    );
}

#[test]
fn a_program_without_libtorch_says_how_to_get_it() {
    let dir = tempfile::tempdir().expect("directory");
    let script = "echo 'error while loading shared libraries: libtorch_cpu.so' >&2; exit 127";
    let mut process = shell(dir.path(), script);
    process.start().expect("starts");
    wait_for("it ends", || process.poll().expect("poll").is_some());
    let text = process.check().expect_err("a crash").to_string();
    assert!(text.contains("cargo xtask libtorch") && text.contains("libtorch_cpu.so"), "{text}");
}

#[test]
fn a_killed_process_is_no_crash_and_starts_again() {
    let dir = tempfile::tempdir().expect("directory");
    let mut process = shell(dir.path(), "echo started; exec sleep 1000");
    process.start().expect("starts");
    let first = process.pid().expect("it runs");
    wait_for("the first life logs", || process.tail() == "started");
    process.kill().expect("killed");
    assert!(!process.is_running() && process.check().is_ok());
    process.start().expect("starts again");
    assert_ne!(process.pid().expect("it runs"), first);
    wait_for("both lives log", || process.tail() == "started\nstarted");
}

#[test]
fn a_process_that_ignores_sigterm_is_killed_at_the_deadline() {
    let dir = tempfile::tempdir().expect("directory");
    let mut process = shell(dir.path(), "trap '' TERM; echo deaf; while :; do sleep 1; done");
    process.start().expect("starts");
    wait_for("the trap is set", || process.tail() == "deaf");
    let error = process.stop(Duration::from_millis(50)).expect_err("late");
    assert!(matches!(error, Error::Late { .. }), "{error}");
    assert!(!process.is_running());
}

#[test]
fn processor_time_of_ended_lives_counts() {
    let dir = tempfile::tempdir().expect("directory");
    let mut process = shell(dir.path(), "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done");
    process.start().expect("starts");
    process.wait_success(DEADLINE).expect("counts to the end");
    assert!(process.cpu() > Duration::ZERO);
}

#[test]
fn a_clean_end_is_asked_for_once() {
    let dir = tempfile::tempdir().expect("directory");
    let script =
        "trap 'echo asked; sleep 0.2; exit 0' TERM; echo ready; while :; do sleep 0.01; done";
    let mut process = shell(dir.path(), script);
    process.start().expect("starts");
    wait_for("the trap is set", || process.tail() == "ready");
    let errors = stop_all(std::iter::once(&mut process), DEADLINE);
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(process.tail(), "ready\nasked");
}

/// Runs itself as a second process that starts a child, and kills that second process.
#[test]
fn a_child_dies_with_a_parent_that_is_killed() {
    const ROLE: &str = "PSCTL_TEST_PARENT";
    let dir = tempfile::tempdir().expect("directory");
    if std::env::var_os(ROLE).is_some() {
        let mut process = shell(dir.path(), "exec sleep 1000");
        process.start().expect("starts");
        println!("child {}", process.pid().expect("it runs"));
        std::thread::sleep(DEADLINE);
        return;
    }
    let mut parent = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "local::tests::a_child_dies_with_a_parent_that_is_killed", "--nocapture"])
        .env(ROLE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let lines = std::io::BufReader::new(parent.stdout.take().expect("piped")).lines();
    let child = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("child ").map(|(_, pid)| pid.to_owned()));
    let stat = format!("/proc/{}/stat", child.expect("the child's pid"));
    assert!(stat_says_alive(&stat));
    parent.kill().expect("killed");
    parent.wait().expect("reaped");
    wait_for("the child is gone", || !stat_says_alive(&stat));
}

/// A zombie that nobody reaps is gone for our purposes.
fn stat_says_alive(path: &str) -> bool {
    std::fs::read_to_string(path).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_directory_in_use_is_refused_and_a_missing_binary_is_named() {
    let dir = tempfile::tempdir().expect("directory");
    let start = |dir: &Path| {
        let options = Options {
            dir: Some(dir.to_owned()),
            bin_dir: Some("/nowhere".into()),
            ..Options::default()
        };
        LocalCluster::start(options).expect_err("refused")
    };
    let error = start(&dir.path().join("new"));
    assert!(matches!(error, Error::NoBinary { .. }), "{error}");
    let error = start(&dir.path().join("new"));
    assert!(matches!(error, Error::DirectoryInUse { .. }), "{error}");
}
