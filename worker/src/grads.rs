use downpour_core::id::VariableId;
use downpour_data::Encoded;
use tch::{Kind, Tensor};

use crate::dense::floats;
use crate::keys::{UniqueKeys, unique};
use crate::pipeline::Push;
use crate::recorder::{GradientStats, StepRecord};
use crate::rows::add;
use crate::step::{Context, Ticket};
use crate::{NonFinite, Result, TableHandle};

/// Gradients of one step: to look at, to clip, to scale, and to push. Dropping them skips the step, if the loop goes on.
#[derive(Debug)]
pub struct Grads {
    ticket: Ticket,
    /// Nothing after a loss that was not finite, where such steps are skipped.
    step: Option<StepGradients>,
}

#[derive(Debug)]
struct StepGradients {
    tables: Vec<TableGradient>,
    dense: Vec<(String, VariableId, Tensor)>,
    loss: f64,
    clock: u64,
    batch: Encoded,
    context: Context,
}

/// The gradient of some rows of a table, a row for each key.
#[derive(Debug)]
pub(crate) struct TableGradient {
    pub(crate) table: TableHandle,
    pub(crate) keys: UniqueKeys,
    pub(crate) gradient: Vec<f32>,
}

/// What [`Grads::inspect`] shows of one variable.
#[derive(Debug)]
pub struct Gradient<'a> {
    /// Name of the variable.
    pub name: &'a str,
    /// Of a table: the keys, each once, one for each row of the tensor.
    pub keys: Option<&'a [u64]>,
    /// The gradient; that of a table is a copy on the CPU.
    pub tensor: Tensor,
}

impl Grads {
    pub(crate) fn new(
        tables: Vec<TableGradient>,
        dense: Vec<(String, VariableId, Tensor)>,
        loss: f64,
        clock: u64,
        batch: Encoded,
        context: Context,
        ticket: Ticket,
    ) -> Self {
        Self { ticket, step: Some(StepGradients { tables, dense, loss, clock, batch, context }) }
    }

    pub(crate) fn skipped(ticket: Ticket) -> Self {
        Self { ticket, step: None }
    }

    /// The gradient of each variable that the loss depended on: tables, then dense variables.
    pub fn inspect(&self) -> impl Iterator<Item = Gradient<'_>> {
        self.step.iter().flat_map(|step| {
            let tables = step.tables.iter().map(|t| Gradient {
                name: t.table.name(),
                keys: Some(&t.keys),
                tensor: Tensor::from_slice(&t.gradient).view([t.keys.len() as i64, -1]),
            });
            let dense = step.dense.iter().map(|(name, _, tensor)| Gradient {
                name,
                keys: None,
                tensor: tensor.shallow_clone(),
            });
            tables.chain(dense)
        })
    }

    /// Euclidean norm over all variables.
    #[must_use]
    pub fn norm(&self) -> f64 {
        let Some(step) = &self.step else { return 0.0 };
        let tables = step.tables.iter().map(|table| {
            let mut stats = GradientStats::default();
            stats.add(&table.gradient);
            stats.squares()
        });
        let dense = step
            .dense
            .iter()
            .map(|(.., tensor)| tensor.square().sum(Kind::Double).double_value(&[]));
        tables.chain(dense).sum::<f64>().sqrt()
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale(&mut self, factor: f64) {
        if let Some(step) = &mut self.step {
            for table in &mut step.tables {
                table.gradient.iter_mut().for_each(|g| *g *= factor as f32);
            }
            for (_, _, gradient) in &mut step.dense {
                *gradient = &*gradient * factor;
            }
        }
    }

    /// Scales all gradients together so that [`Grads::norm`] is at most `norm_max`; returns the norm that they had.
    pub fn clip_norm(&mut self, norm_max: f64) -> f64 {
        let norm = self.norm();
        if norm > norm_max {
            self.scale(norm_max / norm);
        }
        norm
    }

    /// Hands the gradients to the pipeline, which sends them in the background; what goes wrong there is told by
    /// [`Steps::next`](crate::Steps::next).
    pub fn push(self) -> Result<()> {
        let Some(step) = self.step else { return Ok(()) };
        let mut push = Push { clock: step.clock, ..Push::default() };
        let (mut tables, mut dense) = <(GradientStats, GradientStats)>::default();
        let mut not_finite = None;
        for TableGradient { table, keys, gradient } in step.tables {
            if tables.add(&gradient) > 0 {
                not_finite.get_or_insert_with(|| table.name().to_owned());
            }
            push.rows.push((table.id(), keys, gradient));
        }
        for (name, id, gradient) in step.dense {
            let gradient = floats(&gradient)?;
            if dense.add(&gradient) > 0 {
                not_finite.get_or_insert(name);
            }
            push.dense.push((id, gradient));
        }
        // Rows of a step that is not pushed are not trained.
        let samples = if not_finite.is_none() { step.batch.rows() as u64 } else { 0 };
        let context = step.context;
        let record = StepRecord { clock: step.clock, samples, loss: step.loss, tables, dense };
        context.recorder.borrow_mut().step(&record);
        if let Some(what) = not_finite {
            let (loss, clock) = (step.loss, step.clock);
            let fault = NonFinite { what, loss, clock, batch: step.batch };
            return context.on_nonfinite.decide(fault, &context.recorder);
        }
        self.ticket.push(push);
        Ok(())
    }
}

impl TableGradient {
    /// Gradients of the same table into one, with each key once.
    pub(crate) fn merge(all: Vec<Self>) -> Vec<Self> {
        let mut by_table: Vec<Vec<Self>> = Vec::new();
        for one in all {
            match by_table.iter_mut().find(|same| same[0].table.id() == one.table.id()) {
                Some(same) => same.push(one),
                None => by_table.push(vec![one]),
            }
        }
        by_table.into_iter().map(Self::sum).collect()
    }

    fn sum(mut same: Vec<Self>) -> Self {
        if same.len() == 1 {
            return same.remove(0);
        }
        let lists: Vec<&[u64]> = same.iter().map(|one| one.keys.as_slice()).collect();
        let (keys, positions) = unique(same[0].table.arrangement(), &lists);
        let dim = same[0].table.dim() as usize;
        let mut gradient = vec![0.0; keys.len() * dim];
        for (one, positions) in same.iter().zip(positions) {
            for (row, position) in one.gradient.chunks_exact(dim).zip(positions) {
                add(&mut gradient[position as usize * dim..][..dim], row, 1.0);
            }
        }
        Self { table: same.remove(0).table, keys, gradient }
    }
}
