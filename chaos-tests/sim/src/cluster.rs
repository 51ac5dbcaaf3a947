//! The hosts: what `downpour-coordinator` and `downpour-ps` run after they have read their options.

use std::rc::Rc;

use downpour_client::Coordinators;
use downpour_coordinator::raft::mem_disk::{MemDisk, Platters};
use downpour_core::spec::JobSpec;
use downpour_node::process::Node;
use downpour_proto::net::TcpListener;
use downpour_psctl::probe;
use turmoil::Sim;

use crate::shared::{Setting, Shared};

pub(crate) const COORDINATORS: [&str; 3] = ["c1", "c2", "c3"];
pub(crate) const SERVERS: [&str; 3] = ["s1", "s2", "s3"];
/// Clients of the probe, beside a trainer, a zombie and the monitor.
pub(crate) const PROBES: [&str; 2] = ["p0", "p1"];
pub(crate) const OTHERS: [&str; 2] = ["trainer", "zombie"];
pub(crate) const SHARDS: u32 = 4;
pub(crate) const CHECKPOINTS: &str = "s3://simulated/checkpoints";

const COORDINATOR_PORT: u16 = 7070;
const SERVER_PORT: u16 = 7170;
/// Members compare what they have this often: in a minute of simulated time each shall do so several times.
const CHECK_INTERVAL_MS: u64 = 700;
/// As short as may be: shards that are set back wait for it.
const LEASE_MS: u64 = 3000;
const RESTORE_AFTER_MS: u64 = 2500;

pub(crate) fn job(shared: &Shared) -> JobSpec {
    let min_in_sync = shared.setting.min_in_sync;
    JobSpec { min_in_sync, ..probe::job("probe", SHARDS, shared.replicas) }
}

pub(crate) fn coordinators() -> Coordinators {
    Coordinators::new(addresses()).expect("there are addresses")
}

fn addresses() -> Vec<String> {
    COORDINATORS.map(|name| format!("{name}:{COORDINATOR_PORT}")).into()
}

pub(crate) fn start(sim: &mut Sim<'_>, shared: &Rc<Shared>) {
    for (id, name) in (1..).zip(COORDINATORS) {
        let platters = Platters::default();
        let shared = Rc::clone(shared);
        sim.host(name, move || {
            let down = shared.down.borrow().contains(name);
            let platters = platters.clone();
            let setting = shared.setting;
            async move {
                if !down {
                    coordinator(id, name, platters, setting).await?;
                }
                std::future::pending().await
            }
        });
    }
    for name in SERVERS {
        let shared = Rc::clone(shared);
        sim.host(name, move || {
            let down = shared.down.borrow().contains(name);
            let node = Node::default();
            shared.registries.borrow_mut().insert(name.into(), node.registry.clone());
            async move {
                if !down {
                    server(name, node).await?;
                }
                std::future::pending().await
            }
        });
    }
}

async fn coordinator(
    id: u64,
    name: &str,
    platters: Platters,
    setting: Setting,
) -> anyhow::Result<()> {
    let mut config = downpour_coordinator::Config { id, lease_ms: LEASE_MS, ..Default::default() };
    if setting.sets_back {
        config.restore_after_ms = RESTORE_AFTER_MS;
    }
    config.peers = (1..).zip(addresses()).map(|(id, address)| format!("{id}={address}")).collect();
    config.common.advertise = Some(format!("{name}:{COORDINATOR_PORT}"));
    // Small enough that members take snapshots, and that those which were away get one.
    config.compact_entries = 64;
    let listener = TcpListener::bind(("0.0.0.0", COORDINATOR_PORT)).await?;
    let open = move || Ok(MemDisk::new(&platters));
    downpour_coordinator::server::run_on(open, config, listener, Node::default()).await
}

async fn server(name: &str, node: Node) -> anyhow::Result<()> {
    let mut config = downpour_ps::Config {
        name: name.into(),
        coordinators: addresses(),
        data_threads: 2,
        check_interval_ms: CHECK_INTERVAL_MS,
        ..Default::default()
    };
    config.common.advertise = Some(format!("{name}:{SERVER_PORT}"));
    let listener = TcpListener::bind(("0.0.0.0", SERVER_PORT)).await?;
    downpour_ps::run(config, listener, node).await
}
