//! What is exported scores raw rows as the worker does, by a program of 80 lines that knows nothing of this one.
//!
//! The program runs on torch where `python3`, or the Python that DOWNPOUR_TEST_TORCH_PYTHON names, has it (a gigabyte and its GPU libraries), and else on the few
//! functions of it that `testdata/numpy_torch` has; there the model that is a TorchScript is left out, and the test says so.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use support::TestCluster;

/// Rows with every kind of value: missing ones, lists, text to be split, integers with gaps; and of the test half the keys were never trained.
const DATA: &str = r#"
import random, sys
import pyarrow as pa, pyarrow.parquet as pq
for name, rows, users in [("train", 3000, 60), ("test", 700, 120)]:
    r = random.Random(name)
    user = [r.randrange(users) for _ in range(rows)]
    some = lambda value: None if r.random() < 0.1 else value
    tags = [[f"t{r.randrange(users)}" for _ in range(r.randrange(4))] for _ in range(rows)]
    clicks = [(u % 2) ^ (r.random() < 0.1) for u in user]
    pq.write_table(pa.table({
        "user": user,
        "item": [u * 7 % 31 if name == "train" else r.randrange(40) for u in user],
        "city": pa.array([some(r.choice(["", "?", "Köln", "Rom", f"c{u}"])) for u in user]).dictionary_encode(),
        "tags": pa.array(tags, pa.list_(pa.string())),
        "words": ["|".join(t) for t in tags],
        "worth": ["|".join(str(r.randrange(1, 5)) for _ in t) for t in tags],
        "age": pa.array([some(float(r.randrange(90))) for _ in user], pa.float64()),
        "price": pa.array([some(r.expovariate(0.01) - 20) for _ in user], pa.float32()),
        "click": clicks,
    }), f"{sys.argv[1]}/{name}.parquet", row_group_size=1000)
"#;

const SCHEMA: &str = r#"
dim = 4
missing = ["?"]
[[key]]
columns = ["user", "city"]
table = "shared_{column}"
salt = "s-{column}"
[[key]]
column = "item"
raw = true
[[key]]
column = "tags"
pool = "mean"
max_len = 2
[[key]]
column = "words"
table = "tags"
separator = "|"
weights = "worth"
pool = "sqrtn"
[[bucket]]
column = "age"
boundaries = [10, 18.5, 65]
[[cross]]
columns = ["city", "age_bucket"]
[[number]]
column = "price"
transform = "log"
mean = 2.0
std = 1.5
default = -0.25
[[number]]
column = "age"
[[label]]
column = "click"
"#;

const RANKING: &str =
    "dim = 4\n[[key]]\ncolumn = \"user\"\nraw = true\n[[key]]\ncolumn = \"item\"\n";

/// A Python, and whether it has torch.
struct Python {
    program: String,
    torch: bool,
}

impl Python {
    /// None where neither torch nor the packages of the tests are there.
    fn find() -> Option<Python> {
        let program = std::env::var("DOWNPOUR_TEST_TORCH_PYTHON");
        let program = program.unwrap_or_else(|_| String::from("python3"));
        let torch = run(Command::new(&program).args(["-c", "import torch"])).status.success();
        if !torch && std::env::var_os("DOWNPOUR_TEST_PYTHONPATH").is_none() {
            eprintln!(
                "SKIPPED: {program} has no torch, and DOWNPOUR_TEST_PYTHONPATH names no folder with numpy, safetensors and pyarrow: `cargo xtask test` gets them"
            );
            return None;
        }
        if !torch {
            eprintln!(
                "{program} has no torch: numpy stands in for it, and no TorchScript is scored"
            );
        }
        Some(Python { program, torch })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        let paths = std::env::var("DOWNPOUR_TEST_PYTHONPATH").into_iter();
        let stand_in = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/numpy_torch");
        let stand_in = Some(stand_in.to_owned()).filter(|_| !self.torch);
        command.env("PYTHONPATH", paths.chain(stand_in).collect::<Vec<_>>().join(":"));
        command
    }
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn succeed(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn numbers(text: &str) -> Vec<f32> {
    text.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

#[test]
fn an_exported_model_scores_raw_rows_as_the_worker_does() {
    let Some(python) = Python::find() else { return };
    let cluster = TestCluster::start();
    let folder = cluster.folder.path().display().to_string();
    succeed(python.command().args(["-c", DATA, &folder]));
    cluster.file("schema.toml", SCHEMA);
    cluster.file("ranking.toml", RANKING);
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let module = manifest.join("testdata/two_towers.pt").display().to_string();
    let script_schema = "dim = 4\n[[key]]\ncolumn = \"user\"\n[[key]]\ncolumn = \"tags\"\npool = \"mean\"\n[[number]]\ncolumn = \"age\"\n[[label]]\ncolumn = \"click\"\n";
    cluster.file("script.toml", script_schema);
    let psctl = Path::new(env!("CARGO_BIN_EXE_downpour-worker")).with_file_name("psctl");
    let coordinators = cluster.processes.coordinator_addresses();
    let models = [
        ("lr", "schema", "--lr-table 0.1"),
        ("wide-deep", "schema", "--hidden 16,8"),
        ("deepfm", "schema", "--hidden 16 --row-format bf16"),
        ("script", "script", "--model-file"),
        ("mf-bpr", "ranking", ""),
    ];
    for (model, schema, more) in models {
        if model == "script" && !python.torch {
            continue;
        }
        let common = |verb: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_downpour-worker"));
            command.args([verb, "--coordinators", &coordinators, "--job", model, "--model", model]);
            command.args(["--schema", &format!("{folder}/{schema}.toml"), "--init-std", "0.3"]);
            command.args(["--train", &format!("{folder}/train.parquet"), "--seed", "11"]);
            command.args(more.split_whitespace());
            if model == "script" {
                command.arg(&module);
            }
            command
        };
        let to = format!("file://{folder}/checkpoints");
        let mut train = common("train");
        succeed(train.args(["--shards", "5", "--batch", "100", "--checkpoint-to", &to]));
        let scores = format!("{folder}/{model}.scores");
        let test = format!("{folder}/test.parquet");
        succeed(common("evaluate").args(["--data", &test, "--scores", &scores]));
        let export = format!("{folder}/{model}");
        let mut exporting = Command::new(&psctl);
        exporting.args(["export", model, "--to", &export, "-o", "json"]);
        // One from the live job, the others from what the training saved.
        match model {
            "lr" => exporting.args(["--take", "--coordinators", &coordinators]),
            _ => exporting.args(["--from", &to]),
        };
        let exported: serde_json::Value = serde_json::from_str(&succeed(&mut exporting)).unwrap();
        assert_eq!(exported["features"], true, "{exported}");
        assert!(exported["rows"].as_u64().unwrap() > 60, "{exported}");
        let mut score = python.command();
        score.arg(manifest.join("../python/score.py")).args([&export, &test]);
        if model == "script" {
            score.arg(&module);
        }
        let theirs = numbers(&succeed(&mut score));
        let ours = numbers(&std::fs::read_to_string(&scores).unwrap());
        assert_eq!((ours.len(), theirs.len()), (700, 700), "{model}");
        let furthest = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest <= 1e-5, "{model}: {furthest}");
        let spread = ours.iter().copied().fold(f32::MIN, f32::max)
            - ours.iter().copied().fold(f32::MAX, f32::min);
        assert!(spread > 0.1, "{model}: all rows score alike ({spread})");
    }
}
