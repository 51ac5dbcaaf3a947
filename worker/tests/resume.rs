//! A training that goes on: after everything was killed, from the newest checkpoint; after its worker was killed, from the worker's label.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use downpour_checkpoint::catalog::{Catalog, links};
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::store::{Access, Store};
use downpour_checkpoint::write::Scratch;
use downpour_core::id::ShardId;
use downpour_psctl::local::Process;
use serde_json::Value;
use support::{SCHEMA, TestCluster, clicks};

const ROWS: u64 = 6_000;
const BATCH: u64 = 20;
const EPOCHS: u64 = 6;
const BATCHES: u64 = ROWS / BATCH * EPOCHS;
const DEADLINE: Duration = Duration::from_secs(90);

/// Data and checkpoints, which outlive clusters.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("schema.toml"), SCHEMA).unwrap();
        std::fs::write(folder.path().join("train.csv"), clicks(ROWS)).unwrap();
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
             --shards 4 --depth 2 --lr-table 0.1 --lr-dense 0.01 --seed 7 --shuffle-rows 500 {more}",
            cluster.processes.coordinator_addresses(),
            self.path("schema.toml"),
            self.path("train.csv"),
            self.path("test.csv"),
        );
        let text = if more.contains("--batch") { text } else { format!("{text} --batch {BATCH}") };
        let arguments = text.split_whitespace().map(str::to_owned).collect();
        cluster.processes.run(name, "downpour-worker", arguments).unwrap()
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

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// How many batches the label of a worker says are trained.
fn trained(manifest: &Manifest, worker: usize) -> u64 {
    let label = manifest.labels.get(&format!("progress/{worker}")).map_or("{}", String::as_str);
    serde_json::from_str::<Value>(label).unwrap()["batches"].as_u64().unwrap_or(0)
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
        place.checkpoint(|manifest| trained(manifest, 0) > BATCHES / 8);
        worker.kill().unwrap();
        cluster.processes.processes().for_each(|process| process.kill().unwrap());
        place.checkpoint(|_| true)
    };
    let at = trained(&saved, 0);
    assert!((1..BATCHES).contains(&at), "killed in the midst: {at}");
    let ahead = place.pushes(&saved).checked_sub(at).expect("what is trained is in the rows");

    let cluster = TestCluster::start();
    let (log, report) = ended(place.train(&cluster, "worker", &saving));
    let line = first_line(&log);
    let says = |word: &str| line.contains(word);
    assert!(says("resuming") && says(&saved.checkpoint.to_string()), "{line}");
    assert!(says(&format!("after batch {at},")), "{line}");
    // Steps overlap, so that toy data of this size gives 0.99 to 1.0 either way; the counts below are exact.
    assert!(auc(&report) > undisturbed - 0.02, "{report}, not {undisturbed}");

    // Saved at its end: a pass, and what was pushed beyond the label again.
    let last = place.checkpoint(|manifest| trained(manifest, 0) == BATCHES);
    assert_eq!(place.pushes(&last), BATCHES + ahead);
    // Once more, with nothing left to do.
    let (log, again) = ended(place.train(&cluster, "again", &saving));
    assert!(first_line(&log).contains("trained all of its"), "{log}");
    assert_eq!(again["auc"], report["auc"]);
}

#[test]
fn two_workers_go_on_when_the_servers_came_back_empty() {
    let place = Place::new();
    let mut cluster = TestCluster::start();
    let flags = |worker: u64| {
        let uri = place.uri();
        format!("--workers 2 --worker-index {worker} --checkpoint-to {uri} --checkpoint-every 1s")
    };
    let start = |cluster: &TestCluster, life: &str| {
        [0, 1].map(|i| place.train(cluster, &format!("{life}-{i}"), &flags(i)))
    };
    let mut workers = start(&cluster, "first");
    let both = |manifest: &Manifest| (0..2).all(|i| trained(manifest, i) > BATCHES / 40);
    place.checkpoint(both);
    workers.iter_mut().for_each(|worker| worker.kill().unwrap());
    cluster.processes.servers.iter_mut().for_each(|server| server.kill().unwrap());
    let saved = place.checkpoint(both);
    let at = [0, 1].map(|i| trained(&saved, i));
    let ahead = place.pushes(&saved).checked_sub(at[0] + at[1]).expect("in the rows");

    // The coordinators know the job, and not yet that its servers are gone.
    cluster.processes.servers.iter_mut().for_each(|server| server.start().unwrap());
    for (worker, at) in start(&cluster, "second").into_iter().zip(at) {
        let (log, report) = ended(worker);
        let line = first_line(&log);
        assert!(line.contains("resuming") && line.contains(&format!("after batch {at},")), "{log}");
        assert!(auc(&report) > 0.8, "{report}");
    }
    let last = place.checkpoint(|manifest| trained(manifest, 0) + trained(manifest, 1) == BATCHES);
    assert_eq!(place.pushes(&last), BATCHES + ahead);
}

#[test]
fn a_worker_at_work_goes_back_with_a_job_that_lost_its_servers() {
    let place = Place::new();
    let mut cluster = TestCluster::start();
    let flags = format!("--checkpoint-to {} --checkpoint-every 1s", place.uri());
    let worker = place.train(&cluster, "worker", &flags);
    place.checkpoint(|manifest| trained(manifest, 0) > BATCHES / 20);
    cluster.processes.servers.iter_mut().for_each(|server| server.kill().unwrap());
    let saved = place.checkpoint(|_| true);
    let at = trained(&saved, 0);
    let ahead = place.pushes(&saved).checked_sub(at).expect("what is trained is in the rows");
    cluster.processes.servers.iter_mut().for_each(|server| server.start().unwrap());
    let (log, report) = ended(worker);
    let resumed = log.lines().find(|line| line.starts_with("resuming")).unwrap_or_default();
    assert!(log.contains("set back") && resumed.contains(&format!("after batch {at},")), "{log}");
    assert!(auc(&report) > 0.8, "{report}");
    let last = place.checkpoint(|manifest| trained(manifest, 0) == BATCHES);
    // And what it pushed before it saw that it was set back.
    assert!((BATCHES + ahead..2 * BATCHES).contains(&place.pushes(&last)), "{log}");
}

#[test]
fn a_worker_killed_alone_goes_on_from_its_label_and_other_rows_are_refused() {
    let place = Place::new();
    let cluster = TestCluster::start();
    let out = place.path("out");
    let logging = format!("--out {out} --log-every 20steps");
    let mut worker = place.train(&cluster, "worker", &logging);
    let metrics = Path::new(&out).join("metrics.jsonl");
    wait_until("no steps", || text(&metrics).lines().count() >= 2);
    let label = || {
        let status = psctl(&cluster, "job describe clicks -o json");
        let label = status["labels"]["progress/0"].as_str().unwrap_or("{}");
        serde_json::from_str::<Value>(label).unwrap()["batches"].as_u64().unwrap_or(0)
    };
    wait_until("no label", || label() > 0);
    worker.kill().unwrap();
    let at = label();

    for (flags, word) in
        [("--batch 50", "batch size was 20 and is 50"), ("--workers 2", "number of workers")]
    {
        let mut other = place.train(&cluster, "other", flags);
        assert!(other.wait_success(DEADLINE).is_err());
        let log = text(other.log());
        assert!(log.contains(word) && log.contains("--fresh"), "{flags}: {log}");
    }
    let (log, _) = ended(place.train(&cluster, "again", &logging));
    assert!(first_line(&log).contains(&format!("after batch {at},")), "{at}: {log}");
    let lines: Vec<Value> =
        text(&metrics).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert_eq!(last["total_samples"], ROWS * EPOCHS, "nothing twice, nothing left out");
    assert_eq!(last["run_samples"], ROWS * EPOCHS - at * BATCH);
    assert_eq!(last["clock"], BATCHES);

    let (log, _) = ended(place.train(&cluster, "fresh", "--fresh"));
    assert!(!first_line(&log).contains("resuming"), "{log}");
    assert!(log.contains(&format!("samples={}", ROWS * EPOCHS)), "{log}");
}

fn psctl(cluster: &TestCluster, arguments: &str) -> Value {
    let psctl = Path::new(env!("CARGO_BIN_EXE_downpour-worker")).with_file_name("psctl");
    let mut command = std::process::Command::new(psctl);
    command.args(arguments.split_whitespace());
    command.arg("--coordinators").arg(cluster.processes.coordinator_addresses());
    serde_json::from_slice(&command.output().unwrap().stdout).unwrap_or_default()
}
