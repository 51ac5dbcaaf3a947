//! What a shard's file says of itself: everything of the shard's state that is not a row or a block.

use downpour_core::id::{Lsn, ShardId};
use downpour_core::spec::{SHARDS_MAX, Variable, check_name, check_range};
use downpour_proto::v1;
use serde::{Deserialize, Serialize};

use crate::Malformed;

/// Of the format of files and manifests. Another number is refused.
pub const FORMAT: u32 = 1;

/// Refusals that a file remembers, of all sessions together: with those of 65,536 full windows its header would be larger than any may be.
const REFUSALS_MAX: usize = 1 << 18;

/// Which shard of which job a file is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Name of the job.
    pub job: String,
    /// Which shard.
    pub shard: ShardId,
    /// Shards of the job.
    pub shards: u32,
    /// Seed of the job's initial values.
    pub seed: u64,
}

/// The state of a shard at an LSN, but for its rows and blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// Which shard.
    pub owner: Owner,
    /// Where the cut is, and what was copied when it opened.
    pub small: v1::CutSmall,
    /// What each session last did.
    pub cells: Vec<v1::CutCell>,
    /// Those of `small`, checked.
    variables: Vec<Variable>,
    refusals: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    format: u32,
    job: String,
    shard: u32,
    shards: u32,
    seed: u64,
    epoch: u64,
    state: v1::CutSmall,
    cells: Vec<v1::CutCell>,
}

impl Head {
    /// Of a cut.
    ///
    /// # Errors
    /// Names the field of `small` that is not as it must be.
    pub fn new(
        owner: Owner,
        small: v1::CutSmall,
        cells: Vec<v1::CutCell>,
    ) -> Result<Self, Malformed> {
        check_name("job", &owner.job)?;
        check_range("shards", owner.shards.into(), 1, SHARDS_MAX.into())?;
        check_range("shard", owner.shard.0.into(), 0, u64::from(owner.shards) - 1)?;
        check_range("lsn", small.lsn, 1, u64::MAX)?;
        check_range("newer_than", small.newer_than, 0, small.lsn)?;
        let mut variables = Vec::with_capacity(small.variables.len());
        for (one, id) in small.variables.iter().zip(1..) {
            let missing = || Malformed::new("variables.variable", "is not given");
            let variable = Variable::try_from(one.variable.clone().ok_or_else(missing)?)?;
            check_range("variables.id", variable.id.0.into(), id, id)?;
            variables.push(variable);
        }
        check_unique_names(&variables)?;
        let refusals = cells.iter().map(|cell| cell.refusals.len()).sum();
        Ok(Head { owner, small, cells, variables, refusals })
    }

    /// Adds what more sessions did last. What was refused of those that come when there are [`REFUSALS_MAX`] is left out: in a job that begins
    /// from here they have all ended, and in a shard that is set back to here a repeat of a refused push is answered as one that was taken.
    pub(crate) fn add_cells(&mut self, cells: Vec<v1::CutCell>) {
        for mut cell in cells {
            if self.refusals + cell.refusals.len() > REFUSALS_MAX {
                cell.refusals.clear();
            }
            self.refusals += cell.refusals.len();
            self.cells.push(cell);
        }
    }

    /// Where the cut is.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        Lsn(self.small.lsn)
    }

    /// The file holds what changed after this; [`Lsn::ZERO`]: everything.
    #[must_use]
    pub fn newer_than(&self) -> Lsn {
        Lsn(self.small.newer_than)
    }

    /// The variables in order of definition.
    #[must_use]
    pub fn variables(&self) -> &[Variable] {
        &self.variables
    }

    /// As JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        let Owner { job, shard, shards, seed } = self.owner.clone();
        let text = Text {
            format: FORMAT,
            job,
            shard: shard.0,
            shards,
            seed,
            epoch: self.lsn().epoch().0,
            state: self.small.clone(),
            cells: self.cells.clone(),
        };
        serde_json::to_string(&text).expect("numbers, names and lists of them are JSON")
    }

    /// Reads and checks what [`Head::to_json`] wrote.
    ///
    /// # Errors
    /// Names the field.
    pub fn from_json(json: &str) -> Result<Head, Malformed> {
        let text: Text = serde_json::from_str(json)
            .map_err(|error| Malformed::new("__metadata__.downpour", error.to_string()))?;
        check_format(text.format)?;
        let Text { job, shards, seed, epoch, state, cells, .. } = text;
        let lsn_epoch = Lsn(state.lsn).epoch().0;
        check_range("epoch", epoch, lsn_epoch, lsn_epoch)?;
        Head::new(Owner { job, shard: ShardId(text.shard), shards, seed }, state, cells)
    }
}

pub(crate) fn check_format(format: u32) -> Result<(), Malformed> {
    if format == FORMAT {
        return Ok(());
    }
    let problem = format!("is {format}; this version reads {FORMAT}: use the one that wrote it");
    Err(Malformed::new("format", problem))
}

pub(crate) fn check_unique_names(variables: &[Variable]) -> Result<(), Malformed> {
    let mut names: Vec<_> = variables.iter().map(|variable| &variable.spec.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Malformed::new("variables", format!("{:?} is there twice", pair[0]))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_stays_small_enough_to_be_read_however_much_was_refused() {
        let owner = Owner { job: "job".into(), shard: ShardId(0), shards: 1, seed: 1 };
        let small = v1::CutSmall { lsn: 1 << 40, ..v1::CutSmall::default() };
        let mut head = Head::new(owner, small, Vec::new()).unwrap();
        let refusals = vec![v1::CutRefusal::default(); 1 << 10];
        let cell =
            |session| v1::CutCell { session, refusals: refusals.clone(), ..v1::CutCell::default() };
        head.add_cells((1..=300).map(cell).collect());
        assert_eq!(head.cells.len(), 300);
        let kept = head.cells.iter().map(|cell| cell.refusals.len()).sum::<usize>();
        assert_eq!(kept, REFUSALS_MAX);
    }
}
