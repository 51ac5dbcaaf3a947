//! What an operator counts: the rows of all shards are the distinct keys of the data, spread evenly.

mod support;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use support::TestCluster;

const DEADLINE: Duration = Duration::from_secs(60);

fn run(binary: &str, arguments: &[&str]) -> String {
    let folder = Path::new(env!("CARGO_BIN_EXE_downpour-worker")).parent().unwrap();
    let output = Command::new(folder.join(binary)).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_rows_of_all_shards_are_the_distinct_keys_and_no_server_holds_most() {
    let cluster = TestCluster::start();
    let coordinators = cluster.processes.coordinator_addresses();
    let (users, items) = (20_000, 5_000);
    let mut text = String::from("user,item,click\n");
    for i in 0..users {
        writeln!(text, "{i},{},{}", i % items, i % 2).unwrap();
    }
    let data = cluster.file("train.csv", &text);
    let columns =
        "[[key]]\ncolumn = 'user'\n[[key]]\ncolumn = 'item'\n[[label]]\ncolumn = 'click'\n";
    let schema = cluster.file("schema.toml", &format!("dim = 2\n{columns}"));
    let train = ["train", "--coordinators", &coordinators, "--job", "size", "--model", "lr"];
    run("downpour-worker", &[&train[..], &["--schema", &schema, "--train", &data]].concat());

    // Servers report their rows every few seconds.
    let end = Instant::now() + DEADLINE;
    let list = ["shard", "list", "--coordinators", &coordinators, "--job", "size", "-o", "json"];
    loop {
        let shards: serde_json::Value = serde_json::from_str(&run("psctl", &list)).unwrap();
        let shards = shards.as_array().unwrap();
        assert_eq!(shards.len(), 64);
        let rows_of = |server: &str| -> u64 {
            let held = shards.iter().filter(|shard| shard["primary"] == server);
            held.map(|shard| shard["rows"].as_u64().unwrap()).sum()
        };
        let (first, second) = (rows_of("ps-0"), rows_of("ps-1"));
        if first + second == users + items {
            let largest = first.max(second);
            assert!(largest * 100 <= 55 * (users + items), "{first} and {second}");
            return;
        }
        assert!(Instant::now() < end, "{first} + {second} rows, not {}", users + items);
        std::thread::sleep(Duration::from_millis(100));
    }
}
