//! Who pushes: the probe of `psctl verify`, and a trainer whose rows have optimizer slots.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use downpour_client::{
    Defined, DenseTensor, Error, Job, PushBatch, RowGradients, Session, SessionOptions,
};
use downpour_core::id::VariableId;
use downpour_core::init::Init;
use downpour_core::optimizer::{Adagrad, OptimizerSpec, Sgd};
use downpour_core::routing::shard_of;
use downpour_core::spec::{DenseSpec, Shape, TableSpec, VariableSpec};
use downpour_psctl::probe::Probe;
use tokio::time::sleep;

use crate::cluster;
use crate::draw::Draw;
use crate::shared::{Dense, Phase, Shared, count};

/// Before another attempt to join.
const PAUSE: Duration = Duration::from_millis(200);
/// Most pushes that one client makes without a rest.
const BURST_MAX: u64 = 16;
/// Rows of the trainer: few, so that pushes meet while a copy of them is made.
const TRAINED_ROWS: u64 = 64;
pub(crate) const TRAINED: &str = "sim/trained";
const COUNTED: &str = "sim/counted";
pub(crate) const ADAGRAD: Adagrad =
    Adagrad { learning_rate: 0.5, epsilon: 0.0, initial_accumulator: 1.0 };

/// A client of the probe: pushes in bursts while things go wrong, and counts in the end.
pub(crate) async fn probe(shared: Rc<Shared>, index: u64) -> turmoil::Result {
    let coordinators = cluster::coordinators();
    let mut probe = loop {
        match Probe::join(&coordinators, &cluster::job(&shared), index).await {
            Ok(probe) => break probe,
            Err(error) => {
                tracing::info!("the probe does not join yet: {error:#}");
                sleep(PAUSE).await;
            }
        }
    };
    count(&shared.joined);
    shared.wait_for(Phase::Faults).await;
    let mut draw = Draw::new(shared.seed, 100 + index);
    let acknowledged = Cell::new(0);
    while shared.phase.get() == Phase::Faults {
        let (before, burst) = (acknowledged.get(), 1 + draw.below(BURST_MAX));
        let pushed = probe.push_until(|tally| {
            acknowledged.set(tally.acknowledged);
            tally.acknowledged >= before + burst
        });
        pushed.await?;
        shared.acknowledged.set(shared.acknowledged.get() + acknowledged.get() - before);
        sleep(draw.millis(10, 200)).await;
    }
    count(&shared.quiet);
    shared.wait_for(Phase::Judgement).await;
    if index == 0 {
        *shared.counters.borrow_mut() = probe.counters().await?;
    }
    let tally = probe.verify().await?;
    shared.tallies.borrow_mut().push(tally);
    Ok(())
}

fn trained_table() -> VariableSpec {
    VariableSpec {
        name: TRAINED.into(),
        optimizer: OptimizerSpec::Adagrad(ADAGRAD),
        shape: Shape::Table(TableSpec::new(1, Init::Zeros, TRAINED)),
    }
}

/// Its blocks lie on several shards, and the last one is smaller.
fn counted_tensor() -> VariableSpec {
    let dense = DenseSpec { shape: vec![7], block_floats: 2 };
    VariableSpec {
        name: COUNTED.into(),
        optimizer: OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 }),
        shape: Shape::Dense(dense),
    }
}

/// Joins with both variables, the dense one with zeros as its first values.
async fn join(shared: &Shared) -> Result<(Session, Vec<Defined>), Error> {
    let job = Job::Create(cluster::job(shared));
    let options = SessionOptions::worker("trainer");
    let session = Session::open(&cluster::coordinators(), &job, options).await?;
    let defined = session.define(&[trained_table(), counted_tensor()]).await?;
    let dense = defined[1].variable.id;
    if defined[1].initializer {
        let values = vec![DenseTensor { variable: dense, floats: &[0.0; 7] }];
        session.push(&PushBatch { values, ..PushBatch::default() }).await?.await?;
        session.mark_initialized(&[dense]).await?;
    }
    Ok((session, defined))
}

/// What the tensor should be and is.
async fn read_back(
    session: &Session,
    variable: VariableId,
    (acknowledged, unknown): (u64, u64),
) -> Result<Dense, Error> {
    let spec = counted_tensor();
    let Shape::Dense(dense) = &spec.shape else { unreachable!("it is dense") };
    let mut cache = session.dense_cache(&[variable])?;
    session.pull(&mut [], Some(&mut cache)).await?;
    let values = cache.values(variable).unwrap_or_default();
    let (salt, shards) = (spec.routing_salt(), cluster::SHARDS);
    let blocks = values.chunks(dense.block_floats as usize).zip(0u64..);
    let blocks = blocks.map(|(values, block)| (shard_of(block, salt, shards), values.to_vec()));
    let mut rolled_back = BTreeMap::new();
    for one in session.rolled_back() {
        // The first values are a push too, and lost they are given again.
        *rolled_back.entry(one.shard).or_default() += one.last + 1 - one.first;
    }
    Ok(Dense { blocks: blocks.collect(), acknowledged, unknown, rolled_back })
}

/// Pushes gradients of 1, so that the slot of a row tells how often it was updated and so what its weight must be.
pub(crate) async fn trainer(shared: Rc<Shared>) -> turmoil::Result {
    let (session, defined) = loop {
        match join(&shared).await {
            Ok(joined) => break joined,
            Err(error) => {
                tracing::info!("the trainer does not join yet: {error}");
                sleep(PAUSE).await;
            }
        }
    };
    let (table, tensor) = (defined[0].variable.id, defined[1].variable.id);
    let (mut acknowledged, mut unknown) = (0, 0);
    count(&shared.joined);
    shared.wait_for(Phase::Faults).await;
    let mut draw = Draw::new(shared.seed, 200);
    let mut clock = 0;
    while shared.phase.get() == Phase::Faults {
        clock += 1;
        let mut keys: Vec<u64> = (0..8).map(|_| draw.below(TRAINED_ROWS)).collect();
        keys.sort_unstable();
        keys.dedup();
        let gradients = vec![1.0; keys.len()];
        let rows = vec![RowGradients { variable: table, keys: &keys, gradients: &gradients }];
        let dense = vec![DenseTensor { variable: tensor, floats: &[-1.0; 7] }];
        let batch = PushBatch { clock, rows, dense, ..PushBatch::default() };
        // Nothing was sent of what is refused at once.
        if let Ok(ticket) = session.push(&batch).await {
            let told = if ticket.await.is_ok() { &mut acknowledged } else { &mut unknown };
            *told += 1;
        }
        sleep(draw.millis(1, 40)).await;
    }
    count(&shared.quiet);
    shared.wait_for(Phase::Judgement).await;
    let read = read_back(&session, tensor, (acknowledged, unknown)).await?;
    *shared.dense.borrow_mut() = Some(read);
    Ok(())
}
