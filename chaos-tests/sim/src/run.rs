//! One seed.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Mutex;
use std::time::{Duration, UNIX_EPOCH};

use downpour_core::mix::mix64;
use downpour_core::planted;
use downpour_ps::inspect;
use tracing_subscriber::EnvFilter;
use turmoil::{Builder, Sim};

use crate::cluster::{self, PROBES, SERVERS};
use crate::inject::Conductor;
use crate::invariants::{acknowledged, epochs, isolated, replicas};
use crate::options::Options;
use crate::report::Outcome;
use crate::shared::{Phase, Shared};
use crate::{clients, monitor, report, system, zombie};

const TICK: Duration = Duration::from_millis(2);
const LATENCY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(10));
/// Segments that a connection holds: no fault here is about a full one.
const SEGMENTS_MAX: usize = 1 << 16;
/// A phase that lasts longer in simulated time never ends.
const PHASE_MAX: Duration = Duration::from_secs(240);
/// Real seconds after which the system ends a process that does not.
const REAL_SECONDS_MAX: u32 = 240;
const ACKNOWLEDGED_MIN: u64 = 200;
/// Everybody is quiet for so long before it is read back.
const SILENCE: Duration = Duration::from_millis(1500);
/// Between looks at what servers believe.
const LOOK_TICKS: u64 = 5;

/// What a panic prints, which may abort the process.
static ON_PANIC: Mutex<Option<Outcome>> = Mutex::new(None);

/// Runs a seed in this process and prints what it showed.
pub(crate) fn one(seed: u64, options: &Options) -> ExitCode {
    let json = options.json;
    if let Some((_, bug)) = options.bug {
        planted::plant(bug);
    }
    system::seed(seed);
    // SAFETY: a plain call of the system.
    unsafe { libc::alarm(REAL_SECONDS_MAX) };
    let filter = EnvFilter::from_default_env();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(false).init();
    let plant = options.bug.map(|(name, _)| name);
    *ON_PANIC.lock().expect("nobody panicked") = Some(Outcome { seed, ..Outcome::default() });
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        let mut outcome = ON_PANIC.lock().ok().and_then(|mut one| one.take()).unwrap_or_default();
        outcome.failure = Some(panic.to_string());
        print(&outcome, json, plant);
        std::process::exit(1);
    }));
    let outcome = simulate(seed);
    print(&outcome, json, plant);
    // Without the destructors of a simulated world that nobody needs any more.
    std::process::exit(i32::from(outcome.failure.is_some()));
}

fn print(outcome: &Outcome, json: bool, plant: Option<&str>) {
    if json {
        println!("{}", serde_json::to_string(outcome).expect("numbers and text"));
    } else {
        println!("{outcome:#?}");
    }
    if outcome.failure.is_some() {
        eprintln!("again: {}", report::command(outcome.seed, plant));
    }
    _ = std::io::stdout().flush();
}

fn simulate(seed: u64) -> Outcome {
    let shared = Rc::new(Shared::new(seed));
    let mut builder = Builder::new();
    builder
        .rng_seed(seed)
        .epoch(UNIX_EPOCH)
        .enable_random_order()
        .tick_duration(TICK)
        .min_message_latency(LATENCY.0)
        .max_message_latency(LATENCY.1)
        .tcp_capacity(SEGMENTS_MAX)
        .simulation_duration(4 * PHASE_MAX);
    let mut sim = builder.build();
    cluster::start(&mut sim, &shared);
    for (index, name) in (0..).zip(PROBES) {
        sim.client(name, clients::probe(Rc::clone(&shared), index));
    }
    sim.client("trainer", clients::trainer(Rc::clone(&shared)));
    sim.client("zombie", zombie::haunt(Rc::clone(&shared)));
    sim.client("monitor", monitor::watch(Rc::clone(&shared)));

    let mut conductor = Conductor::new(&shared);
    if let Err(error) = conduct(&mut sim, &shared, &mut conductor) {
        shared.broken("programs run on", error);
    }
    if shared.broken.borrow().is_empty() {
        acknowledged::check(&shared);
    }
    let seen = shared.seen.borrow();
    let broken = shared.broken.borrow();
    Outcome {
        seed,
        failure: broken.first().cloned(),
        faults: conductor.done,
        promotions: seen.promotions,
        in_sync_changes: seen.in_sync_changes,
        leader_changes: seen.terms.len().saturating_sub(1) as u64,
        cuts: seen.cuts,
        moves: seen.moves,
        set_backs: seen.set_backs(),
        pushes_acked: shared.acknowledged.get(),
        simulated_ms: sim.elapsed().as_millis() as u64,
        fingerprint: fingerprint(&sim, &seen),
    }
}

/// What any difference between two runs would change sooner or later.
fn fingerprint(sim: &Sim<'_>, seen: &monitor::Seen) -> String {
    let mut hash = mix64(sim.elapsed().as_nanos() as u64) ^ system::random();
    for replica in inspect::replicas() {
        hash = mix64(hash ^ replica.last.0 ^ replica.digest);
    }
    for (&(_, shard, epoch), primary) in &seen.primaries {
        hash = mix64(hash ^ shard as u64 ^ epoch.0 ^ primary.incarnation.0);
    }
    format!("{hash:016x}")
}

/// Until all clients have ended or a promise is broken.
fn conduct(sim: &mut Sim<'_>, shared: &Shared, conductor: &mut Conductor) -> turmoil::Result {
    let (mut phase_began, mut quiet_since, mut serving) = (Duration::ZERO, None, BTreeMap::new());
    for tick in 0u64.. {
        let now = sim.elapsed();
        system::reached(now);
        let phase = shared.phase.get();
        if now - phase_began > PHASE_MAX {
            let (seen, done) = (shared.seen.borrow(), &conductor.done);
            let shards = seen.job.as_ref().map(|job| &job.shards);
            shared.broken(
                "the cluster heals",
                format!("{phase:?} does not end: after {done:?}: {shards:?} {:?}", seen.servers),
            );
        }
        let full = {
            let seen = shared.seen.borrow();
            let settled = seen.all_alive() && !seen.checkpointing() && !seen.moving();
            seen.full(shared.replicas) && settled && seen.asked > phase_began + SILENCE
        };
        let clients = PROBES.len() as u32 + 1;
        let next = match phase {
            Phase::Start if full && shared.joined.get() == clients => {
                conductor.begin(now);
                Some(Phase::Faults)
            }
            Phase::Faults => {
                conductor.conduct(sim, now);
                let enough = shared.acknowledged.get() >= ACKNOWLEDGED_MIN;
                (conductor.is_over() && enough).then_some(Phase::Calm)
            }
            Phase::Calm => {
                let quiet = full && shared.quiet.get() == clients + 1;
                let since = *quiet_since.get_or_insert(now);
                quiet_since = quiet_since.filter(|_| quiet);
                (quiet && now - since > SILENCE).then_some(Phase::Judgement)
            }
            Phase::Start | Phase::Judgement => None,
        };
        if let Some(next) = next {
            tracing::info!(?next, ?now, "phase");
            if next == Phase::Judgement {
                replicas::check(shared);
                SERVERS.iter().for_each(|name| replicas::found_none_that_differs(shared, name));
            }
            shared.phase.set(next);
            phase_began = now;
        }
        if tick % LOOK_TICKS == 0 {
            epochs::serving(&mut serving, shared);
            isolated::check(shared);
        }
        if !shared.broken.borrow().is_empty() || sim.step()? {
            return Ok(());
        }
    }
    Ok(())
}
