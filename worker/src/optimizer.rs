//! Optimizers by name: `Adagrad::lr(0.05)`, `Adam::lr(1e-3).betas(0.9, 0.99).warm_up(1_000)`. They run on the servers.

use downpour_core::optimizer as core;
use downpour_core::optimizer::{Course, OptimizerSpec, Rule, Scaling, Schedule};

/// What any optimizer may have beside its own parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Beside {
    schedule: Schedule,
    staleness: Scaling,
    clip_row_norm: Option<f32>,
    l2_decay: f32,
}

macro_rules! optimizer {
    ($(#[$doc:meta])* $name:ident { $($rest:ident: $default:expr),* }, $(($(#[$set_doc:meta])* $set:ident($($field:ident: $kind:ty),+))),*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct $name {
            rule: core::$name,
            beside: Beside,
        }

        impl $name {
            /// With this learning rate and PyTorch's defaults for the rest.
            #[must_use]
            pub fn lr(learning_rate: f32) -> Self {
                Self { rule: core::$name { learning_rate, $($rest: $default),* }, beside: Beside::default() }
            }

            $(
                $(#[$set_doc])*
                #[must_use]
                pub fn $set(mut self, $($field: $kind),+) -> Self {
                    $(self.rule.$field = $field;)+
                    self
                }
            )*

            /// The learning rate rises in equal parts over the job's first `steps` steps; what follows counts from there.
            #[must_use]
            pub fn warm_up(mut self, steps: u64) -> Self {
                self.beside.schedule.warm_up_steps = steps;
                self
            }

            /// The learning rate is multiplied by `factor` (0 to 1) every `every` steps.
            #[must_use]
            pub fn step(mut self, every: u64, factor: f64) -> Self {
                self.beside.schedule.then = Course::Step { every, factor };
                self
            }

            /// The learning rate falls along half a cosine to `floor` over `steps` steps, and stays there.
            #[must_use]
            pub fn cosine(mut self, steps: u64, floor: f32) -> Self {
                self.beside.schedule.then = Course::Cosine { steps, floor };
                self
            }

            /// Takes smaller steps by gradients that were computed with older weights: each server divides the learning rate of a push by 1 + staleness
            /// ([`Scaling`]). Steps that rounds of synchronous training end with stay as they are.
            #[must_use]
            pub fn by_staleness(mut self, scaling: Scaling) -> Self {
                self.beside.staleness = scaling;
                self
            }

            /// Scales the gradient of each row of a table down to this norm where it is longer. For tables only.
            #[must_use]
            pub fn clip_row_norm(mut self, norm: f32) -> Self {
                self.beside.clip_row_norm = Some(norm);
                self
            }
        }

        impl From<$name> for OptimizerSpec {
            fn from(optimizer: $name) -> Self {
                let Beside { schedule, staleness, clip_row_norm, l2_decay } = optimizer.beside;
                let rule = Rule::$name(optimizer.rule);
                Self { rule, schedule, staleness, clip_row_norm, l2_decay }
            }
        }
    };
}

macro_rules! l2_decay {
    ($($name:ident),+) => {
        $(
            impl $name {
                /// Adds `decay · weight` to the gradient of what a step pushes, as `weight_decay` does in PyTorch's optimizer of this
                /// name. Rows that are not pushed do not decay.
                #[must_use]
                pub fn decay(mut self, decay: f32) -> Self {
                    self.beside.l2_decay = decay;
                    self
                }
            }
        )+
    };
}

optimizer!(
    /// Gradient descent.
    Sgd {},
);
optimizer!(
    /// Gradient descent with momentum 0.9.
    Momentum { momentum: 0.9, nesterov: false },
    (
        /// Share of the old buffer that is kept.
        momentum(momentum: f32)
    ),
    (
        /// Looks ahead along the buffer.
        nesterov(nesterov: bool)
    )
);
optimizer!(
    /// A learning rate per parameter that falls with what it has seen. The usual choice for tables.
    Adagrad { epsilon: 1e-10, initial_accumulator: 0.0 },
    (
        /// Added to the root of the sum.
        epsilon(epsilon: f32)
    ),
    (
        /// The sum of squares that a parameter starts with.
        initial_accumulator(initial_accumulator: f32)
    )
);
optimizer!(
    /// [`Adagrad`] with one sum for a whole row of a table.
    RowwiseAdagrad { epsilon: 1e-10, initial_accumulator: 0.0 },
    (
        /// Added to the root of the sum.
        epsilon(epsilon: f32)
    ),
    (
        /// The sum that a row starts with.
        initial_accumulator(initial_accumulator: f32)
    )
);
optimizer!(
    /// A running mean of the gradient's square.
    RmsProp { alpha: 0.99, epsilon: 1e-8, momentum: 0.0 },
    (
        /// How much of the old mean is kept.
        alpha(alpha: f64)
    ),
    (
        /// Added to the root of the mean.
        epsilon(epsilon: f32)
    ),
    (
        /// Share of an old buffer that is kept; 0 is without a buffer.
        momentum(momentum: f32)
    )
);
optimizer!(
    /// Running means of the gradient and its square. The usual choice for dense variables.
    Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
    (
        /// How much of the old means is kept.
        betas(beta1: f64, beta2: f64)
    ),
    (
        /// Added to the corrected root.
        epsilon(epsilon: f32)
    )
);
optimizer!(
    /// [`Adam`] with decoupled weight decay 0.01.
    AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 },
    (
        /// How much of the old means is kept.
        betas(beta1: f64, beta2: f64)
    ),
    (
        /// Added to the corrected root.
        epsilon(epsilon: f32)
    ),
    (
        /// What is pushed loses the share `learning rate · weight_decay` of its weights. Rows that are not pushed do not decay.
        decay(weight_decay: f32)
    )
);
optimizer!(
    /// FTRL-proximal: weights are exactly 0 until their evidence exceeds `l1`. For sparse linear models, from zeros; its learning rate
    /// is the paper's α, and β is 1.
    Ftrl { beta: 1.0, l1: 0.0, l2: 0.0 },
    (
        /// Damps the first steps.
        beta(beta: f32)
    ),
    (
        /// The evidence below which a weight is 0.
        l1(l1: f32)
    ),
    (
        /// Pulls weights towards 0.
        l2(l2: f32)
    )
);

l2_decay!(Sgd, Momentum, Adagrad, RowwiseAdagrad, RmsProp, Adam);

/// The optimizers of what a job trains: what learning rates are reported from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Optimizers {
    pub(crate) tables: Vec<OptimizerSpec>,
    pub(crate) dense: Vec<OptimizerSpec>,
}

impl Optimizers {
    /// The highest learning rates at `clock`: of the tables, and of the dense variables.
    pub(crate) fn learning_rates(&self, clock: u64) -> [f32; 2] {
        [&self.tables, &self.dense].map(|optimizers| {
            let rates = optimizers.iter().map(|optimizer| optimizer.learning_rate(clock));
            rates.fold(0.0, f32::max)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_an_optimizer_is_in_its_definition() {
        let spec: OptimizerSpec = Adam::lr(0.5)
            .betas(0.8, 0.9)
            .warm_up(10)
            .cosine(90, 0.25)
            .clip_row_norm(2.0)
            .by_staleness(Scaling::Clocks { per: 4.0 })
            .decay(0.1)
            .into();
        let rule = core::Adam { learning_rate: 0.5, beta1: 0.8, beta2: 0.9, epsilon: 1e-8 };
        let schedule =
            Schedule { warm_up_steps: 10, then: Course::Cosine { steps: 90, floor: 0.25 } };
        let expected = OptimizerSpec {
            rule: Rule::Adam(rule),
            schedule,
            staleness: Scaling::Clocks { per: 4.0 },
            clip_row_norm: Some(2.0),
            l2_decay: 0.1,
        };
        assert_eq!(spec, expected);
        let decoupled: OptimizerSpec = AdamW::lr(0.5).decay(0.2).step(3, 0.5).into();
        assert_eq!(decoupled.l2_decay, 0.0);
        assert!(matches!(decoupled.rule, Rule::AdamW(core::AdamW { weight_decay: 0.2, .. })));
        assert_eq!(decoupled.schedule.then, Course::Step { every: 3, factor: 0.5 });
    }

    #[test]
    fn defaults_can_work() {
        let all: [OptimizerSpec; 8] = [
            Sgd::lr(0.1).into(),
            Momentum::lr(0.1).into(),
            Adagrad::lr(0.1).into(),
            RowwiseAdagrad::lr(0.1).into(),
            RmsProp::lr(0.1).into(),
            Adam::lr(0.1).into(),
            AdamW::lr(0.1).into(),
            Ftrl::lr(0.1).into(),
        ];
        assert!(all.iter().all(|spec| spec.validate().is_ok()));
        let optimizers =
            Optimizers { tables: all.to_vec(), dense: vec![Sgd::lr(1.0).warm_up(4).into()] };
        assert_eq!(optimizers.learning_rates(1), [0.1, 0.5]);
    }
}
