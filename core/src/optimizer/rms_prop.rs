//! RMSProp: a running mean of the gradient's square.

use super::row::{self, Element, Gradient, Row};
use super::{OptimizerSlot, StepScalars, require_learning_rate, require_positive, require_share};
use crate::parameter::InvalidParameter;

/// `v ← α·v + (1−α)·g²`, `w ← w − lr·(g / (√v + ε))`; with momentum `b ← µ·b + g / (√v + ε)`, `w ← w − lr·b`.
///
/// Tieleman, Hinton: "Lecture 6.5" (2012), in the form of `torch.optim.RMSprop`, not centred. A row that a push does not name keeps
/// its slots. α is f64, because 1 − α of an f32 such as 0.99 is already wrong in the sixth digit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsProp {
    /// Learning rate.
    pub learning_rate: f32,
    /// Share of the old mean of squares that is kept.
    pub alpha: f64,
    /// Added to the root.
    pub epsilon: f32,
    /// Share of the old buffer that is kept. 0: there is no buffer, and no slot for one.
    pub momentum: f32,
}

impl RmsProp {
    const SLOTS: [OptimizerSlot; 2] = [
        OptimizerSlot::per_parameter("rms_prop_square"),
        OptimizerSlot::per_parameter("rms_prop_momentum"),
    ];

    pub(super) const fn slots(&self) -> &'static [OptimizerSlot] {
        let [square, _] = &Self::SLOTS;
        if self.momentum == 0.0 { std::slice::from_ref(square) } else { &Self::SLOTS }
    }

    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        require_learning_rate("rms_prop.learning_rate", self.learning_rate)?;
        require_share("rms_prop.alpha", self.alpha)?;
        require_positive("rms_prop.epsilon", self.epsilon)?;
        require_share("rms_prop.momentum", self.momentum.into())
    }

    pub(super) fn kernel(&self, scalars: &StepScalars) -> Kernel {
        Kernel {
            learning_rate: scalars.learning_rate,
            alpha: self.alpha as f32,
            rest: (1.0 - self.alpha) as f32,
            epsilon: self.epsilon,
            momentum: self.momentum,
        }
    }
}

/// One update by [`RmsProp`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    learning_rate: f32,
    alpha: f32,
    /// 1 − α.
    rest: f32,
    epsilon: f32,
    momentum: f32,
}

impl Element<1> for Kernel {
    #[inline(always)]
    fn next(&self, weight: f32, [square]: [f32; 1], g: f32) -> (f32, [f32; 1]) {
        let square = self.alpha * square + self.rest * (g * g);
        (weight - self.learning_rate * (g / (square.sqrt() + self.epsilon)), [square])
    }
}

impl Element<2> for Kernel {
    #[inline(always)]
    fn next(&self, weight: f32, [square, buffer]: [f32; 2], g: f32) -> (f32, [f32; 2]) {
        let square = self.alpha * square + self.rest * (g * g);
        let buffer = self.momentum * buffer + g / (square.sqrt() + self.epsilon);
        (weight - self.learning_rate * buffer, [square, buffer])
    }
}

impl row::Kernel for Kernel {
    #[inline(always)]
    fn apply<G: Gradient>(&self, row: Row<'_>, gradient: G) -> u32 {
        if self.momentum == 0.0 {
            row::elementwise::<1>(self, row, gradient)
        } else {
            row::elementwise::<2>(self, row, gradient)
        }
    }
}
