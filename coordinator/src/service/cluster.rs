//! The whole cluster in one reply, for people and tools.

use std::sync::Arc;

use downpour_core::id::ShardId;
use downpour_core::ledger::Ledger;
use downpour_proto::v1;

use super::Service;
use crate::liveness::Liveness;
use crate::state::members::Member;
use crate::state::{Cluster, Job, Node};

impl Service {
    pub(super) fn cluster_reply(&self, cluster: &Cluster) -> v1::GetClusterReply {
        let status = self.handle.status();
        let member = |(id, member): (u64, Member)| {
            let seen = status.members.iter().find(|one| one.id == id).copied().unwrap_or_default();
            v1::MemberView {
                id,
                address: member.address,
                leader: status.leader == Some(id),
                term: status.term,
                matched: seen.matched,
                learner: !member.voter,
                heard: seen.heard,
            }
        };
        let liveness = self.liveness.lock();
        let load = |node: &Arc<Node>| v1::NodeStatus {
            server: Some(node.view.server.into()),
            load: liveness.load(node.view.server),
        };
        let jobs = cluster.jobs.iter();
        v1::GetClusterReply {
            version: cluster.version,
            members: self.group.now(cluster).list.into_iter().map(member).collect(),
            nodes: cluster.nodes.values().map(|node| (&node.view).into()).collect(),
            jobs: jobs
                .map(|(id, job)| job_status(job, cluster.ledgers.get(id), &liveness))
                .collect(),
            loads: cluster.nodes.values().map(load).collect(),
        }
    }
}

fn job_status(job: &Job, ledger: Option<&Arc<Ledger>>, liveness: &Liveness) -> v1::JobStatus {
    let id = job.view.job;
    let sessions = job.sessions.iter().map(|(&number, session)| {
        let holder = ledger.and_then(|ledger| ledger.holder(number));
        v1::SessionView {
            session: number.0,
            name: session.name.clone(),
            kind: session.kind.into(),
            progress: liveness.progress(number),
            tasks_held: holder.map_or(0, |one| one.started.len() + one.ahead.len()) as u32,
            tasks_done: holder.map_or(0, |one| one.done),
        }
    });
    let reports = (0..)
        .map(ShardId)
        .zip(&job.view.shards)
        .filter(|(_, route)| !route.lost())
        .filter_map(|(shard, _)| liveness.last_report(id, shard));
    let checkpoints = &job.checkpoints;
    v1::JobStatus {
        view: Some((&job.view).into()),
        labels: job.labels.clone().into_iter().collect(),
        sessions: sessions.collect(),
        reports: reports.collect(),
        saved_shards: checkpoints.open.as_ref().map_or(0, |open| open.saved.len() as u32),
        checkpoints: Some(without_files(checkpoints)),
        ledger: ledger.map(|ledger| ledger.as_ref().into()),
    }
}

/// Of an open checkpoint the reply says how many shards are stored, not which.
fn without_files(checkpoints: &v1::JobCheckpoints) -> v1::JobCheckpoints {
    let open = checkpoints.open.as_ref().map(|open| v1::OpenCheckpoint {
        saved: Vec::new(),
        initialized: Vec::new(),
        labels: Vec::new(),
        ledger: None,
        consistency: None,
        chain: open.chain.clone(),
        created_ms: open.created_ms,
        clock: open.clock,
        order: open
            .order
            .as_ref()
            .map(|order| v1::CheckpointOrder { newer_than: Vec::new(), ..order.clone() }),
    });
    v1::JobCheckpoints {
        open,
        whole: checkpoints.whole.clone(),
        failed: checkpoints.failed.clone(),
        schedule: checkpoints.schedule.clone(),
    }
}
