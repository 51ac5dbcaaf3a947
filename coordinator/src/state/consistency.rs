//! How far the workers of a job may drift apart. The coordinators say it; from which clock on it holds, shard 0 of the job decides (protocol 7.2).

use downpour_core::id::{JobId, VariableId};

use super::{Outcome, Refused, Reply, State};
use crate::command::ConsistencyChange;

impl State {
    /// What is so already stays as it is.
    pub(super) fn set_consistency(&mut self, id: JobId, change: ConsistencyChange) -> Outcome {
        let version = self.cluster.version;
        let view = &self.job(id)?.view;
        let known = |variable: &VariableId| view.variable(*variable).is_some();
        let (wanted, named) = match change {
            ConsistencyChange::All(all) => {
                let named = all.variables.keys().copied().collect();
                (all, named)
            }
            ConsistencyChange::Variable(variable, mode) => {
                let mut wanted = view.consistency.clone();
                wanted.variables.insert(variable, mode);
                (wanted, vec![variable])
            }
        };
        if let Some(unknown) = named.iter().find(|variable| !known(variable)) {
            let problem = format!("job {:?} has no variable {unknown}", view.spec.name);
            return Err(Refused::NotFound(problem));
        }
        if view.consistency == wanted {
            return Ok(Reply::Viewed(view.version));
        }
        let (name, was) = (view.spec.name.clone(), view.consistency.to_string());
        self.tell("consistency", format!("job {name}: {was} becomes {wanted}"));
        let view = &mut self.job_mut(id).view;
        (view.consistency, view.version) = (wanted, version);
        Ok(Reply::Viewed(version))
    }
}
