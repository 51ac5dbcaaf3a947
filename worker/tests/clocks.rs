//! Workers that wait for each other, as the job's mode says (docs/consistency.md): who trains in which step, and that nobody waits for ever.
//!
//! Workers are threads with sessions of their own. The gradient of every row and of the dense number is 1, with SGD at rate 1: a value says how often it was trained, and in means of how many.

mod support;

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use downpour::{Cluster, Features, Init, Job, Paths, Sgd, Steps, Table, TableHandle};
use downpour_client::Coordinators;
use downpour_core::consistency::{Consistency, Mode};
use downpour_core::id::JobId;
use downpour_proto::v1;
use support::{TestCluster, floats};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};

const JOB: &str = "clocks";
const DEADLINE: Duration = Duration::from_secs(120);
const SYNC: Mode = Mode::Sync { backup_workers: 0 };
const SSP: Mode = Mode::Ssp { bound: 1 };

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn until(what: &str, is: impl Fn() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(started.elapsed() < DEADLINE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl TestCluster {
    fn coordinators(&self) -> Coordinators {
        Coordinators::parse(&self.processes.coordinator_addresses()).unwrap()
    }

    fn status(&self) -> v1::JobStatus {
        let reply = wait(self.coordinators().cluster()).unwrap();
        { reply.jobs }.into_iter().next().unwrap_or_default()
    }

    fn tasks_done(&self) -> u64 {
        self.status().ledger.map_or(0, |ledger| ledger.tasks_done)
    }

    fn job_id(&self) -> JobId {
        JobId(self.status().view.unwrap().job)
    }

    /// A new job with these modes, and a session of ours that trains nothing.
    fn job_in(&self, consistency: &Consistency) -> (Job, TableHandle) {
        let opened = open(&self.cluster);
        wait(self.coordinators().set_consistency(self.job_id(), consistency)).unwrap();
        opened
    }

    /// So many files, each a task, of so many rows; the keys are 0, 1 and so on.
    fn tasks(&self, files: u64, rows: u64) -> String {
        let folder = self.path("samples");
        std::fs::create_dir_all(&folder).unwrap();
        for file in 0..files {
            let rows: String =
                (file * rows..(file + 1) * rows).map(|row| format!("{row},0\n")).collect();
            std::fs::write(folder.join(format!("{file:05}.csv")), format!("row,y\n{rows}"))
                .unwrap();
        }
        folder.display().to_string()
    }
}

fn open(cluster: &Cluster) -> (Job, TableHandle) {
    let job = cluster.job(JOB).shards(4).open().unwrap();
    let table = Table::dim(1).optimizer(Sgd::lr(1.0)).init(Init::Zeros);
    let table = job.table("count", table).unwrap();
    (job, table)
}

fn features(table: &TableHandle) -> Features {
    Features::new().one("row", table).raw().label("y")
}

/// Trains what the ledger gives, to the end.
fn train_shared(cluster: &TestCluster, data: &str, depth: usize, passes: u64) {
    let cluster = Cluster::connect(&cluster.processes.coordinator_addresses()).unwrap();
    let (job, table) = open(&cluster);
    let steps = job.train(Paths::new([data]), features(&table)).batch(8).depth(depth);
    train(&mut steps.shuffle_rows(0).epochs(passes).shared().start().unwrap());
    job.finish().unwrap();
}

fn train(steps: &mut Steps) {
    while let Some(step) = steps.next().unwrap() {
        let loss = step.rows("row").sum(Kind::Float);
        step.backward(&loss).unwrap().push().unwrap();
    }
}

/// What became of every row, by its key.
fn values(job: &Job, table: &TableHandle, rows: u64) -> Vec<f32> {
    floats(&job.rows(table, &(0..rows).collect::<Vec<_>>()).unwrap())
}

/// The fast one runs as far as it may before the slow one goes on: it gets there, and never further.
fn bounded(depth: usize) {
    const STEPS: u64 = 8;
    // A step that ends before the next of the pipeline asks leaves nothing of the depth: only so far does it come for certain.
    const LEAST: u64 = 2;
    let cluster = TestCluster::start();
    let (job, table) = cluster.job_in(&Consistency::all(SSP));
    let data = cluster.tasks(STEPS, 1);
    let most = 1 + depth as u64;
    let (fast, slow) = (AtomicU64::new(0), AtomicU64::new(0));
    let seated = Barrier::new(2);
    let steps = |job: &Job, table: &TableHandle| {
        let steps = job.train(Paths::new([&data]), features(table));
        steps.batch(1).depth(depth).start().unwrap()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let own = Cluster::connect(&cluster.processes.coordinator_addresses()).unwrap();
            let (job, table) = open(&own);
            let mut steps = steps(&job, &table);
            let mut step = steps.next().unwrap();
            seated.wait();
            while let Some(one) = step {
                let done = slow.load(Ordering::SeqCst);
                until("the fast worker does not come as far as it may", || {
                    fast.load(Ordering::SeqCst) >= STEPS.min(done + LEAST)
                });
                slow.fetch_add(1, Ordering::SeqCst);
                let loss = one.rows("row").sum(Kind::Float);
                one.backward(&loss).unwrap().push().unwrap();
                step = steps.next().unwrap();
            }
            drop(steps);
            job.finish().unwrap();
        });
        seated.wait();
        let mut steps = steps(&job, &table);
        while let Some(step) = steps.next().unwrap() {
            let at = fast.fetch_add(1, Ordering::SeqCst) + 1;
            let done = slow.load(Ordering::SeqCst);
            assert!(at <= done + most, "step {at} began when the other worker had done {done}");
            let loss = step.rows("row").sum(Kind::Float);
            step.backward(&loss).unwrap().push().unwrap();
        }
    });
    assert_eq!(values(&job, &table, STEPS), [-2.0; STEPS as usize]);
    job.finish().unwrap();
}

#[test]
fn a_bound_of_one_lets_a_worker_be_one_step_and_its_pipeline_ahead() {
    bounded(1);
}

#[test]
fn a_deeper_pipeline_adds_to_the_bound() {
    bounded(2);
}

/// Two workers, step by step: each has a row of its own, and both one in common. Values of the first one's row, that in common, and the dense number.
fn in_step(consistency: &Consistency, steps: u64) -> [f32; 3] {
    let cluster = TestCluster::start();
    let (job, table) = cluster.job_in(consistency);
    let seated = Barrier::new(2);
    let trained = |own: u64| {
        let connection = Cluster::connect(&cluster.processes.coordinator_addresses()).unwrap();
        let (job, table) = open(&connection);
        let vars = VarStore::new(Device::Cpu);
        let number = vars.root().zeros("w", &[1]);
        job.dense("net", &vars, Sgd::lr(1.0)).unwrap();
        let rows = format!("{own},0\n9,0\n").repeat(steps as usize);
        let data = cluster.file(&format!("{own}.csv"), &format!("row,y\n{rows}"));
        let loop_ = job.train(Paths::new([data]), features(&table));
        let mut loop_ = loop_.batch(2).shuffle_rows(0).depth(2).start().unwrap();
        let mut step = loop_.next().unwrap();
        // Both are there before the first round ends.
        seated.wait();
        while let Some(one) = step {
            let loss = one.rows("row").sum(Kind::Float) + number.sum(Kind::Float);
            one.backward(&loss).unwrap().push().unwrap();
            step = loop_.next().unwrap();
        }
        drop(loop_);
        job.finish().unwrap();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| trained(1));
        trained(2);
    });
    let rows = floats(&job.rows(&table, &[1, 2, 9]).unwrap());
    assert_eq!(rows[0].to_bits(), rows[1].to_bits());
    let vars = VarStore::new(Device::Cpu);
    let number: Tensor = vars.root().zeros("w", &[1]);
    job.existing_dense("net", &vars).unwrap();
    job.finish().unwrap();
    [rows[0], rows[2], floats(&number)[0]]
}

#[test]
fn in_sync_two_workers_train_the_mean_of_both() {
    assert_eq!(in_step(&Consistency::all(SYNC), 6), [-3.0, -6.0, -6.0]);
}

#[test]
fn in_hybrid_dense_values_are_trained_by_the_mean_and_rows_by_each() {
    assert_eq!(in_step(&Consistency::hybrid(0), 6), [-6.0, -12.0, -6.0]);
}

/// Three workers with tasks that do not go up evenly: at the end of a pass some have none.
fn passes_end(consistency: &Consistency, depth: usize) {
    let cluster = TestCluster::start();
    let (job, table) = cluster.job_in(consistency);
    let (files, passes) = (10, 2);
    let data = cluster.tasks(files, 20);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| train_shared(&cluster, &data, depth, passes));
        }
    });
    assert_eq!(cluster.tasks_done(), files * passes);
    // Each row once in a pass, alone or as a part of a mean.
    for (key, value) in values(&job, &table, files * 20).into_iter().enumerate() {
        let once = -2.001..-2.0 / 3.001;
        assert!(once.contains(&value), "row {key} is {value}");
    }
    job.finish().unwrap();
}

#[test]
fn a_pass_ends_in_ssp_when_a_worker_has_no_task_left() {
    passes_end(&Consistency::all(Mode::Ssp { bound: 0 }), 2);
}

#[test]
fn a_pass_ends_in_sync_when_a_worker_has_no_task_left() {
    passes_end(&Consistency::all(SYNC), 2);
}

#[test]
fn what_a_round_drops_is_trained_again_before_its_task_is_done() {
    passes_end(&Consistency::all(Mode::Sync { backup_workers: 1 }), 1);
}

#[test]
fn modes_change_while_workers_train() {
    let cluster = TestCluster::start();
    let (job, table) = cluster.job_in(&Consistency::default());
    let files = 60;
    let data = cluster.tasks(files, 16);
    std::thread::scope(|scope| {
        let workers = [1, 2].map(|depth| {
            let (cluster, data) = (&cluster, &data);
            scope.spawn(move || train_shared(cluster, data, depth, 2))
        });
        let changes = [SSP, SYNC, Mode::Async, SYNC, SSP, Mode::Sync { backup_workers: 1 }];
        for (change, mode) in changes.into_iter().enumerate() {
            let done = (change as u64 + 1) * 15;
            until("tasks are not done", || {
                cluster.tasks_done() >= done || workers.iter().any(ScopedJoinHandle::is_finished)
            });
            let all = Consistency::all(mode);
            wait(cluster.coordinators().set_consistency(cluster.job_id(), &all)).unwrap();
        }
    });
    assert_eq!(cluster.tasks_done(), files * 2);
    let values = values(&job, &table, files * 16);
    assert!(values.iter().all(|value| (-2.0..=-1.0).contains(value)), "{values:?}");
    job.finish().unwrap();
}

#[test]
fn a_worker_that_has_left_its_loop_is_waited_for_by_nobody_and_a_paused_job_goes_on() {
    let cluster = TestCluster::start();
    let (job, table) = cluster.job_in(&Consistency::all(SYNC));
    let data = cluster.tasks(40, 1);
    // It leaves its loop in the midst, and its session stays open.
    let steps = || job.train(Paths::new([&data]), features(&table)).batch(1).depth(2).start();
    let mut left = steps().unwrap();
    let step = left.next().unwrap().expect("a step");
    std::thread::scope(|scope| {
        let other = scope.spawn(|| train_shared(&cluster, &data, 1, 1));
        drop(step);
        drop(left);
        until("the other worker does not go on", || cluster.tasks_done() >= 2);
        wait(cluster.coordinators().pause_job(cluster.job_id(), true)).unwrap();
        wait(cluster.coordinators().pause_job(cluster.job_id(), false)).unwrap();
        until("it does not end", || other.is_finished());
    });
    job.finish().unwrap();
}
