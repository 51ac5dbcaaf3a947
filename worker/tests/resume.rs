//! A training that goes on: after everything was killed, from the newest checkpoint; after its worker was killed, from the tasks that are done.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use downpour_checkpoint::catalog::{Catalog, links};
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::{Access, Store};
use downpour_checkpoint::write::Scratch;
use downpour_client::Coordinators;
use downpour_core::id::{JobId, ShardId};
use downpour_proto::v1;
use downpour_psctl::local::Process;
use serde_json::Value;
use support::{SCHEMA, TestCluster, clicks, write_parts};

const ROWS: u64 = 6_000;
const BATCH: u64 = 20;
const EPOCHS: u64 = 6;
/// Rows of all passes.
const ALL: u64 = ROWS * EPOCHS;
/// Files, each a task.
const PARTS: u64 = 30;
const DEADLINE: Duration = Duration::from_secs(90);

/// Data and checkpoints, which outlive clusters.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("schema.toml"), SCHEMA).unwrap();
        write_parts(&folder.path().join("train"), ROWS, PARTS);
        std::fs::write(folder.path().join("test.csv"), clicks(1000)).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn uri(&self) -> String {
        format!("file://{}", self.path("checkpoints"))
    }

    /// Starts the training, always the same one, with further flags.
    fn train(&self, cluster: &TestCluster, name: &str, more: &str) -> Process {
        let text = format!(
            "train --coordinators {} --job clicks --model wide-deep --hidden 16 --schema {} --train {} --test {} --epochs {EPOCHS} \
             --shards 4 --depth 2 --lr-table 0.1 --lr-dense 0.01 {more}",
            cluster.processes.coordinator_addresses(),
            self.path("schema.toml"),
            self.path("train"),
            self.path("test.csv"),
        );
        let own = format!("--batch {BATCH} --seed 7 --shuffle-rows 500");
        let own: Vec<&str> = own.split_whitespace().collect();
        let own = own.chunks(2).filter(|flag| !more.contains(flag[0])).flatten();
        let text = own.fold(text, |text, word| format!("{text} {word}"));
        let arguments = text.split_whitespace().map(str::to_owned).collect();
        cluster.processes.run(name, "downpour-worker", arguments).unwrap()
    }

    /// Waits until a training is in its midst and has a checkpoint, however fast it is and however slow checkpoints are: it holds meanwhile. It is at work when this returns.
    fn in_the_midst(&self, cluster: &TestCluster) {
        wait_until("too little is trained", || cluster.samples() > ALL / 20);
        cluster.pause(true);
        self.checkpoint(|manifest| trained(manifest) > ALL / 20);
        let held = cluster.samples();
        cluster.pause(false);
        wait_until("it does not go on", || cluster.samples() > held);
        assert!(cluster.samples() < ALL, "this test came too late");
    }

    /// The checkpoint that every shard of a job that lost its servers was set back to.
    fn set_back_to(&self, cluster: &TestCluster) -> Manifest {
        let view = cluster.job().view.unwrap();
        let [back] = view.set_back.as_slice() else { panic!("{:?}", view.set_back) };
        let name = CheckpointName::new(back.checkpoint.as_str()).unwrap();
        let catalog = Catalog::new(Store::open(&self.uri(), Access::Read).unwrap());
        wait(catalog.manifest("clicks", &name)).unwrap()
    }

    /// The newest whole checkpoint, once `good` says so.
    fn checkpoint(&self, good: impl Fn(&Manifest) -> bool) -> Manifest {
        let catalog = Catalog::new(Store::open(&self.uri(), Access::Write).unwrap());
        let started = Instant::now();
        loop {
            if let Ok(manifest) = wait(catalog.latest("clicks"))
                && good(&manifest)
            {
                return manifest;
            }
            assert!(started.elapsed() < DEADLINE, "no such checkpoint");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How often the dense weights were updated in what a checkpoint holds: by one of each push.
    fn pushes(&self, manifest: &Manifest) -> u64 {
        let catalog = Catalog::new(Store::open(&self.uri(), Access::Read).unwrap());
        let chain = wait(catalog.chain(manifest.clone())).unwrap();
        let shards = (0..manifest.job.shards).map(ShardId);
        let steps = shards.map(|shard| {
            let (newest, _) = links(&chain, shard).unwrap().pop().unwrap();
            let file = wait(catalog.open_file(newest, shard, &Scratch::default())).unwrap();
            let variables = &file.head().small.variables;
            let dense = variables.iter().zip(&manifest.variables);
            let dense = dense.filter(|(_, variable)| variable.spec.name.starts_with("net/"));
            dense.map(|(small, _)| small.steps).max().unwrap_or(0)
        });
        steps.max().unwrap()
    }
}

impl TestCluster {
    fn coordinators(&self) -> Coordinators {
        Coordinators::parse(&self.processes.coordinator_addresses()).unwrap()
    }

    /// The only one.
    fn job(&self) -> v1::JobStatus {
        let cluster = wait(self.coordinators().cluster()).unwrap();
        { cluster.jobs }.into_iter().next().unwrap_or_default()
    }

    /// Rows of the tasks that are done.
    fn samples(&self) -> u64 {
        self.job().ledger.map_or(0, |ledger| ledger.samples)
    }

    fn pause(&self, paused: bool) {
        let job = JobId(self.job().view.unwrap().job);
        wait(self.coordinators().pause_job(job, paused)).unwrap();
    }

    /// They come back with nothing.
    fn restart_servers(&mut self) {
        self.processes.servers.iter_mut().for_each(|server| server.kill().unwrap());
        self.processes.servers.iter_mut().for_each(|server| server.start().unwrap());
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Rows of the tasks that are done.
fn trained(manifest: &Manifest) -> u64 {
    manifest.ledger.as_ref().map_or(0, |ledger| ledger.totals().samples)
}

/// Its log and its report.
fn ended(mut worker: Process) -> (String, Value) {
    let ended = worker.wait_success(DEADLINE);
    let log = std::fs::read_to_string(worker.log()).unwrap();
    ended.unwrap_or_else(|error| panic!("{error}: {log}"));
    let report = log.lines().find_map(|line| serde_json::from_str(line).ok());
    (log.clone(), report.unwrap_or_else(|| panic!("no report: {log}")))
}

fn auc(report: &Value) -> f64 {
    report["auc"].as_f64().unwrap()
}

fn first_line(log: &str) -> &str {
    log.lines().next().unwrap_or_default()
}

/// Where it says that it begins: in the midst, or after the others have done everything, for it may come that late.
fn begins(log: &str) -> (&str, bool) {
    let midst = |line: &str| match line {
        _ if line.contains("resuming") => Some(true),
        _ if line.contains("were trained before") => Some(false),
        _ => None,
    };
    let said = log.lines().find_map(|line| Some((line, midst(line)?)));
    said.unwrap_or_else(|| panic!("it says nothing: {log}"))
}

fn wait_until(what: &str, mut good: impl FnMut() -> bool) {
    let started = Instant::now();
    while !good() {
        assert!(started.elapsed() < DEADLINE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn everything_is_killed_and_the_same_command_goes_on_from_the_newest_checkpoint() {
    let place = Place::new();
    let saving = format!("--checkpoint-to {} --checkpoint-every 1s", place.uri());
    let undisturbed = {
        let cluster = TestCluster::start();
        auc(&ended(place.train(&cluster, "worker", "")).1)
    };
    let saved = {
        let mut cluster = TestCluster::start();
        let mut worker = place.train(&cluster, "worker", &saving);
        place.in_the_midst(&cluster);
        worker.kill().unwrap();
        cluster.processes.processes().for_each(|process| process.kill().unwrap());
        place.checkpoint(|_| true)
    };
    let at = trained(&saved);
    assert!((1..ALL).contains(&at), "killed in the midst: {at}");
    assert!(place.pushes(&saved) * BATCH >= at, "what is done is in the rows");

    let cluster = TestCluster::start();
    let (log, report) = ended(place.train(&cluster, "worker", &saving));
    let line = first_line(&log);
    let says = |word: &str| line.contains(word);
    assert!(says("resuming") && says(&saved.checkpoint.to_string()), "{line}");
    assert!(says(&format!(" {at} samples in all")), "{line}");
    // Steps overlap, so that toy data of this size gives 0.99 to 1.0 either way; the counts below are exact.
    assert!(auc(&report) > undisturbed - 0.02, "{report}, not {undisturbed}");

    // Saved at its end: each task of each pass is done, and what was in flight is pushed again.
    let last = place.checkpoint(|manifest| trained(manifest) == ALL);
    assert!(last.ledger.as_ref().unwrap().is_over());
    let again = place.pushes(&last) - place.pushes(&saved);
    assert!(again * BATCH >= ALL - at, "{again} steps for {} rows", ALL - at);
    // Once more, with nothing left to do.
    let (log, again) = ended(place.train(&cluster, "again", &saving));
    assert!(first_line(&log).contains("were trained before"), "{log}");
    assert_eq!(again["auc"], report["auc"]);
}

#[test]
fn two_workers_go_on_when_the_servers_came_back_empty() {
    let place = Place::new();
    let mut cluster = TestCluster::start();
    let flags = |worker: u64| {
        format!("--worker-index {worker} --checkpoint-to {} --checkpoint-every 1s", place.uri())
    };
    let start = |cluster: &TestCluster, life: &str| {
        [0, 1].map(|i| place.train(cluster, &format!("{life}-{i}"), &flags(i)))
    };
    let mut workers = start(&cluster, "first");
    place.in_the_midst(&cluster);
    workers.iter_mut().for_each(|worker| worker.kill().unwrap());
    // The coordinators know the job, and not yet that its servers are gone.
    cluster.restart_servers();
    let saved = place.checkpoint(|_| true);
    let at = trained(&saved);
    assert!(place.pushes(&saved) * BATCH >= at, "what is done is in the rows");
    let resumed = start(&cluster, "second").map(|worker| {
        let (log, report) = ended(worker);
        assert!(auc(&report) > 0.8, "{report}");
        begins(&log).1
    });
    assert!(resumed.contains(&true), "what was trained is trained again");
    let last = place.checkpoint(|manifest| trained(manifest) == ALL);
    assert!(place.pushes(&last) * BATCH >= ALL);
}

#[test]
fn a_worker_at_work_goes_back_with_a_job_that_lost_its_servers() {
    let place = Place::new();
    let mut cluster = TestCluster::start();
    let flags = format!("--checkpoint-to {} --checkpoint-every 1s", place.uri());
    let worker = place.train(&cluster, "worker", &flags);
    place.in_the_midst(&cluster);
    cluster.restart_servers();
    let (log, report) = ended(worker);
    let at = trained(&place.set_back_to(&cluster));
    let (line, midst) = begins(&log);
    assert!(midst && line.contains(&format!(" {at} samples in all")), "{at}: {log}");
    assert!(log.contains("set back"), "{log}");
    assert!(auc(&report) > 0.8, "{report}");
    let last = place.checkpoint(|manifest| trained(manifest) == ALL);
    assert!(place.pushes(&last) * BATCH >= ALL);
}

#[test]
fn a_worker_at_work_goes_on_when_another_that_comes_has_the_lost_job_begin_again() {
    let place = Place::new();
    // So long that nothing is set back meanwhile.
    let mut cluster = TestCluster::start_with_coordinator(&["--lease-ms", "600000"]);
    let train = |cluster: &TestCluster, name: &str, worker: u64| {
        let to = place.uri();
        let flags = format!("--worker-index {worker} --checkpoint-to {to} --checkpoint-every 1s");
        place.train(cluster, name, &flags)
    };
    let at_work = train(&cluster, "at-work", 0);
    place.in_the_midst(&cluster);
    let before = cluster.job().view.unwrap().job;
    cluster.restart_servers();
    cluster.processes.servers.iter_mut().for_each(|server| server.wait_ready(DEADLINE).unwrap());
    let comes = train(&cluster, "comes", 1);
    let ((was_there, _), (came, _)) = (ended(at_work), ended(comes));
    assert!(was_there.contains("set back"), "{was_there}");
    assert!(begins(&was_there).1 || begins(&came).1, "{was_there}{came}");
    let after = cluster.job().view.unwrap();
    assert!(after.job > before && after.set_back.is_empty(), "{after:?}");
    let last = place.checkpoint(|manifest| trained(manifest) == ALL);
    assert!(place.pushes(&last) * BATCH >= ALL);
}

#[test]
fn a_worker_killed_alone_goes_on_with_what_is_not_done_and_other_rows_are_refused() {
    let place = Place::new();
    let cluster = TestCluster::start_with_coordinator(&["--session-timeout-ms", "3000"]);
    let out = place.path("out");
    let logging = format!("--out {out} --log-every 20steps");
    let mut worker = place.train(&cluster, "worker", &logging);
    wait_until("no task is done", || cluster.samples() > 0);
    worker.kill().unwrap();
    // What it said last may still arrive.
    wait_until("its session does not end", || {
        psctl(&cluster, "worker list -o json").as_array().is_some_and(Vec::is_empty)
    });
    let at = cluster.samples();
    assert!(at < ALL, "this test came too late");

    let one_more = Path::new(&place.path("train")).join("999.csv");
    for (flags, more, word) in
        [("--shuffle-rows 0", false, "were shuffled"), ("", true, "other files")]
    {
        if more {
            std::fs::write(&one_more, clicks(10)).unwrap();
        }
        let mut other = place.train(&cluster, "other", flags);
        assert!(other.wait_success(DEADLINE).is_err());
        let log = text(other.log());
        assert!(log.contains(word) && log.contains("--fresh"), "{flags}: {log}");
    }
    std::fs::remove_file(&one_more).unwrap();
    // Another batch size reads the same tasks.
    let (log, _) = ended(place.train(&cluster, "again", &format!("{logging} --batch 50")));
    assert!(first_line(&log).contains(&format!(" {at} samples in all")), "{at}: {log}");
    let metrics = text(&Path::new(&out).join("metrics.jsonl"));
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!(last["total_samples"], ALL, "nothing twice, nothing left out");
    assert_eq!(last["run_samples"], ALL - at);

    let (log, _) = ended(place.train(&cluster, "fresh", "--fresh"));
    assert!(!first_line(&log).contains("resuming"), "{log}");
    assert!(log.contains(&format!("samples={ALL}")), "{log}");
}

fn psctl(cluster: &TestCluster, arguments: &str) -> Value {
    let psctl = Path::new(env!("CARGO_BIN_EXE_downpour-worker")).with_file_name("psctl");
    let mut command = std::process::Command::new(psctl);
    command.args(arguments.split_whitespace());
    command.arg("--coordinators").arg(cluster.processes.coordinator_addresses());
    serde_json::from_slice(&command.output().unwrap().stdout).unwrap_or_default()
}
