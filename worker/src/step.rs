use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use downpour_data::{Encoded, Pool};
use tch::{Device, Kind, Tensor};
use tokio::sync::{mpsc, oneshot};

use crate::dense::DenseVariable;
use crate::grads::{Grads, TableGradient};
use crate::keys::{Bags, unique};
use crate::pipeline::{Command, Loaded};
use crate::prepare::Prepared;
use crate::recorder::Recorder;
use crate::rows::{Gather, Leaf};
use crate::{Error, NonFinite, OnNonFinite, Result, TableHandle};

/// A batch with its rows pulled: a value that [`Step::backward`] consumes, so that nothing of one step leaks into the next.
///
/// It belongs to the thread that took it from [`Steps::next`](crate::Steps::next), where autograd records. Dropping it skips it, if the loop goes on.
#[derive(Debug)]
pub struct Step {
    batch: Prepared,
    /// One for each table of the layout.
    leaves: Vec<Leaf>,
    /// One for each feature.
    gathers: Vec<Gather>,
    lookups: RefCell<Vec<(TableHandle, Leaf, Gather)>>,
    clock: u64,
    dense: Rc<[DenseVariable]>,
    context: Context,
    ticket: Ticket,
}

/// What every step of a loop shares.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) device: Device,
    /// Gradients are wanted.
    pub(crate) trains: bool,
    pub(crate) on_nonfinite: OnNonFinite,
    pub(crate) recorder: Rc<RefCell<Recorder>>,
}

/// The obligation to tell the pipeline how a step ended, exactly once.
#[derive(Debug)]
pub(crate) struct Ticket {
    commands: mpsc::Sender<Command>,
    /// How many steps are open.
    open: Arc<AtomicUsize>,
    /// Steps that were dropped. Only who goes on means it: after an error, or a panic, their rows are not trained.
    skipped: Rc<RefCell<Vec<u64>>>,
    clock: u64,
    over: bool,
}

impl Step {
    pub(crate) fn new(
        loaded: Loaded,
        clock: u64,
        dense: Rc<[DenseVariable]>,
        context: Context,
        ticket: Ticket,
    ) -> Result<Self> {
        let Loaded { prepared: mut batch, rows, .. } = loaded;
        let tables = batch.layout.tables.iter().zip(std::mem::take(&mut batch.keys)).zip(rows);
        let leaves = tables
            .map(|((table, keys), rows)| {
                Leaf::new(keys, rows, table.dim(), context.device, context.trains)
            })
            .collect::<Result<_>>()?;
        let features = batch.layout.features.iter().zip(std::mem::take(&mut batch.bags));
        let gathers = features
            .map(|(feature, bags)| {
                Gather::new(bags, (feature.pool == Pool::Padded).then_some(feature.max_len))
            })
            .collect();
        let lookups = RefCell::default();
        Ok(Self { batch, leaves, gathers, lookups, clock, dense, context, ticket })
    }

    /// Steps that this worker had finished before.
    #[must_use]
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// Rows of the batch.
    #[must_use]
    pub fn len(&self) -> usize {
        self.batch.encoded.rows()
    }

    /// No batch is empty; here for completeness.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of the features, as [`Step::rows`] takes them.
    pub fn features(&self) -> impl Iterator<Item = &str> {
        self.batch.layout.features.iter().map(|feature| feature.name.as_str())
    }

    /// The batch as it was read: keys, numbers, labels, and where its rows came from.
    #[must_use]
    pub fn batch(&self) -> &Encoded {
        &self.batch.encoded
    }

    /// The value of a feature: `[batch, dim]`, a bag pooled; or, for a padded feature, `[batch, max_len, dim]`. Zeros where there
    /// is no key. Every call gives the same tensor, which autograd begins with: it cannot be changed in place.
    ///
    /// # Panics
    ///
    /// When no feature has this name, or LibTorch is out of memory.
    pub fn rows(&self, feature: &str) -> Tensor {
        self.rows_at(self.batch.layout.feature(feature))
    }

    /// [`Step::rows`] of the feature with this index, in the order of [`Step::features`].
    ///
    /// # Panics
    ///
    /// As [`Step::rows`].
    pub fn rows_at(&self, index: usize) -> Tensor {
        let feature = &self.batch.layout.features[index];
        self.leaves[feature.table].gather(&self.gathers[index]).unwrap_or_else(|error| {
            panic!("gather the rows of feature {:?}: {error}", feature.name)
        })
    }

    /// The floats of [`Step::rows_at`] cut into tensors of so many each, `[.., widths[i]]`: cheaper than cutting them afterwards, because
    /// neither they nor their gradients are put together in between.
    ///
    /// # Panics
    ///
    /// When the widths are not those of a row together, or LibTorch is out of memory.
    pub fn split_rows_at(&self, index: usize, widths: &[usize]) -> Vec<Tensor> {
        let feature = &self.batch.layout.features[index];
        let dim = self.batch.layout.tables[feature.table].dim() as usize;
        let sum: usize = widths.iter().sum();
        assert!(sum == dim, "{widths:?} are not the {dim} floats of feature {:?}", feature.name);
        let mut start = 0;
        let part = |&width: &usize| {
            let floats = start..start + width;
            start += width;
            let part = self.leaves[feature.table].gather_floats(&self.gathers[index], floats);
            part.unwrap_or_else(|error| {
                panic!("gather the rows of feature {:?}: {error}", feature.name)
            })
        };
        widths.iter().map(part).collect()
    }

    /// `[batch, max_len]`: 1 where a padded feature has a key, 0 elsewhere.
    ///
    /// # Panics
    ///
    /// When no padded feature has this name.
    pub fn mask(&self, feature: &str) -> Tensor {
        let index = self.batch.layout.feature(feature);
        let width = self.batch.layout.features[index].max_len;
        assert!(width > 0, "feature {feature:?} is not padded: it has no mask");
        let (.., mask) = self.gathers[index].bags.padded(width);
        self.tensor(&mask).view([self.len() as i64, width as i64])
    }

    /// `[batch, numbers]`.
    pub fn dense(&self) -> Tensor {
        self.tensor(&self.batch.encoded.numbers).view([self.len() as i64, -1])
    }

    /// `[batch]`, or `[batch, labels]` where there are several.
    pub fn labels(&self) -> Tensor {
        let labels = self.tensor(&self.batch.encoded.labels);
        match self.batch.layout.schema.labels().len() {
            0 | 1 => labels,
            several => labels.view([self.len() as i64, several as i64]),
        }
    }

    /// `[batch]`; ones where the features name no weight.
    pub fn weights(&self) -> Tensor {
        match self.batch.encoded.weights.as_slice() {
            [] => Tensor::ones([self.len() as i64], (Kind::Float, self.context.device)),
            weights => self.tensor(weights),
        }
    }

    fn tensor(&self, values: &[f32]) -> Tensor {
        Tensor::from_slice(values).to_device(self.context.device)
    }

    /// Rows of keys that only this step knows, `[keys, dim]`, in their order. Equal keys, also those of features on the same table,
    /// are one push in the end.
    pub fn lookup(&self, table: &TableHandle, keys: &[u64]) -> Result<Tensor> {
        let (unique, mut positions) = unique(table.arrangement(), &[keys]);
        let (reply, answer) = oneshot::channel();
        let ask = Command::Lookup { table: table.clone(), keys: unique.clone(), reply };
        let gone = || Error::usage("the loop that this step belongs to has ended: see its error");
        self.ticket.commands.blocking_send(ask).map_err(|_| gone())?;
        let values = answer.blocking_recv().map_err(|_| gone())??;
        let leaf =
            Leaf::new(unique, values, table.dim(), self.context.device, self.context.trains)?;
        let gather = Gather::new(Bags::single(positions.remove(0)), None);
        let rows = leaf.gather(&gather)?;
        self.lookups.borrow_mut().push((table.clone(), leaf, gather));
        Ok(rows)
    }

    /// Gradients of `loss`, a scalar, for every variable that it depends on. A variable that this step did not use has none and
    /// will not be pushed; a row that it looked up will, also when its gradient is zero.
    ///
    /// A loss that is not finite is an error, or a skipped step: see [`OnNonFinite`].
    pub fn backward(self, loss: &Tensor) -> Result<Grads> {
        let value = loss.f_double_value(&[]).map_err(|_| {
            Error::usage(format!("the loss must be one number, not a tensor of {:?}", loss.size()))
        })?;
        if !value.is_finite() {
            let Step { batch, clock, context, ticket, .. } = self;
            let fault = NonFinite { what: "loss".into(), loss: value, clock, batch: batch.encoded };
            context.on_nonfinite.decide(fault, &context.recorder)?;
            return Ok(Grads::skipped(ticket));
        }
        if !loss.requires_grad() {
            return Err(Error::usage("the loss depends on no variable: nothing to train"));
        }
        let Step { batch, leaves, gathers, lookups, clock, dense, context, ticket } = self;
        let lookups = lookups.into_inner();
        // Each leaf with its table and all that was gathered from it.
        let of_leaf = |leaf: usize| {
            let features = batch.layout.features.iter().zip(&gathers);
            features.filter(move |(feature, _)| feature.table == leaf).map(|(_, gather)| gather)
        };
        let sources: Vec<(&TableHandle, &Leaf, Vec<&Gather>)> =
            (batch.layout.tables.iter().zip(&leaves).enumerate())
                .map(|(i, (table, leaf))| (table, leaf, of_leaf(i).collect()))
                .chain(lookups.iter().map(|(table, leaf, gather)| (table, leaf, vec![gather])))
                .collect();
        let trained: Vec<&DenseVariable> =
            dense.iter().filter(|variable| variable.tensor.requires_grad()).collect();
        let of_tables = sources.iter().map(|(_, leaf, gathers)| leaf.inputs(gathers));
        let of_tables: Vec<Vec<Tensor>> = of_tables.collect();
        let inputs: Vec<&Tensor> = (of_tables.iter().flatten())
            .chain(trained.iter().map(|variable| &variable.tensor))
            .collect();
        let gradients = Tensor::f_run_backward(&[loss], &inputs, false, false)?;
        let mut rest = gradients.as_slice();
        let mut tables = Vec::new();
        for ((table, leaf, gathers), inputs) in sources.iter().zip(&of_tables) {
            let (own, others) = rest.split_at(inputs.len());
            rest = others;
            if let Some(gradient) = leaf.gradient(gathers, own)? {
                let (table, keys) = ((*table).clone(), leaf.keys.clone());
                tables.push(TableGradient { table, keys, gradient });
            }
        }
        let dense: Vec<(String, _, Tensor)> = (trained.iter().zip(rest))
            .filter(|(_, gradient)| gradient.defined())
            .map(|(variable, gradient)| {
                (variable.name.clone(), variable.id, gradient.shallow_clone())
            })
            .collect();
        let tables = TableGradient::merge(tables);
        Ok(Grads::new(tables, dense, value, clock, batch.encoded, context, ticket))
    }
}

impl Ticket {
    pub(crate) fn new(
        commands: mpsc::Sender<Command>,
        open: Arc<AtomicUsize>,
        skipped: Rc<RefCell<Vec<u64>>>,
        clock: u64,
    ) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self { commands, open, skipped, clock, over: false }
    }

    /// Ends the step with this push.
    pub(crate) fn push(mut self, push: crate::pipeline::Push) {
        self.over = true;
        self.open.fetch_sub(1, Ordering::Relaxed);
        // The channel holds an end for every open step, so it is never full; closed means that the pipeline has failed, and
        // `next` says why.
        _ = self.commands.try_send(Command::Push(push));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.over {
            self.open.fetch_sub(1, Ordering::Relaxed);
            self.skipped.borrow_mut().push(self.clock);
        }
    }
}
