//! Does to a cluster what a schedule says, and undoes it.
//!
//! Faults overlap; two things are waited for, each with a deadline: full in-sync sets before the next fault that may cost a copy, and all
//! coordinators before the next that takes one away. A process that ends without having been told to is an error.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use downpour_psctl::local::{Interrupt, Process};
use rustix::process::Signal;

use crate::cluster::{DEADLINE, TestCluster};
use crate::disk;
use crate::faults::{Fault, Kind};
use crate::monitor::Monitor;
use crate::network::{Cut, Network};
use crate::report::During;
use downpour_psctl::acks::{Acks, Outage};
use downpour_psctl::probe::{self, Probe, Tally};

const POLL: Duration = Duration::from_millis(10);
/// Pushes of a worker that joins while nobody leads.
const NEWCOMER_PUSHES: u64 = 20;

/// Who is hit, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Server(usize),
    Coordinator(usize),
    Everybody,
}

/// A fault that is not undone yet.
struct Active {
    fault: Fault,
    victim: Victim,
    until: Instant,
    change: Change,
}

/// How far the group of coordinators is with a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Nothing was begun.
    None,
    /// The member of this number does not vote yet, as far as is known.
    Joins(u64),
    /// The victim is no member any more.
    Leaves,
}

/// See the module.
pub struct Injector<'a> {
    cluster: &'a mut TestCluster,
    monitor: &'a Monitor,
    acks: &'a Acks,
    interrupt: Interrupt,
    start: Instant,
    active: Vec<Active>,
    newcomers: Vec<tokio::task::JoinHandle<Result<Tally>>>,
    /// The group of coordinators is not the one that was founded.
    replaced: bool,
    /// By kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// What they coincided with.
    pub during: During,
}

impl<'a> Injector<'a> {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(
        cluster: &'a mut TestCluster,
        monitor: &'a Monitor,
        acks: &'a Acks,
        interrupt: Interrupt,
    ) -> Self {
        Injector {
            cluster,
            monitor,
            acks,
            interrupt,
            start: Instant::now(),
            active: Vec::new(),
            newcomers: Vec::new(),
            replaced: false,
            faults: BTreeMap::new(),
            during: During::default(),
        }
    }

    /// Injects faults as long as each can still be undone before all is `over`, which is asked of a moment to come; then waits until the cluster is
    /// whole again.
    ///
    /// # Errors
    /// The cluster does not recover in time, a process crashed, or the run was interrupted.
    pub fn run(
        &mut self,
        schedule: impl Iterator<Item = Fault>,
        over: impl Fn(Instant) -> bool,
    ) -> Result<()> {
        for fault in schedule {
            let at = Instant::now() + fault.after;
            if over(at + fault.lasts) {
                break;
            }
            while Instant::now() < at {
                self.step()?;
            }
            self.make_way(&fault)?;
            if over(Instant::now() + fault.lasts) {
                break;
            }
            self.inject(fault)?;
        }
        while !over(Instant::now()) {
            self.step()?;
        }
        self.wait(|injector| injector.active.is_empty(), "the last faults to be undone")?;
        self.wait(Self::coordinators_are_whole, "all coordinators to be ready")?;
        self.wait_for_servers()
    }

    /// What the workers saw that joined while nobody led.
    ///
    /// # Errors
    /// One could not join, push or read.
    pub fn newcomers(&mut self) -> Result<Tally> {
        let mut tally = Tally::default();
        for newcomer in self.newcomers.drain(..) {
            let found = self.cluster.runtime.block_on(newcomer).context("a newcomer panicked")?;
            tally = tally.merge(&found.context("a worker that joined without a leader")?);
        }
        Ok(tally)
    }

    /// Undoes what is due and looks after the processes.
    fn step(&mut self) -> Result<()> {
        ensure!(!self.interrupt.is_set(), "interrupted");
        let now = Instant::now();
        for mut active in std::mem::take(&mut self.active) {
            if now < active.until || !self.undo(&mut active)? {
                self.active.push(active);
            }
        }
        let stopping =
            |kind| matches!(kind, Kind::DiskFull | Kind::CorruptFile | Kind::ReplaceCoordinator);
        let stopping = self.active.iter().filter(|active| stopping(active.fault.kind));
        let stopping: Vec<Victim> = stopping.map(|active| active.victim).collect();
        for (index, coordinator) in self.cluster.processes.coordinators.iter_mut().enumerate() {
            if !stopping.contains(&Victim::Coordinator(index)) {
                coordinator.check()?;
            }
        }
        self.cluster.processes.servers.iter_mut().try_for_each(Process::check)?;
        std::thread::sleep(POLL);
        Ok(())
    }

    fn wait(&mut self, mut until: impl FnMut(&mut Self) -> bool, what: &str) -> Result<()> {
        let began = Instant::now();
        while !until(self) {
            ensure!(began.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
            self.step()?;
        }
        Ok(())
    }

    fn make_way(&mut self, fault: &Fault) -> Result<()> {
        let kind = fault.kind;
        if kind.lethal() {
            self.wait_for_servers()?;
        } else if kind.of_a_coordinator() {
            self.wait(Self::coordinators_are_whole, "all coordinators to be ready")?;
        } else if matches!(kind, Kind::Delay | Kind::Loss) {
            let calm = |injector: &mut Self| {
                injector.active.iter().all(|active| active.fault.kind != kind)
            };
            self.wait(calm, "the network to be fast")?;
        } else {
            self.wait(
                |injector| injector.free_server(fault.victim).is_some(),
                "a server that runs",
            )?;
        }
        Ok(())
    }

    fn coordinators_are_whole(&mut self) -> bool {
        let idle = self.active.iter().all(|active| !active.fault.kind.of_a_coordinator());
        idle && all_ready(&mut self.cluster.processes.coordinators)
    }

    /// Until all live and every in-sync set is full, by a state that was asked for after they were ready.
    fn wait_for_servers(&mut self) -> Result<()> {
        let hit = |active: &Active| matches!(active.victim, Victim::Server(_));
        self.wait(|injector| !injector.active.iter().any(hit), "the servers to be left alone")?;
        let ready = |injector: &mut Self| all_ready(&mut injector.cluster.processes.servers);
        self.wait(ready, "all servers to be ready")?;
        let (since, servers) = (Instant::now(), self.cluster.processes.servers.len());
        let full = |injector: &mut Self| {
            let seen = injector.monitor.seen();
            seen.asked.is_some_and(|asked| asked > since)
                && seen.short == 0
                && seen.alive == servers
        };
        self.wait(full, "full in-sync sets").with_context(|| {
            let seen = self.monitor.seen();
            let (short, lost, alive) = (seen.short, seen.lost, seen.alive);
            format!("{short} shards are short of replicas, {lost} lost; {alive} of {servers} servers live")
        })
    }

    fn free_server(&self, draw: u64) -> Option<usize> {
        let count = self.cluster.processes.servers.len();
        let is_hit =
            |index| self.active.iter().any(|active| active.victim == Victim::Server(index));
        (0..count).map(|step| (draw as usize % count + step) % count).find(|&index| !is_hit(index))
    }

    fn inject(&mut self, fault: Fault) -> Result<()> {
        let failing_over = self.acks.waiting();
        let seen = self.monitor.seen();
        let victim = self.victim(&fault)?;
        let now = Instant::now();
        match fault.kind {
            Kind::KillServer => self.acks.outage(Outage::Reset, now),
            kind if kind.lethal() => self.acks.outage(Outage::Silence, now),
            _ => {}
        }
        let change = self.hit(&fault, victim)?;
        self.say(&format!("{} {} for {:?}", fault.kind.name(), self.name(victim), fault.lasts));
        *self.faults.entry(fault.kind.name()).or_default() += 1;
        self.during.failover += u64::from(failing_over);
        self.during.catch_up += u64::from(seen.short > 0);
        self.during.checkpoint += u64::from(seen.checkpointing);
        self.active.push(Active { fault, victim, until: now + fault.lasts, change });
        Ok(())
    }

    fn victim(&mut self, fault: &Fault) -> Result<Victim> {
        let any = |count: usize| fault.victim as usize % count;
        Ok(match fault.kind {
            Kind::KillLeader | Kind::PauseLeader => Victim::Coordinator(self.cluster.leader()?),
            Kind::Delay | Kind::Loss => Victim::Everybody,
            kind if kind.of_a_coordinator() => {
                Victim::Coordinator(any(self.cluster.processes.coordinators.len()))
            }
            _ => Victim::Server(self.free_server(fault.victim).context("no server is left alone")?),
        })
    }

    fn name(&self, victim: Victim) -> String {
        match victim {
            Victim::Server(index) => self.cluster.processes.servers[index].name().to_owned(),
            Victim::Coordinator(index) => {
                self.cluster.processes.coordinators[index].name().to_owned()
            }
            Victim::Everybody => "everybody".to_owned(),
        }
    }

    fn process(&mut self, victim: Victim) -> Result<&mut Process> {
        match victim {
            Victim::Server(index) => Ok(&mut self.cluster.processes.servers[index]),
            Victim::Coordinator(index) => Ok(&mut self.cluster.processes.coordinators[index]),
            Victim::Everybody => bail!("everybody is no process"),
        }
    }

    /// Nobody listens any more at the address of a dead process; a proxy before it would.
    fn refuse(&self, victim: Victim, refuse: bool) {
        let at = match victim {
            Victim::Coordinator(index) => index,
            Victim::Server(index) => self.cluster.processes.coordinators.len() + index,
            Victim::Everybody => return,
        };
        if let Some(proxy) = self.cluster.proxies.get(at) {
            proxy.refuse(refuse);
        }
    }

    fn hit(&mut self, fault: &Fault, victim: Victim) -> Result<Change> {
        match fault.kind {
            Kind::KillServer | Kind::KillCoordinator | Kind::KillLeader => {
                self.process(victim)?.kill()?;
                self.refuse(victim, true);
                if fault.kind == Kind::KillLeader {
                    self.welcome_newcomer();
                }
            }
            Kind::PauseServer | Kind::PauseServerLong | Kind::PauseLeader => {
                self.process(victim)?.signal(Signal::STOP)?;
            }
            Kind::PartitionServer | Kind::PartitionServerOneWay | Kind::PartitionCoordinator => {
                let cuts = self.cuts(fault.kind, victim);
                let network = self.network()?;
                cuts.into_iter().for_each(|cut| network.cut(cut));
            }
            Kind::Delay => {
                self.network()?.set_delay(Duration::from_millis(5 + fault.victim % 45));
            }
            Kind::Loss => self.network()?.set_loss(5 + fault.victim % 25),
            Kind::Reset => self.network()?.break_connections(&self.name(victim)),
            Kind::DiskFull => self.disk(victim)?.fill()?,
            Kind::CorruptFile => {
                let Victim::Coordinator(index) = victim else {
                    bail!("only coordinators have files")
                };
                self.process(victim)?.kill()?;
                disk::damage(&self.cluster.data_dir(index), fault.victim)?;
                self.process(victim)?.start()?;
            }
            Kind::ReplaceCoordinator => {
                let joins = self.cluster.add_coordinator()?;
                self.replaced = true;
                if fault.victim & 1 << 32 != 0 {
                    let leader = Victim::Coordinator(self.cluster.leader()?);
                    let leader = self.process(leader)?;
                    leader.kill()?;
                    leader.start()?;
                }
                return Ok(Change::Joins(joins));
            }
        }
        Ok(Change::None)
    }

    /// True: it is undone. False: not yet, ask again.
    fn undo(&mut self, active: &mut Active) -> Result<bool> {
        let (victim, name) = (active.victim, self.name(active.victim));
        match active.fault.kind {
            Kind::KillServer | Kind::KillCoordinator | Kind::KillLeader => {
                self.refuse(victim, false);
                self.process(victim)?.start()?;
            }
            Kind::PauseServer | Kind::PauseServerLong | Kind::PauseLeader => {
                self.process(victim)?.signal(Signal::CONT)?;
            }
            kind @ (Kind::PartitionServer
            | Kind::PartitionServerOneWay
            | Kind::PartitionCoordinator) => {
                let cuts = self.cuts(kind, victim);
                let network = self.network()?;
                cuts.iter().for_each(|cut| network.heal(cut));
            }
            Kind::Delay => self.network()?.set_delay(Duration::ZERO),
            Kind::Loss => self.network()?.set_loss(0),
            Kind::Reset => {}
            Kind::DiskFull => {
                if !self.has_stopped(active, "stop although its disk is full")? {
                    self.write_something();
                    return Ok(false);
                }
                self.disk(victim)?.free()?;
                self.process(victim)?.start()?;
            }
            Kind::CorruptFile => {
                if let Change::Joins(id) = active.change {
                    return self.votes(id, active);
                }
                let Victim::Coordinator(index) = victim else {
                    bail!("only coordinators have files")
                };
                // A bit of what nobody reads any more may have been hit.
                let coordinator = self.process(victim)?;
                if coordinator.wait_ready(Duration::ZERO).is_err() {
                    if !self.has_stopped(active, "refuse a damaged file")? {
                        return Ok(false);
                    }
                    if self.replaced {
                        // Since the group changed, who forgot what it promised is no member that it would take back (docs/protocol.md 12.4).
                        self.cluster.remove_member(self.cluster.member(index)?)?;
                        self.cluster.forget_coordinator(index);
                        active.change = Change::Joins(self.cluster.add_coordinator()?);
                        active.victim = Victim::Everybody;
                        return Ok(false);
                    }
                    empty(&self.cluster.data_dir(index))?;
                    self.process(victim)?.start()?;
                }
            }
            Kind::ReplaceCoordinator => {
                let Victim::Coordinator(index) = victim else {
                    bail!("only coordinators are replaced")
                };
                match active.change {
                    Change::Joins(id) => {
                        if self.votes(id, active)? {
                            self.cluster.remove_member(self.cluster.member(index)?)?;
                            active.change = Change::Leaves;
                        }
                        return Ok(false);
                    }
                    _ if !self.has_left(active)? => return Ok(false),
                    _ => self.cluster.forget_coordinator(index),
                }
            }
        }
        self.say(&format!("{} {name} is over", active.fault.kind.name()));
        Ok(true)
    }

    /// Whether a member that joined votes by now.
    fn votes(&self, id: u64, active: &Active) -> Result<bool> {
        ensure!(Instant::now() < active.until + DEADLINE, "member {id} does not vote");
        let members = self.cluster.members()?;
        Ok(members.iter().any(|member| member.id == id && !member.learner))
    }

    /// Whether a member that was removed has ended, as it should.
    fn has_left(&mut self, active: &Active) -> Result<bool> {
        let late = Instant::now() > active.until + DEADLINE;
        let process = self.process(active.victim)?;
        match process.poll()? {
            Some(status) if status.success() => Ok(true),
            Some(status) => bail!("{} ended ({status}):\n{}", process.name(), process.tail()),
            None if late => bail!("{} goes on though it was removed", process.name()),
            None => Ok(false),
        }
    }

    /// Whether the victim has ended by itself, and not in a crash of the harness's making.
    fn has_stopped(&mut self, active: &Active, what: &str) -> Result<bool> {
        let late = Instant::now() > active.until + DEADLINE;
        let process = self.process(active.victim)?;
        match process.poll()? {
            Some(status) if status.code().is_some_and(|code| code != 0 && code != 101) => Ok(true),
            Some(status) => bail!("{} ended ({status}):\n{}", process.name(), process.tail()),
            None if late => bail!("{} did not {what}", process.name()),
            None => Ok(false),
        }
    }

    fn cuts(&self, kind: Kind, victim: Victim) -> Vec<Cut> {
        let name = Some(self.name(victim));
        let outwards = Cut { from: name.clone(), to: None };
        let inwards = Cut { from: None, to: name };
        if kind == Kind::PartitionServerOneWay { vec![outwards] } else { vec![outwards, inwards] }
    }

    fn network(&self) -> Result<&Network> {
        self.cluster.network.as_ref().context("no network is between them")
    }

    fn disk(&self, victim: Victim) -> Result<&disk::SmallDisk> {
        let Victim::Coordinator(index) = victim else { bail!("only coordinators have disks") };
        self.cluster.disks.get(index).context("the coordinators have no small disks")
    }

    /// A member notices a full disk when it writes.
    fn write_something(&self) {
        let coordinators = self.cluster.coordinators.clone().with_deadline(Duration::from_secs(2));
        self.cluster.runtime.block_on(async {
            // Whether it succeeds is no matter here.
            if let Ok((job, _)) = coordinators.create_job(&probe::job("write", 64, 1)).await {
                _ = coordinators.delete_job(job.job).await;
            }
        });
    }

    /// While nobody leads, a job is created, and a worker joins it, pushes and reads.
    fn welcome_newcomer(&mut self) {
        let coordinators = self.cluster.coordinators.clone();
        let job = probe::job(&format!("newcomer-{}", self.newcomers.len()), 4, 2);
        self.newcomers.push(self.cluster.runtime.spawn(async move {
            let mut probe = Probe::join(&coordinators, &job, 0).await?;
            probe.push_until(|tally| tally.acknowledged >= NEWCOMER_PUSHES).await?;
            // Its gaps are those of a cluster that makes a job.
            let tally = Tally { longest_ack_gap_ms: 0, ..probe.verify().await? };
            let made = coordinators.job(&job.name).await?;
            coordinators.delete_job(made.job).await?;
            Ok(tally)
        }));
    }

    fn say(&self, what: &str) {
        eprintln!("{:6.1} s: {what}", self.start.elapsed().as_secs_f64());
    }
}

fn all_ready(processes: &mut [Process]) -> bool {
    processes.iter_mut().all(|process| process.wait_ready(Duration::ZERO).is_ok())
}

/// Removes what is in a directory, which may be a mount.
fn empty(directory: &std::path::Path) -> Result<()> {
    for entry in fs::read_dir(directory).context("list a data directory")? {
        let path = entry?.path();
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}
