//! Where load should go: which copies move and which members become primaries, by what is measured.
//!
//! A pure planner over what a leader knows now. Each step lowers one number, the sum over servers of how far their work is from the mean and their memory above what is fair, by more
//! than it costs; so plans end. A plan touches a shard once, for each step is based on where the shard is: what is left is for the next one, and soon there is nothing. A change of primary between members costs next to nothing and is preferred;
//! a copy costs what it takes to send. Nothing goes to a server that is closed or full, two copies of a shard never stand on one node, and copies
//! of a shard that stand in different zones stay so.

use crate::id::{JobId, NodeId, ServerRef, ShardId};
use crate::routing::Move;

/// Work of a backup, as a share of its primary's: it applies the same records, and answers nobody.
const BACKUP_WORK: f64 = 0.4;
/// Share of a shard's weight that does not depend on what is measured: what is idle is spread too, and what is measured fluctuates.
const EVEN: f64 = 0.1;
/// Of memory, in means of all servers, beyond which a server has too much: it runs out sooner than others. Below that it costs nothing, for who leads shards with much work
/// should have fewer of them.
const MEMORY_FAIR: f64 = 1.15;
/// A step must lower the sum by more than this.
const GAIN_MIN: f64 = 1e-3;
/// The same for a copy of a server's fair share of bytes.
const COPY_COST: f64 = 0.05;
/// Share of a server's memory limit up to which it is given copies.
pub const FULL: f64 = 0.9;

/// A server that lives.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Which.
    pub server: ServerRef,
    /// Where it stands.
    pub zone: String,
    /// It may be given copies.
    pub open: bool,
    /// Resident bytes, and the most that may be; 0: no limit.
    pub memory: u64,
    #[allow(missing_docs)]
    pub memory_limit: u64,
    /// Bytes of copies that it is to hold at most; 0: as many as there is memory for.
    pub capacity: u64,
}

/// A shard as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub shard: ShardId,
    /// The primary, one of the members.
    pub primary: ServerRef,
    /// All members.
    pub members: Vec<ServerRef>,
    /// Of one copy.
    pub bytes: u64,
    /// That pushes named of late.
    pub rows_per_s: f64,
    /// It has all the members it needs, and none is on the way: it may be touched.
    pub settled: bool,
}

/// When to begin, and when to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Nothing is done while no server has more than this many times the mean.
    pub start: f64,
    /// Nothing more is done once none has more than this.
    pub goal: f64,
    /// Most steps.
    pub steps_max: usize,
    /// Primaries change between members, and nothing is copied.
    pub promotions_only: bool,
}

/// What is to be done with one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// This member becomes the primary.
    Promote(ServerRef),
    /// A copy moves.
    Move(Move),
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Position in the list of shards.
    pub shard: usize,
    /// What.
    pub change: Change,
    /// Work of the server that it takes load from, before: times the mean.
    pub load: f64,
    /// Memory of that server, the same way.
    pub memory: f64,
    /// Share of all rows/s that the shard has.
    pub rows_share: f64,
}

/// What is to be done, and what comes of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In this order.
    pub steps: Vec<Step>,
    /// Work of each server, times the mean: as it is.
    pub before: Vec<f64>,
    /// After all steps.
    pub after: Vec<f64>,
}

/// What should be done now. Servers that are not listed are taken for dead: their copies are not touched.
#[must_use]
pub fn plan(servers: &[Server], shards: &[Shard], options: Options) -> Plan {
    let mut board = Board::new(servers, shards);
    let before = board.works();
    let mut steps = Vec::new();
    if board.worst() > options.start {
        while steps.len() < options.steps_max && board.worst() > options.goal {
            let Some(step) = board.best_step(options.promotions_only) else { break };
            board.apply(&step);
            steps.push(step);
        }
    }
    Plan { steps, before, after: board.works() }
}

/// Work and memory, in units of the mean of all servers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Load {
    work: f64,
    memory: f64,
}

impl Load {
    fn plus(self, other: Load, sign: f64) -> Load {
        Load { work: self.work + sign * other.work, memory: self.memory + sign * other.memory }
    }

    /// How far its work is from the mean, and its memory above what is fair.
    fn cost(self) -> f64 {
        (self.work - 1.0).powi(2) + self.crowded().powi(2)
    }

    fn worst(self) -> f64 {
        // Memory may be as uneven as costs as much.
        self.work.max(1.0 + self.crowded())
    }

    fn crowded(self) -> f64 {
        (self.memory - MEMORY_FAIR).max(0.0)
    }
}

struct Board<'a> {
    servers: &'a [Server],
    shards: &'a [Shard],
    /// Positions of servers: the primary first.
    members: Vec<Vec<usize>>,
    /// Of a shard's primary and of a backup.
    weights: Vec<(Load, Load)>,
    rows_shares: Vec<f64>,
    loads: Vec<Load>,
    /// Bytes that were planned to go there.
    coming: Vec<u64>,
    /// Bytes of the copies that it has, as it is.
    held: Vec<u64>,
    /// Shards that may be touched.
    free: Vec<bool>,
}

impl<'a> Board<'a> {
    fn new(servers: &'a [Server], shards: &'a [Shard]) -> Self {
        let at = |server: &ServerRef| servers.iter().position(|one| one.server == *server);
        let members = |shard: &Shard| {
            let others = shard.members.iter().filter(|one| **one != shard.primary);
            std::iter::once(&shard.primary).chain(others).filter_map(at).collect::<Vec<_>>()
        };
        // A primary that is not listed: its members are not told apart, and it is not touched.
        let members: Vec<Vec<usize>> = shards.iter().map(members).collect();
        let count = shards.len().max(1) as f64;
        let rows: f64 = shards.iter().map(|shard| shard.rows_per_s.max(0.0)).sum();
        let bytes: f64 = shards.iter().map(|shard| shard.bytes as f64).sum();
        let share = |part: f64, whole: f64| {
            if whole > 0.0 { (1.0 - EVEN) * part / whole + EVEN / count } else { 1.0 / count }
        };
        let weight = |shard: &Shard| {
            let (work, memory) =
                (share(shard.rows_per_s.max(0.0), rows), share(shard.bytes as f64, bytes));
            (Load { work, memory }, Load { work: BACKUP_WORK * work, memory })
        };
        let mut board = Board {
            rows_shares: shards
                .iter()
                .map(|shard| if rows > 0.0 { shard.rows_per_s / rows } else { 0.0 })
                .collect(),
            weights: shards.iter().map(weight).collect(),
            loads: vec![Load::default(); servers.len()],
            coming: vec![0; servers.len()],
            held: vec![0; servers.len()],
            free: shards.iter().map(|shard| shard.settled).collect(),
            servers,
            shards,
            members,
        };
        let mut sum = Load::default();
        let copies = board.members.iter().zip(&board.weights).zip(shards);
        for ((members, (primary, backup)), shard) in copies {
            for (copy, &at) in members.iter().enumerate() {
                board.held[at] = board.held[at].saturating_add(shard.bytes);
                let weight = if copy == 0 { *primary } else { *backup };
                board.loads[at] = board.loads[at].plus(weight, 1.0);
                sum = sum.plus(weight, 1.0);
            }
        }
        let mean = |sum: f64| if sum > 0.0 { sum / servers.len() as f64 } else { 1.0 };
        let (work, memory) = (mean(sum.work), mean(sum.memory));
        let scale =
            |load: &mut Load| (load.work, load.memory) = (load.work / work, load.memory / memory);
        board.loads.iter_mut().for_each(scale);
        board.weights.iter_mut().for_each(|(primary, backup)| {
            scale(primary);
            scale(backup);
        });
        board
    }

    fn works(&self) -> Vec<f64> {
        self.loads.iter().map(|load| load.work).collect()
    }

    /// Of the server that has most.
    fn worst(&self) -> f64 {
        self.loads.iter().map(|load| load.worst()).fold(0.0, f64::max)
    }

    /// The best step that takes load from the server that has most; from the next one where none is good enough.
    fn best_step(&self, promotions_only: bool) -> Option<Step> {
        let mut order: Vec<usize> = (0..self.servers.len()).collect();
        order.sort_by(|a, b| self.loads[*b].worst().total_cmp(&self.loads[*a].worst()));
        order.into_iter().find_map(|from| self.best_from(from, promotions_only))
    }

    fn best_from(&self, from: usize, promotions_only: bool) -> Option<Step> {
        let mut best: Option<(f64, Step)> = None;
        for (shard, members) in self.members.iter().enumerate() {
            let known = members.len() == self.shards[shard].members.len();
            let Some(copy) = members.iter().position(|at| *at == from) else { continue };
            if !self.free[shard] || !known {
                continue;
            }
            let mut consider = |change: Change, gain: f64| {
                if gain > GAIN_MIN && best.as_ref().is_none_or(|(most, _)| gain > *most) {
                    let Load { work, memory } = self.loads[from];
                    let rows_share = self.rows_shares[shard];
                    best = Some((gain, Step { shard, change, load: work, memory, rows_share }));
                }
            };
            if copy == 0 {
                for &to in members.iter().skip(1).filter(|to| self.servers[**to].open) {
                    let (primary, backup) = self.weights[shard];
                    let more = primary.plus(backup, -1.0);
                    consider(Change::Promote(self.servers[to].server), self.gain(from, to, more));
                }
            }
            if promotions_only {
                continue;
            }
            let (primary, backup) = self.weights[shard];
            let weight = if copy == 0 { primary } else { backup };
            for (to, target) in self.servers.iter().enumerate() {
                if members.contains(&to) || !self.fits(shard, from, to) {
                    continue;
                }
                let gain = self.gain(from, to, weight) - COPY_COST * weight.memory;
                let (from, to) = (self.servers[from].server, target.server);
                consider(Change::Move(Move { from, to }), gain);
            }
        }
        best.map(|(_, step)| step)
    }

    /// By how much the sum falls when `weight` goes from one server to another.
    fn gain(&self, from: usize, to: usize, weight: Load) -> f64 {
        let (a, b) = (self.loads[from], self.loads[to]);
        a.cost() + b.cost() - a.plus(weight, -1.0).cost() - b.plus(weight, 1.0).cost()
    }

    /// Whether a copy may go there.
    fn fits(&self, shard: usize, from: usize, to: usize) -> bool {
        let (members, target) = (&self.members[shard], &self.servers[to]);
        let node = |at: usize| -> NodeId { self.servers[at].server.node };
        let beside = |at: usize| {
            let others = members.iter().filter(|other| **other != from);
            others.filter(|other| self.servers[**other].zone == self.servers[at].zone).count()
        };
        // Reported from outside: any number may come.
        let more = self.coming[to].saturating_add(self.shards[shard].bytes);
        let (memory, held) =
            (target.memory.saturating_add(more), self.held[to].saturating_add(more));
        let full = (target.memory_limit > 0 && memory as f64 > FULL * target.memory_limit as f64)
            || (target.capacity > 0 && held > target.capacity);
        let twice = members.iter().any(|other| node(*other) == target.server.node);
        target.open && !full && !twice && beside(to) <= beside(from)
    }

    fn apply(&mut self, step: &Step) {
        let at = |server: ServerRef| {
            let position = self.servers.iter().position(|one| one.server == server);
            position.expect("steps name listed servers")
        };
        self.free[step.shard] = false;
        let (primary, backup) = self.weights[step.shard];
        let (from, to, weight) = match step.change {
            Change::Promote(to) => {
                (self.members[step.shard][0], at(to), primary.plus(backup, -1.0))
            }
            Change::Move(Move { from, to }) => {
                let (from, to) = (at(from), at(to));
                self.coming[to] = self.coming[to].saturating_add(self.shards[step.shard].bytes);
                let is_primary = self.members[step.shard][0] == from;
                (from, to, if is_primary { primary } else { backup })
            }
        };
        self.loads[from] = self.loads[from].plus(weight, -1.0);
        self.loads[to] = self.loads[to].plus(weight, 1.0);
        let members = &mut self.members[step.shard];
        let old = members.iter().position(|one| *one == from).expect("it takes from a member");
        match members.iter().position(|one| *one == to) {
            Some(new) => members.swap(old, new),
            None => members[old] = to,
        }
    }
}

#[cfg(test)]
mod tests;
