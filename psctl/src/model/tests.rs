use downpour_core::consistency::Mode;
use downpour_core::id::VariableId;
use serde_json::{Value, json};

use super::*;

fn server(node: u32) -> v1::ServerRef {
    v1::ServerRef { node, incarnation: u64::from(node) + 10 }
}

fn route(shard: u32, primary: Option<u32>, in_sync: &[u32]) -> v1::ShardRoute {
    v1::ShardRoute {
        shard,
        epoch: 2,
        set_version: 3,
        primary: primary.map(server),
        in_sync: in_sync.iter().map(|node| server(*node)).collect(),
        lost: primary.is_none(),
        joining: (primary.is_some() && in_sync.len() < 2).then(|| server(1)),
        moving: (primary == Some(2) && in_sync.len() < 2)
            .then(|| v1::ShardMove { from: Some(server(2)), to: Some(server(1)) }),
    }
}

fn node(node: u32, name: &str, alive: bool) -> v1::NodeView {
    let (name, address) = (name.to_owned(), format!("127.0.0.1:{node}"));
    v1::NodeView {
        node,
        name,
        incarnation: u64::from(node) + 10,
        address,
        zone: String::new(),
        alive,
        admission: 0,
    }
}

/// One job of three shards on two servers: one whole, one short, one lost.
fn reply() -> v1::GetClusterReply {
    let spec = v1::JobSpec { name: "ctr".into(), shards: 3, replicas: 2, min_in_sync: 1, seed: 7 };
    let shape = v1::variable_spec::Shape::Table(v1::TableSpec {
        dim: 16,
        init: None,
        group: "g".into(),
        row_format: 0,
    });
    let adam = v1::Adam { learning_rate: 0.001, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let kind = Some(v1::optimizer::Kind::Adam(adam));
    let optimizer = v1::Optimizer { kind, ..Default::default() };
    let item =
        v1::VariableSpec { name: "item".into(), optimizer: Some(optimizer), shape: Some(shape) };
    let modes = Consistency {
        variables: [(VariableId(1), Mode::Ssp { bound: 4 })].into(),
        ..Consistency::hybrid(1)
    };
    let view = v1::JobView {
        job: 1,
        spec: Some(spec),
        version: 9,
        variables: vec![v1::Variable { id: 1, spec: Some(item) }],
        shards: vec![route(0, Some(1), &[1, 2]), route(1, Some(2), &[2]), route(2, None, &[])],
        sessions: None,
        consistency: Some((&modes).into()),
        ..v1::JobView::default()
    };
    let report = |shard, rows| v1::ShardReport {
        job: 1,
        shard,
        last_lsn: (2 << 40) | 5,
        rows,
        bytes: rows * 100,
        rows_per_s: rows as f64,
        stale_clocks: (shard == 1).then_some(1.5),
        stale_records: (shard == 1).then_some(4.0),
        ..v1::ShardReport::default()
    };
    let rolled_back = vec![v1::RolledBackPushes {
        shard: 1,
        epoch: 2,
        first: 5,
        last: 6,
        first_clock: Some(2),
        last_clock: None,
    }];
    let progress = v1::WorkerProgress {
        clock: 3,
        samples: 300,
        samples_per_s: 12.5,
        loss: f64::NAN,
        rolled_back,
    };
    let session = v1::SessionView {
        session: 4,
        name: "worker-0".into(),
        kind: v1::SessionKind::Worker.into(),
        progress: Some(progress),
        tasks_held: 3,
        tasks_done: 40,
    };
    let plan = v1::LedgerPlan { tasks: 64, passes: 2, ..Default::default() };
    let ledger = v1::LedgerView {
        plan: Some(plan),
        pass: 1,
        done: 40,
        leased: 3,
        pending: 21,
        samples: 1040,
        ..Default::default()
    };
    v1::GetClusterReply {
        version: 20,
        members: vec![v1::MemberView {
            id: 1,
            address: "127.0.0.1:7070".into(),
            leader: true,
            term: 4,
            matched: 20,
            learner: false,
            heard: true,
        }],
        nodes: vec![node(2, "ps-1", false), node(1, "ps-0", true)],
        jobs: vec![v1::JobStatus {
            view: Some(view),
            labels: [("owner".to_owned(), "ads".to_owned())].into(),
            sessions: vec![session],
            reports: vec![report(0, 10), report(1, 20)],
            ledger: Some(ledger),
            ..v1::JobStatus::default()
        }],
        ..v1::GetClusterReply::default()
    }
}

fn cluster() -> Cluster {
    reply().into()
}

fn json(value: impl Serialize) -> Value {
    serde_json::to_value(value).expect("JSON")
}

#[test]
fn the_json_of_a_cluster_is_a_promise() {
    let cluster = cluster();
    let node = |name: &str, number: u32, alive: bool, primaries: u64, backups: u64, rows: u64| {
        json!({
            "name": name, "node": number, "incarnation": number + 10,
            "address": format!("127.0.0.1:{number}"), "zone": "", "alive": alive, "admission": "open",
            "primaries": primaries, "backups": backups, "rows": rows, "bytes": rows * 100, "rows_per_s": rows as f64,
            "pull_rows_per_s": 0.0, "log_bytes_per_s": 0.0, "memory_bytes": 0, "memory_limit": 0, "capacity_bytes": 0,
            "pushed_bytes_per_s": 0.0, "pulled_bytes_per_s": 0.0,
            "push_p50_s": null, "push_p99_s": null, "pull_p50_s": null, "pull_p99_s": null,
        })
    };
    assert_eq!(
        json(&cluster),
        json!({
            "version": 20,
            "coordinators": [
                {"id": 1, "address": "127.0.0.1:7070", "leader": true, "term": 4, "matched": 20, "learner": false, "heard": true},
            ],
            "nodes": [node("ps-0", 1, true, 1, 0, 10), node("ps-1", 2, false, 1, 1, 20)],
            "jobs": [{
                "name": "ctr", "job": 1, "shards": 3, "replicas": 2, "min_in_sync": 1, "seed": 7,
                "version": 9, "paused": false, "consistency": "hybrid(1), item ssp(4)",
                "stale_clocks": 1.5, "stale_records": 4.0, "lost_shards": 1, "short_shards": 1, "sessions": 1, "rows": 30,
                "bytes": 3000, "labels": {"owner": "ads"},
                "variables": [{
                    "id": 1, "name": "item", "kind": "table", "shape": [16], "group": "g",
                    "optimizer": "adam(lr 0.001)",
                }],
                "data": {
                    "pass": 2, "passes": 2, "tasks": 64, "done": 40, "leased": 3, "pending": 21,
                    "samples": 1040, "over": false,
                },
            }],
        })
    );
    assert_eq!(
        json(&cluster.shards[1]),
        json!({
            "job": "ctr", "shard": 1, "epoch": 2, "set_version": 3, "primary": "ps-1",
            "in_sync": ["ps-1"], "joining": "ps-0", "moving": {"from": "ps-1", "to": "ps-0", "step": "copying"}, "replicas": 2, "lost": false, "rows": 20, "bytes": 2000,
            "last_lsn": 2_199_023_255_557_u64, "rows_per_s": 20.0, "pull_rows_per_s": 0.0, "log_bytes_per_s": 0.0, "set_back": null,
            "stale_clocks": 1.5, "stale_records": 4.0,
        })
    );
    assert_eq!(
        json(&cluster.workers),
        json!([{
            "job": "ctr", "session": 4, "name": "worker-0", "kind": "worker", "clock": 3,
            "samples": 300, "samples_per_s": 12.5, "paused": false, "loss": null,
            "rolled_back": [{
                "shard": 1, "epoch": 2, "first": 5, "last": 6, "first_clock": 2, "last_clock": null,
            }],
            "tasks_held": 3, "tasks_done": 40,
        }])
    );
}

#[test]
fn a_worker_of_a_paused_job_trains_nothing() {
    let mut reply = reply();
    let view = reply.jobs[0].view.as_mut().expect("a job");
    view.paused = true;
    let worker = &Cluster::from(reply).workers[0];
    assert_eq!((worker.paused, worker.samples_per_s), (true, 0.0));
    assert!(worker.cells().contains(&"paused".to_owned()));
}

#[test]
fn every_problem_of_a_cluster_is_told() {
    assert_eq!(
        cluster().problems(),
        [
            "node ps-1 is dead",
            "job ctr: 1 of 3 shards are lost",
            "job ctr: 1 of 3 shards have fewer than 2 in-sync members",
        ]
    );
}

#[test]
fn a_reply_with_nothing_in_it_is_an_empty_cluster() {
    let empty = v1::GetClusterReply { jobs: vec![v1::JobStatus::default()], ..Default::default() };
    let cluster = Cluster::from(empty);
    assert!(cluster.jobs.is_empty() && cluster.shards.is_empty());
    assert_eq!(cluster.problems(), ["no coordinator leads"]);
}
