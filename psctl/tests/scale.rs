//! `psctl scale ps` on real processes, beside psctl: `cargo build --bins` makes them.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use downpour_client::Coordinators;
use downpour_proto::v1;
use downpour_psctl::probe::{self, Probe};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(60);

fn psctl(line: &str, dir: &Path) -> Command {
    let mut psctl = Command::new(env!("CARGO_BIN_EXE_psctl"));
    psctl.args(line.split_whitespace()).arg("--dir").arg(dir).stdin(Stdio::null());
    psctl.env_remove("DOWNPOUR_LOCAL");
    psctl
}

fn run(line: &str, dir: &Path) -> Output {
    psctl(line, dir).output().expect("psctl starts")
}

fn json(line: &str, dir: &Path) -> Value {
    let output = run(line, dir);
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{line}`: {}\n{progress}", output.status);
    serde_json::from_slice(&output.stdout).expect("JSON on stdout and nothing else")
}

/// Exit status and what it says.
fn fails(line: &str, dir: &Path) -> (Option<i32>, String) {
    let output = run(line, dir);
    assert!(output.stdout.is_empty(), "`{line}` fails and writes data");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A `psctl local` and what it printed.
struct Local {
    psctl: Child,
    addresses: Value,
}

impl Local {
    fn start(servers: u32, dir: &Path) -> Self {
        Self::start_with((1, servers), dir)
    }

    fn start_with((coordinators, servers): (u32, u32), dir: &Path) -> Self {
        let line = format!("-o json local --coordinators {coordinators} --servers {servers}");
        let mut psctl = psctl(&line, dir).stdout(Stdio::piped()).spawn().expect("psctl starts");
        let stdout = psctl.stdout.take().expect("piped");
        let mut values = serde_json::Deserializer::from_reader(stdout).into_iter();
        Self { psctl, addresses: values.next().expect("it says where it is").expect("JSON") }
    }

    fn coordinators(&self) -> Coordinators {
        let address = self.addresses["coordinators"][0]["address"].as_str().expect("an address");
        Coordinators::parse(address).expect("an address")
    }

    fn children(&self) -> Vec<i32> {
        let own = self.psctl.id().to_string();
        let processes = Path::new("/proc").read_dir().expect("list").flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.filter(|number| parent(*number).is_some_and(|parent| parent == own)).collect()
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        _ = self.psctl.kill();
        _ = self.psctl.wait();
    }
}

fn parent(process: i32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut fields = after_name.split(' ');
    // One that has ended and waits for its parent is gone.
    (fields.next() != Some("Z")).then(|| fields.next().map(str::to_owned))?
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .expect("runtime")
}

/// Servers that the coordinators know, and how many copies each holds.
fn holders(coordinators: &Coordinators) -> Vec<(String, usize)> {
    let cluster = runtime().block_on(coordinators.cluster()).expect("answered");
    let views: Vec<_> = cluster.jobs.iter().filter_map(|job| job.view.as_ref()).collect();
    let copies = |node: u32| {
        let members = views.iter().flat_map(|view| &view.shards).flat_map(|route| &route.in_sync);
        members.filter(|member| member.node == node).count()
    };
    let mut holders: Vec<_> =
        cluster.nodes.iter().map(|node| (node.name.clone(), copies(node.node))).collect();
    holders.sort();
    holders
}

#[test]
fn servers_come_and_go_while_a_client_pushes_and_it_notices_nothing() {
    let root = tempfile::tempdir().expect("directory");
    let dir = root.path().join("cluster");
    let mut local = Local::start(2, &dir);
    let coordinators = local.coordinators();
    let job = probe::job("probe", 8, 2);
    let (stop, pushed) = (AtomicBool::new(false), AtomicU64::new(0));

    let tally = thread::scope(|scope| {
        let pushing = scope.spawn(|| {
            runtime().block_on(async {
                let mut probe = Probe::join(&coordinators, &job, 0).await.expect("joins");
                let ended = probe.push_until(|tally| {
                    pushed.store(tally.acknowledged, Ordering::Relaxed);
                    stop.load(Ordering::Relaxed)
                });
                ended.await.expect("pushes");
                probe::verify_all(vec![probe]).await.expect("reads back")
            })
        });
        // Also when an assertion fails, or the scope would wait for ever.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let stopping = Stop(&stop);
        let goes_on = || {
            let before = pushed.load(Ordering::Relaxed);
            wait_for("pushes go on", || pushed.load(Ordering::Relaxed) > before + 100);
        };
        goes_on();

        let planned = json("-o json scale ps 3 --dry-run", &dir);
        assert_eq!((&planned["start"], &planned["drain"]), (&1.into(), &Value::Array(vec![])));
        let (status, error) = fails("scale ps 3", &dir);
        assert_eq!(status, Some(2), "nobody can be asked: {error}");
        let (status, error) = fails("scale ps 1 --yes", &dir);
        assert_eq!(status, Some(2), "{error}");
        assert!(error.contains("2 copies"), "{error}");
        let address = local.addresses["coordinators"][0]["address"].as_str().expect("an address");
        let mut nowhere = Command::new(env!("CARGO_BIN_EXE_psctl"));
        nowhere.args(["node", "drain", "ps-1", "--dry-run", "--coordinators", address]);
        let nowhere = nowhere.output().expect("psctl starts");
        let error = String::from_utf8_lossy(&nowhere.stderr);
        assert_eq!(nowhere.status.code(), Some(3), "{error}");
        assert!(error.contains("8 copies stay"), "{error}");
        assert_eq!(holders(&coordinators).len(), 2, "nothing has changed");

        let grown = json("-o json scale ps 3 --yes", &dir);
        assert_eq!((&grown["before"], &grown["after"]), (&2.into(), &3.into()));
        assert_eq!(grown["started"], serde_json::json!(["ps-2"]));
        goes_on();
        assert_eq!(local.children().len(), 4, "a coordinator and three servers");
        let held = holders(&coordinators);
        assert!(held.len() == 3 && held[2].1 > 0, "{held:?}");

        let planned = json("-o json scale ps 2 --dry-run", &dir);
        assert_eq!(planned["drain"][0]["server"], "ps-2");
        let steps = planned["drain"][0]["steps"].as_array().expect("steps").len();
        assert_eq!(steps, held[2].1, "all that it holds");
        let shrunk = json("-o json scale ps 2 --yes", &dir);
        assert_eq!(shrunk["stopped"], serde_json::json!(["ps-2"]));
        assert_eq!(holders(&coordinators), [("ps-0".to_owned(), 8), ("ps-1".to_owned(), 8)]);
        assert_eq!(local.children().len(), 3);
        goes_on();

        // A name can be used again.
        assert_eq!(json("-o json scale ps 3 -y", &dir)["started"][0], "ps-2");
        goes_on();
        assert!(run("scale ps 3", &dir).status.success(), "nothing to do needs no answer");
        drop(stopping);
        pushing.join().expect("no panic")
    });
    assert!(tally.acknowledged > 400, "{tally:?}");
    assert_eq!((tally.lost, tally.duplicated), (0, 0), "{tally:?}");
    assert_eq!((tally.client_errors, tally.unknown), (0, 0), "{tally:?}");

    let children = local.children();
    assert_eq!(children.len(), 4);
    kill_process(Pid::from_child(&local.psctl), Signal::TERM).expect("signal");
    assert!(local.psctl.wait().expect("ends").success());
    assert!(children.iter().all(|child| parent(*child).is_none()), "no process is left");
    assert!(!dir.join("control.sock").exists(), "no socket is left");
    let (status, error) = fails("scale ps 3 --yes", &dir);
    assert!(status == Some(1) && error.contains("no cluster runs in"), "{error}");
}

#[test]
fn a_cluster_goes_on_without_a_coordinator_that_was_removed() {
    let root = tempfile::tempdir().expect("directory");
    let dir = root.path().join("cluster");
    let mut local = Local::start_with((3, 1), &dir);
    let coordinators = local.coordinators();
    assert_eq!(local.children().len(), 4);
    let request = v1::RemoveCoordinatorRequest { id: 3, dry_run: false };
    runtime().block_on(coordinators.remove_coordinator(request)).expect("removed");
    wait_for("it ends", || local.children().len() == 3);
    assert_eq!(json("-o json scale ps 2 --yes", &dir)["started"][0], "ps-1");
    assert!(local.psctl.try_wait().expect("looked at").is_none());
    kill_process(Pid::from_child(&local.psctl), Signal::TERM).expect("signal");
    assert!(local.psctl.wait().expect("ends").success());
}

#[test]
fn a_cluster_does_not_go_on_without_a_coordinator_that_was_not_removed() {
    let root = tempfile::tempdir().expect("directory");
    let dir = root.path().join("cluster");
    let mut local = Local::start_with((3, 1), &dir);
    let pid = local.addresses["coordinators"][2]["pid"].as_i64().expect("it runs");
    let pid = Pid::from_raw(pid.try_into().expect("a process")).expect("a process");
    kill_process(pid, Signal::TERM).expect("signal");
    wait_for("psctl ends", || local.psctl.try_wait().expect("looked at").is_some());
    assert!(!local.psctl.wait().expect("ended").success());
}

#[test]
fn a_cluster_that_was_killed_is_told_from_none_and_a_server_that_cannot_start_harms_nobody() {
    let root = tempfile::tempdir().expect("directory");
    let (bin, dir) = (root.path().join("bin"), root.path().join("cluster"));
    std::fs::create_dir(&bin).expect("directory");
    for name in ["downpour-coordinator", "downpour-ps"] {
        let real = Path::new(env!("CARGO_BIN_EXE_psctl")).with_file_name(name);
        std::os::unix::fs::symlink(real, bin.join(name)).expect("link");
    }
    let line = format!("-o json local --coordinators 1 --servers 1 --bin-dir {}", bin.display());
    let mut psctl = psctl(&line, &dir).stdout(Stdio::piped()).spawn().expect("psctl starts");
    let stdout = psctl.stdout.take().expect("piped");
    let mut values = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
    let addresses = values.next().expect("it says where it is").expect("JSON");
    let mut local = Local { psctl, addresses };

    std::fs::remove_file(bin.join("downpour-ps")).expect("there");
    let (status, error) = fails("scale ps 2 --yes", &dir);
    assert!(status == Some(1) && error.contains("downpour-ps"), "{error}");
    std::os::unix::fs::symlink("/bin/false", bin.join("downpour-ps")).expect("link");
    let (status, error) = fails("scale ps 2 --yes", &dir);
    assert!(status == Some(1) && error.contains("ps-1 ended"), "{error}");
    assert_eq!(holders(&local.coordinators()).len(), 1);
    assert_eq!(json("-o json scale ps 1 --dry-run", &dir)["servers"], 1);

    let children = local.children();
    local.psctl.kill().expect("killed");
    local.psctl.wait().expect("reaped");
    wait_for("its processes end", || children.iter().all(|child| parent(*child).is_none()));
    let (status, error) = fails("scale ps 2 --yes", &dir);
    assert!(status == Some(1) && error.contains("was killed"), "{error}");
}
