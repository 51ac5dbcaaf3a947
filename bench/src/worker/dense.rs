//! The worker of D.

use crate::clock::{now_s, own_cpu_s};
use crate::peer::DensePeer;
use crate::protocol::{Answer, Command, DenseSteps, Inbox, say};
use crate::workload::{Dense, GRADIENT};

pub(super) fn run(
    mut peer: impl DensePeer,
    workload: Dense,
    inbox: &mut Inbox,
) -> anyhow::Result<()> {
    let gradient = vec![GRADIENT; workload.floats];
    let mut values = vec![0.0; workload.floats];
    say(&Answer::Ready { address: None })?;
    while let Some(command) = peer.next_command(inbox)? {
        say(&match command {
            // A tensor of zeros was initialised when it was defined.
            Command::Fill => Answer::Done,
            Command::Steps { count } => {
                let mut done = DenseSteps::default();
                let cpu_s = own_cpu_s();
                for _ in 0..count {
                    inbox.check()?;
                    let begun = now_s();
                    peer.pull(&mut values)?;
                    let pulled = now_s();
                    peer.push(&gradient)?;
                    done.pull_s.push(pulled - begun);
                    done.push_s.push(now_s() - pulled);
                }
                done.cpu_s = own_cpu_s() - cpu_s;
                Answer::Dense(done)
            }
            Command::Check { repeats } => {
                let values = peer.pull(&mut values)?;
                let wanted = Dense::expected(repeats as usize);
                let difference = |&value: &f32| (f64::from(value) - wanted).abs();
                Answer::Checked { error: values.iter().map(difference).fold(0.0, f64::max) }
            }
            Command::CleanUp => {
                peer.clean_up()?;
                Answer::Done
            }
        })?;
    }
    Ok(())
}
