//! A client whose pushes can be counted afterwards.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use downpour_client::{
    Coordinators, Error, Job, PushBatch, RolledBack, RowGradients, Session, SessionOptions,
    TableRows,
};
use downpour_core::id::{ShardId, VariableId};
use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Sgd};
use downpour_core::routing::shard_of;
use downpour_core::spec::{JobSpec, Shape, TableSpec, VariableSpec};

use crate::acks::Acks;

/// Pushes whose acknowledgement one client waits for at once.
const IN_FLIGHT_MAX: usize = 8;
/// Serial numbers of one client start here times its index, so they never meet.
const SERIALS_PER_CLIENT: u64 = 1 << 40;
const SERIALS: &str = "probe/serials";
const COUNTERS: &str = "probe/counters";

/// The job of a probe: tables that count.
#[must_use]
pub fn job(name: &str, shards: u32, replicas: u32) -> JobSpec {
    JobSpec { name: name.into(), shards, replicas, min_in_sync: 1, seed: 1 }
}

/// A table of single floats in which a push with gradient −1 adds 1.
#[must_use]
pub fn counting_table(name: &str) -> VariableSpec {
    VariableSpec {
        name: name.into(),
        optimizer: OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 }),
        shape: Shape::Table(TableSpec::new(1, Init::Zeros, name)),
    }
}

/// What the probe saw.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Pushes that were acknowledged.
    pub acknowledged: u64,
    /// Pushes that failed without telling whether they were applied.
    pub unknown: u64,
    /// Acknowledged pushes whose effect is missing.
    pub lost: u64,
    /// Those of them that the session said are rolled back, because every copy of their shard was gone.
    pub named: u64,
    /// Parts of pushes to each shard that the session said are rolled back.
    pub rolled_back: BTreeMap<ShardId, u64>,
    /// Pushes whose effect is there more than once.
    pub duplicated: u64,
    /// Longest time between two acknowledgements of one client.
    pub longest_ack_gap_ms: u64,
    /// Errors that the client's user would have seen.
    pub client_errors: u64,
}

impl Tally {
    /// Of several clients together.
    #[must_use]
    pub fn merge(self, other: &Tally) -> Tally {
        let mut rolled_back = self.rolled_back;
        for (shard, count) in &other.rolled_back {
            *rolled_back.entry(*shard).or_default() += count;
        }
        Tally {
            acknowledged: self.acknowledged + other.acknowledged,
            unknown: self.unknown + other.unknown,
            lost: self.lost + other.lost,
            named: self.named + other.named,
            rolled_back,
            duplicated: self.duplicated + other.duplicated,
            longest_ack_gap_ms: self.longest_ack_gap_ms.max(other.longest_ack_gap_ms),
            client_errors: self.client_errors + other.client_errors,
        }
    }
}

/// One client that pushes without pause until it is told to stop.
pub struct Probe {
    coordinators: Coordinators,
    job: JobSpec,
    session: Session,
    serials: VariableId,
    counters: VariableId,
    /// Rows that every push increments besides its own: one on each shard, or as many as [`Probe::weigh`] was told.
    counter_keys: Vec<u64>,
    acks: Arc<Acks>,
    next_serial: u64,
    first_serial: u64,
    unknown_serials: BTreeSet<u64>,
    /// What sessions before this one said.
    rolled_back: Vec<RolledBack>,
    tally: Tally,
    last_ack: Option<Instant>,
}

impl Probe {
    /// Joins the job as client number `index`, from 0.
    ///
    /// # Errors
    /// The cluster does not answer, or has another job of this name.
    pub async fn join(coordinators: &Coordinators, job: &JobSpec, index: u64) -> Result<Probe> {
        Self::join_timed(coordinators, job, index, Arc::default()).await
    }

    /// As [`Probe::join`]; tells `acks` of every acknowledgement.
    ///
    /// # Errors
    /// The same.
    pub async fn join_timed(
        coordinators: &Coordinators,
        job: &JobSpec,
        index: u64,
        acks: Arc<Acks>,
    ) -> Result<Probe> {
        let options = SessionOptions::worker(format!("probe-{index}"));
        let session = Session::open(coordinators, &Job::Create(job.clone()), options)
            .await
            .context("open the probe's session")?;
        let tables = [counting_table(SERIALS), counting_table(COUNTERS)];
        let defined = session.define(&tables).await.context("define the probe's tables")?;
        let first_serial = index * SERIALS_PER_CLIENT;
        Ok(Probe {
            coordinators: coordinators.clone(),
            job: job.clone(),
            counter_keys: keys_on_shards(tables[1].routing_salt(), job.shards, |_| 1),
            acks,
            session,
            serials: defined[0].variable.id,
            counters: defined[1].variable.id,
            next_serial: first_serial,
            first_serial,
            unknown_serials: BTreeSet::new(),
            rolled_back: Vec::new(),
            tally: Tally::default(),
            last_ack: None,
        })
    }

    /// From now on every push increments so many rows of each shard. All clients of a job must agree, and begin with it.
    pub fn weigh(&mut self, rows: impl Fn(ShardId) -> usize) {
        let salt = counting_table(COUNTERS).routing_salt();
        self.counter_keys = keys_on_shards(salt, self.job.shards, rows);
    }

    /// Pushes until `stop` says so, several at a time.
    ///
    /// # Errors
    /// A batch does not fit (a bug of the probe).
    pub async fn push_until(&mut self, mut stop: impl FnMut(&Tally) -> bool) -> Result<()> {
        let mut waiting: VecDeque<(u64, Instant, downpour_client::PushTicket)> = VecDeque::new();
        self.last_ack = Some(Instant::now());
        loop {
            if let Some(error) = self.session.ended() {
                eprintln!("probe: the session ended: {error}");
                self.tally.client_errors += 1;
                self.unknown_serials.extend(waiting.into_iter().map(|(serial, ..)| serial));
                return Ok(());
            }
            let stopping = stop(&self.tally);
            if !stopping && waiting.len() < IN_FLIGHT_MAX {
                let serial = self.next_serial;
                self.next_serial += 1;
                let sent = Instant::now();
                match self.push(serial).await {
                    Ok(ticket) => waiting.push_back((serial, sent, ticket)),
                    Err(error) => self.failed(serial, &error),
                }
                continue;
            }
            let Some((serial, sent, ticket)) = waiting.pop_front() else { return Ok(()) };
            match ticket.await {
                Ok(outcome) => {
                    ensure!(outcome.refusals.is_empty(), "refused: {:?}", outcome.refusals);
                    self.acknowledge(sent);
                }
                Err(error) => self.failed(serial, &error),
            }
        }
    }

    async fn push(&self, serial: u64) -> Result<downpour_client::PushTicket, Error> {
        let counters = &self.counter_keys;
        let ones = vec![-1.0; counters.len()];
        let own = [serial];
        let rows = vec![
            RowGradients { variable: self.serials, keys: &own, gradients: &[-1.0] },
            RowGradients { variable: self.counters, keys: counters, gradients: &ones },
        ];
        let clock = serial - self.first_serial;
        self.session.push(&PushBatch { clock, rows, ..PushBatch::default() }).await
    }

    fn acknowledge(&mut self, sent: Instant) {
        self.tally.acknowledged += 1;
        let now = Instant::now();
        self.acks.acknowledged(sent, now);
        if let Some(last) = self.last_ack.replace(now) {
            let gap_ms = now.duration_since(last).as_millis() as u64;
            self.tally.longest_ack_gap_ms = self.tally.longest_ack_gap_ms.max(gap_ms);
        }
    }

    fn failed(&mut self, serial: u64, error: &Error) {
        eprintln!("probe: push {serial}: {error}");
        self.tally.client_errors += 1;
        self.unknown_serials.insert(serial);
    }

    /// Reads every row that this probe pushed and counts what is missing and what is there twice.
    ///
    /// # Errors
    /// The rows cannot be read.
    pub async fn verify(mut self) -> Result<Tally> {
        self.reopen().await?;
        self.tally.unknown = self.unknown_serials.len() as u64;
        self.rolled_back.extend(self.session.rolled_back());
        for one in &self.rolled_back {
            *self.tally.rolled_back.entry(one.shard).or_default() += one.last + 1 - one.first;
        }
        let serials: Vec<u64> = (self.first_serial..self.next_serial).collect();
        for keys in serials.chunks(65_536) {
            let mut values = vec![0.0; keys.len()];
            let rows = TableRows { variable: self.serials, keys, values: &mut values };
            self.session.pull(&mut [rows], None).await.context("read the serials back")?;
            for (serial, value) in keys.iter().zip(values) {
                let unknown = self.unknown_serials.contains(serial);
                let lost = value < 1.0 && !unknown;
                self.tally.lost += u64::from(lost);
                self.tally.named += u64::from(lost && self.is_rolled_back(*serial));
                self.tally.duplicated += u64::from(value > 1.0);
            }
        }
        // Closed, or its cells stay until it times out; who cannot say so now is closed by the coordinator later.
        _ = self.session.close().await;
        Ok(self.tally)
    }

    /// Whether the session said so of this push, on the shard that its own row is on.
    fn is_rolled_back(&self, serial: u64) -> bool {
        let (shard, clock) = (self.shard_of_serial(serial), serial - self.first_serial);
        let within = |(first, last): (u64, u64)| (first..=last).contains(&clock);
        // Clocks of long ago are not remembered one by one.
        { self.rolled_back.iter() }.any(|one| one.shard == shard && one.clocks.is_none_or(within))
    }

    fn shard_of_serial(&self, serial: u64) -> ShardId {
        shard_of(serial, counting_table(SERIALS).routing_salt(), self.job.shards)
    }

    /// A session that has ended reads no more.
    async fn reopen(&mut self) -> Result<()> {
        if self.session.ended().is_some() {
            self.rolled_back.extend(self.session.rolled_back());
            let (options, job) = (SessionOptions::worker("verify"), Job::Create(self.job.clone()));
            self.session = Session::open(&self.coordinators, &job, options).await?;
        }
        Ok(())
    }

    /// Value of every counter: each push of every client added 1.
    ///
    /// # Errors
    /// The rows cannot be read.
    pub async fn counters(&mut self) -> Result<Vec<(ShardId, f32)>> {
        self.reopen().await?;
        let keys = &self.counter_keys;
        let mut values = vec![0.0; keys.len()];
        let rows = TableRows { variable: self.counters, keys, values: &mut values };
        self.session.pull(&mut [rows], None).await.context("read the counters back")?;
        let salt = counting_table(COUNTERS).routing_salt();
        let shards = keys.iter().map(|&key| shard_of(key, salt, self.job.shards));
        Ok(shards.zip(values).collect())
    }
}

/// What all clients of a job found together. Besides each client's own rows, every push of everybody is in the counters of all shards.
///
/// # Errors
/// The rows cannot be read.
pub async fn verify_all(mut probes: Vec<Probe>) -> Result<Tally> {
    let counters = match probes.first_mut() {
        Some(probe) => probe.counters().await?,
        None => Vec::new(),
    };
    let mut tally = Tally::default();
    for probe in probes {
        tally = tally.merge(&probe.verify().await?);
    }
    let (least, most) = (tally.acknowledged, tally.acknowledged + tally.unknown);
    // Whole numbers, exact up to 2^24.
    for counter in counters.into_iter().map(|(_, counter)| counter as u64) {
        tally.lost = tally.lost.max(least.saturating_sub(counter));
        tally.duplicated = tally.duplicated.max(counter.saturating_sub(most));
    }
    Ok(tally)
}

/// The smallest keys on each shard, as many as it wants, sorted.
fn keys_on_shards(salt: u64, shards: u32, wanted: impl Fn(ShardId) -> usize) -> Vec<u64> {
    let mut wanted: Vec<usize> = (0..shards).map(|shard| wanted(ShardId(shard))).collect();
    let all: usize = wanted.iter().sum();
    let mut missing = |key: &u64| {
        let left = &mut wanted[shard_of(*key, salt, shards).0 as usize];
        let missing = *left > 0;
        *left -= usize::from(missing);
        missing
    };
    (0..).filter(|key| missing(key)).take(all).collect()
}

/// Waits until `condition` gives a value, at most `deadline`.
///
/// # Errors
/// It never did; `what` says what was waited for.
pub async fn wait_for<T, F: Future<Output = Option<T>>>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> F,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        ensure!(Instant::now() < end, "{what}: not within {deadline:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_gets_as_many_keys_as_it_wants_and_all_differ() {
        let wanted = |shard: ShardId| if shard.0 < 3 { 21 } else { 2 };
        let (salt, shards) = (counting_table(COUNTERS).routing_salt(), 16);
        let keys = keys_on_shards(salt, shards, wanted);
        assert!(keys.windows(2).all(|pair| pair[0] < pair[1]), "{keys:?}");
        for shard in (0..shards).map(ShardId) {
            let there = keys.iter().filter(|&&key| shard_of(key, salt, shards) == shard);
            assert_eq!(there.count(), wanted(shard), "{shard}");
        }
        assert_eq!(keys_on_shards(salt, shards, |_| 0), [0; 0]);
    }
}
