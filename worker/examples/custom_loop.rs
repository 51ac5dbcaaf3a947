//! A training loop of one's own: two tables, a bag, numbers, a perceptron, negatives that are drawn in the step.
//!
//! On a running cluster (`psctl local`, or any other):
//!
//!     cargo run -p downpour --example custom_loop -- 127.0.0.1:7070
//!
//! It makes a small file of clicks to train on: users like items whose number has their own parity.

use std::fmt::Write as _;

use downpour::{Adagrad, Adam, Cluster, Features, Paths, Pool, Result, Step, Table};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};

fn main() -> Result<()> {
    let coordinators = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7070".into());
    let folder = std::env::temp_dir().join(format!("downpour-custom-loop-{}", std::process::id()));
    let (train, test) = (folder.join("train.csv"), folder.join("test.csv"));
    let written = std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&train, clicks(0..10_000)))
        .and_then(|()| std::fs::write(&test, clicks(10_000..12_000)));
    written.expect("the temporary folder can be written");

    let cluster = Cluster::connect(&coordinators)?; // blocking: the runtime is inside
    let job = cluster.job("custom-loop").open()?; // create, or join and check that the variables agree
    let items = job.table("item", Table::dim(16).optimizer(Adagrad::lr(0.05)))?;
    let users = job.table("user", Table::dim(32).optimizer(Adagrad::lr(0.05)))?;
    let vars = nn::VarStore::new(Device::Cpu);
    let net = mlp(&vars.root());
    job.dense("net", &vars, Adam::lr(1e-3))?; // the first worker's values win, others pull

    let features = Features::new() // which column feeds which table: what prefetch needs
        .one("user_id", &users)
        .one("item_id", &items)
        .bag("last_items", &items, Pool::Mean) // a list on a shared table; empty = zeros
        .separated_by("|")
        .dense(["price", "hour"])
        .label("click")
        .weight("w");
    let paths = Paths::new([train.display().to_string()]);
    let mut steps = job.train(paths, features).batch(256).epochs(6).depth(2).start()?;

    while let Some(step) = steps.next()? {
        // Keys that are known only now go the same way: their gradients join those of the features.
        let drawn: Vec<u64> =
            (0..64).map(|i| items.key(((step.clock() * 64 + i) * 7 % 500).to_string())).collect();
        let drawn = step.lookup(&items, &drawn)?;
        // Something to keep items apart from: drawn ones should not look like those that were shown.
        let likeness = step.rows("item_id").matmul(&drawn.tr()).square().mean(Kind::Float);
        let loss = cross_entropy(&predict(&net, &step), &step) + likeness * 0.1;
        let mut grads = step.backward(&loss)?; // consumes the step, on this thread
        grads.clip_norm(10.0);
        grads.push()?; // queued, bounded; errors surface in next()
    }
    let report =
        job.evaluate(Paths::new([test.display().to_string()]), |step| Ok(predict(&net, step)))?;
    println!(
        "AUC {:.4}, log loss {:.4}",
        report.auc.unwrap_or(f64::NAN),
        report.logloss.unwrap_or(f64::NAN)
    );
    // A leftover file is no reason to fail.
    _ = std::fs::remove_dir_all(&folder);
    job.finish()
}

fn mlp(root: &nn::Path) -> nn::Sequential {
    nn::seq()
        .add(nn::linear(root / "hidden", 32 + 16 + 16 + 2, 64, nn::LinearConfig::default()))
        .add_fn(Tensor::relu)
        .add(nn::linear(root / "output", 64, 1, nn::LinearConfig::default()))
}

fn predict(net: &nn::Sequential, step: &Step) -> Tensor {
    let rows = ["user_id", "item_id", "last_items"].map(|feature| step.rows(feature));
    let x = Tensor::cat(&[&rows[0], &rows[1], &rows[2], &step.dense()], 1);
    net.forward(&x).squeeze_dim(1)
}

fn cross_entropy(logits: &Tensor, step: &Step) -> Tensor {
    let (labels, weights) = (step.labels(), Some(step.weights()));
    logits.binary_cross_entropy_with_logits(&labels, weights, None, tch::Reduction::Mean)
}

fn clicks(rows: std::ops::Range<u64>) -> String {
    let mut text = String::from("user_id,item_id,last_items,price,hour,click,w\n");
    for i in rows {
        // SplitMix64's multiplier mixes the row numbers well enough for toy data.
        let random = |n: u64| (i * 8 + n).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33;
        let (user, item, price, hour) = (random(0) % 300, random(1) % 500, random(2) % 100, i % 24);
        let last: Vec<String> = (3..3 + i % 4).map(|n| (random(n) % 500).to_string()).collect();
        let click = u64::from(user % 2 == item % 2) ^ u64::from(random(7) % 10 == 0);
        let (last, price, hour) = (last.join("|"), price as f64 / 100.0, hour as f64 / 24.0);
        writeln!(text, "{user},{item},{last},{price:.2},{hour:.2},{click},1")
            .expect("writing to a string");
    }
    text
}
