//! Fills a store, and asks it and the floor for the same rows in turn.

use std::collections::HashSet;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::BytesMut;
use downpour_core::mix::mix64;
use downpour_core::routing::shard_of;
use downpour_proto::tensor::{KEY_BYTES, Keys};
use rustix::time::{ClockId, clock_gettime};

use super::floor::Floor;
use super::report::{Measured, Rate};
use super::stores::{Boxes, Indexed, Inline, Rules, Store, Winner};
use super::{Args, Ids, Variant};
use crate::arena::Arena;
use crate::memory::resident_bytes;

/// As many as a job has where nothing else is said.
pub(super) const SHARDS: usize = 64;
/// New keys of one push while the store grows.
const GROWTH_KEYS: usize = 256;
const ROUTING_SALT: u64 = 7;

/// Measures one variant in this process.
pub(super) fn measure(args: &Args) -> anyhow::Result<Measured> {
    let rules = Rules { dim: args.dim as usize, optimizer: args.optimizer() };
    if args.variant == Variant::WinnerSmallPages {
        rustix::thread::disable_transparent_huge_pages(true).context("turn huge pages off")?;
    }
    match args.variant {
        Variant::All | Variant::Winner | Variant::WinnerSmallPages => {
            measure_store(args, rules, &Winner::new(rules))
        }
        Variant::Dashmap => measure_store(args, rules, &Boxes::new(rules)),
        Variant::Hashbrown => measure_store(args, rules, &Indexed::<Inline, false>::new(rules)),
        Variant::HashbrownPrefetch => {
            measure_store(args, rules, &Indexed::<Inline, true>::new(rules))
        }
        Variant::HashbrownPool => measure_store(args, rules, &Indexed::<Arena, true>::new(rules)),
    }
}

fn measure_store(args: &Args, rules: Rules, store: &dyn Store) -> anyhow::Result<Measured> {
    let floats = rules.dim + rules.optimizer.state_width(rules.dim);
    let before = resident_bytes()?;
    let growth = fill(args, store);
    let row_bytes = (resident_bytes()? as f64 - before as f64) / f64::from(args.rows);
    // Floor and batches come after the memory was looked at. The floor may have its huge pages in any case.
    if args.variant == Variant::WinnerSmallPages {
        rustix::thread::disable_transparent_huge_pages(false).context("turn huge pages on")?;
    }
    let mut samples = run_threads(args, store).into_iter();
    let mut rate = || {
        let seconds = samples.next().unwrap_or_default();
        let rows = f64::from(args.batch) * f64::from(args.batches);
        Rate::of(seconds.into_iter().map(|seconds| rows / seconds).collect())
    };
    let (gather, lookups, scatter, updates) = (rate(), rate(), rate(), rate());
    Ok(Measured {
        variant: args.variant.name(),
        lookup_share: lookups.median / gather.median,
        update_share: updates.median / scatter.median,
        gather_rows_s: gather,
        scatter_rows_s: scatter,
        lookups_s: lookups,
        updates_s: updates,
        row_overhead_bytes: row_bytes - (floats * size_of::<f32>()) as f64,
        pause_max_ms: growth.longest.as_secs_f64() * 1e3,
        pause_p999_ms: growth.p999.as_secs_f64() * 1e3,
        pause_max_cpu_ms: growth.longest_cpu.as_secs_f64() * 1e3,
        insert_ns: growth.cpu.as_secs_f64() * 1e9 / f64::from(args.rows),
    })
}

/// The key of a row, which scatters ids over the shards.
fn key_of(id: u64) -> u64 {
    mix64(id)
}

fn shard_of_key(key: u64) -> usize {
    shard_of(key, ROUTING_SALT, SHARDS as u32).0 as usize
}

/// How a store behaved while it grew.
struct Growth {
    longest: Duration,
    longest_cpu: Duration,
    p999: Duration,
    cpu: Duration,
}

/// Creates all rows by pushes of [`GROWTH_KEYS`] to one shard each, and times every single one.
fn fill(args: &Args, store: &dyn Store) -> Growth {
    let gradients = gradients(GROWTH_KEYS * args.dim as usize);
    let mut waiting: Vec<Vec<u64>> = (0..SHARDS).map(|_| Vec::with_capacity(GROWTH_KEYS)).collect();
    let mut raw = Vec::with_capacity(GROWTH_KEYS * KEY_BYTES);
    let mut pauses = Vec::with_capacity(args.rows as usize / GROWTH_KEYS + SHARDS);
    let mut growth = Growth {
        longest: Duration::ZERO,
        longest_cpu: Duration::ZERO,
        p999: Duration::ZERO,
        cpu: Duration::ZERO,
    };
    let mut push = |shard: usize, keys: &mut Vec<u64>| {
        keys.sort_unstable();
        raw.clear();
        raw.extend(keys.iter().flat_map(|key| key.to_le_bytes()));
        let (started, started_cpu) = (Instant::now(), cpu_time());
        store.push(
            shard,
            Keys::trusted(&raw),
            &gradients[..raw.len() / KEY_BYTES * args.dim as usize * 4],
        );
        let (pause, cpu) = (started.elapsed(), cpu_time() - started_cpu);
        pauses.push(pause);
        growth.longest_cpu = growth.longest_cpu.max(cpu);
        growth.cpu += cpu;
        keys.clear();
    };
    for id in 0..u64::from(args.rows) {
        let key = key_of(id);
        let shard = shard_of_key(key);
        waiting[shard].push(key);
        if waiting[shard].len() == GROWTH_KEYS {
            push(shard, &mut waiting[shard]);
        }
    }
    for (shard, keys) in waiting.iter_mut().enumerate().filter(|(_, keys)| !keys.is_empty()) {
        push(shard, keys);
    }
    pauses.sort_unstable();
    growth.longest = pauses.last().copied().unwrap_or_default();
    growth.p999 = pauses.get(pauses.len() * 999 / 1000).copied().unwrap_or_default();
    growth
}

/// Different keys by shard, rising, and the places of their rows in the floor in the same order.
struct Batch {
    keys: Vec<u8>,
    /// Where the keys of each shard end.
    ends: Vec<usize>,
    places: Vec<u32>,
}

impl Batch {
    fn new(args: &Args, random: &mut impl FnMut() -> u64) -> Self {
        let rows = u64::from(args.rows);
        let mut ids = HashSet::with_capacity(args.batch as usize);
        while ids.len() < args.batch as usize {
            let unit = (random() >> 11) as f64 / (1u64 << 53) as f64;
            ids.insert(match args.ids {
                Ids::Uniform => random() % rows,
                Ids::Zipf => {
                    // By inverting the integral of 1/x; the hot ids are scattered over the rows.
                    let rank = ((rows as f64).powf(unit) as u64).min(rows - 1);
                    mix64(rank) % rows
                }
            });
        }
        let mut keys: Vec<(usize, u64, u32)> =
            ids.into_iter().map(|id| (shard_of_key(key_of(id)), key_of(id), id as u32)).collect();
        keys.sort_unstable();
        let end = |shard| keys.partition_point(|(other, ..)| *other <= shard);
        Batch {
            ends: (0..SHARDS).map(end).collect(),
            places: keys.iter().map(|(.., id)| *id).collect(),
            keys: keys.iter().flat_map(|(_, key, _)| key.to_le_bytes()).collect(),
        }
    }

    /// Shard, its first key and its keys.
    fn shards(&self) -> impl Iterator<Item = (usize, usize, Keys<'_>)> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).enumerate().map(|(shard, (start, &end))| {
            (shard, start, Keys::trusted(&self.keys[start * KEY_BYTES..end * KEY_BYTES]))
        })
    }
}

/// Seconds of CPU time of each repeat: gather, lookups, scatter, updates; the mean over the threads.
fn run_threads(args: &Args, store: &dyn Store) -> Vec<Vec<f64>> {
    let barrier = Barrier::new(args.threads as usize);
    let of_threads: Vec<[Vec<f64>; 4]> = std::thread::scope(|scope| {
        let spawn = |thread| {
            let barrier = &barrier;
            scope.spawn(move || run_thread(args, store, thread, barrier))
        };
        let threads: Vec<_> = (0..args.threads).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread that measures")).collect()
    });
    let mean = |kind: usize, repeat: usize| {
        let seconds = of_threads.iter().map(|samples| samples[kind][repeat]);
        seconds.sum::<f64>() / of_threads.len() as f64
    };
    (0..4)
        .map(|kind| (0..args.repeats as usize).map(|repeat| mean(kind, repeat)).collect())
        .collect()
}

fn run_thread(args: &Args, store: &dyn Store, thread: u32, barrier: &Barrier) -> [Vec<f64>; 4] {
    let dim = args.dim as usize;
    let mut state = mix64(args.seed ^ mix64(u64::from(thread) + 1));
    let mut random = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix64(state)
    };
    let batches: Vec<Batch> = (0..args.batches).map(|_| Batch::new(args, &mut random)).collect();
    let mut floor = Floor::new(args.rows as usize, dim);
    let gradients = gradients(args.batch as usize * dim);
    let mut gathered = vec![0.0; args.batch as usize * dim];
    let mut out = BytesMut::with_capacity(gathered.len() * size_of::<f32>());
    let mut samples: [Vec<f64>; 4] = Default::default();
    let mut timed = |kind: usize, warm_up: bool, work: &mut dyn FnMut(&Batch)| {
        barrier.wait();
        let started = cpu_time();
        batches.iter().for_each(work);
        if !warm_up {
            samples[kind].push((cpu_time() - started).as_secs_f64());
        }
    };
    for repeat in 0..=args.repeats {
        let warm_up = repeat == 0;
        timed(0, warm_up, &mut |batch| {
            floor.gather(&batch.places, &mut gathered);
            std::hint::black_box(&gathered);
        });
        timed(1, warm_up, &mut |batch| {
            out.clear();
            batch.shards().for_each(|(shard, _, keys)| store.pull(shard, keys, &mut out));
            std::hint::black_box(&out);
        });
        timed(2, warm_up, &mut |batch| floor.scatter(&batch.places, &gradients, 0.1));
        timed(3, warm_up, &mut |batch| {
            for (shard, start, keys) in batch.shards() {
                let gradients = &gradients[start * dim * size_of::<f32>()..];
                store.push(shard, keys, &gradients[..keys.len() * dim * size_of::<f32>()]);
            }
        });
    }
    samples
}

fn gradients(count: usize) -> Vec<u8> {
    (0..count).flat_map(|_| 0.01f32.to_le_bytes()).collect()
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
