//! Who pushes: the probe of `psctl verify`, and a trainer whose rows have optimizer slots.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use downpour_client::{Job, PushBatch, RowGradients, Session, SessionOptions};
use downpour_core::init::Init;
use downpour_core::optimizer::{Adagrad, OptimizerSpec};
use downpour_core::spec::{Shape, TableSpec, VariableSpec};
use downpour_psctl::probe::Probe;
use tokio::time::sleep;

use crate::cluster;
use crate::draw::Draw;
use crate::shared::{Phase, Shared, count};

/// Before another attempt to join.
const PAUSE: Duration = Duration::from_millis(200);
/// Most pushes that one client makes without a rest.
const BURST_MAX: u64 = 16;
/// Rows of the trainer: few, so that pushes meet while a copy of them is made.
const TRAINED_ROWS: u64 = 64;
pub(crate) const TRAINED: &str = "sim/trained";
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

/// Pushes gradients of 1, so that the slot of a row tells how often it was updated and so what its weight must be.
pub(crate) async fn trainer(shared: Rc<Shared>) -> turmoil::Result {
    let coordinators = cluster::coordinators();
    let job = Job::Create(cluster::job(&shared));
    let (session, table) = loop {
        let options = SessionOptions::worker("trainer");
        let Ok(session) = Session::open(&coordinators, &job, options).await else {
            sleep(PAUSE).await;
            continue;
        };
        match session.define(&[trained_table()]).await {
            Ok(defined) => break (session, defined[0].variable.id),
            Err(_) => sleep(PAUSE).await,
        }
    };
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
        let pushed = session.push(&PushBatch { clock, rows, ..PushBatch::default() }).await;
        if let Ok(ticket) = pushed {
            // What becomes of it shows in the rows.
            _ = ticket.await;
        }
        sleep(draw.millis(1, 40)).await;
    }
    count(&shared.quiet);
    shared.wait_for(Phase::Judgement).await;
    Ok(())
}
