//! The pipeline over a slow network: what is under way at once, and that the rows are right whatever overtakes what.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use downpour::{Features, Init, Paths, Sgd, Table};
use downpour_chaos_tests::proxy::Proxy;
use support::{TestCluster, floats};
use tch::Kind;

const DEPTH: usize = 8;

/// Trains 40 steps of 3 keys, 10 of which each occur in every step, while answers are held until `held` requests are under way. Returns how
/// many were under way at most.
fn train(cluster: &TestCluster, proxy: &Proxy, name: &str, in_order: bool, held: usize) -> usize {
    let keys: Vec<u64> = (0..120).map(|i| i * i % 10).collect();
    let lines: String = keys.iter().map(|key| format!("{key},0\n")).collect();
    let data = cluster.file("keys.csv", &format!("a,y\n{lines}"));
    let job = cluster.cluster.job(name).shards(4).open().unwrap();
    let table = Table::dim(2).optimizer(Sgd::lr(1.0)).init(Init::Zeros);
    let table = job.table("t", table).unwrap();
    let features = Features::new().one("a", &table).raw().label("y");
    proxy.hold_answers_until(held);
    let train = job.train(Paths::new([data]), features).batch(3).depth(DEPTH).in_order(in_order);
    let mut steps = train.start().unwrap();
    while let Some(step) = steps.next().unwrap() {
        let loss = step.rows("a").sum(Kind::Float);
        step.backward(&loss).unwrap().push().unwrap();
    }
    let most = proxy.most_under_way();
    let mut wanted = BTreeMap::new();
    for key in keys {
        *wanted.entry(key).or_insert(0.0) -= 1.0;
    }
    let unique: Vec<u64> = wanted.keys().copied().collect();
    let rows = floats(&job.rows(&table, &unique).unwrap());
    let wanted: Vec<f32> = wanted.values().flat_map(|&value| [value; 2]).collect();
    assert_eq!(rows, wanted, "gradient descent with rate 1: minus the number of occurrences");
    job.finish().unwrap();
    most
}

#[test]
fn steps_overlap_on_a_slow_network_unless_their_order_is_kept() {
    let proxy = Proxy::start("127.0.0.1:0", Duration::from_millis(2)).unwrap();
    let cluster = TestCluster::start_with(1, &["--advertise", &proxy.address().to_string()]);
    proxy.forward_to(cluster.processes.servers[0].address());
    // Nothing is answered before the pulls of all open steps are there, so the test ends only when they overlap.
    assert!(train(&cluster, &proxy, "overlapping", false, DEPTH) >= DEPTH);
    // One pull or push at a time, which is a message on each lane.
    const LANES: usize = 2;
    assert!(train(&cluster, &proxy, "in-order", true, 1) <= LANES);
}
