//! `bench-click`, as `psctl bench train` starts it, on little data.

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::TestCluster;

const BATCH: u64 = 1024;
const BATCHES: u64 = 12;

/// Clicks follow from the first id alone.
fn write_data(cluster: &TestCluster) {
    for (split, rows) in [("train", BATCHES * BATCH), ("test", BATCH)] {
        let random = |i: u64| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u32;
        let ids: Vec<u32> = (0..rows * 26).map(|i| random(i) % 50 + (i % 26) as u32 * 50).collect();
        let clicks = ids.iter().step_by(26).map(|id| (id % 2) as f32);
        let numbers = (0..rows * 13).map(|i| random(i) as f32 / (1u32 << 24) as f32);
        let write = |end: &str, bytes: Vec<u8>| {
            std::fs::write(cluster.path(&format!("e_{split}_{end}")), bytes).unwrap();
        };
        write("y.f32", clicks.flat_map(f32::to_le_bytes).collect());
        write("x.f32", numbers.flat_map(f32::to_le_bytes).collect());
        write("ids.u32", ids.iter().flat_map(|id| id.to_le_bytes()).collect());
    }
    let weights = 429 * 256 + 256 + 256 * 128 + 128 + 128 + 1 + 1;
    let weights = (0..weights).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 16) as f32 / 65536.0);
    let weights = weights.flat_map(|uniform| ((uniform - 0.5) * 0.2).to_le_bytes());
    std::fs::write(cluster.path("e_mlp_init.f32"), weights.collect::<Vec<u8>>()).unwrap();
}

#[test]
fn a_worker_of_the_benchmark_keeps_to_its_protocol_and_learns() {
    let cluster = TestCluster::start();
    write_data(&cluster);
    for (tables, transport) in [("fused", "framed"), ("26", "grpc")] {
        let mut worker = Command::new(env!("CARGO_BIN_EXE_downpour-worker"));
        worker.args(["bench-click", "--worker", "0", "--workers", "1", "--depth", "2"]);
        worker.args(["--coordinators", &cluster.processes.coordinator_addresses()]);
        worker.args(["--job", tables, "--tables", tables, "--transport", transport]);
        worker.arg("--data").arg(cluster.folder.path());
        worker.args(["--batches", &BATCHES.to_string()]);
        let mut worker = worker.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut stdin, stdout) = (worker.stdin.take().unwrap(), worker.stdout.take().unwrap());
        let mut lines = BufReader::new(stdout).lines();
        let mut next =
            || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
        assert_eq!(next(), serde_json::json!({"ready": true}));
        writeln!(stdin, "go").unwrap();
        let timed = next();
        assert_eq!(timed["samples"], 2 * BATCH);
        let seconds = timed["end_s"].as_f64().unwrap() - timed["start_s"].as_f64().unwrap();
        assert!((0.0..seconds).contains(&timed["wait_s"].as_f64().unwrap()), "{timed}");
        writeln!(stdin, "go").unwrap();
        let scores = next();
        assert!(scores["auc"].as_f64().unwrap() > 0.8, "{scores}");
        assert!(scores["logloss"].as_f64().unwrap() < 0.69, "{scores}");
        drop(stdin);
        assert!(worker.wait().unwrap().success());
    }
}

#[test]
fn a_worker_of_the_benchmark_ends_when_nobody_listens() {
    let cluster = TestCluster::start();
    write_data(&cluster);
    let mut worker = Command::new(env!("CARGO_BIN_EXE_downpour-worker"));
    worker.args(["bench-click", "--worker", "0", "--workers", "1", "--job", "alone"]);
    worker.args(["--coordinators", &cluster.processes.coordinator_addresses()]);
    worker.arg("--data").arg(cluster.folder.path());
    let status = worker.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}
