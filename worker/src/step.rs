use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use downpour_data::{Encoded, Pool};
use tch::{Device, Kind, Tensor};
use tokio::sync::{mpsc, oneshot};

use crate::dense::DenseVariable;
use crate::grads::{Grads, TableGradient};
use crate::keys::unique;
use crate::pipeline::{Command, Loaded};
use crate::prepare::Prepared;
use crate::recorder::Recorder;
use crate::rows::Leaf;
use crate::{Error, NonFinite, OnNonFinite, Result, TableHandle};

/// A batch with its rows pulled: a value that [`Step::backward`] consumes, so that nothing of one step leaks into the next.
///
/// It belongs to the thread that took it from [`Steps::next`](crate::Steps::next), where autograd records. Dropping it skips it.
#[derive(Debug)]
pub struct Step {
    batch: Prepared,
    /// One for each table of the layout.
    leaves: Vec<Leaf>,
    lookups: RefCell<Vec<(TableHandle, Leaf)>>,
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
                Leaf::new(keys, &rows, table.dim(), context.device, context.trains)
            })
            .collect::<Result<_>>()?;
        Ok(Self { batch, leaves, lookups: RefCell::default(), clock, dense, context, ticket })
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
    /// is no key.
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
        let (leaf, bags) = (&self.leaves[feature.table], &self.batch.bags[index]);
        let rows = match feature.pool {
            Pool::Padded => leaf.padded(bags, feature.max_len),
            _ => leaf.pool(bags),
        };
        rows.unwrap_or_else(|error| {
            panic!("gather the rows of feature {:?}: {error}", feature.name)
        })
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
        let (.., mask) = self.batch.bags[index].padded(width);
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
        let (unique, positions) = unique(&[keys]);
        let (reply, answer) = oneshot::channel();
        let ask = Command::Lookup { table: table.clone(), keys: unique.clone(), reply };
        let gone = || Error::usage("the loop that this step belongs to has ended: see its error");
        self.ticket.commands.blocking_send(ask).map_err(|_| gone())?;
        let values = answer.blocking_recv().map_err(|_| gone())??;
        let leaf =
            Leaf::new(unique, &values, table.dim(), self.context.device, self.context.trains)?;
        let positions = Tensor::f_from_slice(&positions[0])?.f_to_device(self.context.device)?;
        let rows = leaf.rows.f_index_select(0, &positions)?;
        self.lookups.borrow_mut().push((table.clone(), leaf));
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
        let Step { batch, leaves, lookups, clock, dense, context, ticket } = self;
        let tables = batch.layout.tables.iter().cloned().zip(leaves).chain(lookups.into_inner());
        let leaves: Vec<(TableHandle, Leaf)> =
            tables.filter(|(_, leaf)| !leaf.keys.is_empty()).collect();
        let trained: Vec<usize> =
            (0..dense.len()).filter(|&i| dense[i].tensor.requires_grad()).collect();
        let inputs: Vec<&Tensor> = (leaves.iter().map(|(_, leaf)| &leaf.rows))
            .chain(trained.iter().map(|&i| &dense[i].tensor))
            .collect();
        let mut gradients = Tensor::f_run_backward(&[loss], &inputs, false, false)?;
        let of_dense = gradients.split_off(leaves.len());
        let dense: Vec<(String, _, Tensor)> = (trained.iter().zip(of_dense))
            .filter(|(_, gradient)| gradient.defined())
            .map(|(&i, gradient)| (dense[i].name.clone(), dense[i].id, gradient))
            .collect();
        let tables = (leaves.into_iter().zip(gradients))
            .filter(|(_, gradient)| gradient.defined())
            .map(|((table, leaf), gradient)| TableGradient { table, keys: leaf.keys, gradient })
            .collect();
        let tables = TableGradient::merge(tables)?;
        Ok(Grads::new(tables, dense, value, clock, batch.encoded, context, ticket))
    }
}

impl Ticket {
    pub(crate) fn new(commands: mpsc::Sender<Command>, open: Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self { commands, open, over: false }
    }

    /// Ends the step with this push.
    pub(crate) fn push(mut self, push: crate::pipeline::Push) {
        self.end(Command::Push(push));
    }

    fn end(&mut self, command: Command) {
        self.over = true;
        self.open.fetch_sub(1, Ordering::Relaxed);
        // The channel holds an end for every open step, so it is never full; closed means that the pipeline has failed, and
        // `next` says why.
        _ = self.commands.try_send(command);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.over {
            self.end(Command::Skip);
        }
    }
}
