//! What operators do to workers: a paused job's hold, an evicted one ends and says so.

mod support;

use std::time::{Duration, Instant};

use downpour_client::Coordinators;
use downpour_core::id::SessionId;
use support::{SCHEMA, TestCluster, clicks};

const DEADLINE: Duration = Duration::from_secs(90);
const EVICTED: i32 = 76;

#[test]
fn workers_hold_while_their_job_is_paused_and_end_when_they_are_evicted() {
    let cluster = TestCluster::start();
    let train = cluster.file("train.csv", &clicks(2_000));
    let schema = cluster.file("schema.toml", SCHEMA);
    let addresses = cluster.processes.coordinator_addresses();
    let text = format!(
        "train --coordinators {addresses} --job clicks --model wide-deep --hidden 8 --schema {schema} --train {train} --epochs 100000 --batch 20 \
         --shards 4 --depth 2 --log-every 250ms"
    );
    let arguments = text.split_whitespace().map(str::to_owned).collect();
    let mut worker = cluster.processes.run("worker", "downpour-worker", arguments).unwrap();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let coordinators = Coordinators::parse(&addresses).unwrap();
    let job = until("the job is there", || {
        let cluster = runtime.block_on(coordinators.cluster()).ok()?;
        cluster.jobs.into_iter().find_map(|job| job.view).map(|view| view.job)
    });
    let job = downpour_core::id::JobId(job);
    // Which step a line is about.
    let step = |words: &str| {
        let log = std::fs::read_to_string(worker.log()).unwrap();
        let line = log.lines().find(|line| line.contains(words))?;
        let clock = line.rsplit("clock=").next()?.split_whitespace().next()?;
        clock.parse::<u64>().ok()
    };

    assert!(runtime.block_on(coordinators.pause_job(job, true)).unwrap());
    let held = until("it holds", || step("the job is paused: holding before the next step"));
    assert!(!runtime.block_on(coordinators.pause_job(job, true)).unwrap(), "a repeat");
    assert!(runtime.block_on(coordinators.pause_job(job, false)).unwrap());
    let next = until("it goes on", || step("goes on with the next step"));
    assert_eq!(next, held, "no step began in between");

    let sessions = runtime.block_on(coordinators.cluster()).unwrap().jobs;
    let session = sessions.into_iter().flat_map(|job| job.sessions).next().unwrap().session;
    assert!(runtime.block_on(coordinators.evict_session(job, SessionId(session))).unwrap());
    let status = until("it ends", || worker.poll().unwrap());
    assert_eq!(status.code(), Some(EVICTED));
    let log = std::fs::read_to_string(worker.log()).unwrap();
    assert!(log.contains("was evicted by an operator"), "{log}");
}

#[test]
fn a_worker_that_keeps_its_order_ends_the_steps_that_it_has_begun_before_it_holds() {
    const ROWS: u64 = 100_000;
    let cluster = TestCluster::start();
    // A key for each step: rows of the table are steps whose push was applied.
    let lines: String = (0..ROWS).map(|row| format!("{row},{}\n", row % 2)).collect();
    let train = cluster.file("train.csv", &format!("user,click\n{lines}"));
    let schema = "dim = 1\n[[key]]\ncolumn = \"user\"\n[[label]]\ncolumn = \"click\"\n";
    let schema = cluster.file("schema.toml", schema);
    let addresses = cluster.processes.coordinator_addresses();
    let text = format!(
        "train --coordinators {addresses} --job steps --model lr --schema {schema} --train {train} --batch 1 --shuffle-rows 0 --shards 4 --depth 2 --in-order"
    );
    let arguments = text.split_whitespace().map(str::to_owned).collect();
    let worker = cluster.processes.run("worker", "downpour-worker", arguments).unwrap();

    let trained = cluster.rows("steps", 100);
    assert!(trained < ROWS);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let coordinators = Coordinators::parse(&addresses).unwrap();
    let job = runtime.block_on(coordinators.job("steps")).unwrap().job;
    assert!(runtime.block_on(coordinators.pause_job(job, true)).unwrap());
    let begun = until("it holds", || {
        let log = std::fs::read_to_string(worker.log()).unwrap();
        let line = log.lines().find(|line| line.contains("holding before the next step"))?;
        line.rsplit("clock=").next()?.split_whitespace().next()?.parse::<u64>().ok()
    });
    assert_eq!(cluster.rows("steps", begun), begun);
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}
