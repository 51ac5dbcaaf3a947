//! One worker of S.

use crate::clock::{now_s, own_cpu_s};
use crate::peer::SparsePeer;
use crate::protocol::{Answer, Command, Inbox, SparseSteps, say};
use crate::workload::{GRADIENT, Sparse};

/// Rows of one message when all rows are gone through.
const ROWS_AT_ONCE: usize = 20_000;

pub(super) fn run(
    mut peer: impl SparsePeer,
    workload: &Sparse,
    worker: usize,
    inbox: &mut Inbox,
) -> anyhow::Result<()> {
    let floats = workload.ids_per_step * workload.dim as usize;
    let mut steps = Steps {
        workload,
        ids: workload.ids(worker)?,
        keys: Vec::new(),
        rows: vec![0.0; floats],
        gradients: vec![GRADIENT; floats],
    };
    say(&Answer::Ready { address: None })?;
    while let Some(command) = peer.next_command(inbox)? {
        say(&match command {
            Command::Fill => {
                fill(&mut peer, workload, inbox)?;
                Answer::Done
            }
            Command::Steps { count } => Answer::Sparse(steps.take(count, &mut peer, inbox)?),
            Command::Check { repeats } => {
                Answer::Checked { error: check(&mut peer, workload, repeats, inbox)? }
            }
            Command::CleanUp => {
                peer.clean_up()?;
                Answer::Done
            }
        })?;
    }
    Ok(())
}

struct Steps<'a> {
    workload: &'a Sparse,
    ids: Vec<u32>,
    keys: Vec<u64>,
    /// Room for the rows of a step.
    rows: Vec<f32>,
    /// Made beforehand: the same for all steps.
    gradients: Vec<f32>,
}

impl Steps<'_> {
    fn take(
        &mut self,
        count: usize,
        peer: &mut impl SparsePeer,
        inbox: &Inbox,
    ) -> anyhow::Result<SparseSteps> {
        let dim = self.workload.dim as usize;
        let mut done = SparseSteps { step_s: Vec::with_capacity(count), ..Default::default() };
        let cpu_s = own_cpu_s();
        done.start_s = now_s();
        let mut begun = done.start_s;
        for ids in self.ids.chunks_exact(self.workload.ids_per_step).take(count) {
            inbox.check()?;
            peer.unique(ids, &mut self.keys);
            done.dedup_s += now_s() - begun;
            let floats = self.keys.len() * dim;
            peer.pull(&self.keys, &mut self.rows[..floats])?;
            let pulled = now_s();
            peer.push(&self.keys, &self.gradients[..floats])?;
            done.rows += self.keys.len();
            let ended = now_s();
            done.push_s += ended - pulled;
            done.step_s.push(ended - begun);
            begun = ended;
        }
        done.end_s = begun;
        done.cpu_s = own_cpu_s() - cpu_s;
        Ok(done)
    }
}

/// All ids with their keys, in parts whose keys rise.
fn parts(peer: &impl SparsePeer, workload: &Sparse) -> impl Iterator<Item = Vec<(u64, u32)>> {
    (0..workload.rows).step_by(ROWS_AT_ONCE).map(move |first| {
        let end = workload.rows.min(first.saturating_add(ROWS_AT_ONCE as u32));
        let mut part: Vec<(u64, u32)> = (first..end).map(|id| (peer.key(id), id)).collect();
        part.sort_unstable();
        part
    })
}

fn fill(peer: &mut impl SparsePeer, workload: &Sparse, inbox: &Inbox) -> anyhow::Result<()> {
    if !peer.begins_empty() {
        return Ok(());
    }
    let dim = workload.dim as usize;
    let parts: Vec<_> = parts(peer, workload).collect();
    for part in parts {
        inbox.check()?;
        let keys: Vec<u64> = part.iter().map(|&(key, _)| key).collect();
        let value = |&(_, id): &(u64, u32)| workload.optimizer.first_gradient(id);
        let gradients: Vec<f32> =
            part.iter().map(value).flat_map(|value| std::iter::repeat_n(value, dim)).collect();
        peer.push(&keys, &gradients)?;
    }
    Ok(())
}

/// The largest difference.
fn check(
    peer: &mut impl SparsePeer,
    workload: &Sparse,
    repeats: u32,
    inbox: &Inbox,
) -> anyhow::Result<f64> {
    let dim = workload.dim as usize;
    let expected = workload.expected(repeats)?;
    let parts: Vec<_> = parts(peer, workload).collect();
    let mut rows = vec![0.0; ROWS_AT_ONCE * dim];
    let mut largest = 0.0f64;
    for part in parts {
        inbox.check()?;
        let keys: Vec<u64> = part.iter().map(|&(key, _)| key).collect();
        let rows = &mut rows[..keys.len() * dim];
        peer.pull(&keys, rows)?;
        for (row, &(_, id)) in rows.chunks_exact(dim).zip(&part) {
            let wanted = expected[id as usize];
            largest =
                row.iter().map(|&value| (f64::from(value) - wanted).abs()).fold(largest, f64::max);
        }
    }
    Ok(largest)
}
