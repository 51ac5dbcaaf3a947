//! Options of `downpour-ps`.

use clap::Args;
use downpour_node::config::{Common, Options, Problem, check_host_port};
use serde::{Deserialize, Serialize};

/// A server without rows needs some tens of MiB.
const MEMORY_LIMIT_MIN: u64 = 128 << 20;

const DATA_THREADS_MAX: usize = 1024;

/// Copies beside pushes: with four times as much on two cores pushes come to less than half as many, and at twice as much a second of changing primaries
/// does (docs/performance.md).
const COPY_BYTES_PER_S_AND_CORE: u64 = 8 << 20;

/// A parameter server: holds shards, applies pushes, answers pulls
#[derive(Clone, Debug, Args, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Stable name of this server, unique in the cluster (in Kubernetes: the pod's name)
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Coordinators, any of them, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT,...")]
    pub coordinators: Vec<String>,
    /// Where this server stands: backups are spread over zones
    #[arg(long, value_name = "ZONE")]
    pub zone: String,
    /// Take copies from the start on, also where this name was cordoned or drained before: for servers that are drained whenever they stop
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, value_name = "BOOL")]
    pub uncordon: bool,
    /// Whoever starts this server promises that no process that began under its name before still runs anywhere (as a StatefulSet does, unless a pod is deleted by force). Without it, a name whose last process
    /// has the last copy of a shard is free only to a process that listens where that one did, on the same boot of the same system: a machine that cannot be reached may go on
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, value_name = "BOOL")]
    pub exclusive_name: bool,
    /// End, with status 0, when the job of this name was there and is gone, and nothing of another job is held here; empty: never
    #[arg(long, value_name = "NAME")]
    pub for_job: String,
    /// A job that is gone for less than this is started over
    #[arg(long, value_name = "MS")]
    pub for_job_wait_ms: u64,
    /// A backup that acknowledges nothing for this long is removed from its in-sync set
    #[arg(long, value_name = "MS")]
    pub backup_timeout_ms: u64,
    /// After this long the members of each shard compare a sample of their values with the primary's; 0: never
    #[arg(long, value_name = "MS")]
    pub check_interval_ms: u64,
    /// Bytes of all records kept because a backup has not acknowledged them; beyond, pushes are asked to come later
    #[arg(long, value_name = "BYTES")]
    pub log_bytes_max: usize,
    /// The same for one shard, and for the rows that an open cut of it has to save
    #[arg(long, value_name = "BYTES")]
    pub shard_log_bytes_max: usize,
    /// Bytes of contributions to rounds of synchronous training that this server keeps, of all shards together. A round that needs more is refused, with advice
    #[arg(long, value_name = "BYTES")]
    pub contribution_bytes_max: usize,
    /// Bytes a second that this server sends in copies of shards to servers that are to hold them, for moves and for lost members all together; 0: as many as go; without it 8 MiB for each core
    #[arg(long, value_name = "BYTES")]
    pub copy_bytes_per_s: u64,
    /// Requests of one push stream that wait for the backups; beyond, the stream is not read
    #[arg(long, value_name = "COUNT")]
    pub push_requests_max: usize,
    /// Threads that serve connections of frames (pulls and pushes of our own clients); 0: as many as there are cores
    #[arg(long, value_name = "COUNT")]
    pub data_threads: usize,
    /// Bytes that the process may have resident; near them keys without a row are refused, and training on the others goes on. 0: no limit
    #[arg(long, value_name = "BYTES")]
    pub memory_limit: u64,
    /// Bytes of copies of shards that this server is given at most when shards move or lack a member; what it has is never taken away for it. 0: as many as nine tenths of --memory-limit leave room for
    #[arg(long, value_name = "BYTES")]
    pub capacity_bytes: u64,
    /// What every server has
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: String::new(),
            coordinators: Vec::new(),
            zone: String::new(),
            uncordon: false,
            exclusive_name: false,
            for_job: String::new(),
            for_job_wait_ms: 10_000,
            backup_timeout_ms: 1000,
            check_interval_ms: 10_000,
            log_bytes_max: 512 << 20,
            shard_log_bytes_max: 32 << 20,
            contribution_bytes_max: 1 << 30,
            copy_bytes_per_s: COPY_BYTES_PER_S_AND_CORE * cores() as u64,
            push_requests_max: 64,
            data_threads: 0,
            memory_limit: 0,
            capacity_bytes: 0,
            common: Common::default(),
        }
    }
}

impl Config {
    /// Threads for connections of frames, resolved.
    pub(crate) fn data_threads(&self) -> usize {
        match self.data_threads {
            0 => cores(),
            count => count,
        }
    }
}

/// What the process may use.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Options for Config {
    fn problems(&self) -> Vec<Problem> {
        let mut problems = self.common.problems();
        if let Err(invalid) = downpour_core::spec::check_name("name", &self.name) {
            problems.push(Problem::new("name", invalid.problem));
        }
        if !self.for_job.is_empty()
            && let Err(invalid) = downpour_core::spec::check_name("for_job", &self.for_job)
        {
            problems.push(Problem::new("for_job", invalid.problem));
        }
        if self.coordinators.is_empty() {
            problems.push(Problem::new("coordinators", "must name at least one host:port"));
        }
        let addresses = self.coordinators.iter();
        problems.extend(addresses.filter_map(|address| check_host_port("coordinators", address)));
        let positive = [
            ("backup_timeout_ms", self.backup_timeout_ms),
            ("log_bytes_max", self.log_bytes_max as u64),
            ("shard_log_bytes_max", self.shard_log_bytes_max as u64),
            ("contribution_bytes_max", self.contribution_bytes_max as u64),
            ("push_requests_max", self.push_requests_max as u64),
        ];
        if self.data_threads > DATA_THREADS_MAX {
            let problem = format!("must be at most {DATA_THREADS_MAX}");
            problems.push(Problem::new("data_threads", problem));
        }
        if (1..MEMORY_LIMIT_MIN).contains(&self.memory_limit) {
            let problem = format!("must be at least {MEMORY_LIMIT_MIN}, or 0 for no limit");
            problems.push(Problem::new("memory_limit", problem));
        }
        let zeros = positive.iter().filter(|(_, value)| *value == 0);
        problems.extend(zeros.map(|(field, _)| Problem::new(field, "must not be 0")));
        problems
    }
}
