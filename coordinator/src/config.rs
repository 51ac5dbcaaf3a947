//! The options of a coordinator.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use downpour_core::rebalance;
use downpour_core::spec::check_name;
use downpour_node::config::{Common, Options, Problem, check_host_port};
use serde::{Deserialize, Serialize};

use crate::balance::BY_ITSELF;
use crate::liveness::Timeouts;
use crate::raft;
use crate::rescue::Patience;
use crate::service::Times;
use crate::state::joins::Limits;

const MEMBERS_MAX: usize = 5;
const COMPACT_BYTES: u64 = 64 << 20;
const KEEP_ENTRIES_SHARE: u64 = 4;
/// A lease must outlast this many of the longest elections (protocol 4.1).
const ELECTIONS_PER_LEASE: u64 = 3;

/// A member of the control plane: it knows where every shard of every job lives
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Number of this member, as in --peers; 0: of the member there whose address is --advertise (so that the members of a StatefulSet can have the
    /// same options), or 1 where it is alone
    #[arg(long, value_name = "NUMBER")]
    pub id: u64,
    /// The members that found the group, this one too: NUMBER=HOST:PORT, 1, 3 or 5 of them; without it this member is alone. It stays as it is when the group is changed later (psctl coordinator add, remove)
    #[arg(long, value_name = "NUMBER=HOST:PORT,...", value_delimiter = ',')]
    pub peers: Vec<String>,
    /// Members of a group that runs, some are enough: this one joins it, unless its address is in --peers; it waits until psctl coordinator add has let it in, and is told its number
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub join: Vec<String>,
    /// Name of the cluster; members of different clusters refuse each other
    #[arg(long, value_name = "NAME")]
    pub cluster: String,
    /// Directory of the log and snapshots, of this member alone
    #[arg(long, value_name = "DIRECTORY")]
    pub data_dir: PathBuf,
    /// Servers are told to heartbeat this often
    #[arg(long, value_name = "MS")]
    pub heartbeat_ms: u64,
    /// A server that is not heard for this long (or is late and refuses connections) is judged dead: its shards go to the other members of their in-sync sets
    #[arg(long, value_name = "MS")]
    pub failure_timeout_ms: u64,
    /// A server that alone holds a shard may go on for this long without an answer to its heartbeats. More than before counts from the next server that registers on; less at once, but lost shards are waited for as long as the longest that there was
    #[arg(long, value_name = "MS")]
    pub lease_ms: u64,
    /// A shard whose last copy is on a server that is judged dead, and that may only be unreachable, goes on from the job's newest checkpoint after this (and a lease); 0: it is waited for. Copies that are known to be gone are not waited for. Servers that register under this option acknowledge nothing more once they are cut off from the coordinators for so long: nothing is rolled back that was acknowledged later
    #[arg(long, value_name = "MS")]
    pub restore_after_ms: u64,
    /// A session that is not renewed for this long is closed
    #[arg(long, value_name = "MS")]
    pub session_timeout_ms: u64,
    /// Unit of Raft's time; the leader heartbeats every two
    #[arg(long, value_name = "MS")]
    pub raft_tick_ms: u64,
    /// Ticks without a leader before an election; each is drawn from once to twice this
    #[arg(long, value_name = "TICKS")]
    pub raft_election_ticks: u64,
    /// Log entries after which a snapshot takes their place
    #[arg(long, value_name = "ENTRIES")]
    pub compact_entries: u64,
    /// Copies that one server sends or takes at once, when shards get members and when they move
    #[arg(long, value_name = "COUNT")]
    pub copies_per_server: u32,
    /// Moves of shards that are under way in the cluster at once; the others wait
    #[arg(long, value_name = "COUNT")]
    pub moves_max: usize,
    /// What the leader does by itself where load is uneven for some time: nothing (off), have other members become primaries, which copies nothing (primaries), or also
    /// move copies (all)
    #[arg(long, value_enum, value_name = "WHAT")]
    pub auto_rebalance: AutoRebalance,
    /// What every server has
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
}

/// What the leader does by itself where load is uneven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AutoRebalance {
    /// Nothing.
    #[default]
    Off,
    /// Primaries change between members.
    Primaries,
    /// Copies move too.
    All,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            id: 0,
            peers: Vec::new(),
            join: Vec::new(),
            cluster: "downpour".into(),
            data_dir: PathBuf::new(),
            heartbeat_ms: 300,
            failure_timeout_ms: 1500,
            lease_ms: 10_000,
            restore_after_ms: 0,
            session_timeout_ms: 30_000,
            raft_tick_ms: 50,
            raft_election_ticks: 10,
            compact_entries: 8192,
            copies_per_server: 2,
            moves_max: 4,
            auto_rebalance: AutoRebalance::Off,
            common: Common { listen: "127.0.0.1:7070".into(), ..Common::default() },
        }
    }
}

impl Options for Config {
    fn problems(&self) -> Vec<Problem> {
        let mut problems = self.common.problems();
        let mut check = |field, wrong: bool, problem: &str| {
            if wrong {
                problems.push(Problem::new(field, problem));
            }
        };
        check("data_dir", self.data_dir.as_os_str().is_empty(), "is required");
        check(
            "cluster",
            check_name("cluster", &self.cluster).is_err(),
            "must be 1 to 200 of A-Z a-z 0-9 . _ - /",
        );
        check("raft_tick_ms", self.raft_tick_ms == 0, "must not be 0");
        check(
            "raft_election_ticks",
            !(4..1000).contains(&self.raft_election_ticks),
            "must be 4 to 999",
        );
        check("copies_per_server", self.copies_per_server == 0, "must not be 0");
        check("moves_max", self.moves_max == 0, "must not be 0");
        check("compact_entries", self.compact_entries == 0, "must not be 0");
        check("heartbeat_ms", self.heartbeat_ms == 0, "must not be 0");
        let heartbeats = self.failure_timeout_ms < 2 * self.heartbeat_ms;
        check("failure_timeout_ms", heartbeats, "must be at least two heartbeat_ms");
        let election_ms = 2 * self.raft_election_ticks * self.raft_tick_ms;
        let short = self.lease_ms < ELECTIONS_PER_LEASE * election_ms;
        check(
            "lease_ms",
            short,
            "must be at least three of the longest elections (2 x raft_election_ticks x raft_tick_ms)",
        );
        check("session_timeout_ms", self.session_timeout_ms == 0, "must not be 0");
        match self.members() {
            Ok(members) => {
                check("peers", members.len() > MEMBERS_MAX, "must be at most 5");
                let joins = self.is_stranger_to(&members);
                if !joins {
                    problems.extend(self.member(&members).err());
                }
                if joins && self.id != 0 {
                    let problem = "must not be given: the group that it joins says it";
                    problems.push(Problem::new("id", problem));
                }
                let malformed = |one: &&String| check_host_port("join", one).is_some();
                if let Some(one) = self.join.iter().find(malformed) {
                    let problem = format!("must be HOST:PORT, not {one:?}");
                    problems.push(Problem::new("join", problem));
                }
            }
            Err(problem) => problems.push(problem),
        }
        problems
    }
}

impl Config {
    /// host:port by member; empty: this one is alone.
    ///
    /// # Errors
    /// An entry is not NUMBER=HOST:PORT, or a number or address is there twice.
    pub fn members(&self) -> Result<BTreeMap<u64, String>, Problem> {
        let mut members = BTreeMap::new();
        for peer in &self.peers {
            let malformed =
                || Problem::new("peers", format!("must be NUMBER=HOST:PORT, not {peer:?}"));
            let (id, address) = peer.split_once('=').ok_or_else(malformed)?;
            let id = id.trim().parse().ok().filter(|&id: &u64| id > 0).ok_or_else(malformed)?;
            if check_host_port("peers", address).is_some() {
                return Err(malformed());
            }
            let twice = members.values().any(|other| other == address);
            if twice || members.insert(id, address.to_owned()).is_some() {
                return Err(Problem::new("peers", format!("names {id} or {address} twice")));
            }
        }
        Ok(members)
    }

    /// This one's number among `members`.
    ///
    /// # Errors
    /// It is not there.
    pub(crate) fn member(&self, members: &BTreeMap<u64, String>) -> Result<u64, Problem> {
        if self.id == 0 && !members.is_empty() {
            let own = self.common.advertise.as_ref();
            let found = members.iter().find(|&(_, address)| Some(address) == own);
            return found.map(|(&id, _)| id).ok_or_else(|| {
                Problem::new("id", "is needed, or an --advertise that is one of --peers")
            });
        }
        let id = self.id.max(1);
        let known = members.is_empty() || members.contains_key(&id);
        known.then_some(id).ok_or_else(|| Problem::new("peers", "must have this member's id too"))
    }

    /// Whether this one joins a group that runs.
    ///
    /// # Errors
    /// See [`Config::members`].
    pub fn joins(&self) -> Result<bool, Problem> {
        Ok(self.is_stranger_to(&self.members()?))
    }

    fn is_stranger_to(&self, founders: &BTreeMap<u64, String>) -> bool {
        let own = self.common.advertise.as_ref().unwrap_or(&self.common.listen);
        let founder = founders.values().any(|address| address == own);
        !self.join.is_empty() && !founder
    }

    /// What servers and clients are told of time.
    #[must_use]
    pub fn times(&self) -> Times {
        Times {
            heartbeat_ms: self.heartbeat_ms,
            lease_ms: self.lease_ms,
            session_timeout_ms: self.session_timeout_ms,
            isolation_ms: self.restore_after_ms,
        }
    }

    /// How long silence is borne.
    #[must_use]
    pub fn timeouts(&self) -> Timeouts {
        Timeouts {
            failure: Duration::from_millis(self.failure_timeout_ms),
            // The next heartbeat is overdue by a fifth.
            suspicion: Duration::from_millis(self.heartbeat_ms + self.heartbeat_ms / 5),
            session: Duration::from_millis(self.session_timeout_ms),
        }
    }

    /// How long lost shards are waited for.
    #[must_use]
    pub fn patience(&self) -> Patience {
        Patience {
            lease: Duration::from_millis(self.lease_ms),
            unreachable: Some(self.restore_after_ms)
                .filter(|&after_ms| after_ms > 0)
                .map(Duration::from_millis),
        }
    }

    /// What goes on at once.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits { joins_per_server: self.copies_per_server, moves: self.moves_max }
    }

    /// What is done by itself where load is uneven; none: nothing.
    #[must_use]
    pub fn rebalancing(&self) -> Option<rebalance::Options> {
        let promotions_only = match self.auto_rebalance {
            AutoRebalance::Off => return None,
            AutoRebalance::Primaries => true,
            AutoRebalance::All => false,
        };
        Some(rebalance::Options { promotions_only, ..BY_ITSELF })
    }

    /// How member `id` takes part in Raft, in a group that these founded.
    #[must_use]
    pub fn raft(&self, id: u64, founders: BTreeMap<u64, String>) -> raft::Options {
        raft::Options {
            id,
            tick: Duration::from_millis(self.raft_tick_ms),
            election_ticks: self.raft_election_ticks as usize,
            heartbeat_ticks: 2,
            compact_entries: self.compact_entries,
            compact_bytes: COMPACT_BYTES,
            keep_entries: self.compact_entries / KEEP_ENTRIES_SHARE,
            founders,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(ordinal: u64, peers: &[&str]) -> Config {
        let advertise = Some(format!("member-{ordinal}.members:7070"));
        Config {
            peers: peers.iter().map(ToString::to_string).collect(),
            data_dir: "/data".into(),
            common: Common { advertise, ..Common::default() },
            ..Config::default()
        }
    }

    const PEERS: [&str; 3] =
        ["1=member-0.members:7070", "2=member-1.members:7070", "3=member-2.members:7070"];

    #[test]
    fn members_with_the_same_options_find_their_numbers_by_their_addresses() {
        for ordinal in 0..3 {
            let config = pod(ordinal, &PEERS);
            let members = config.members().expect("well-formed");
            assert_eq!(config.member(&members), Ok(ordinal + 1));
            assert_eq!(config.problems(), []);
        }
        assert_eq!(pod(0, &[]).member(&BTreeMap::new()), Ok(1), "alone");
    }

    #[test]
    fn a_member_that_is_not_there_is_refused_and_never_another_one() {
        let stranger = pod(3, &PEERS);
        assert_eq!(stranger.problems().len(), 1, "{:?}", stranger.problems());
        let silent = Config { common: Common::default(), ..stranger.clone() };
        assert_eq!(silent.problems().len(), 1);
        assert_eq!(Config { id: 4, ..stranger.clone() }.problems().len(), 1);
        let numbered = Config { id: 2, ..stranger };
        assert_eq!(numbered.member(&numbered.members().expect("well-formed")), Ok(2));
    }
}
