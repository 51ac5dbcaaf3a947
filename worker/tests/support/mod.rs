//! A cluster of the real server binaries, small data, and shorthands.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use downpour::{Cluster, Pool, TableHandle};
use downpour_psctl::local::{LocalCluster, Options};
use tch::Tensor;

/// One coordinator, two servers, and a connection.
pub(crate) struct TestCluster {
    pub(crate) processes: LocalCluster,
    pub(crate) cluster: Cluster,
    pub(crate) folder: tempfile::TempDir,
}

impl TestCluster {
    pub(crate) fn start() -> Self {
        Self::start_with(2, &[])
    }

    /// So many servers with further arguments.
    pub(crate) fn start_with(servers: usize, server_args: &[&str]) -> Self {
        let server_args = server_args.iter().map(|&argument| argument.into()).collect();
        Self::start_as(Options { servers, server_args, ..Options::default() })
    }

    /// A coordinator with further arguments.
    pub(crate) fn start_with_coordinator(coordinator_args: &[&str]) -> Self {
        let coordinator_args = coordinator_args.iter().map(|&argument| argument.into()).collect();
        Self::start_as(Options { coordinator_args, ..Options::default() })
    }

    fn start_as(options: Options) -> Self {
        let binaries = Path::new(env!("CARGO_BIN_EXE_downpour-worker")).parent().unwrap();
        let options = Options { coordinators: 1, bin_dir: Some(binaries.to_owned()), ..options };
        let processes = LocalCluster::start(options)
            .expect("start a cluster (`cargo build --bins` makes the binaries it needs)");
        let cluster = Cluster::connect(&processes.coordinator_addresses()).unwrap();
        Self { processes, cluster, folder: tempfile::tempdir().unwrap() }
    }

    /// Writes a file of test data.
    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// Rows of a job, once the servers report at least `least`: what has happened before the last of them is in it.
    pub(crate) fn rows(&self, job: &str, least: u64) -> u64 {
        let psctl = Path::new(env!("CARGO_BIN_EXE_downpour-worker")).with_file_name("psctl");
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let coordinators = self.processes.coordinator_addresses();
            let arguments =
                ["shard", "list", "--job", job, "-o", "json", "--coordinators", &coordinators];
            let output = Command::new(&psctl).args(arguments).output().expect("psctl runs");
            // Nothing is listed before there is such a job.
            let shards: Vec<serde_json::Value> =
                serde_json::from_slice(&output.stdout).unwrap_or_default();
            let rows = shards.iter().map(|shard| shard["rows"].as_u64().unwrap_or(0)).sum();
            if rows >= least {
                return rows;
            }
            assert!(Instant::now() < deadline, "{rows} rows of {least}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Of what [`clicks`] makes.
pub(crate) const SCHEMA: &str = r#"
dim = 4
[[key]]
column = "user"
[[key]]
column = "items"
separator = "|"
pool = "mean"
[[number]]
column = "x"
[[label]]
column = "click"
"#;

/// `user,items,x,click`: items is a list of up to three with gaps, and whoever is odd, or has an odd first item,
/// clicks.
pub(crate) fn clicks(rows: u64) -> String {
    let mut text = String::from("user,items,x,click\n");
    for i in 0..rows {
        let user = i.wrapping_mul(2_654_435_761) % 97;
        let items: Vec<String> = (0..i % 4).map(|n| ((i * 31 + n * 17) % 53).to_string()).collect();
        let click = (user % 2) | u64::from(!items.is_empty()) & (i * 31 % 53 % 2);
        writeln!(text, "{user},{},{},{click}", items.join("|"), (i % 10) as f64 / 10.0).unwrap();
    }
    text
}

/// [`clicks`] in so many files of a folder, each of which is a task.
pub(crate) fn write_parts(folder: &Path, rows: u64, parts: u64) {
    std::fs::create_dir_all(folder).unwrap();
    let text = clicks(rows);
    let (header, rest) = text.split_once('\n').unwrap();
    let lines: Vec<&str> = rest.lines().collect();
    for (part, lines) in lines.chunks(lines.len().div_ceil(parts as usize)).enumerate() {
        let text = format!("{header}\n{}\n", lines.join("\n"));
        std::fs::write(folder.join(format!("{part:03}.csv")), text).unwrap();
    }
}

/// The columns of [`clicks`].
pub(crate) fn click_features(users: &TableHandle, items: &TableHandle) -> downpour::Features {
    downpour::Features::new()
        .one("user", users)
        .bag("items", items, Pool::Mean)
        .separated_by("|")
        .dense(["x"])
        .label("click")
}

pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.contiguous().view(-1)).unwrap()
}
