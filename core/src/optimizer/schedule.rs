//! Learning rates that change with the job's clock.

use std::f64::consts::PI;

use super::{power, require_not_negative};
use crate::parameter::{InvalidParameter, require};

/// How a variable's learning rate follows from the clock: first it rises, then it takes its course.
///
/// The clock is the number of steps that the furthest session had finished, as far as the shard knows (docs/protocol.md 2.7). Only
/// the primary evaluates a schedule, once per update and into the log record: this may use a power and a cosine, and apply may not.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Schedule {
    /// Steps over which the learning rate rises in equal parts: step `t` (from 0) has the share `(t + 1) / warm_up_steps`. 0: none.
    pub warm_up_steps: u64,
    /// What follows. Its time starts when the warm-up ends.
    pub then: Course,
}

/// What a learning rate does after its warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Course {
    /// It stays.
    #[default]
    Constant,
    /// It is multiplied by `factor` every `every` steps (`torch.optim.lr_scheduler.StepLR`).
    Step {
        /// Steps between two changes.
        every: u64,
        /// From 0 to 1.
        factor: f64,
    },
    /// It falls along half a cosine to `floor` over `steps` steps and stays there (`CosineAnnealingLR` up to `T_max`).
    Cosine {
        /// Steps until it is at the floor.
        steps: u64,
        /// The last learning rate.
        floor: f32,
    },
}

impl Schedule {
    pub(super) fn validate(&self) -> Result<(), InvalidParameter> {
        let count = |field, steps| require(steps > 0, field, steps as f64, "at least 1");
        match self.then {
            Course::Constant => Ok(()),
            Course::Step { every, factor } => {
                count("schedule.step.every", every)?;
                let share = (0.0..=1.0).contains(&factor);
                require(share, "schedule.step.factor", factor, "from 0 to 1")
            }
            Course::Cosine { steps, floor } => {
                count("schedule.cosine.steps", steps)?;
                require_not_negative("schedule.cosine.floor", floor)
            }
        }
    }

    /// The learning rate at `clock` of an optimizer that is given `base`.
    #[must_use]
    pub fn learning_rate(&self, base: f32, clock: u64) -> f32 {
        let base = f64::from(base);
        let Some(time) = clock.checked_sub(self.warm_up_steps) else {
            return (base * (clock + 1) as f64 / self.warm_up_steps as f64) as f32;
        };
        let rate = match self.then {
            Course::Constant => base,
            Course::Step { every, factor } => base * power(factor, time / every.max(1)),
            Course::Cosine { steps, floor } => {
                let floor = f64::from(floor);
                let share = time.min(steps) as f64 / steps.max(1) as f64;
                floor + (base - floor) * (1.0 + (PI * share).cos()) / 2.0
            }
        };
        rate as f32
    }
}
