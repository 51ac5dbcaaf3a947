//! Optimizers by name: `Adagrad::lr(0.05)`, `Adam::lr(1e-3).betas(0.9, 0.99)`. They run on the servers.

use downpour_core::optimizer as core;
use downpour_core::optimizer::OptimizerSpec;

macro_rules! optimizer {
    ($(#[$doc:meta])* $name:ident { $($rest:ident: $default:expr),* }, $(($(#[$set_doc:meta])* $set:ident($($field:ident: $kind:ty),+))),*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct $name(core::$name);

        impl $name {
            /// With this learning rate and PyTorch's defaults for the rest.
            #[must_use]
            pub fn lr(learning_rate: f32) -> Self {
                Self(core::$name { learning_rate, $($rest: $default),* })
            }

            $(
                $(#[$set_doc])*
                #[must_use]
                pub fn $set(mut self, $($field: $kind),+) -> Self {
                    $(self.0.$field = $field;)+
                    self
                }
            )*
        }

        impl From<$name> for OptimizerSpec {
            fn from(optimizer: $name) -> Self {
                OptimizerSpec::$name(optimizer.0)
            }
        }
    };
}

optimizer!(
    /// Gradient descent.
    Sgd {},
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
