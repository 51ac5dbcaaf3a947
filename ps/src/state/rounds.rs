//! Contributions to rounds, and the step that their mean takes at the end of one (docs/protocol.md 7).

use downpour_core::cells::{Refusal, RefusalReason};
use downpour_core::clocks::Round;
use downpour_core::id::{Lsn, SessionId, VariableId};
use downpour_core::optimizer::StepScalars;
use downpour_core::row_format::RowFormat;
use downpour_proto::Invalid;
use downpour_proto::tensor::{Keys, widened};
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::validate::UPDATES_MAX;

use super::{Applied, Blank, CannotApply, Finite, Parameters, ShardState, VariableState};
use crate::record::{Blocks, Change, EndRound, Push, RoundStep, Update};
use crate::rounds::{Contribution, Sum, cost};

/// Contributions of all sessions to a round: beyond, pushes wait for its end.
const CONTRIBUTIONS_BYTES_MAX: usize = 1 << 28;
/// Contributions of one session, which are one piece of a cut.
const CONTRIBUTION_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (1 << 20);

impl ShardState {
    /// Bytes of the contributions to the round that is open.
    #[must_use]
    pub fn contributed_bytes(&self) -> usize {
        self.contributions.bytes()
    }

    /// The first variable of contributions for which there is no room, or which are so much for their round that a copy could not be sent in one piece. All that is kept is
    /// of the round that is open, which does not end before this session has contributed: to wait would not help.
    pub(super) fn contributes_too_much(&self, push: &Push) -> Option<VariableId> {
        let contributes = |update: &&Update| matches!(update.change, Change::Contribution { .. });
        let first = push.updates.iter().find(contributes)?.variable;
        let costs = push.updates.iter().filter(contributes).map(|update| cost(&update.change));
        let (bytes, count) =
            costs.fold((0usize, 0usize), |(sum, count), one| (sum + one, count + 1));
        let kept = &self.contributions;
        let (session_bytes, session_count) = kept.of_session(push.session);
        let too_much = session_bytes + bytes > CONTRIBUTION_BYTES_MAX
            || session_count + count > UPDATES_MAX
            || (kept.bytes() + bytes > CONTRIBUTIONS_BYTES_MAX
                && kept.bytes() - kept.of_closed(self.cells.closed()) + bytes
                    > CONTRIBUTIONS_BYTES_MAX);
        too_much.then_some(first)
    }

    /// Takes contributions to rounds that are over out of a push, and has it say so.
    pub(super) fn drop_late(&self, push: &mut Push) -> Option<Refusal> {
        let (session, last) = (push.session, self.board.last_round().number);
        let mut late = None;
        push.updates.retain(|update| {
            let Change::Contribution { round, .. } = update.change else { return true };
            let over = round <= last || self.contributions.is_over(session, round);
            if over && late.is_none() {
                late = Some(update.variable);
            }
            !over
        });
        late.map(|variable| Refusal { reason: RefusalReason::RoundOver, variable })
    }

    /// Decides everything about the end of a round. `None`: it is over here already. Reads only.
    #[must_use]
    pub fn resolve_round(&self, round: Round) -> Option<EndRound> {
        if round.number <= self.board.last_round().number {
            return None;
        }
        let variables = self.contributions.variables(&round);
        let step = |id: VariableId| {
            let variable = self.variable(id)?;
            let step = variable.steps + 1;
            let scalars = variable.variable.spec.optimizer.scalars(step, self.clock);
            Some(RoundStep { variable: id, step, scalars })
        };
        Some(EndRound { steps: variables.into_iter().filter_map(step).collect(), round })
    }

    /// Keeps what was contributed.
    pub(super) fn contribute(
        &mut self,
        session: SessionId,
        round: u64,
        variable: VariableId,
        gradients: Change,
    ) {
        if self.contributions.bytes() + cost(&gradients) > CONTRIBUTIONS_BYTES_MAX {
            self.contributions.drop_closed(self.cells.closed());
        }
        self.contributions.keep(session, round, variable, gradients);
    }

    /// Puts back what a session contributed to the round that is open.
    pub(crate) fn restore_contribution(
        &mut self,
        session: SessionId,
        contribution: Contribution,
    ) -> Result<(), Invalid> {
        for (variable, change) in &contribution.updates {
            self.check_shape(*variable, change, Finite::Required, Blank::Allowed).map_err(
                |reason| {
                    Invalid::new(
                        "contribution.updates",
                        format!("of variable {variable}: {reason}"),
                    )
                },
            )?;
            if !matches!(change, Change::Rows { .. } | Change::Gradients(_)) {
                return Err(Invalid::new("contribution.updates", "are not gradients"));
            }
        }
        if contribution.round <= self.board.last_round().number {
            return Err(Invalid::new("contribution.round", "is over"));
        }
        self.contributions.restore(session, contribution)
    }

    /// Applies the mean of the contributions to a round, and drops those that came too late.
    pub(super) fn end_round(&mut self, end: &EndRound, lsn: Lsn) -> Result<Applied, CannotApply> {
        let EndRound { round, steps } = end;
        let here = |step: &RoundStep| self.variable(step.variable).is_some();
        if round.number <= self.board.last_round().number || !steps.iter().all(here) {
            return Err(CannotApply::Fit(lsn));
        }
        let mut applied = Applied::default();
        let contributions = std::mem::take(&mut self.contributions);
        for RoundStep { variable: id, step, scalars } in steps {
            let gradients = contributions.gradients(round, *id);
            let Some(variable) = self.variable_mut(*id) else { continue };
            let Some(change) = variable.mean(gradients, round.members.len()) else { continue };
            applied.not_stored += variable.apply_mean(&change, scalars, lsn);
            variable.steps = *step;
        }
        self.contributions = contributions;
        self.contributions.end_round(round.number, self.cells.closed());
        self.board.end_round(round.clone());
        Ok(applied)
    }
}

impl VariableState {
    /// The mean of gradients that were checked, over so many members.
    fn mean<'a>(
        &self,
        gradients: impl Iterator<Item = &'a Change>,
        members: usize,
    ) -> Option<Change> {
        let format = self.row_format();
        let mut sum = Sum::default();
        for change in gradients {
            match (&self.parameters, change) {
                (Parameters::Table(_), Change::Rows { keys, gradients }) => {
                    let keys = Keys::trusted(keys);
                    match format {
                        RowFormat::F32 => sum.add_rows(keys, gradients),
                        RowFormat::Bf16 => sum.add_rows(keys, &widened(gradients)),
                    }
                }
                (Parameters::Dense(dense), Change::Gradients(blocks)) => {
                    sum.add_blocks(blocks, |number| dense.block_bytes(number));
                }
                _ => return None,
            }
        }
        let (items, floats) = sum.mean(members);
        Some(match self.parameters {
            Parameters::Table(_) => Change::Rows {
                keys: items.iter().flat_map(|key| key.to_le_bytes()).collect(),
                gradients: floats.into(),
            },
            Parameters::Dense(_) => Change::Gradients(Blocks {
                numbers: items.into_iter().map(|number| number as u32).collect(),
                floats: floats.into(),
            }),
        })
    }

    /// Applies a mean, whose floats are `f32` in any row format.
    fn apply_mean(&mut self, mean: &Change, scalars: &StepScalars, lsn: Lsn) -> u64 {
        match (&mut self.parameters, mean) {
            (Parameters::Table(table), Change::Rows { keys, gradients }) => {
                table.push(Keys::trusted(keys), gradients, scalars, lsn)
            }
            (Parameters::Dense(dense), Change::Gradients(blocks)) => {
                dense.push(&blocks.numbers, &blocks.floats, scalars, lsn)
            }
            _ => 0,
        }
    }
}
