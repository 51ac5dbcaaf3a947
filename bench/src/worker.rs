//! A child process: reads its role, then does what it is told until its stdin ends.

mod dense;
mod sparse;

use anyhow::Context as _;

use crate::floor;
use crate::peer::{Cluster, Floor};
use crate::protocol::{Answer, Inbox, Peer, Role, say};

/// What this process does when it is started as a [`crate::child`].
///
/// # Errors
/// What was told to the parent already.
pub fn main() -> anyhow::Result<()> {
    let mut inbox = Inbox::open()?;
    let Some(role) = inbox.wait::<Role>()? else { return Ok(()) };
    let done = match role {
        Role::Floor(server) => floor::serve(server, &mut inbox),
        Role::Sparse { peer, workload, worker } => match peer {
            Peer::Floor { address } => Floor::connect(&address, workload.dim as usize)
                .and_then(|peer| sparse::run(peer, &workload, worker, &mut inbox)),
            Peer::Cluster { .. } => Cluster::table(&peer, &workload)
                .and_then(|peer| sparse::run(peer, &workload, worker, &mut inbox)),
        },
        Role::Dense { peer, workload } => match peer {
            Peer::Floor { address } => {
                Floor::connect(&address, 0).and_then(|peer| dense::run(peer, workload, &mut inbox))
            }
            Peer::Cluster { .. } => Cluster::tensor(&peer, &workload)
                .and_then(|peer| dense::run(peer, workload, &mut inbox)),
        },
    };
    if let Err(error) = &done {
        say(&Answer::Failed { error: format!("{error:#}") }).context("tell the parent")?;
    }
    done
}
