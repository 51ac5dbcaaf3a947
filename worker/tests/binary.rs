//! The worker binary on a real cluster: train, evaluate, stop, and what it says when something is wrong.

mod support;

use std::process::{Command, Output};
use std::time::Duration;

use support::{SCHEMA, TestCluster, clicks};

impl TestCluster {
    fn worker(&self, arguments: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_downpour-worker"));
        command.args(self.arguments(arguments)).output().expect("the binary runs")
    }

    /// `@name` stands for a file of the test's folder, `@cluster` for the coordinators.
    fn arguments(&self, arguments: &str) -> Vec<String> {
        let replace = |word: &str| match word.strip_prefix('@') {
            Some("cluster") => self.processes.coordinator_addresses(),
            Some(file) => self.path(file).display().to_string(),
            None => word.to_owned(),
        };
        arguments.split_whitespace().map(replace).collect()
    }

    fn with_clicks() -> Self {
        let cluster = Self::start();
        cluster.file("schema.toml", SCHEMA);
        cluster.file("train.csv", &clicks(4000));
        cluster.file("test.csv", &clicks(500));
        cluster
    }
}

fn report(output: &Output) -> serde_json::Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
}

fn complaint(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    text.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn every_model_trains_and_evaluates_to_the_same_report() {
    let cluster = TestCluster::with_clicks();
    for (model, more) in [
        ("lr", "--lr-table 0.3"),
        ("wide-deep", "--hidden 16 --dropout 0.1"),
        ("deepfm", "--hidden 16,8 --l2 0.0001 --clip-norm 5"),
    ] {
        let common = format!(
            "--coordinators @cluster --job {model} --model {model} --schema @schema.toml --hidden 16"
        );
        let common =
            if more.contains("hidden") { common.replace("--hidden 16", "") } else { common };
        let trained = cluster.worker(&format!(
            "train {common} {more} --train @train.csv --test @test.csv --batch 100 --epochs 3 --lr-dense 0.01 --shards 8 \
             --out @{model} --eval-every 50steps --eval-data @test.csv"
        ));
        let at_the_end = report(&trained);
        assert!(at_the_end["auc"].as_f64().unwrap() > 0.8, "{model}: {at_the_end}");
        let evaluated =
            report(&cluster.worker(&format!(
                "evaluate {common} {more} --data @test.csv --report @report.json"
            )));
        for metric in ["auc", "logloss", "accuracy", "samples"] {
            assert_eq!(evaluated[metric], at_the_end[metric], "{model}, {metric}");
        }
        let beside =
            std::fs::read_to_string(cluster.path(model).join("evaluations.jsonl")).unwrap();
        assert_eq!(beside.lines().count(), 2, "120 steps, one for every 50: {beside}");
        let written = std::fs::read_to_string(cluster.path("report.json")).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), evaluated);
    }
}

#[test]
fn a_torchscript_module_trains() {
    let cluster = TestCluster::with_clicks();
    let module = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/two_towers.pt");
    let trained = cluster.worker(&format!(
        "train --coordinators @cluster --job script --model-file {module} --schema @schema.toml --train @train.csv \
         --test @test.csv --batch 100 --epochs 3 --lr-dense 0.01 --lr-table 0.1 --shards 8"
    ));
    let trained = report(&trained);
    assert!(trained["auc"].as_f64().unwrap() > 0.75, "{trained}");
}

#[test]
fn ranking_learns_what_users_had() {
    let cluster = TestCluster::start();
    cluster
        .file("schema.toml", "dim = 8\n[[key]]\ncolumn = \"user\"\n[[key]]\ncolumn = \"item\"\n");
    // Users like items of their own remainder by 4; of 40 such items each has 9 in training and 1 in the test.
    let (mut train, mut test) = ("user,item\n".to_owned(), "user,item\n".to_owned());
    for user in 0..80u64 {
        for n in 0..10 {
            let item = user % 4 + 4 * ((user * 7 + n * 11) % 40);
            let line = format!("{user},{item}\n");
            if n == 3 { test.push_str(&line) } else { train.push_str(&line) }
        }
    }
    cluster.file("train.csv", &train);
    cluster.file("test.csv", &test);
    let trained = cluster.worker(
        "train --coordinators @cluster --job rank --model mf-bpr --schema @schema.toml --train @train.csv --test @test.csv \
         --batch 90 --epochs 25 --lr-table 0.3 --init-std 0.1 --shards 8",
    );
    let trained = report(&trained);
    assert_eq!(trained["users"], 80);
    // By chance 10 of 151 would be 0.07; of the 31 that are left of the right remainder, 0.32.
    assert!(trained["hr@10"].as_f64().unwrap() > 0.2, "{trained}");
}

#[test]
fn a_number_that_is_not_finite_names_its_rows_and_stops_or_skips() {
    let cluster = TestCluster::with_clicks();
    let mut lines: Vec<String> = clicks(1000).lines().map(str::to_owned).collect();
    lines[700] = "3,1,3e38,1".into();
    cluster.file("poisoned.csv", &lines.join("\n"));
    // Two hidden layers multiply the number beyond what f32 holds.
    let train = "train --coordinators @cluster --model wide-deep --schema @schema.toml --train @poisoned.csv --batch 100 \
                 --shuffle-rows 0 --shards 4 --hidden 64,64 --lr-dense 0.5 --optimizer-dense sgd";
    let stopped = complaint(&cluster.worker(&format!("{train} --job stop --out @stop")));
    assert!(stopped.contains("poisoned.csv") && stopped.contains("rows 602 to 701"), "{stopped}");
    let saved = std::fs::read_dir(cluster.path("stop")).unwrap();
    let saved = saved.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(saved.into_iter().any(|name| name.starts_with("nonfinite-")), "the batch is saved");
    let skipped = cluster.worker(&format!("{train} --job skip --out @skip --on-nonfinite skip"));
    assert!(skipped.status.success(), "{}", String::from_utf8_lossy(&skipped.stderr));
    let log = std::fs::read_to_string(cluster.path("skip").join("metrics.jsonl")).unwrap();
    assert!(log.contains("\"skipped_steps\":1"), "{log}");

    let spoilt = "train --coordinators @cluster --job spoilt --model deepfm --hidden 16 --schema @schema.toml --train @train.csv --batch 10 \
                  --shards 4 --optimizer-dense sgd --lr-dense 1e30 --on-nonfinite skip --out @spoilt";
    assert!(
        complaint(&cluster.worker(spoilt)).contains("train.csv"),
        "a run that learns nothing fails"
    );
    assert_eq!(
        std::fs::read_dir(cluster.path("spoilt")).unwrap().count(),
        11,
        "ten batches, metrics"
    );
}

#[test]
fn sigterm_ends_a_worker_cleanly() {
    stop_after_some_steps("").unwrap();
}

#[test]
fn a_worker_that_was_stopped_has_the_status_that_it_was_told() {
    let ended = stop_after_some_steps("--stopped-status 75").unwrap_err();
    assert!(ended.to_string().contains("75"), "{ended}");
}

fn stop_after_some_steps(more: &str) -> Result<(), downpour_psctl::local::Error> {
    let cluster = TestCluster::with_clicks();
    let arguments = cluster.arguments(&format!(
        "train --coordinators @cluster --job long --model lr --schema @schema.toml --train @train.csv --batch 16 \
         --epochs 100000 --shards 4 --out @out --log-every 5steps {more}",
    ));
    let mut worker = cluster.processes.run("worker", "downpour-worker", arguments).unwrap();
    let log = cluster.path("out").join("metrics.jsonl");
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string(&log).unwrap_or_default().lines().count() < 2 {
        assert!(std::time::Instant::now() < deadline, "no steps: {}", worker.tail());
        std::thread::sleep(Duration::from_millis(20));
    }
    worker.ask_to_stop().unwrap();
    let ended = worker.wait_success(Duration::from_secs(30));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(
        log.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()),
        "{log}"
    );
    ended
}

#[test]
fn complaints_name_the_flag_the_file_and_the_column() {
    let cluster = TestCluster::with_clicks();
    cluster.file("nan.csv", "user,items,x,click\n1,2,0.5,1\n1,2,0.5,nan\n");
    cluster.file("wrong.toml", &SCHEMA.replace("\"user\"", "\"usr\""));
    let base = "--coordinators @cluster --job bad --shards 4";
    for (arguments, words) in [
        (format!("train {base} --schema @schema.toml --train @train.csv"), vec!["--model"]),
        (format!("train {base} --model lr --train @train.csv"), vec!["--schema"]),
        (format!("train {base} --model what --schema @schema.toml --train @train.csv"), vec!["what", "deepfm"]),
        (format!("train {base} --model lr --schema @schema.toml --train @none.csv"), vec!["none.csv"]),
        (format!("train {base} --model lr --schema @schema.toml --train @nan.csv"), vec!["nan.csv", "3", "click"]),
        (format!("train {base} --model lr --schema @wrong.toml --train @train.csv"), vec!["usr", "user", "train.csv"]),
        (format!("train {base} --model lr --schema @schema.toml --train @train.csv --device cuda:x"), vec!["--device", "cuda:x"]),
        (format!("train {base} --model lr --schema @schema.toml --train @train.csv --log-every often"), vec!["--log-every"]),
        (format!("train {base} --model deepfm --schema @schema.toml --train @train.csv --hidden 8,0"), vec!["--hidden", "0"]),
        (format!("train {base} --model lr --schema @schema.toml --train @train.csv --clip-norm nan"), vec!["--clip-norm"]),
        (format!("train {base} --model lr --schema @schema.toml --train @train.csv --config @schema.toml"), vec!["--config", "dim"]),
        ("evaluate --coordinators @cluster --job none --model lr --schema @schema.toml --data @test.csv".into(), vec!["none"]),
        (format!("train {base} --model script --model-file @schema.toml --schema @schema.toml --train @train.csv"), vec!["--model-file"]),
    ] {
        let text = cluster.worker(&arguments);
        assert_eq!(text.status.code(), Some(1), "{arguments}");
        let text = String::from_utf8_lossy(&text.stderr).into_owned();
        assert!(words.iter().all(|word| text.contains(word)), "{arguments}: {text}");
    }
    let differs = "train --coordinators @cluster --job other --model lr --schema @schema.toml --train @train.csv --batch 500";
    assert!(cluster.worker(differs).status.success());
    let differs = complaint(&cluster.worker(&format!("{differs} --lr-table 0.9")));
    assert!(differs.contains("optimizer") && differs.contains("0.9"), "{differs}");
}

#[test]
fn the_example_of_a_custom_loop_learns() {
    let cluster = TestCluster::start();
    let example = std::path::Path::new(env!("CARGO_BIN_EXE_downpour-worker"))
        .with_file_name("examples")
        .join("custom_loop");
    let output = Command::new(example)
        .arg(cluster.processes.coordinator_addresses())
        .output()
        .expect("cargo builds examples for tests");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let auc: f64 = text.split([' ', ',']).nth(1).and_then(|word| word.parse().ok()).unwrap();
    assert!(auc > 0.75, "{text}");
}

#[test]
fn evaluations_without_gain_end_the_training() {
    let cluster = TestCluster::with_clicks();
    cluster.file(
        "run.toml",
        "model = \"lr\"\nbatch = 100\nepochs = 100\nlr_table = 1e-20\nlr_dense = 1e-20\n",
    );
    let trained = cluster.worker(
        "train --config @run.toml --coordinators @cluster --job patient --schema @schema.toml --train @train.csv --shards 4 \
         --out @out --eval-every 20steps --eval-data @test.csv --patience 2",
    );
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    let evaluations =
        std::fs::read_to_string(cluster.path("out").join("evaluations.jsonl")).unwrap();
    let clocks: Vec<(u64, bool)> = evaluations
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| (line["clock"].as_u64().unwrap(), line["best"].as_bool().unwrap()))
        .collect();
    assert_eq!(clocks, [(20, true), (40, false), (60, false)]);
}
