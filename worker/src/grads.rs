use downpour_core::id::VariableId;
use downpour_data::Encoded;
use tch::{Kind, Tensor};

use crate::dense::floats;
use crate::keys::{UniqueKeys, unique};
use crate::pipeline::Push;
use crate::recorder::{GradientStats, StepRecord};
use crate::step::{Context, Ticket};
use crate::{NonFinite, Result, TableHandle};

/// Gradients of one step: to look at, to clip, to scale, and to push. Dropping them skips the step.
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

/// The gradient of some rows of a table, `[keys, dim]`.
#[derive(Debug)]
pub(crate) struct TableGradient {
    pub(crate) table: TableHandle,
    pub(crate) keys: UniqueKeys,
    pub(crate) gradient: Tensor,
}

/// What [`Grads::inspect`] shows of one variable.
#[derive(Debug)]
pub struct Gradient<'a> {
    /// Name of the variable.
    pub name: &'a str,
    /// Of a table: the keys, rising, one for each row of the tensor.
    pub keys: Option<&'a [u64]>,
    /// The gradient.
    pub tensor: &'a Tensor,
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
                tensor: &t.gradient,
            });
            let dense =
                step.dense.iter().map(|(name, _, tensor)| Gradient { name, keys: None, tensor });
            tables.chain(dense)
        })
    }

    /// Euclidean norm over all variables.
    #[must_use]
    pub fn norm(&self) -> f64 {
        let squares = self
            .inspect()
            .map(|gradient| gradient.tensor.square().sum(Kind::Double).double_value(&[]));
        squares.sum::<f64>().sqrt()
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale(&mut self, factor: f64) {
        if let Some(step) = &mut self.step {
            for table in &mut step.tables {
                table.gradient = &table.gradient * factor;
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
            let gradient = floats(&gradient)?;
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
    pub(crate) fn merge(all: Vec<Self>) -> Result<Vec<Self>> {
        let mut by_table: Vec<Vec<Self>> = Vec::new();
        for one in all {
            match by_table.iter_mut().find(|same| same[0].table.id() == one.table.id()) {
                Some(same) => same.push(one),
                None => by_table.push(vec![one]),
            }
        }
        by_table.into_iter().map(Self::sum).collect()
    }

    fn sum(mut same: Vec<Self>) -> Result<Self> {
        if same.len() == 1 {
            return Ok(same.remove(0));
        }
        let lists: Vec<&[u64]> = same.iter().map(|one| one.keys.as_slice()).collect();
        let (keys, positions) = unique(&lists);
        let first = &same[0].gradient;
        let shape = [keys.len() as i64, first.size()[1]];
        let mut gradient = Tensor::f_zeros(shape, (first.f_kind()?, first.device()))?;
        for (one, positions) in same.iter().zip(positions) {
            let positions = Tensor::f_from_slice(&positions)?.f_to_device(gradient.device())?;
            gradient = gradient.f_index_add(0, &positions, &one.gradient)?;
        }
        Ok(Self { table: same.remove(0).table, keys, gradient })
    }
}
