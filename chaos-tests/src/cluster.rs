//! A cluster of the real binaries, and what a test asks it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use downpour_client::Coordinators;
use downpour_core::id::{NodeId, ShardId};
use downpour_psctl::local::{LocalCluster, Options};
use tokio::runtime::Runtime;

use crate::probe::wait_for;

/// How long anything may take that a test waits for.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A running cluster, a runtime for clients of it, and a handle to its coordinators.
pub struct TestCluster {
    /// The processes.
    pub processes: LocalCluster,
    /// Where clients of this process run.
    pub runtime: Runtime,
    /// The control plane.
    pub coordinators: Coordinators,
}

impl TestCluster {
    /// Starts three coordinators and `servers` servers.
    ///
    /// # Errors
    /// A binary is missing (`cargo build --bins` makes them) or does not become ready.
    pub fn start(servers: usize) -> Result<TestCluster> {
        let options = Options { servers, ..Options::default() };
        let processes = LocalCluster::start(options)
            .context("start a cluster (`cargo build --bins` makes the binaries it needs)")?;
        let runtime = Runtime::new().context("start a runtime")?;
        let coordinators = Coordinators::parse(&processes.coordinator_addresses())?;
        Ok(TestCluster { processes, runtime, coordinators })
    }

    /// Index of the coordinator that leads now.
    ///
    /// # Errors
    /// There was no leader for a long time.
    pub fn leader(&self) -> Result<usize> {
        let leader = || async {
            let cluster = self.coordinators.cluster().await.ok()?;
            let leader = cluster.members.iter().find(|member| member.leader)?;
            Some(leader.id as usize - 1)
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
    pub fn stop(self) -> Result<()> {
        let errors = self.processes.stop(DEADLINE);
        ensure!(errors.is_empty(), "processes did not end cleanly: {errors:?}");
        Ok(())
    }
}
