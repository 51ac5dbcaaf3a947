//! Optimizers as flags.

use clap::ValueEnum;
use downpour::{
    Adagrad, Adam, AdamW, Course, Ftrl, Momentum, OptimizerSpec, RmsProp, RowwiseAdagrad, Scaling,
    Schedule, Sgd,
};
use serde::{Deserialize, Serialize};

use crate::options::{Options, needed};

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Optimizer {
    Sgd,
    Momentum,
    Nesterov,
    Adagrad,
    RowwiseAdagrad,
    RmsProp,
    Adam,
    AdamW,
    Ftrl,
}

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LrSchedule {
    Constant,
    Step,
    Cosine,
}

impl Options {
    pub(crate) fn table_optimizer(&self) -> anyhow::Result<OptimizerSpec> {
        let optimizer = self.optimizer_table.unwrap_or(Optimizer::Adagrad);
        let spec = self.optimizer(optimizer, self.lr_table.unwrap_or(0.05), self.decay_table)?;
        Ok(OptimizerSpec { clip_row_norm: self.clip_row_norm, ..spec })
    }

    pub(crate) fn dense_optimizer(&self) -> anyhow::Result<OptimizerSpec> {
        let optimizer = self.optimizer_dense.unwrap_or(Optimizer::Adam);
        self.optimizer(optimizer, self.lr_dense.unwrap_or(1e-3), self.decay_dense)
    }

    fn optimizer(
        &self,
        optimizer: Optimizer,
        rate: f32,
        decay: Option<f32>,
    ) -> anyhow::Result<OptimizerSpec> {
        let initial = self.initial_accumulator.unwrap_or(0.0);
        let l2 = decay.unwrap_or(0.0);
        let momentum = Momentum::lr(rate).momentum(self.momentum.unwrap_or(0.9)).decay(l2);
        let spec: OptimizerSpec = match optimizer {
            Optimizer::Sgd => Sgd::lr(rate).decay(l2).into(),
            Optimizer::Momentum => momentum.into(),
            Optimizer::Nesterov => momentum.nesterov(true).into(),
            Optimizer::Adagrad => Adagrad::lr(rate).initial_accumulator(initial).decay(l2).into(),
            Optimizer::RowwiseAdagrad => {
                RowwiseAdagrad::lr(rate).initial_accumulator(initial).decay(l2).into()
            }
            Optimizer::RmsProp => {
                RmsProp::lr(rate).momentum(self.momentum.unwrap_or(0.0)).decay(l2).into()
            }
            Optimizer::Adam => Adam::lr(rate).decay(l2).into(),
            Optimizer::AdamW => AdamW::lr(rate).decay(decay.unwrap_or(0.01)).into(),
            Optimizer::Ftrl => Ftrl::lr(rate)
                .beta(self.ftrl_beta.unwrap_or(1.0))
                .l1(self.ftrl_l1.unwrap_or(0.0))
                .l2(l2)
                .into(),
        };
        let (schedule, staleness) = (self.schedule(rate)?, self.staleness()?);
        Ok(OptimizerSpec { schedule, staleness, ..spec })
    }

    fn staleness(&self) -> anyhow::Result<Scaling> {
        let scaling = self.lr_staleness.as_deref().unwrap_or("none").parse();
        scaling.map_err(|error| anyhow::anyhow!("--lr-staleness: {error}"))
    }

    fn schedule(&self, rate: f32) -> anyhow::Result<Schedule> {
        let steps = || needed(&self.lr_steps, "--lr-steps").copied();
        let factor = self.lr_factor.unwrap_or(0.1);
        let then = match self.lr_schedule.unwrap_or(LrSchedule::Constant) {
            LrSchedule::Constant => Course::Constant,
            LrSchedule::Step => Course::Step { every: steps()?, factor },
            LrSchedule::Cosine => Course::Cosine {
                steps: steps()?,
                floor: (f64::from(rate) * self.lr_floor.unwrap_or(0.0)) as f32,
            },
        };
        Ok(Schedule { warm_up_steps: self.warm_up.unwrap_or(0), then })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_make_the_optimizer_that_they_name() {
        let options = Options {
            optimizer_table: Some(Optimizer::Ftrl),
            ftrl_l1: Some(0.5),
            decay_table: Some(0.25),
            clip_row_norm: Some(2.0),
            optimizer_dense: Some(Optimizer::Nesterov),
            lr_dense: Some(0.1),
            warm_up: Some(10),
            lr_schedule: Some(LrSchedule::Cosine),
            lr_steps: Some(100),
            lr_floor: Some(0.5),
            lr_staleness: Some("records:4".into()),
            ..Options::default()
        };
        let table = options.table_optimizer().unwrap();
        let ftrl: OptimizerSpec = Ftrl::lr(0.05)
            .l1(0.5)
            .l2(0.25)
            .clip_row_norm(2.0)
            .warm_up(10)
            .cosine(100, 0.025)
            .by_staleness(Scaling::Records { per: 4.0 })
            .into();
        assert_eq!(table, ftrl);
        let dense = Momentum::lr(0.1).nesterov(true).warm_up(10).cosine(100, 0.05);
        let dense = dense.by_staleness(Scaling::Records { per: 4.0 });
        assert_eq!(options.dense_optimizer().unwrap(), dense.into());
    }

    #[test]
    fn a_unit_of_staleness_is_read_with_its_number_or_refused_by_flag() {
        let of = |text: &str| {
            Options { lr_staleness: Some(text.into()), ..Options::default() }.staleness()
        };
        assert_eq!(Options::default().staleness().unwrap(), Scaling::None);
        assert_eq!(of("records:0.5").unwrap(), Scaling::Records { per: 0.5 });
        assert!(of("steps").unwrap_err().to_string().contains("--lr-staleness"));
    }

    #[test]
    fn a_schedule_without_its_steps_names_the_flag() {
        let options = Options { lr_schedule: Some(LrSchedule::Step), ..Options::default() };
        assert!(options.dense_optimizer().unwrap_err().to_string().contains("--lr-steps"));
    }
}
