//! A cluster of the real binaries, and what a test asks it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use downpour_client::Coordinators;
use downpour_core::id::{NodeId, ShardId};
use downpour_psctl::local::{Interrupt, LocalCluster, Options};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::disk::SmallDisk;
use crate::network::Network;
use crate::proxy::Proxy;
use downpour_psctl::probe::{Probe, wait_for};

const COORDINATORS: usize = 3;
/// Often, so that a run has some.
const SNAPSHOTS: [&str; 2] = ["--compact-entries", "64"];

/// How long anything may take that a test waits for.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// What a cluster is to be like.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Parameter servers.
    pub servers: usize,
    /// Of these, how many are not started yet.
    pub servers_later: usize,
    /// Everything goes through proxies, so that the network can be disturbed.
    pub proxied: bool,
    /// Each coordinator has a small disk of its own, which can be filled; needs the right to mount.
    pub small_disks: bool,
    /// For coordinators, beside what they always get.
    pub coordinator_args: Vec<String>,
    /// Ends every wait early.
    pub interrupt: Interrupt,
}

/// A running cluster, a runtime for clients of it, and a handle to its coordinators.
pub struct TestCluster {
    /// The processes.
    pub processes: LocalCluster,
    /// Where clients of this process run.
    pub runtime: Runtime,
    /// The control plane.
    pub coordinators: Coordinators,
    /// What everything goes through, if it is proxied.
    pub network: Option<Network>,
    /// Of each coordinator, if they are small.
    pub disks: Vec<SmallDisk>,
    /// One before each process, coordinators first, if it is proxied.
    pub proxies: Vec<Proxy>,
    /// Those of coordinators that have left, in front of others now: servers start with the addresses of the first ones.
    pub(crate) old_proxies: Vec<Proxy>,
    /// Of coordinators that have left.
    pub(crate) old_logs: Vec<PathBuf>,
    // Last: nothing runs or is mounted there any more.
    dir: TempDir,
}

impl TestCluster {
    /// Starts three coordinators and `servers` servers.
    ///
    /// # Errors
    /// A binary is missing (`cargo build --bins` makes them) or does not become ready.
    pub fn start(servers: usize) -> Result<TestCluster> {
        Self::launch(&Setup { servers, ..Setup::default() })
    }

    /// Starts three coordinators and servers as `setup` says.
    ///
    /// # Errors
    /// The same, or the system lacks something that the setup needs.
    pub fn launch(setup: &Setup) -> Result<TestCluster> {
        let dir = tempfile::Builder::new().prefix("downpour-chaos-").tempdir()?;
        let network = setup.proxied.then(Network::new).transpose()?;
        let coordinators = (1..=COORDINATORS).map(|id| format!("coordinator-{id}"));
        let names = coordinators.chain((0..setup.servers).map(|index| format!("ps-{index}")));
        let proxies = names.filter_map(|name| Some(Proxy::in_network(network.as_ref()?, name)));
        let proxies: Vec<Proxy> = proxies.collect::<Result<_>>()?;
        let options = Options {
            coordinators: COORDINATORS,
            servers: setup.servers,
            dir: Some(dir.path().to_owned()),
            advertise: proxies.iter().map(|proxy| proxy.address().to_string()).collect(),
            interrupt: setup.interrupt.clone(),
            coordinator_args: (SNAPSHOTS.map(String::from).into_iter())
                .chain(setup.coordinator_args.iter().cloned())
                .collect(),
            ..Options::default()
        };
        let processes = LocalCluster::lay_out(&options)
            .context("start a cluster (`cargo build --bins` makes the binaries it needs)")?;
        for (proxy, process) in
            proxies.iter().zip(processes.coordinators.iter().chain(&processes.servers))
        {
            proxy.forward_to(process.address());
        }
        let coordinators = Coordinators::parse(&processes.coordinator_addresses())?;
        let runtime = Runtime::new().context("start a runtime")?;
        let mut cluster = TestCluster {
            processes,
            runtime,
            coordinators,
            network,
            disks: Vec::new(),
            proxies,
            old_proxies: Vec::new(),
            old_logs: Vec::new(),
            dir,
        };
        for index in (0..COORDINATORS).filter(|_| setup.small_disks) {
            cluster.disks.push(SmallDisk::mount(&cluster.data_dir(index))?);
        }
        match cluster
            .processes
            .start_some(setup.servers - setup.servers_later, options.ready_within)
        {
            Ok(()) => Ok(cluster),
            Err(error) => {
                if !setup.interrupt.is_set() {
                    cluster.keep_dir();
                }
                Err(error.into())
            }
        }
    }

    /// What a coordinator keeps.
    #[must_use]
    pub fn data_dir(&self, coordinator: usize) -> PathBuf {
        let name = self.processes.coordinators[coordinator].name();
        let number = name.rsplit('-').next().unwrap_or(name);
        self.dir.path().join("coordinators").join(number)
    }

    /// Reads back what a probe that was alone in its job pushed.
    ///
    /// # Errors
    /// An acknowledged push is missing or there twice, or the client saw an error.
    pub fn counts_each_push_once(&self, mut probe: Probe) -> Result<()> {
        let counters = self.runtime.block_on(probe.counters())?;
        let tally = self.runtime.block_on(probe.verify())?;
        ensure!(tally.lost == 0 && tally.duplicated == 0, "{tally:?}");
        ensure!(tally.client_errors == 0, "the client saw errors: {tally:?}");
        ensure!(
            counters.iter().all(|&(_, count)| count == tally.acknowledged as f32),
            "{} acknowledged, counted {counters:?}",
            tally.acknowledged
        );
        Ok(())
    }

    /// Where checkpoints go: a folder that every process reaches.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.dir.path().join("checkpoints")
    }

    /// The logs stay when the cluster is gone; says where.
    pub fn keep_dir(&mut self) {
        self.dir.disable_cleanup(true);
        eprintln!("the logs of the cluster are in {}", self.processes.log_dir().display());
    }

    /// Index of the coordinator that leads now.
    ///
    /// # Errors
    /// There was no leader for a long time.
    pub fn leader(&self) -> Result<usize> {
        let leader = || async {
            let cluster = self.coordinators.cluster().await.ok()?;
            let leader = cluster.members.iter().find(|member| member.leader)?;
            self.coordinator_at(&leader.address)
        };
        self.runtime.block_on(wait_for("a leading coordinator", DEADLINE, leader))
    }

    /// Index of the server process that is primary of `shard` of the job, and the shard's epoch.
    ///
    /// # Errors
    /// The job does not exist or the shard is lost.
    pub fn primary(&self, job: &str, shard: ShardId) -> Result<(usize, u64)> {
        self.runtime.block_on(async {
            let cluster = self.coordinators.cluster().await?;
            let view = self.coordinators.job(job).await?;
            let route = view.route(shard).context("the job has no such shard")?;
            let primary = route.primary.context("the shard is lost")?;
            let server = self.index_of(&cluster, primary.node)?;
            Ok((server, route.epoch.0))
        })
    }

    fn index_of(
        &self,
        cluster: &downpour_proto::v1::GetClusterReply,
        node: NodeId,
    ) -> Result<usize> {
        let node = cluster.nodes.iter().find(|view| view.node == node.0);
        let name = &node.context("the primary's node is not listed")?.name;
        let index = self.processes.servers.iter().position(|process| process.name() == name);
        index.with_context(|| format!("no process is called {name}"))
    }

    /// Ends every process in order.
    ///
    /// # Errors
    /// One did not end cleanly on SIGTERM.
    pub fn stop(mut self) -> Result<()> {
        let errors = self.processes.stop(DEADLINE);
        if !errors.is_empty() {
            self.keep_dir();
        }
        ensure!(errors.is_empty(), "processes did not end cleanly: {errors:?}");
        Ok(())
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep_dir();
        }
    }
}
