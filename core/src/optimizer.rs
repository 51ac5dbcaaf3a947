//! The arithmetic that a shard applies to a row (or a dense block) when a gradient arrives.
//!
//! Follow one push: the primary evaluates [`OptimizerSpec::scalars`] once per update and writes them into the log record;
//! every replica builds an [`Update`] from the variable's definition and the record's scalars, and calls [`Update::apply`] for
//! each row with the gradient's bytes where they arrived. `row` has the loop over a row's elements, and each optimizer's file what
//! becomes of one element.
//!
//! # Bit identity
//!
//! A backup applies gradients itself, so each kernel gives the same bits on every machine: + − × ÷ √ on f32 in the order
//! written, no fused multiply-add, no reciprocal approximation, no math library; the one reduction (sums of squares over a row, of
//! [`RowwiseAdagrad`] and of clipping) has a fixed lane order. The compiler neither contracts nor reassociates these, so
//! vectorising changes no bit: kernels are compiled for several instruction sets, and the machine's best one is chosen at run time.
//! It supposes the default floating point environment: a process that turns on flush-to-zero (LibTorch can) must not apply.
//!
//! # Numbers that are not finite
//!
//! NaN and infinity are never stored. Who accepts a push refuses gradients that are not finite
//! ([`all_finite`](crate::tensor_bytes::all_finite)). A finite gradient can still overflow (its square, or the sum): **an
//! element whose new weight or new optimizer slots would not be finite is left as it was, weight and slots alike**, and apply
//! returns how many there were. The whole row is left where a number that belongs to it is not finite: the accumulator of row-wise
//! Adagrad, the norm of clipping.

mod adagrad;
mod adam;
mod adam_w;
mod ftrl;
mod momentum;
mod rms_prop;
mod row;
mod rowwise_adagrad;
mod schedule;
mod sgd;
mod staleness;
#[cfg(test)]
mod tests;

pub use adagrad::Adagrad;
pub use adam::Adam;
pub use adam_w::AdamW;
pub use ftrl::Ftrl;
pub use momentum::Momentum;
pub use rms_prop::RmsProp;
pub use rowwise_adagrad::RowwiseAdagrad;
pub use schedule::{Course, Schedule};
pub use sgd::Sgd;
pub use staleness::{Scaling, Staleness, UnknownScaling};

use crate::instruction_set::{InstructionSet, Work};
use crate::parameter::{InvalidParameter, require};
use crate::tensor_bytes::FLOAT_BYTES;
use row::{AsItCame, Modified, Row};

/// What a push does to a variable: plain data, part of the variable's definition.
///
/// `OptimizerSpec::Sgd(sgd)`, or `sgd.into()`, is that optimizer at a constant learning rate with nothing else to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSpec {
    /// Which optimizer, with its parameters.
    pub rule: Rule,
    /// What the clock makes of the learning rate.
    pub schedule: Schedule,
    /// What the age of the weights that a gradient was computed with makes of it.
    pub staleness: Scaling,
    /// Longest that the gradient of a row may be, for tables: a longer one is scaled down to this Euclidean norm. It comes before
    /// everything else that is done with a gradient.
    pub clip_row_norm: Option<f32>,
    /// λ: `λ·w` is added to the gradient of each weight that a push names, as `weight_decay` does in PyTorch's optimizers other
    /// than AdamW. Rows that a push does not name do not decay. [`AdamW`] and [`Ftrl`] have a decay of their own instead.
    pub l2_decay: f32,
}

/// Which optimizer a variable has, with its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Gradient descent.
    Sgd(Sgd),
    /// Gradient descent with momentum.
    Momentum(Momentum),
    /// A learning rate per parameter.
    Adagrad(Adagrad),
    /// A learning rate per row, for tables: a block of a dense variable would count as one row.
    RowwiseAdagrad(RowwiseAdagrad),
    /// A running mean of the gradient's square.
    RmsProp(RmsProp),
    /// Running means of the gradient and of its square.
    Adam(Adam),
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Follow the regularised leader: sparse weights.
    Ftrl(Ftrl),
}

macro_rules! rules {
    ($($name:ident),+) => {
        /// The optimizers as they are most often wanted: named like the variants of [`Rule`].
        #[allow(non_snake_case)]
        impl OptimizerSpec {
            $(
                #[doc = concat!("[`", stringify!($name), "`] at a constant learning rate.")]
                #[must_use]
                pub const fn $name(rule: $name) -> Self {
                    Self::new(Rule::$name(rule))
                }
            )+
        }

        $(
            impl From<$name> for OptimizerSpec {
                fn from(rule: $name) -> Self {
                    Self::$name(rule)
                }
            }
        )+
    };
}

rules!(Sgd, Momentum, Adagrad, RowwiseAdagrad, RmsProp, Adam, AdamW, Ftrl);

/// One optimizer slot: state kept beside the parameters of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptimizerSlot {
    /// Name of its tensor in checkpoints.
    pub name: &'static str,
    shape: SlotShape,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotShape {
    PerParameter,
    PerRow,
}

impl OptimizerSlot {
    const fn per_parameter(name: &'static str) -> Self {
        Self { name, shape: SlotShape::PerParameter }
    }

    const fn per_row(name: &'static str) -> Self {
        Self { name, shape: SlotShape::PerRow }
    }

    /// Floats for a row of `dim` floats.
    #[must_use]
    pub const fn width(self, dim: usize) -> usize {
        match self.shape {
            SlotShape::PerParameter => dim,
            SlotShape::PerRow => 1,
        }
    }
}

/// What the primary resolves once per update and writes into the log record, so that apply needs no clock, schedule or power.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepScalars {
    /// Learning rate of this update, the schedule and its staleness worked in.
    pub learning_rate: f32,
    /// `beta1^step`; 0 for optimizers without betas.
    pub beta1_power: f64,
    /// `beta2^step`; 0 for optimizers without betas.
    pub beta2_power: f64,
}

impl OptimizerSpec {
    /// An optimizer at a constant learning rate, without clipping and decay.
    #[must_use]
    pub const fn new(rule: Rule) -> Self {
        let schedule = Schedule { warm_up_steps: 0, then: Course::Constant };
        Self { rule, schedule, staleness: Scaling::None, clip_row_norm: None, l2_decay: 0.0 }
    }

    /// Refuses parameters that cannot work, and names the field.
    pub fn validate(&self) -> Result<(), InvalidParameter> {
        match &self.rule {
            Rule::Sgd(sgd) => sgd.validate(),
            Rule::Momentum(momentum) => momentum.validate(),
            Rule::Adagrad(adagrad) => adagrad.validate(),
            Rule::RowwiseAdagrad(adagrad) => adagrad.validate(),
            Rule::RmsProp(rms_prop) => rms_prop.validate(),
            Rule::Adam(adam) => adam.validate(),
            Rule::AdamW(adam) => adam.validate(),
            Rule::Ftrl(ftrl) => ftrl.validate(),
        }?;
        self.schedule.validate()?;
        self.staleness.validate()?;
        if let Some(norm) = self.clip_row_norm {
            require_positive("clip_row_norm", norm)?;
        }
        require_not_negative("l2_decay", self.l2_decay)?;
        let own = match &self.rule {
            Rule::AdamW(_) => Some("0 beside adam_w, which has weight_decay"),
            Rule::Ftrl(_) => Some("0 beside ftrl, which has l2"),
            _ => None,
        };
        own.map_or(Ok(()), |rule| require(self.l2_decay == 0.0, "l2_decay", self.l2_decay, rule))
    }

    /// The optimizer slots, in the order in which they lie in a row's state.
    #[must_use]
    pub const fn slots(&self) -> &'static [OptimizerSlot] {
        match &self.rule {
            Rule::Sgd(_) => &[],
            Rule::Momentum(_) => &Momentum::SLOTS,
            Rule::Adagrad(_) => &Adagrad::SLOTS,
            Rule::RowwiseAdagrad(_) => &RowwiseAdagrad::SLOTS,
            Rule::RmsProp(rms_prop) => rms_prop.slots(),
            Rule::Adam(_) => &Adam::SLOTS,
            Rule::AdamW(_) => &AdamW::SLOTS,
            Rule::Ftrl(_) => &Ftrl::SLOTS,
        }
    }

    /// Floats of state beside a row of `dim` floats: the sum of the slots' widths.
    #[must_use]
    pub fn state_width(&self, dim: usize) -> usize {
        self.slots().iter().map(|slot| slot.width(dim)).sum()
    }

    /// Writes the state of a row that was never pushed.
    pub fn init_state(&self, state: &mut [f32]) {
        state.fill(match &self.rule {
            Rule::Adagrad(adagrad) => adagrad.initial_accumulator,
            Rule::RowwiseAdagrad(adagrad) => adagrad.initial_accumulator,
            _ => 0.0,
        });
    }

    /// The learning rate at `clock`.
    #[must_use]
    pub fn learning_rate(&self, clock: u64) -> f32 {
        let base = match &self.rule {
            Rule::Sgd(sgd) => sgd.learning_rate,
            Rule::Momentum(momentum) => momentum.learning_rate,
            Rule::Adagrad(adagrad) => adagrad.learning_rate,
            Rule::RowwiseAdagrad(adagrad) => adagrad.learning_rate,
            Rule::RmsProp(rms_prop) => rms_prop.learning_rate,
            Rule::Adam(adam) => adam.learning_rate,
            Rule::AdamW(adam) => adam.learning_rate,
            Rule::Ftrl(ftrl) => ftrl.learning_rate,
        };
        self.schedule.learning_rate(base, clock)
    }

    /// The scalars of update number `step` of this variable on this shard, at `clock` of the job. `step` counts the pushes that this
    /// shard applied to the variable, this one included: the first is 1 (and 0 is taken as 1). See [`Adam`] for what that means to
    /// rows.
    #[must_use]
    pub fn scalars(&self, step: u64, clock: u64) -> StepScalars {
        let (beta1_power, beta2_power) = match &self.rule {
            Rule::Adam(Adam { beta1, beta2, .. }) | Rule::AdamW(AdamW { beta1, beta2, .. }) => {
                (power(*beta1, step.max(1)), power(*beta2, step.max(1)))
            }
            _ => (0.0, 0.0),
        };
        StepScalars { learning_rate: self.learning_rate(clock), beta1_power, beta2_power }
    }

    /// [`OptimizerSpec::scalars`] of an update that is so stale.
    #[must_use]
    pub fn scalars_of_stale(&self, step: u64, clock: u64, staleness: Staleness) -> StepScalars {
        let scalars = self.scalars(step, clock);
        let learning_rate = self.staleness.learning_rate(scalars.learning_rate, staleness);
        StepScalars { learning_rate, ..scalars }
    }

    /// The kernel for all rows of one update.
    #[must_use]
    pub fn update(&self, scalars: &StepScalars) -> Update {
        self.update_with(scalars, InstructionSet::best())
    }

    fn update_with(&self, scalars: &StepScalars, instructions: InstructionSet) -> Update {
        let kernel = match &self.rule {
            Rule::Sgd(_) => Kernel::Sgd(sgd::Kernel::at(scalars.learning_rate)),
            Rule::Momentum(momentum) => Kernel::Momentum(momentum.kernel(scalars)),
            Rule::Adagrad(adagrad) => Kernel::Adagrad(adagrad.kernel(scalars)),
            Rule::RowwiseAdagrad(adagrad) => Kernel::RowwiseAdagrad(adagrad.kernel(scalars)),
            Rule::RmsProp(rms_prop) => Kernel::RmsProp(rms_prop.kernel(scalars)),
            Rule::Adam(adam) => Kernel::Adam(adam.kernel(scalars)),
            Rule::AdamW(adam) => Kernel::Adam(adam.kernel(scalars)),
            Rule::Ftrl(ftrl) => Kernel::Ftrl(ftrl.kernel(scalars)),
        };
        let modified = self.clip_row_norm.is_some() || self.l2_decay != 0.0;
        let modified = modified.then_some(Modified {
            norm_max: self.clip_row_norm,
            l2: self.l2_decay,
            scale: 1.0,
        });
        Update { kernel, modified, instructions }
    }

    /// [`Update::apply`] for a single row or block.
    pub fn apply(
        &self,
        scalars: &StepScalars,
        weights: &mut [f32],
        state: &mut [f32],
        gradient: &[u8],
    ) -> u32 {
        self.update(scalars).apply(weights, state, gradient)
    }
}

/// An optimizer with everything that is constant over the rows of one update worked out.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    kernel: Kernel,
    modified: Option<Modified>,
    instructions: InstructionSet,
}

#[derive(Debug, Clone, Copy)]
enum Kernel {
    Sgd(sgd::Kernel),
    Momentum(momentum::Kernel),
    Adagrad(adagrad::Kernel),
    RowwiseAdagrad(rowwise_adagrad::Kernel),
    RmsProp(rms_prop::Kernel),
    Adam(adam::Kernel),
    Ftrl(ftrl::Kernel),
}

impl Update {
    /// Applies one gradient to one row (or block) of `dim` floats in place and returns how many of its elements were left as
    /// they were because their new values would not be finite.
    ///
    /// `gradient` holds `dim` little-endian f32 at any alignment; `state` holds the optimizer slots one after the other.
    ///
    /// # Panics
    ///
    /// If the lengths do not belong together: who decodes a record checks them against the variable's definition.
    pub fn apply(&self, weights: &mut [f32], state: &mut [f32], gradient: &[u8]) -> u32 {
        assert_eq!(gradient.len(), weights.len() * FLOAT_BYTES, "bytes of the gradient");
        self.instructions.run(self, weights, state, gradient)
    }
}

impl Work for Update {
    #[inline(always)]
    fn run(&self, weights: &mut [f32], state: &mut [f32], bytes: &[u8]) -> u32 {
        let row = Row { weights, state, bytes };
        match &self.kernel {
            Kernel::Sgd(kernel) => self.run_kernel(kernel, row),
            Kernel::Momentum(kernel) => self.run_kernel(kernel, row),
            Kernel::Adagrad(kernel) => self.run_kernel(kernel, row),
            Kernel::RowwiseAdagrad(kernel) => self.run_kernel(kernel, row),
            Kernel::RmsProp(kernel) => self.run_kernel(kernel, row),
            Kernel::Adam(kernel) => self.run_kernel(kernel, row),
            Kernel::Ftrl(kernel) => self.run_kernel(kernel, row),
        }
    }
}

impl Update {
    #[inline(always)]
    fn run_kernel(&self, kernel: &impl row::Kernel, row: Row<'_>) -> u32 {
        let Some(modified) = self.modified else { return kernel.apply(row, AsItCame) };
        match modified.of_row(&row) {
            Some(gradient) => kernel.apply(row, gradient),
            None => row.weights.len() as u32,
        }
    }
}

/// `base^exponent` by repeated squaring, from the lowest bit of the exponent up.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// Any finite learning rate: 0 freezes, and a negative one climbs (counting rows use −1).
fn require_learning_rate(field: &'static str, value: f32) -> Result<(), InvalidParameter> {
    require(value.is_finite(), field, value, "finite")
}

fn require_not_negative(field: &'static str, value: f32) -> Result<(), InvalidParameter> {
    require(value.is_finite() && value >= 0.0, field, value, "finite and at least 0")
}

fn require_positive(field: &'static str, value: f32) -> Result<(), InvalidParameter> {
    require(value.is_finite() && value > 0.0, field, value, "finite and above 0")
}

fn require_share(field: &'static str, value: f64) -> Result<(), InvalidParameter> {
    require((0.0..1.0).contains(&value), field, value, "at least 0 and below 1")
}
