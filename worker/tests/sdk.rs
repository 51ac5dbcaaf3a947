//! The SDK on a real cluster: what a step sees, what it pushes, and that a worker alone is repeatable.

mod support;

use std::path::Path;

use downpour::{Adagrad, Adam, Cluster, Error, Features, Init, Job, Paths, Pool, Sgd, Table};
use support::{TestCluster, click_features, clicks, floats};
use tch::nn::{self, Module, VarStore};
use tch::{Device, Kind, Tensor};

fn mlp(vars: &VarStore, input: i64) -> nn::Sequential {
    nn::seq()
        .add(nn::linear(vars.root() / "0", input, 8, nn::LinearConfig::default()))
        .add_fn(Tensor::relu)
        .add(nn::linear(vars.root() / "1", 8, 1, nn::LinearConfig::default()))
}

/// Trains with lookups in every step; returns the log without what depends on time, and all weights.
fn train_once(cluster: &TestCluster, job: &str, data: &str, depth: usize) -> (String, Vec<f32>) {
    let out = cluster.path(job);
    tch::manual_seed(3);
    let job = cluster.cluster.job(job).shards(8).seed(7).open().unwrap();
    let users = job.table("user", Table::dim(4)).unwrap();
    let items = job.table("item", Table::dim(4).optimizer(Adagrad::lr(0.1))).unwrap();
    let vars = VarStore::new(Device::Cpu);
    let net = mlp(&vars, 13);
    job.dense("net", &vars, Adam::lr(1e-2)).unwrap();
    let mut steps = job
        .train(Paths::new([data]), click_features(&users, &items))
        .batch(64)
        .epochs(2)
        .depth(depth)
        .in_order(depth > 1)
        .seed(5)
        .log_every(downpour::Every::Steps(5))
        .out(&out)
        .start()
        .unwrap();
    while let Some(step) = steps.next().unwrap() {
        let drawn: Vec<u64> = (0..step.len() as u64)
            .map(|i| items.key((i * step.clock() % 53).to_string()))
            .collect();
        let drawn = step.lookup(&items, &drawn).unwrap();
        let x = Tensor::cat(&[step.rows("user"), step.rows("items"), step.dense(), drawn], 1);
        let logits = net.forward(&x).squeeze_dim(1);
        let loss = logits.binary_cross_entropy_with_logits::<Tensor>(
            &step.labels(),
            None,
            None,
            tch::Reduction::Mean,
        );
        let mut grads = step.backward(&loss).unwrap();
        grads.clip_norm(1.0);
        grads.push().unwrap();
    }
    let mut weights: Vec<f32> = vars.variables().into_values().flat_map(|t| floats(&t)).collect();
    weights.sort_by(f32::total_cmp);
    let keys: Vec<u64> = (0..100).map(|key| users.key(key.to_string())).collect();
    weights.extend(floats(&job.rows(&users, &keys).unwrap()));
    job.finish().unwrap();
    (without_times(&out), weights)
}

fn without_times(out: &Path) -> String {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        let object = line.as_object_mut().unwrap();
        assert!(object.remove("samples_per_s").is_some() && object.remove("wall_s").is_some());
        line.to_string()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn one_worker_with_a_seed_is_byte_identical_at_any_depth_in_order() {
    let cluster = TestCluster::start();
    let data = cluster.file("clicks.csv", &clicks(1000));
    for depth in [1, 3] {
        let (log, weights) = train_once(&cluster, &format!("a{depth}"), &data, depth);
        let (log_again, weights_again) = train_once(&cluster, &format!("b{depth}"), &data, depth);
        assert_eq!(log, log_again, "depth {depth}");
        let bits = |weights: &[f32]| weights.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&weights), bits(&weights_again), "depth {depth}");
        assert_eq!(log.lines().count(), 7, "32 steps, a line for every 5 and the rest: {log}");
    }
}

/// Gradient descent with rate 1 from zero: after one step a row is minus the number of its occurrences.
fn counting(job: &Job, name: &str) -> downpour::TableHandle {
    job.table(name, Table::dim(2).optimizer(Sgd::lr(1.0)).init(Init::Zeros)).unwrap()
}

#[test]
fn a_step_pushes_each_key_once_and_nothing_that_it_did_not_use() {
    let cluster = TestCluster::start();
    let data = cluster.file("keys.csv", "a,b,c,y\n1,2,9,0\n1,,9,0\n3,1,9,0\n");
    let job = cluster.cluster.job("counts").shards(4).open().unwrap();
    let (shared, unused) = (counting(&job, "shared"), counting(&job, "unused"));
    let vars = VarStore::new(Device::Cpu);
    let used = vars.root().zeros("used", &[2]);
    let _idle = vars.root().zeros("idle", &[2]);
    job.dense("net", &vars, Sgd::lr(1.0)).unwrap();
    let features = Features::new()
        .one("a", &shared)
        .raw()
        .one("b", &shared)
        .raw()
        .one("c", &unused)
        .raw()
        .label("y");
    let mut steps = job.train(Paths::new([data]), features).start().unwrap();
    let step = steps.next().unwrap().expect("a step");
    let looked_up = step.lookup(&shared, &[3, 7, 3]).unwrap();
    assert_eq!(looked_up.size(), [3, 2]);
    assert_eq!(floats(&step.rows("b")), [0.0; 6], "a missing value is a zero vector");
    let sorted = |keys: &[u64]| {
        let mut keys = keys.to_vec();
        keys.sort_unstable();
        keys
    };
    let sum = |tensor: Tensor| tensor.sum(Kind::Float);
    let loss =
        sum(step.rows("a")) + sum(step.rows("b")) + sum(looked_up) + sum(used.shallow_clone());
    let grads = step.backward(&loss).unwrap();
    let names: Vec<_> = grads.inspect().map(|g| (g.name.to_owned(), g.keys.map(sorted))).collect();
    let wanted = [("shared".to_owned(), Some(vec![1, 2, 3, 7])), ("net/used".to_owned(), None)];
    assert_eq!(names, wanted, "equal keys are one row, unused variables are not there");
    grads.push().unwrap();
    assert!(steps.next().unwrap().is_none(), "and the push is acknowledged");
    let rows = floats(&job.rows(&shared, &[1, 2, 3, 7, 8]).unwrap());
    assert_eq!(rows, [-3.0, -3.0, -1.0, -1.0, -3.0, -3.0, -1.0, -1.0, 0.0, 0.0]);
    assert_eq!(floats(&job.rows(&unused, &[9]).unwrap()), [0.0, 0.0]);
    job.finish().unwrap();
}

#[test]
fn gradients_can_be_clipped_and_scaled_and_a_dropped_step_pushes_nothing() {
    let cluster = TestCluster::start();
    let data = cluster.file("keys.csv", "a,y\n1,0\n2,0\n3,0\n");
    let job = cluster.cluster.job("clip").shards(4).open().unwrap();
    let table = counting(&job, "t");
    let features = || Features::new().one("a", &table).raw().label("y");
    let train = || job.train(Paths::new([&data]), features()).batch(1).shuffle_rows(0).start();
    let mut steps = train().unwrap();
    for (clock, wanted_norm) in [(0, 8f64.sqrt()), (1, 0.0), (2, 8f64.sqrt())] {
        let step = steps.next().unwrap().expect("a step");
        assert_eq!(step.clock(), clock);
        if clock == 1 {
            continue;
        }
        let loss = step.rows("a").sum(Kind::Float) * 2.0;
        let mut grads = step.backward(&loss).unwrap();
        assert!((grads.clip_norm(f64::from(clock as u32) + 1.0) - wanted_norm).abs() < 1e-6);
        grads.scale(0.5);
        grads.push().unwrap();
    }
    assert!(steps.next().unwrap().is_none());
    let rows = floats(&job.rows(&table, &[1, 2, 3]).unwrap());
    let clipped = (1.0 / 8f32.sqrt() * 2.0 * 0.5, 0.5f32.sqrt() * 2.0 * 0.5);
    assert!((rows[0] + clipped.0).abs() < 1e-6, "{rows:?}");
    assert_eq!(rows[2..4], [0.0, 0.0], "the second step was dropped");
    assert!(rows[4] < -0.9, "{rows:?}");
    job.finish().unwrap();
}

#[test]
fn the_first_workers_dense_values_win() {
    let cluster = TestCluster::start();
    let weights = |value: f64| {
        let vars = VarStore::new(Device::Cpu);
        let tensor = vars.root().var("w", &[3, 2], nn::Init::Const(value));
        (vars, tensor)
    };
    let jobs = [1.0, 2.0].map(|value| {
        let job = cluster.cluster.job("dense").shards(4).open().unwrap();
        let (vars, tensor) = weights(value);
        job.dense("net", &vars, Adam::lr(0.1)).unwrap();
        assert_eq!(floats(&tensor), [1.0; 6], "the worker that brought {value}");
        job
    });
    let (vars, _) = weights(3.0);
    let other = jobs[0].dense("net", &vars, Adam::lr(0.2)).unwrap_err().to_string();
    assert!(other.contains("net/w") && other.contains("optimizer"), "{other}");
    let (vars, tensor) = weights(4.0);
    jobs[1].existing_dense("net", &vars).unwrap();
    assert_eq!(floats(&tensor), [1.0; 6]);
    jobs.iter().for_each(|job| job.finish().unwrap());
}

#[test]
fn misuse_is_an_error_that_says_what_to_do() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let inside = runtime.block_on(async { Cluster::connect("127.0.0.1:1").err() });
    assert!(matches!(inside, Some(Error::InsideRuntime)));

    let cluster = TestCluster::start();
    let data = cluster.file("keys.csv", "a,y\n1,0\n2,0\n");
    let job = cluster.cluster.job("misuse").shards(4).open().unwrap();
    let table = counting(&job, "t");
    let features = || Features::new().one("a", &table).raw().label("y");
    let mut steps = job.train(Paths::new([&data]), features()).batch(1).start().unwrap();
    let step = steps.next().unwrap().expect("a step");
    let second = steps.next().unwrap_err().to_string();
    assert!(second.contains("push or drop"), "{second}");
    let evaluated = job.evaluate(Paths::new([&data]), |step| Ok(step.labels())).unwrap_err();
    assert!(evaluated.to_string().contains("open"), "{evaluated}");
    let loss = step.backward(&Tensor::from(1.0f32)).unwrap_err().to_string();
    assert!(loss.contains("no variable"), "{loss}");
    let step = steps.next().unwrap().expect("a step");
    let loss = step.rows("a");
    let many = step.backward(&loss).unwrap_err().to_string();
    assert!(many.contains("one number"), "{many}");

    let mut steps = job.train(Paths::new([&data]), features()).depth(2).start().unwrap();
    let step = steps.next().unwrap().expect("a step");
    let over = steps.next().unwrap_err().to_string();
    assert!(over.contains("1 steps are open"), "there is no second batch: {over}");
    drop((step, steps));

    let wide = cluster.cluster.job("misuse").shards(8).open().map(drop).unwrap_err().to_string();
    assert!(wide.contains("shards"), "{wide}");
    let same = cluster.cluster.job("misuse").shards(4).min_in_sync(1).open().unwrap();
    same.finish().unwrap();
    let none = cluster.cluster.job("none").existing().open().map(drop).unwrap_err().to_string();
    assert!(none.contains("none"), "{none}");
    let table = job.table("t", Table::dim(3)).unwrap_err().to_string();
    assert!(table.contains('t') && table.contains("optimizer"), "{table}");
    let missing = Features::new().one("nothing", &counting(&job, "t")).label("y");
    let mut steps = job.train(Paths::new([&data]), missing).start().unwrap();
    let missing = steps.next().unwrap_err().to_string();
    assert!(missing.contains("nothing") && missing.contains("keys.csv"), "{missing}");
    job.finish().unwrap();
}

#[test]
fn padded_features_and_masks_line_up() {
    let cluster = TestCluster::start();
    let data = cluster.file("lists.csv", "l,y\n4|5,0\n,1\n6|4|5,1\n");
    let job = cluster.cluster.job("padded").shards(4).open().unwrap();
    let init = Init::Constant(1.0);
    let table = job.table("t", Table::dim(2).init(init)).unwrap();
    let features =
        Features::new().bag("l", &table, Pool::Padded).separated_by("|").max_len(2).label("y");
    let evaluation = job.evaluation(Paths::new([data]), features);
    evaluation
        .for_each(|step| {
            assert_eq!(floats(&step.mask("l")), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]);
            let rows = step.rows("l");
            assert_eq!(rows.size(), [3, 2, 2]);
            assert_eq!(
                floats(&rows.sum_dim_intlist(2, false, Kind::Float)),
                [2.0, 2.0, 0.0, 0.0, 2.0, 2.0]
            );
            Ok(())
        })
        .unwrap();
    job.finish().unwrap();
}

#[test]
fn a_loop_that_is_left_early_keeps_what_it_pushed() {
    let cluster = TestCluster::start();
    let data = cluster.file("keys.csv", "a,y\n1,0\n1,0\n1,0\n1,0\n1,0\n");
    let job = cluster.cluster.job("early").shards(4).open().unwrap();
    let table = counting(&job, "t");
    let features = Features::new().one("a", &table).raw().label("y");
    let mut steps = job.train(Paths::new([data]), features).batch(1).depth(3).start().unwrap();
    for _ in 0..3 {
        let step = steps.next().unwrap().expect("a step");
        let loss = step.rows("a").sum(Kind::Float);
        step.backward(&loss).unwrap().push().unwrap();
    }
    drop(steps);
    assert_eq!(floats(&job.rows(&table, &[1]).unwrap()), [-3.0, -3.0]);
    job.finish().unwrap();
}

#[test]
fn only_a_push_creates_rows() {
    let cluster = TestCluster::start();
    let (train, test) = ("a,y\n1,0\n,1\n2,0\n1,1\n", "a,y\n1,0\n77,1\n78,0\n");
    let (train, test) = (cluster.file("train.csv", train), cluster.file("test.csv", test));
    let more = cluster.file("more.csv", "a,y\n3,0\n");
    let job = cluster.cluster.job("rows").shards(4).open().unwrap();
    let table = counting(&job, "t");
    let features = || Features::new().one("a", &table).label("y");
    let train_on = |file: &str| {
        let mut steps = job.train(Paths::new([file]), features()).start().unwrap();
        while let Some(step) = steps.next().unwrap() {
            let loss = step.rows("a").sum(Kind::Float);
            step.backward(&loss).unwrap().push().unwrap();
        }
    };
    train_on(&train);
    assert_eq!(cluster.rows("rows", 2), 2, "the missing value has no row");
    let report = job.evaluate(Paths::new([test]), |step| Ok(step.rows("a").select(1, 0))).unwrap();
    assert_eq!(report.samples, 3);
    let _ = job.rows(&table, &[91, 92, 93]).unwrap();
    train_on(&more);
    assert_eq!(cluster.rows("rows", 3), 3, "neither evaluation nor looking made rows");
    job.finish().unwrap();
}

#[test]
fn handles_may_be_shared_between_threads() {
    fn shared<T: Clone + Send + Sync>() {}
    shared::<Cluster>();
    shared::<Job>();
    shared::<downpour::TableHandle>();
}
