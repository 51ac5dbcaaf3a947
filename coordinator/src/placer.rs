//! The one way by which shards get other places, whoever wants it: few primaries change at a time, for who pushes to all of them waits for all.

use std::sync::Arc;
use std::time::Duration;

use downpour_proto::v1;
use downpour_proto::v1::shard_placement::Placing;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tracing::info;

use crate::command::Body;
use crate::raft::{Error, Handle};
use crate::state::Reply;

/// Primaries that change at once.
const PROMOTIONS_MIN: usize = 4;
/// A wish takes no more turns than this; then more are made at once.
const TURNS_MAX: usize = 20;
/// Between two turns.
const PAUSE: Duration = Duration::from_millis(250);

/// All clones take turns.
#[derive(Clone, Debug)]
pub struct Placer {
    handle: Handle,
    turns: Turns,
}

impl Placer {
    /// Proposes to this member.
    #[must_use]
    pub fn new(handle: Handle) -> Self {
        Placer { handle, turns: Turns::default() }
    }

    /// Commits them all; what cannot be done (any more) is passed over.
    ///
    /// # Errors
    /// Some were not committed.
    pub async fn place(&self, placements: Vec<v1::ShardPlacement>) -> Result<(), Error> {
        self.turns.take(placements, |some| self.commit(some)).await
    }

    async fn commit(&self, placements: Vec<v1::ShardPlacement>) -> Result<(), Error> {
        let reply = self.handle.propose(Body::Place(v1::PlaceShardsRequest { placements }));
        if let Reply::Placed(placed) = reply.await? {
            info!(placed, "shards are placed");
        }
        Ok(())
    }
}

#[derive(Clone, Debug, Default)]
struct Turns {
    /// When the next one may be.
    free: Arc<Mutex<Option<Instant>>>,
}

impl Turns {
    /// At once what changes no primary, the rest some at a time, one turn after the other.
    async fn take<F: Future<Output = Result<(), Error>>>(
        &self,
        placements: Vec<v1::ShardPlacement>,
        commit: impl Fn(Vec<v1::ShardPlacement>) -> F,
    ) -> Result<(), Error> {
        let promotes = |one: &v1::ShardPlacement| matches!(one.placing, Some(Placing::Promote(_)));
        let (promotions, others): (Vec<_>, Vec<_>) = placements.into_iter().partition(promotes);
        if !others.is_empty() {
            commit(others).await?;
        }
        for some in promotions.chunks(at_once(promotions.len())) {
            sleep_until(self.next(Instant::now())).await;
            commit(some.to_vec()).await?;
        }
        Ok(())
    }

    fn next(&self, now: Instant) -> Instant {
        let mut free = self.free.lock();
        let turn = free.map_or(now, |free| free.max(now));
        *free = Some(turn + PAUSE);
        turn
    }
}

/// How many of so many primaries change in one turn.
fn at_once(promotions: usize) -> usize {
    PROMOTIONS_MIN.max(promotions.div_ceil(TURNS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placements(moves: u32, promotions: u32) -> Vec<v1::ShardPlacement> {
        let server = v1::ServerRef { node: 1, incarnation: 1 };
        let placing = |number| match number < moves {
            true => Placing::Move(v1::ShardMove::default()),
            false => Placing::Promote(server),
        };
        let one = |shard| {
            let placing = Some(placing(shard));
            v1::ShardPlacement { shard, placing, ..Default::default() }
        };
        (0..moves + promotions).map(one).collect()
    }

    #[tokio::test]
    async fn few_primaries_change_at_once_and_everything_is_placed() {
        assert_eq!([0, 80, 81, 400].map(at_once), [4, 4, 5, 20], "no more than twenty turns");
        for (promotions, turns) in [(0, 0), (4, 1), (9, 3)] {
            let made = Mutex::new(Vec::new());
            let commit = |some: Vec<v1::ShardPlacement>| {
                made.lock().push(some);
                std::future::ready(Ok(()))
            };
            let placed = Turns::default().take(placements(30, promotions), commit).await;
            placed.expect("committed");
            let made = made.into_inner();
            let shards: Vec<u32> = made.iter().flatten().map(|one| one.shard).collect();
            assert_eq!(shards, (0..30 + promotions).collect::<Vec<_>>());
            assert!(made.len() == 1 + turns && made[1..].iter().all(|some| some.len() <= 4));
        }
    }

    #[tokio::test]
    async fn turns_are_apart_whoever_asks() {
        let (turns, now) = (Turns::default(), Instant::now());
        let other = turns.clone();
        assert_eq!([turns.next(now), other.next(now)], [now, now + PAUSE]);
        assert_eq!(turns.next(now + PAUSE / 2), now + 2 * PAUSE);
        let later = now + 9 * PAUSE;
        assert_eq!([other.next(later), turns.next(later)], [later, later + PAUSE], "nobody asked");
    }
}
