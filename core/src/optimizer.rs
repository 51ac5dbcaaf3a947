//! The arithmetic that a shard applies to a row (or a dense block) when a gradient arrives.
//!
//! Follow one push: the primary evaluates [`OptimizerSpec::scalars`] once per update and writes them into the log record;
//! every replica builds an [`Update`] from the variable's definition and the record's scalars, and calls [`Update::apply`] for
//! each row with the gradient's bytes where they arrived.
//!
//! # Bit identity
//!
//! A backup applies gradients itself, so each kernel gives the same bits on every machine: + − × ÷ √ on f32 in the order
//! written, no fused multiply-add, no reciprocal approximation, no math library; the one reduction ([`RowwiseAdagrad`]) has a
//! fixed lane order. The compiler neither contracts nor reassociates these, so vectorising changes no bit. It supposes the
//! default floating point environment: a process that turns on flush-to-zero (LibTorch can) must not apply.
//!
//! # Numbers that are not finite
//!
//! NaN and infinity are never stored. Who accepts a push refuses gradients that are not finite
//! ([`all_finite`](crate::tensor_bytes::all_finite)). A finite gradient can still overflow (its square, or the sum): **an
//! element whose new weight or new optimizer slots would not be finite is left as it was, weight and slots alike**, and apply
//! returns how many there were. Row-wise Adagrad skips the whole row when its one accumulator would not be finite.

mod adagrad;
mod adam;
mod rowwise_adagrad;
mod sgd;
#[cfg(test)]
mod tests;

pub use adagrad::Adagrad;
pub use adam::Adam;
pub use rowwise_adagrad::RowwiseAdagrad;
pub use sgd::Sgd;

use std::hint::select_unpredictable;

use crate::parameter::{InvalidParameter, require};
use crate::tensor_bytes::FLOAT_BYTES;

/// Which optimizer a variable has, with its parameters: plain data, part of the variable's definition.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OptimizerSpec {
    /// Gradient descent.
    Sgd(Sgd),
    /// A learning rate per parameter.
    Adagrad(Adagrad),
    /// A learning rate per row, for tables: a block of a dense variable would count as one row.
    RowwiseAdagrad(RowwiseAdagrad),
    /// Running means of the gradient and of its square.
    Adam(Adam),
}

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
    /// Learning rate of this update.
    pub learning_rate: f32,
    /// `beta1^step`; 0 for optimizers without betas.
    pub beta1_power: f64,
    /// `beta2^step`; 0 for optimizers without betas.
    pub beta2_power: f64,
}

impl OptimizerSpec {
    /// Refuses parameters that cannot work, and names the field.
    pub fn validate(&self) -> Result<(), InvalidParameter> {
        match self {
            Self::Sgd(sgd) => sgd.validate(),
            Self::Adagrad(adagrad) => adagrad.validate(),
            Self::RowwiseAdagrad(adagrad) => adagrad.validate(),
            Self::Adam(adam) => adam.validate(),
        }
    }

    /// The optimizer slots, in the order in which they lie in a row's state.
    #[must_use]
    pub const fn slots(&self) -> &'static [OptimizerSlot] {
        match self {
            Self::Sgd(_) => &[],
            Self::Adagrad(_) => &Adagrad::SLOTS,
            Self::RowwiseAdagrad(_) => &RowwiseAdagrad::SLOTS,
            Self::Adam(_) => &Adam::SLOTS,
        }
    }

    /// Floats of state beside a row of `dim` floats: the sum of the slots' widths.
    #[must_use]
    pub fn state_width(&self, dim: usize) -> usize {
        self.slots().iter().map(|slot| slot.width(dim)).sum()
    }

    /// Writes the state of a row that was never pushed.
    pub fn init_state(&self, state: &mut [f32]) {
        state.fill(match self {
            Self::Adagrad(adagrad) => adagrad.initial_accumulator,
            Self::RowwiseAdagrad(adagrad) => adagrad.initial_accumulator,
            Self::Sgd(_) | Self::Adam(_) => 0.0,
        });
    }

    /// The scalars of update number `step` of this variable on this shard. `step` counts the pushes that this shard applied to
    /// the variable, this one included: the first is 1 (and 0 is taken as 1). See [`Adam`] for what that means to rows.
    #[must_use]
    pub fn scalars(&self, step: u64) -> StepScalars {
        let (learning_rate, beta1_power, beta2_power) = match self {
            Self::Sgd(sgd) => (sgd.learning_rate, 0.0, 0.0),
            Self::Adagrad(adagrad) => (adagrad.learning_rate, 0.0, 0.0),
            Self::RowwiseAdagrad(adagrad) => (adagrad.learning_rate, 0.0, 0.0),
            Self::Adam(adam) => {
                (adam.learning_rate, power(adam.beta1, step.max(1)), power(adam.beta2, step.max(1)))
            }
        };
        StepScalars { learning_rate, beta1_power, beta2_power }
    }

    /// The kernel for all rows of one update.
    #[must_use]
    pub fn update(&self, scalars: &StepScalars) -> Update {
        Update(match self {
            Self::Sgd(_) => Kernel::Sgd(sgd::Kernel::new(scalars)),
            Self::Adagrad(adagrad) => Kernel::Adagrad(adagrad.kernel(scalars)),
            Self::RowwiseAdagrad(adagrad) => Kernel::RowwiseAdagrad(adagrad.kernel(scalars)),
            Self::Adam(adam) => Kernel::Adam(adam.kernel(scalars)),
        })
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
pub struct Update(Kernel);

#[derive(Debug, Clone, Copy)]
enum Kernel {
    Sgd(sgd::Kernel),
    Adagrad(adagrad::Kernel),
    RowwiseAdagrad(rowwise_adagrad::Kernel),
    Adam(adam::Kernel),
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
        match &self.0 {
            Kernel::Sgd(kernel) => kernel.apply(weights, state, gradient),
            Kernel::Adagrad(kernel) => kernel.apply(weights, state, gradient),
            Kernel::RowwiseAdagrad(kernel) => kernel.apply(weights, state, gradient),
            Kernel::Adam(kernel) => kernel.apply(weights, state, gradient),
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

/// `new` where `keep` holds, else `old` as it was. The hint keeps the compiler from making it a branch, with which the loops
/// do not vectorise (measured: Adam without it takes three times as long).
#[inline(always)]
fn store(old: &mut f32, new: f32, keep: bool) {
    *old = select_unpredictable(keep, new, *old);
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
