//! Which cluster is measured.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use downpour_bench::System;
use downpour_bench::protocol::Peer;
use downpour_psctl::local::{Error, Interrupt, LocalCluster, Options, Process};

/// How long a process may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Place {
    #[command(flatten)]
    which: Which,
    /// Servers of a cluster that is started
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64), conflicts_with = "coordinators")]
    servers: u16,
    /// Where the binaries of a cluster that is started are; without it beside psctl
    #[arg(long, value_name = "DIR", conflicts_with = "coordinators")]
    bin_dir: Option<PathBuf>,
    /// Slices of the table or tensor
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    shards: u32,
    /// Copies of each shard, the primary included
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=3))]
    replicas: u32,
    /// How pulls and pushes travel
    #[arg(long, value_name = "NAME", default_value = "framed", value_parser = ["framed", "grpc"])]
    transport: String,
}

#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Start a cluster on this machine, with one coordinator, and stop it at the end
    #[arg(long)]
    local: bool,
    /// A cluster that runs; the job is removed at the end
    #[arg(long, value_name = "HOST:PORT,...")]
    coordinators: Option<String>,
}

impl Place {
    /// As many servers as copies of each shard; binaries beside psctl or in `bin_dir`.
    pub(super) fn local(bin_dir: Option<PathBuf>, transport: String, replicas: u16) -> Self {
        let which = Which { local: true, coordinators: None };
        let servers = replicas;
        Self { which, servers, bin_dir, shards: 64, replicas: replicas.into(), transport }
    }

    /// Gives a cluster to `measure`, and stops it afterwards if it was started for that.
    pub(super) fn with<T>(
        &self,
        interrupt: &Interrupt,
        measure: impl FnOnce(&mut Measured) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let started =
            self.which.coordinators.is_none().then(|| self.start(interrupt)).transpose()?;
        let coordinators = self.which.coordinators.clone();
        let coordinators = coordinators
            .or_else(|| started.as_ref().map(LocalCluster::coordinator_addresses))
            .unwrap_or_default();
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let job = format!("bench-{}-{}", since_1970.as_millis(), std::process::id());
        let mut measured = Measured {
            peer: Peer::Cluster {
                coordinators,
                job,
                shards: self.shards,
                replicas: self.replicas,
                transport: self.transport.clone(),
            },
            started,
            interrupt: interrupt.clone(),
        };
        let result = measure(&mut measured);
        if let Some(mut cluster) = measured.started {
            let failed = result
                .as_ref()
                .is_err_and(|error| !matches!(error.downcast_ref(), Some(Error::Interrupted)));
            if failed {
                cluster.keep_dir();
                eprintln!("the logs of the servers are in {}", cluster.log_dir().display());
            }
            cluster.stop(STOP_DEADLINE).iter().for_each(|error| eprintln!("psctl: {error}"));
        }
        result
    }

    /// Where binaries are, if not beside psctl.
    pub(super) fn bin_dir(&self) -> Option<&Path> {
        self.bin_dir.as_deref()
    }

    fn start(&self, interrupt: &Interrupt) -> Result<LocalCluster, Error> {
        eprintln!("starting 1 coordinator and {} servers", self.servers);
        LocalCluster::start(Options {
            coordinators: 1,
            servers: self.servers.into(),
            bin_dir: self.bin_dir.clone(),
            interrupt: interrupt.clone(),
            ..Options::default()
        })
    }
}

/// A cluster while it is measured.
pub(super) struct Measured {
    peer: Peer,
    started: Option<LocalCluster>,
    interrupt: Interrupt,
}

impl Measured {
    /// Of a cluster that was started for this.
    pub(super) fn servers(&self) -> Option<usize> {
        self.started.as_ref().map(|cluster| cluster.servers.len())
    }
}

impl System for Measured {
    fn peer(&self) -> Peer {
        self.peer.clone()
    }

    fn check(&mut self) -> anyhow::Result<()> {
        if let Some(cluster) = &mut self.started {
            cluster.check()?;
        }
        not_interrupted(&self.interrupt)
    }

    fn cpu_s(&self) -> Option<f64> {
        let cluster = self.started.as_ref()?;
        Some(cluster.servers.iter().map(Process::cpu).sum::<Duration>().as_secs_f64())
    }
}

pub(super) fn not_interrupted(interrupt: &Interrupt) -> anyhow::Result<()> {
    if interrupt.is_set() { Err(Error::Interrupted.into()) } else { Ok(()) }
}
