//! The cluster as scripts and people see it: what the coordinators answer, with names in place of numbers.
//!
//! The field names here are the JSON of `-o json`: they are a promise.

use std::collections::BTreeMap;

use downpour_core::consistency::Consistency;
use downpour_core::id::Lsn;
use downpour_core::optimizer::Scaling;
use downpour_core::routing::{Move, MoveStep, ShardRoute};
use downpour_proto::v1;
use serde::Serialize;

use crate::output::{Row, bytes, count};

/// Everything.
#[derive(Debug, Serialize)]
pub(crate) struct Cluster {
    /// Position in the coordinators' log.
    pub(crate) version: u64,
    pub(crate) coordinators: Vec<Coordinator>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) jobs: Vec<Job>,
    #[serde(skip)]
    pub(crate) shards: Vec<Shard>,
    #[serde(skip)]
    pub(crate) workers: Vec<Worker>,
}

/// A member of the coordinator group.
#[derive(Debug, Serialize)]
pub(crate) struct Coordinator {
    pub(crate) id: u64,
    pub(crate) address: String,
    pub(crate) leader: bool,
    pub(crate) term: u64,
    /// Position in the log that the leader knows this member has.
    pub(crate) matched: u64,
    /// It does not vote yet: it is catching up.
    pub(crate) learner: bool,
    /// The leader heard of it of late.
    pub(crate) heard: bool,
}

/// A parameter server in its newest life.
#[derive(Debug, Serialize)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) node: u32,
    pub(crate) incarnation: u64,
    pub(crate) address: String,
    pub(crate) zone: String,
    pub(crate) alive: bool,
    /// `open`, `cordoned` or `draining`.
    pub(crate) admission: &'static str,
    /// Shards of which it is the primary.
    pub(crate) primaries: u64,
    /// Shards of which it is another in-sync member.
    pub(crate) backups: u64,
    /// Of the shards of which it is the primary, as it last reported.
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    /// That pushes name.
    pub(crate) rows_per_s: f64,
    pub(crate) pull_rows_per_s: f64,
    pub(crate) log_bytes_per_s: f64,
    /// Of the process, as it last reported.
    #[serde(flatten)]
    pub(crate) load: Load,
}

/// What a server last said of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Load {
    pub(crate) memory_bytes: u64,
    /// 0: no limit.
    pub(crate) memory_limit: u64,
    /// Of copies that it is to hold at most; 0: as many as there is memory for.
    pub(crate) capacity_bytes: u64,
    pub(crate) pushed_bytes_per_s: f64,
    pub(crate) pulled_bytes_per_s: f64,
    /// From a request's arrival to its reply; `None`: there was none of late.
    pub(crate) push_p50_s: Option<f64>,
    pub(crate) push_p99_s: Option<f64>,
    pub(crate) pull_p50_s: Option<f64>,
    pub(crate) pull_p99_s: Option<f64>,
}

impl From<v1::NodeLoad> for Load {
    fn from(load: v1::NodeLoad) -> Self {
        Load {
            memory_bytes: load.memory_bytes,
            memory_limit: load.memory_limit,
            capacity_bytes: load.capacity_bytes,
            pushed_bytes_per_s: load.pushed_bytes_per_s,
            pulled_bytes_per_s: load.pulled_bytes_per_s,
            push_p50_s: load.push_p50_s,
            push_p99_s: load.push_p99_s,
            pull_p50_s: load.pull_p50_s,
            pull_p99_s: load.pull_p99_s,
        }
    }
}

/// One shard of one job.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Shard {
    pub(crate) job: String,
    pub(crate) shard: u32,
    pub(crate) epoch: u64,
    pub(crate) set_version: u64,
    /// `None`: lost.
    pub(crate) primary: Option<String>,
    /// Names, the primary's among them.
    pub(crate) in_sync: Vec<String>,
    /// Who is being made a member.
    pub(crate) joining: Option<String>,
    /// The copy that moves.
    pub(crate) moving: Option<Moving>,
    /// Members that the job wants.
    pub(crate) replicas: u32,
    pub(crate) lost: bool,
    /// As the primary last reported.
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    pub(crate) last_lsn: u64,
    /// The last time that every copy was gone.
    pub(crate) set_back: Option<SetBack>,
    /// That pushes name.
    pub(crate) rows_per_s: f64,
    pub(crate) pull_rows_per_s: f64,
    pub(crate) log_bytes_per_s: f64,
    /// The mean of the last seconds; `None`: no push said what it was computed with.
    #[serde(flatten)]
    pub(crate) staleness: Staleness,
}

/// How far shards go on between the pull and the push of a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Staleness {
    /// In steps of the furthest worker.
    pub(crate) stale_clocks: Option<f64>,
    /// In records of the shard's log.
    pub(crate) stale_records: Option<f64>,
}

impl Staleness {
    /// The mean over shards; those with more pushes count for more.
    fn mean<'a>(shards: impl Iterator<Item = &'a Shard> + Clone) -> Self {
        let mean = |of: fn(&Staleness) -> Option<f64>| {
            let parts = shards
                .clone()
                .filter_map(|shard| Some((of(&shard.staleness)?, shard.rows_per_s.max(1e-9))));
            let (sum, weight) = parts
                .fold((0.0, 0.0), |(sum, all), (one, weight)| (sum + one * weight, all + weight));
            (weight > 0.0).then(|| sum / weight)
        };
        Staleness {
            stale_clocks: mean(|one| one.stale_clocks),
            stale_records: mean(|one| one.stale_records),
        }
    }
}

impl std::fmt::Display for Staleness {
    /// `1.2 clocks, 3.4 records`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.stale_clocks, self.stale_records) {
            (Some(clocks), Some(records)) => write!(f, "{clocks:.1} clocks, {records:.1} records"),
            _ => f.write_str("-"),
        }
    }
}

/// A copy on its way from one server to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Moving {
    pub(crate) from: String,
    pub(crate) to: String,
    /// What it waits for: `queued`, `copying`, `promotion`, `removal`.
    pub(crate) step: &'static str,
}

/// A job and what it holds.
#[derive(Debug, Serialize)]
pub(crate) struct Job {
    pub(crate) name: String,
    pub(crate) job: u64,
    pub(crate) shards: u32,
    pub(crate) replicas: u32,
    pub(crate) min_in_sync: u32,
    pub(crate) seed: u64,
    pub(crate) version: u64,
    /// Its workers begin no further step.
    pub(crate) paused: bool,
    /// How far they may drift apart, as `psctl job set-consistency` takes it; and of single variables.
    pub(crate) consistency: String,
    /// How stale what they push is.
    #[serde(flatten)]
    pub(crate) staleness: Staleness,
    pub(crate) lost_shards: u64,
    /// Shards with fewer in-sync members than the job wants.
    pub(crate) short_shards: u64,
    pub(crate) sessions: u64,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) variables: Vec<Variable>,
    /// How far its data is trained, where workers share it.
    pub(crate) data: Option<Data>,
}

/// Tasks of a job's data.
#[derive(Debug, Serialize)]
pub(crate) struct Data {
    /// From 1.
    pub(crate) pass: u64,
    pub(crate) passes: u64,
    pub(crate) tasks: u32,
    /// Of the pass.
    pub(crate) done: u32,
    pub(crate) leased: u32,
    pub(crate) pending: u32,
    /// Rows, of all passes.
    pub(crate) samples: u64,
    pub(crate) over: bool,
}

impl Data {
    fn new(view: &v1::LedgerView) -> Option<Self> {
        let plan = view.plan.as_ref()?;
        Some(Self {
            pass: (view.pass + 1).min(plan.passes),
            passes: plan.passes,
            tasks: plan.tasks,
            done: view.done,
            leased: view.leased,
            pending: view.pending,
            samples: view.samples,
            over: view.pass >= plan.passes,
        })
    }
}

/// A variable of a job.
#[derive(Debug, Serialize)]
pub(crate) struct Variable {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    /// A table's width, a dense tensor's dimensions.
    pub(crate) shape: Vec<u64>,
    /// Tables of one group place equal keys on one shard.
    pub(crate) group: Option<String>,
    pub(crate) optimizer: String,
}

/// A session: a worker, an evaluator or an operator.
#[derive(Debug, Serialize)]
pub(crate) struct Worker {
    pub(crate) job: String,
    pub(crate) session: u64,
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) clock: u64,
    pub(crate) samples: u64,
    /// 0 while the job is paused: what it reported last is of before.
    pub(crate) samples_per_s: f64,
    /// Its job is.
    pub(crate) paused: bool,
    /// `None`: not a number, or not reported.
    pub(crate) loss: Option<f64>,
    /// Acknowledged and lost: shards went on from a checkpoint.
    pub(crate) rolled_back: Vec<RolledBack>,
    /// Of the job's data.
    pub(crate) tasks_held: u32,
    pub(crate) tasks_done: u64,
}

/// A stretch of a session's pushes to a shard.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RolledBack {
    pub(crate) shard: u32,
    /// That the shard went on with.
    pub(crate) epoch: u64,
    /// Numbers of the first and the last among the session's pushes to the shard.
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// Theirs, where they are still known.
    pub(crate) first_clock: Option<u64>,
    pub(crate) last_clock: Option<u64>,
}

impl From<v1::RolledBackPushes> for RolledBack {
    fn from(pushes: v1::RolledBackPushes) -> Self {
        let v1::RolledBackPushes { shard, epoch, first, last, first_clock, last_clock } = pushes;
        Self { shard, epoch, first, last, first_clock, last_clock }
    }
}

/// That a shard went on from a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SetBack {
    pub(crate) epoch: u64,
    pub(crate) checkpoint: String,
}

impl From<v1::GetClusterReply> for Cluster {
    fn from(reply: v1::GetClusterReply) -> Self {
        let names: BTreeMap<u32, &str> =
            reply.nodes.iter().map(|node| (node.node, node.name.as_str())).collect();
        let shards: Vec<Shard> = reply.jobs.iter().flat_map(|job| shards(job, &names)).collect();
        let load = |node: &v1::NodeView| {
            let server = v1::ServerRef { node: node.node, incarnation: node.incarnation };
            let status = reply.loads.iter().find(|one| one.server == Some(server));
            status.and_then(|status| status.load).map(Load::from).unwrap_or_default()
        };
        let mut nodes: Vec<Node> =
            reply.nodes.iter().map(|node| Node::new(node, load(node), &shards)).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        let jobs = reply.jobs.iter().filter_map(|job| Job::new(job, &shards)).collect();
        let workers = reply.jobs.iter().flat_map(workers).collect();
        let coordinators = reply.members.into_iter().map(|member| {
            let v1::MemberView { id, address, leader, term, matched, learner, heard } = member;
            Coordinator { id, address, leader, term, matched, learner, heard }
        });
        Self {
            version: reply.version,
            coordinators: coordinators.collect(),
            nodes,
            jobs,
            shards,
            workers,
        }
    }
}

fn job_name(status: &v1::JobStatus) -> Option<&str> {
    Some(&status.view.as_ref()?.spec.as_ref()?.name)
}

fn shards(status: &v1::JobStatus, names: &BTreeMap<u32, &str>) -> Vec<Shard> {
    let (Some(view), Some(job)) = (&status.view, job_name(status)) else { return Vec::new() };
    let replicas = view.spec.as_ref().map_or(0, |spec| spec.replicas);
    let reports: BTreeMap<u32, &v1::ShardReport> =
        status.reports.iter().map(|report| (report.shard, report)).collect();
    let name = |server: &v1::ServerRef| {
        names.get(&server.node).map_or_else(|| format!("node {}", server.node), ToString::to_string)
    };
    let shard = |route: &v1::ShardRoute| {
        let report = reports.get(&route.shard);
        Shard {
            job: job.to_owned(),
            shard: route.shard,
            epoch: route.epoch,
            set_version: route.set_version,
            primary: route.primary.as_ref().map(name),
            in_sync: route.in_sync.iter().map(name).collect(),
            joining: route.joining.as_ref().map(name),
            moving: moving(route, name),
            replicas,
            lost: route.lost,
            rows: report.map_or(0, |report| report.rows),
            bytes: report.map_or(0, |report| report.bytes),
            last_lsn: report.map_or(0, |report| report.last_lsn),
            set_back: view.set_back.iter().find_map(|back| {
                let own = back.shards.iter().find(|own| own.shard == route.shard)?;
                Some(SetBack { epoch: own.epoch, checkpoint: back.checkpoint.clone() })
            }),
            rows_per_s: report.map_or(0.0, |report| report.rows_per_s),
            pull_rows_per_s: report.map_or(0.0, |report| report.pull_rows_per_s),
            log_bytes_per_s: report.map_or(0.0, |report| report.log_bytes_per_s),
            staleness: report.map_or_else(Staleness::default, |report| Staleness {
                stale_clocks: report.stale_clocks,
                stale_records: report.stale_records,
            }),
        }
    };
    view.shards.iter().map(shard).collect()
}

fn moving(route: &v1::ShardRoute, name: impl Fn(&v1::ServerRef) -> String) -> Option<Moving> {
    let route = ShardRoute::try_from(route.clone()).ok()?;
    let step = match route.step()? {
        MoveStep::Queued => "queued",
        MoveStep::Copying => "copying",
        MoveStep::Promotion => "promotion",
        MoveStep::Removal => "removal",
    };
    let Move { from, to } = route.moving?;
    Some(Moving { from: name(&from.into()), to: name(&to.into()), step })
}

/// The sum of rates; of none it is 0, and not the -0 that `sum` gives.
pub(crate) fn total(rates: impl Iterator<Item = f64>) -> f64 {
    rates.fold(0.0, |sum, rate| sum + rate)
}

fn workers(status: &v1::JobStatus) -> Vec<Worker> {
    let job = job_name(status).unwrap_or_default();
    let paused = status.view.as_ref().is_some_and(|view| view.paused);
    let worker = |session: &v1::SessionView| {
        let progress = session.progress.clone().unwrap_or_default();
        Worker {
            job: job.to_owned(),
            session: session.session,
            name: session.name.clone(),
            kind: match session.kind() {
                v1::SessionKind::Unspecified => "unknown",
                v1::SessionKind::Worker => "worker",
                v1::SessionKind::Evaluator => "evaluator",
                v1::SessionKind::Operator => "operator",
            },
            clock: progress.clock,
            samples: progress.samples,
            samples_per_s: if paused { 0.0 } else { progress.samples_per_s },
            paused,
            loss: (progress.clock > 0 && progress.loss.is_finite()).then_some(progress.loss),
            rolled_back: progress.rolled_back.into_iter().map(RolledBack::from).collect(),
            tasks_held: session.tasks_held,
            tasks_done: session.tasks_done,
        }
    };
    status.sessions.iter().map(worker).collect()
}

impl Node {
    fn new(view: &v1::NodeView, load: Load, shards: &[Shard]) -> Self {
        let v1::NodeView { node, name, incarnation, address, zone, alive, admission } =
            view.clone();
        let led: Vec<&Shard> =
            shards.iter().filter(|shard| shard.primary.as_ref() == Some(&name)).collect();
        let member = shards.iter().filter(|shard| shard.in_sync.contains(&name)).count();
        Self {
            node,
            incarnation,
            address,
            zone,
            alive,
            admission: match v1::Admission::try_from(admission) {
                Ok(v1::Admission::Open) => "open",
                Ok(v1::Admission::Cordoned) => "cordoned",
                Ok(v1::Admission::Draining) => "draining",
                Err(_) => "unknown",
            },
            primaries: led.len() as u64,
            backups: member.saturating_sub(led.len()) as u64,
            rows: led.iter().map(|shard| shard.rows).sum(),
            bytes: led.iter().map(|shard| shard.bytes).sum(),
            rows_per_s: total(led.iter().map(|shard| shard.rows_per_s)),
            pull_rows_per_s: total(led.iter().map(|shard| shard.pull_rows_per_s)),
            log_bytes_per_s: total(led.iter().map(|shard| shard.log_bytes_per_s)),
            load,
            name,
        }
    }
}

impl Job {
    fn new(status: &v1::JobStatus, shards: &[Shard]) -> Option<Self> {
        let view = status.view.as_ref()?;
        let spec = view.spec.as_ref()?;
        let own: Vec<&Shard> = shards.iter().filter(|shard| shard.job == spec.name).collect();
        Some(Self {
            name: spec.name.clone(),
            job: view.job,
            shards: spec.shards,
            replicas: spec.replicas,
            min_in_sync: spec.min_in_sync,
            seed: spec.seed,
            version: view.version,
            paused: view.paused,
            consistency: consistency(view),
            staleness: Staleness::mean(own.iter().copied()),
            lost_shards: own.iter().filter(|shard| shard.lost).count() as u64,
            short_shards: own.iter().filter(|shard| shard.is_short()).count() as u64,
            sessions: status.sessions.len() as u64,
            rows: own.iter().map(|shard| shard.rows).sum(),
            bytes: own.iter().map(|shard| shard.bytes).sum(),
            labels: status.labels.clone().into_iter().collect(),
            variables: view.variables.iter().filter_map(Variable::new).collect(),
            data: status.ledger.as_ref().and_then(Data::new),
        })
    }
}

/// The modes of a job, with the names of variables in place of their numbers.
fn consistency(view: &v1::JobView) -> String {
    let modes = view.consistency.clone().unwrap_or_default();
    let Ok(modes) = Consistency::try_from(modes) else { return "unknown".to_owned() };
    modes.with_names(|id| {
        let variable = view.variables.iter().find(|variable| variable.id == id.0);
        let spec = variable.and_then(|variable| variable.spec.as_ref());
        spec.map_or_else(|| format!("variable {id}"), |spec| spec.name.clone())
    })
}

impl Variable {
    fn new(variable: &v1::Variable) -> Option<Self> {
        use v1::optimizer::Kind;
        use v1::variable_spec::Shape;
        let spec = variable.spec.as_ref()?;
        let (kind, shape, group) = match spec.shape.as_ref()? {
            Shape::Table(table) => ("table", vec![u64::from(table.dim)], Some(table.group.clone())),
            Shape::Dense(dense) => ("dense", dense.shape.clone(), None),
        };
        let optimizer = spec.optimizer.as_ref()?;
        let (name, learning_rate) = match optimizer.kind.as_ref()? {
            Kind::Sgd(sgd) => ("sgd", sgd.learning_rate),
            Kind::Momentum(momentum) => ("momentum", momentum.learning_rate),
            Kind::Adagrad(adagrad) => ("adagrad", adagrad.learning_rate),
            Kind::RowwiseAdagrad(adagrad) => ("rowwise_adagrad", adagrad.learning_rate),
            Kind::RmsProp(rms_prop) => ("rms_prop", rms_prop.learning_rate),
            Kind::Adam(adam) => ("adam", adam.learning_rate),
            Kind::AdamW(adam) => ("adam_w", adam.learning_rate),
            Kind::Ftrl(ftrl) => ("ftrl", ftrl.learning_rate),
        };
        let scaling = optimizer.staleness.and_then(|scaling| Scaling::try_from(scaling).ok());
        let scaling = scaling.map(|scaling| format!(", by staleness {scaling}"));
        let optimizer = format!("{name}(lr {learning_rate}{})", scaling.unwrap_or_default());
        Some(Self { id: variable.id, name: spec.name.clone(), kind, shape, group, optimizer })
    }
}

impl Shard {
    /// Alive, with fewer in-sync members than the job wants.
    pub(crate) fn is_short(&self) -> bool {
        !self.lost && self.in_sync.len() < self.replicas as usize
    }
}

impl std::fmt::Display for Moving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}->{} ({})", self.from, self.to, self.step)
    }
}

impl Cluster {
    /// What an operator would want to know, a sentence each.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.coordinators.iter().any(|member| member.leader) {
            problems.push("no coordinator leads".to_owned());
        }
        let silent = self.coordinators.iter().filter(|member| !member.heard);
        problems.extend(silent.map(|member| format!("coordinator {} is not heard", member.id)));
        let dead = self.nodes.iter().filter(|node| !node.alive);
        problems.extend(dead.map(|node| format!("node {} is dead", node.name)));
        for job in &self.jobs {
            if job.lost_shards > 0 {
                problems.push(format!(
                    "job {}: {} of {} shards are lost",
                    job.name, job.lost_shards, job.shards
                ));
            }
            if job.short_shards > 0 {
                let Job { name, short_shards, shards, replicas, .. } = job;
                problems.push(format!("job {name}: {short_shards} of {shards} shards have fewer than {replicas} in-sync members"));
            }
        }
        problems
    }
}

fn yes(condition: bool) -> String {
    if condition { "yes" } else { "no" }.to_owned()
}

impl Row for Coordinator {
    const TITLES: &'static [&'static str] =
        &["ID", "ADDRESS", "LEADER", "VOTES", "HEARD", ">TERM", ">MATCHED"];
    fn cells(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.address.clone(),
            yes(self.leader),
            yes(!self.learner),
            yes(self.heard),
            self.term.to_string(),
            self.matched.to_string(),
        ]
    }
}

impl Row for Node {
    const TITLES: &'static [&'static str] = &[
        "NAME",
        ">INCARNATION",
        "ADDRESS",
        "ZONE",
        "ALIVE",
        "ADMISSION",
        ">PRIMARIES",
        ">BACKUPS",
        ">ROWS",
        ">BYTES",
        ">ROWS/S",
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.incarnation.to_string(),
            self.address.clone(),
            self.zone.clone(),
            yes(self.alive),
            self.admission.to_owned(),
            self.primaries.to_string(),
            self.backups.to_string(),
            count(self.rows),
            bytes(self.bytes),
            count(self.rows_per_s as u64),
        ]
    }
}

impl Row for Shard {
    const TITLES: &'static [&'static str] = &[
        "JOB",
        ">SHARD",
        ">EPOCH",
        "PRIMARY",
        "IN SYNC",
        "JOINING",
        "MOVING",
        ">ROWS",
        ">BYTES",
        ">LAST LSN",
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.job.clone(),
            self.shard.to_string(),
            self.epoch.to_string(),
            self.primary.clone().unwrap_or_else(|| "lost".to_owned()),
            self.in_sync.join(","),
            self.joining.clone().unwrap_or_else(|| "-".to_owned()),
            self.moving.as_ref().map_or_else(|| "-".to_owned(), Moving::to_string),
            count(self.rows),
            bytes(self.bytes),
            Lsn(self.last_lsn).to_string(),
        ]
    }
}

impl Row for Job {
    const TITLES: &'static [&'static str] = &[
        "NAME",
        ">JOB",
        "PAUSED",
        ">SHARDS",
        ">LOST",
        ">SHORT",
        ">REPLICAS",
        ">VARIABLES",
        ">SESSIONS",
        ">ROWS",
        ">BYTES",
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.job.to_string(),
            yes(self.paused),
            self.shards.to_string(),
            self.lost_shards.to_string(),
            self.short_shards.to_string(),
            self.replicas.to_string(),
            self.variables.len().to_string(),
            self.sessions.to_string(),
            count(self.rows),
            bytes(self.bytes),
        ]
    }
}

impl Row for Variable {
    const TITLES: &'static [&'static str] = &[">ID", "NAME", "KIND", "SHAPE", "GROUP", "OPTIMIZER"];
    fn cells(&self) -> Vec<String> {
        let shape: Vec<String> = self.shape.iter().map(ToString::to_string).collect();
        vec![
            self.id.to_string(),
            self.name.clone(),
            self.kind.to_owned(),
            shape.join("x"),
            self.group.clone().unwrap_or_default(),
            self.optimizer.clone(),
        ]
    }
}

impl Row for Worker {
    const TITLES: &'static [&'static str] = &[
        "JOB",
        ">SESSION",
        "NAME",
        "KIND",
        ">CLOCK",
        ">SAMPLES",
        ">SAMPLES/S",
        ">LOSS",
        ">ROLLED BACK",
        ">TASKS HELD",
        ">DONE",
    ];
    fn cells(&self) -> Vec<String> {
        vec![
            self.job.clone(),
            self.session.to_string(),
            self.name.clone(),
            self.kind.to_owned(),
            count(self.clock),
            count(self.samples),
            if self.paused { "paused".to_owned() } else { count(self.samples_per_s as u64) },
            self.loss.map(|loss| format!("{loss:.5}")).unwrap_or_default(),
            count(self.rolled_back.iter().map(|pushes| pushes.last + 1 - pushes.first).sum()),
            count(self.tasks_held.into()),
            count(self.tasks_done),
        ]
    }
}

#[cfg(test)]
mod tests;
