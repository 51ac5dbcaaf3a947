//! What the committed state says while faults happen, and checkpoints, which it has begun.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use downpour_client::{Error, Refused};
use downpour_core::id::{Epoch, JobId, ServerRef, ShardId};
use downpour_core::view::{JobView, NodeView};
use downpour_proto::v1;
use downpour_proto::v1::shard_placement::Placing;
use tokio::time::sleep;
use tracing::info;

use crate::cluster::{self, CHECKPOINTS, SERVERS, SHARDS};
use crate::draw::Draw;
use crate::invariants::{checkpoints, epochs};
use crate::shared::{Phase, Shared};
use crate::system;

const INTERVAL: Duration = Duration::from_millis(50);
const DEADLINE: Duration = Duration::from_secs(2);

/// Counts over all states that were seen, and the newest of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) job: Option<JobView>,
    /// By name.
    pub(crate) servers: BTreeMap<String, (ServerRef, bool)>,
    pub(crate) leader: Option<u64>,
    pub(crate) terms: BTreeSet<u64>,
    pub(crate) promotions: u64,
    pub(crate) in_sync_changes: u64,
    /// Members that were copied to and added, and checkpoints that became whole.
    pub(crate) cuts: u64,
    /// That were done.
    pub(crate) moves: u64,
    pub(crate) checkpoint_whole: Option<String>,
    /// When the newest state was asked for.
    pub(crate) asked: Duration,
    /// Who led in which epoch.
    pub(crate) primaries: BTreeMap<(JobId, usize, Epoch), ServerRef>,
}

impl Seen {
    /// Every shard has all its members. One that is moved has them too.
    pub(crate) fn full(&self, replicas: u32) -> bool {
        let route_is_full = |route: &downpour_core::routing::ShardRoute| {
            let copies = route.joining.is_none() || route.moving.is_some();
            route.in_sync.len() >= replicas as usize && copies
        };
        self.job.as_ref().is_some_and(|job| job.shards.iter().all(route_is_full))
    }

    pub(crate) fn all_alive(&self) -> bool {
        self.servers.len() == SERVERS.len() && self.servers.values().all(|(_, alive)| *alive)
    }

    pub(crate) fn moving(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.shards.iter().any(|route| route.moving.is_some()))
    }

    /// Shards that went on from a checkpoint, the last time each.
    pub(crate) fn set_backs(&self) -> u64 {
        let shards = (0..SHARDS).map(ShardId);
        self.job.as_ref().map_or(0, |job| {
            shards.filter(|&shard| job.orders.set_back_in(shard).is_some()).count() as u64
        })
    }

    pub(crate) fn checkpointing(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.orders.checkpoint.is_some())
    }

    /// The host of a life of a server.
    pub(crate) fn name(&self, server: ServerRef) -> Option<&'static str> {
        let (name, _) = self.servers.iter().find(|(_, (known, _))| *known == server)?;
        SERVERS.into_iter().find(|known| known == name)
    }

    /// The primary's host, and those of the other members, of a shard.
    pub(crate) fn members(&self, shard: usize) -> Option<(&'static str, Vec<&'static str>)> {
        let route = self.job.as_ref()?.shards.get(shard)?;
        let primary = route.primary?;
        let others = route.others(primary).map(|other| self.name(other)).collect::<Option<_>>()?;
        Some((self.name(primary)?, others))
    }

    fn cluster(&mut self, cluster: v1::GetClusterReply, asked: Duration, shared: &Shared) {
        self.asked = asked;
        if let Some(leader) = cluster.members.iter().find(|member| member.leader) {
            self.leader = Some(leader.id);
            self.terms.insert(leader.term);
        }
        for node in cluster.nodes {
            if let Ok(NodeView { name, server, alive, .. }) = NodeView::try_from(node) {
                self.servers.insert(name, (server, alive));
            }
        }
        for status in cluster.jobs {
            if let Some(whole) = status.checkpoints.and_then(|checkpoints| checkpoints.whole)
                && self.checkpoint_whole.replace(whole.checkpoint.clone()) != Some(whole.checkpoint)
            {
                self.cuts += 1;
            }
            match status.view.map(JobView::try_from) {
                Some(Ok(view)) => self.view(view, shared),
                view => shared.broken("views", format!("{view:?}")),
            }
        }
    }

    fn view(&mut self, view: JobView, shared: &Shared) {
        epochs::committed(&mut self.primaries, self.job.as_ref(), &view, shared);
        for (shard, route) in view.shards.iter().enumerate() {
            let Some(old) = self.job.as_ref().and_then(|job| job.shards.get(shard)) else {
                continue;
            };
            self.promotions += route.epoch.0.saturating_sub(old.epoch.0);
            self.in_sync_changes += u64::from(route.in_sync != old.in_sync);
            let added = |member: &&ServerRef| !old.in_sync.contains(member);
            self.cuts += route.in_sync.iter().filter(added).count() as u64;
            let done = old.moving.filter(|_| route.moving.is_none()).is_some_and(|moving| {
                route.in_sync.contains(&moving.to) && !route.in_sync.contains(&moving.from)
            });
            self.moves += u64::from(done);
            if old.set_version != route.set_version || old.epoch != route.epoch {
                info!(shard, ?route, "seen");
            }
        }
        self.job = Some(view);
    }
}

/// Where a shard could go: to a server without a copy of it, or its primary to another member.
fn placement(seen: &Seen, shared: &Shared, draw: &mut Draw) -> Option<v1::ShardPlacement> {
    if !seen.full(shared.replicas) || seen.moving() {
        return None;
    }
    let job = seen.job.as_ref()?;
    let shard = draw.below(job.shards.len() as u64) as usize;
    let route = &job.shards[shard];
    let mut alive = seen.servers.values().filter(|(_, alive)| *alive).map(|(server, _)| *server);
    let member = draw.one_of(&route.in_sync);
    let placing = match alive.find(|server| !route.in_sync.contains(server)) {
        Some(free) => {
            let (from, to) = (Some(member.into()), Some(free.into()));
            Placing::Move(v1::ShardMove { from, to })
        }
        None => Placing::Promote(member.into()),
    };
    Some(v1::ShardPlacement {
        job: job.job.0,
        shard: shard as u32,
        epoch: route.epoch.0,
        set_version: route.set_version,
        reason: "the simulation".into(),
        placing: Some(placing),
    })
}

/// Asks again and again, until the judgement.
pub(crate) async fn watch(shared: Rc<Shared>) -> turmoil::Result {
    let coordinators = cluster::coordinators().with_deadline(DEADLINE);
    let mut begun = 0;
    let mut draw = Draw::new(shared.seed, 400);
    while shared.phase.get() < Phase::Judgement {
        let asked = system::elapsed();
        // Without a leader there is no answer, and nothing to see.
        if let Ok(state) = coordinators.cluster().await {
            shared.seen.borrow_mut().cluster(state, asked, &shared);
        }
        let wanted = shared.checkpoints_wanted.get();
        let job = shared.seen.borrow().job.as_ref().map(|job| job.job);
        if let (Some(job), 1..) = (job, wanted) {
            shared.checkpoints_wanted.set(wanted - 1);
            begun += 1;
            let incremental = begun % 3 > 0;
            let begun = coordinators.create_checkpoint(job, CHECKPOINTS, incremental).await;
            info!(?begun, "a checkpoint");
            if let Err(Error::Refused { code: Refused::InvalidArgument, message, .. }) = begun {
                shared.broken("checkpoints can be taken", message);
            }
        }
        let wanted = shared.moves_wanted.get();
        let placement = placement(&shared.seen.borrow(), &shared, &mut draw);
        if let (Some(placement), 1.., Phase::Faults) = (placement, wanted, shared.phase.get()) {
            shared.moves_wanted.set(wanted - 1);
            let placed = coordinators.place_shards(vec![placement.clone()]).await;
            info!(?placement, ?placed, "a move");
        }
        sleep(INTERVAL).await;
    }
    checkpoints::check(&shared).await;
    Ok(())
}
