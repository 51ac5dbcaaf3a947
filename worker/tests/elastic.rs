//! Workers that come and go during a pass: every sample is trained, and once where nobody was gone before its task was done (docs/protocol.md 7.2).
//!
//! A row for each sample counts how often it was trained: zero at first, SGD at rate 1, and a loss whose gradient is 1.

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use downpour::{Cluster, Features, Init, Job, Paths, Sgd, Table, TableHandle};
use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::store::{Access, Store};
use downpour_client::Coordinators;
use downpour_core::id::JobId;
use downpour_core::mix::mix64;
use downpour_data::{BatchReader, Dataset, Part, Task};
use downpour_proto::v1;
use serde_json::Value;
use support::{TestCluster, floats};
use tch::Kind;

const DEADLINE: Duration = Duration::from_secs(120);
const BATCH: usize = 8;
const JOB: &str = "counts";
/// Where a worker finds what it is to do: a process of this very binary that runs [`worker_process`] alone.
const WORKER: &str = "DOWNPOUR_TEST_WORKER";

/// A file is a task.
#[derive(Clone, Copy)]
struct Data {
    files: u32,
    rows_of_a_file: u32,
}

impl Data {
    fn rows(self) -> u64 {
        u64::from(self.files * self.rows_of_a_file)
    }

    fn write(self, cluster: &TestCluster) -> String {
        let folder = cluster.path("samples");
        std::fs::create_dir_all(&folder).unwrap();
        for file in 0..self.files {
            let first = file * self.rows_of_a_file;
            let rows: String =
                (first..first + self.rows_of_a_file).map(|row| format!("{row},0\n")).collect();
            std::fs::write(folder.join(format!("{file:05}.csv")), format!("row,y\n{rows}"))
                .unwrap();
        }
        folder.display().to_string()
    }

    /// How often each sample of each task was trained, by the task's number.
    fn counts(self, job: &Job, table: &TableHandle) -> Vec<Vec<u32>> {
        let keys: Vec<u64> = (0..self.rows()).collect();
        let rows = floats(&job.rows(table, &keys).unwrap());
        let counts: Vec<u32> = rows.iter().map(|value| (-value) as u32).collect();
        counts.chunks(self.rows_of_a_file as usize).map(<[u32]>::to_vec).collect()
    }
}

fn join(cluster: &Cluster, name: &str) -> (Job, TableHandle) {
    let job = cluster.job(name).shards(4).open().unwrap();
    let table = Table::dim(1).optimizer(Sgd::lr(1.0)).init(Init::Zeros);
    let table = job.table("count", table).unwrap();
    (job, table)
}

/// What a worker of these tests does; nothing where it was not started as one.
#[test]
fn worker_process() {
    let Ok(told) = std::env::var(WORKER) else { return };
    let [coordinators, job, data, passes] = told.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{told}");
    };
    let cluster = Cluster::connect(coordinators).unwrap();
    let (job, table) = join(&cluster, job);
    let features = Features::new().one("row", &table).raw().label("y");
    let mut steps = job
        .train(Paths::new([data]), features)
        .batch(BATCH)
        .depth(2)
        .shuffle_rows(30)
        .epochs(passes.parse().unwrap())
        .shared()
        .start()
        .unwrap();
    while let Some(step) = steps.next().unwrap() {
        let loss = step.rows("row").sum(Kind::Float);
        step.backward(&loss).unwrap().push().unwrap();
    }
    steps.finish().unwrap();
    drop(steps);
    job.finish().unwrap();
}

struct Worker(Child);

impl Worker {
    fn start(cluster: &TestCluster, job: &str, data: &str, passes: u64) -> Self {
        let coordinators = cluster.processes.coordinator_addresses();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["worker_process", "--exact", "--nocapture"]);
        command.env(WORKER, format!("{coordinators} {job} {data} {passes}"));
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn ask_to_stop(&self) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    fn wait_success(&mut self) {
        let started = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return assert!(status.success(), "{status}");
            }
            assert!(started.elapsed() < DEADLINE, "a worker does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // One that has ended cannot be killed.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

impl TestCluster {
    fn psctl(&self, arguments: &str) -> Value {
        let psctl = Path::new(env!("CARGO_BIN_EXE_downpour-worker")).with_file_name("psctl");
        let mut command = Command::new(psctl);
        command.args(arguments.split_whitespace());
        command.args(["--coordinators", &self.processes.coordinator_addresses(), "-o", "json"]);
        let output = command.output().expect("psctl runs");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// What the coordinators say of the job.
    fn status(&self) -> v1::JobStatus {
        let coordinators = Coordinators::parse(&self.processes.coordinator_addresses()).unwrap();
        let reply = wait(coordinators.cluster()).unwrap();
        let is_it = |job: &v1::JobStatus| {
            let spec = job.view.as_ref().and_then(|view| view.spec.as_ref());
            spec.is_some_and(|spec| spec.name == JOB)
        };
        { reply.jobs }.into_iter().find(is_it).unwrap_or_default()
    }

    /// Tasks that are done, in all passes.
    fn tasks_done(&self) -> u64 {
        self.status().ledger.map_or(0, |ledger| ledger.tasks_done)
    }

    fn wait_for_tasks(&self, done: u64) {
        let started = Instant::now();
        while self.tasks_done() < done {
            assert!(started.elapsed() < DEADLINE, "{} of {done} tasks", self.tasks_done());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The most that a worker holds now.
    fn most_held(&self) -> u64 {
        let held = self.status().sessions.iter().map(|one| one.tasks_held).max();
        held.unwrap_or(0).into()
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn cluster() -> TestCluster {
    TestCluster::start_with_coordinator(&["--session-timeout-ms", "3000"])
}

/// Six workers, three of which are killed when the seed says so, and two that join.
fn killed_and_joined(data: Data, passes: u64, seed: u64) {
    let cluster = cluster();
    let folder = data.write(&cluster);
    let start = || Worker::start(&cluster, JOB, &folder, passes);
    let mut workers: Vec<Worker> = (0..6).map(|_| start()).collect();
    let draw = |i: u64, below: u64| mix64(seed * 100 + i) % below;
    let all = u64::from(data.files) * passes;
    let mut held = 0;
    for death in 0..3 {
        cluster.wait_for_tasks(all * (death + 1) / 5 + draw(death, all / 10));
        let before = cluster.most_held();
        workers.remove(draw(death + 3, workers.len() as u64) as usize).kill();
        // Whoever died held about as many as the one with the most.
        held += before.max(cluster.most_held()) + 4;
        assert!(cluster.tasks_done() < all, "killed too late");
        if death < 2 {
            workers.push(start());
        }
    }
    workers.iter_mut().for_each(Worker::wait_success);
    assert_eq!(cluster.tasks_done(), all, "every pass ended exactly");
    let (job, table) = join(&cluster.cluster, JOB);
    let counts = data.counts(&job, &table);
    let fewest = counts.iter().flatten().min().unwrap();
    assert!(u64::from(*fewest) >= passes, "a sample was trained {fewest} times in {passes} passes");
    let more = |task: &&Vec<u32>| task.iter().any(|count| u64::from(*count) > passes);
    let again = counts.iter().filter(more).count() as u64;
    assert!(again <= held, "{again} tasks were trained again, but the dead had at most {held}");
    job.finish().unwrap();
}

#[test]
fn workers_are_killed_and_join_during_a_pass_and_every_sample_is_trained() {
    killed_and_joined(Data { files: 300, rows_of_a_file: 40 }, 2, 7);
}

/// `cargo test -p downpour --test elastic -- --ignored`
#[test]
#[ignore = "takes minutes"]
fn workers_are_killed_and_join_during_long_passes() {
    for seed in 0..10 {
        killed_and_joined(Data { files: 600, rows_of_a_file: 200 }, 3, seed);
    }
}

#[test]
fn without_a_death_each_sample_is_trained_once_in_a_pass_and_who_is_asked_to_stop_gives_its_tasks_back()
 {
    let data = Data { files: 60, rows_of_a_file: 40 };
    let cluster = cluster();
    let folder = data.write(&cluster);
    let mut first: Vec<Worker> = (0..2).map(|_| Worker::start(&cluster, JOB, &folder, 2)).collect();
    cluster.wait_for_tasks(10);
    let mut joins = Worker::start(&cluster, JOB, &folder, 2);
    first.iter_mut().for_each(Worker::wait_success);
    joins.wait_success();
    let (job, table) = join(&cluster.cluster, JOB);
    assert!(data.counts(&job, &table).iter().flatten().all(|count| *count == 2));

    // Two more passes; a worker that leaves has nothing any more, and another goes on.
    let mut leaves = Worker::start(&cluster, JOB, &folder, 4);
    cluster.wait_for_tasks(130);
    leaves.ask_to_stop();
    leaves.wait_success();
    let ledger = cluster.status().ledger.unwrap();
    assert_eq!(ledger.leased, 0, "{ledger:?}");
    Worker::start(&cluster, JOB, &folder, 4).wait_success();
    assert!(data.counts(&job, &table).iter().flatten().all(|count| *count >= 4));
    assert_eq!(cluster.tasks_done(), 240);
    job.finish().unwrap();
}

#[test]
fn a_checkpoint_under_load_has_all_that_is_done_and_only_what_was_in_flight_is_trained_again() {
    let data = Data { files: 120, rows_of_a_file: 40 };
    let cluster = cluster();
    let folder = data.write(&cluster);
    let mut workers: Vec<Worker> =
        (0..3).map(|_| Worker::start(&cluster, JOB, &folder, 1)).collect();
    cluster.wait_for_tasks(30);
    let uri = format!("file://{}", cluster.path("checkpoints").display());
    // From here, and not by another process, which takes its time while they train on.
    let coordinators = Coordinators::parse(&cluster.processes.coordinator_addresses()).unwrap();
    let id = JobId(cluster.status().view.unwrap().job);
    let ended = wait(coordinators.take_checkpoint(id, &uri, false, DEADLINE)).unwrap();
    assert_eq!(ended.error, "");
    workers.iter_mut().for_each(Worker::wait_success);
    let manifest = manifest(&cluster.path("checkpoints"));
    let ledger = manifest.ledger.expect("the job has tasks");
    assert!((1..data.files).contains(&ledger.done()), "in the midst: {}", ledger.done());

    let restored = cluster.psctl(&format!("checkpoint restore {uri} {JOB} --as again"));
    let (job, table) = join(&cluster.cluster, "again");
    let order = ledger.plan().order(ledger.pass());
    let parts = ledger.to_parts();
    let counts = data.counts(&job, &table);
    for position in 0..parts.next {
        let done = !parts.returned.contains(&position);
        let task = &counts[order.task(position) as usize];
        assert!(!done || task.iter().all(|count| *count == 1), "{position}: {task:?}, {restored}");
    }
    Worker::start(&cluster, "again", &folder, 1).wait_success();
    let counts = data.counts(&job, &table);
    for position in 0..data.files {
        let task = &counts[order.task(position) as usize];
        // What nobody had begun then may be in the rows too: shards are cut later.
        let once = position < parts.next && !parts.returned.contains(&position);
        assert!(task.iter().all(|count| *count >= 1), "{position}: {task:?}");
        assert!(!once || task.iter().all(|count| *count == 1), "{position}: {task:?}");
    }
    job.finish().unwrap();
}

fn manifest(folder: &Path) -> Manifest {
    let catalog =
        Catalog::new(Store::open(&format!("file://{}", folder.display()), Access::Read).unwrap());
    wait(catalog.latest(JOB)).unwrap()
}

#[test]
fn a_server_that_was_started_for_a_job_ends_with_it() {
    let wait = ["--for-job", JOB, "--for-job-wait-ms", "300"];
    let mut cluster = TestCluster::start_with(1, &wait);
    let (other, _) = join(&cluster.cluster, "other");
    let (job, _) = join(&cluster.cluster, JOB);
    job.finish().unwrap();
    other.finish().unwrap();
    for (name, over) in [(JOB, false), ("other", true)] {
        cluster.psctl(&format!("job delete {name} --yes"));
        let gone = cluster.psctl("job list");
        assert!(gone.as_array().is_some_and(|jobs| jobs.iter().all(|job| job["name"] != name)));
        if over {
            let ended = cluster.processes.servers[0].wait_success(DEADLINE);
            assert!(ended.is_ok(), "{ended:?}");
            let nodes = cluster.psctl("node list");
            assert_eq!(nodes[0]["admission"], "cordoned", "nothing is placed on it any more");
        }
    }
}

#[test]
fn who_fails_leaves_its_tasks_as_they_were_and_may_begin_again_in_the_same_session() {
    let cluster = TestCluster::start();
    let data = Data { files: 6, rows_of_a_file: BATCH as u32 };
    let files = data.write(&cluster);
    let (job, table) = join(&cluster.cluster, JOB);
    let start = || {
        let features = Features::new().one("row", &table).raw().label("y");
        let steps = job.train(Paths::new([&files]), features).batch(BATCH).shuffle_rows(0);
        steps.shared().start().unwrap()
    };
    // As after an error between `next` and `push`: the only step of a whole task.
    let mut steps = start();
    let step = steps.next().unwrap();
    assert!(step.is_some());
    drop(step);
    drop(steps);
    assert_eq!(cluster.tasks_done(), 0, "nothing was trained");

    // Which goes on where that loop was, also in what it asks for.
    let mut steps = start();
    while let Some(step) = steps.next().unwrap() {
        let loss = step.rows("row").sum(Kind::Float);
        step.backward(&loss).unwrap().push().unwrap();
    }
    steps.finish().unwrap();
    for (task, counts) in data.counts(&job, &table).into_iter().enumerate() {
        assert!(counts.iter().all(|&count| count == 1), "task {task}: {counts:?}");
    }
    job.finish().unwrap();
}

/// A list of tasks of which none can be read.
struct Listed(Vec<Task>);

impl Dataset for Listed {
    fn tasks(&self) -> downpour_data::Result<Vec<Task>> {
        Ok(self.0.clone())
    }

    fn open(&self, task: &Task) -> downpour_data::Result<BatchReader> {
        panic!("{task:?} is broken")
    }
}

#[test]
fn a_dataset_that_breaks_is_not_taken_for_one_that_ends() {
    let cluster = TestCluster::start();
    let (job, table) = join(&cluster.cluster, JOB);
    let start = |names: [&str; 2]| {
        let task = |file: &str| Task { file: file.into(), part: Part::Whole, rows: None };
        let dataset: Arc<dyn Dataset> = Arc::new(Listed(names.map(task).into()));
        let features = Features::new().one("row", &table).raw().label("y");
        job.train(dataset, features).shared().start()
    };
    let error = start(["a", "a"]).err().expect("nobody could tell when it is done").to_string();
    assert!(error.contains("twice"), "{error}");
    let mut steps = start(["a", "b"]).unwrap();
    let error = steps.next().unwrap_err().to_string();
    assert!(error.contains("panicked"), "{error}");
    drop(steps);
    assert_eq!(cluster.tasks_done(), 0);
    job.finish().unwrap();
}
