//! What a client knows of its job: the newest view, the servers, and what redirects told it in between.

use std::collections::BTreeMap;

use downpour_core::id::{Epoch, NodeId, ServerRef, ShardId};
use downpour_core::spec::{Variable, VariableSpec};
use downpour_core::view::{JobView, NodeView};

/// A job at a moment. Only goes forward: an older view, an older life of a server or an older redirect changes nothing.
#[derive(Clone, Debug)]
pub struct JobState {
    /// The newest view.
    pub view: JobView,
    /// Servers by number.
    pub nodes: BTreeMap<NodeId, NodeView>,
    /// Position of the coordinators' log that this contains.
    pub version: u64,
    /// The job was deleted.
    pub deleted: bool,
    /// Redirects that are ahead of the view.
    hints: BTreeMap<ShardId, (Epoch, Option<ServerRef>)>,
}

/// Where requests for a shard go now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Highest epoch seen.
    pub epoch: Epoch,
    /// Its primary; `None` while it is unknown or the shard is lost.
    pub primary: Option<ServerRef>,
}

impl JobState {
    /// From the answer that opened a session.
    #[must_use]
    pub fn new(view: JobView, nodes: impl IntoIterator<Item = NodeView>) -> Self {
        let nodes = nodes.into_iter().map(|node| (node.server.node, node)).collect();
        JobState { view, nodes, version: 0, deleted: false, hints: BTreeMap::new() }
    }

    /// Where `shard` is. A shard that the job does not have is nowhere.
    #[must_use]
    pub fn route(&self, shard: ShardId) -> Route {
        let viewed = self.view.route(shard);
        let viewed = viewed.map_or(Route { epoch: Epoch(0), primary: None }, |route| Route {
            epoch: route.epoch,
            primary: route.primary,
        });
        match self.hints.get(&shard) {
            Some(&(epoch, primary)) if epoch > viewed.epoch => Route { epoch, primary },
            _ => viewed,
        }
    }

    /// Address of one life of a server; `None` when it is not the one that is known.
    #[must_use]
    pub fn address(&self, server: ServerRef) -> Option<&str> {
        let node = self.nodes.get(&server.node)?;
        (node.server == server).then_some(node.address.as_str())
    }

    /// The variable of this name.
    #[must_use]
    pub fn variable_named(&self, name: &str) -> Option<&Variable> {
        self.view.variables.iter().find(|variable| variable.spec.name == name)
    }

    /// Takes note of a view; true when it says something new.
    pub(crate) fn learn_view(&mut self, view: JobView) -> bool {
        if view.job != self.view.job || view.version <= self.view.version {
            return false;
        }
        // The coordinators mint epochs, so a newer view has no lower one; a hint that is still ahead stays.
        self.hints.retain(|&shard, hint| view.route(shard).is_some_and(|seen| hint.0 > seen.epoch));
        self.view = view;
        true
    }

    /// Takes note of a server; true when it says something new. Within one life only "judged dead" is news.
    pub(crate) fn learn_node(&mut self, node: NodeView) -> bool {
        let news = self.nodes.get(&node.server.node).is_none_or(|known| {
            let (known_life, life) = (known.server.incarnation, node.server.incarnation);
            life > known_life || (life == known_life && known.alive && !node.alive)
        });
        if news {
            self.nodes.insert(node.server.node, node);
        }
        news
    }

    /// Takes note of a server's redirect; true when it is ahead of what is known.
    pub(crate) fn redirected(
        &mut self,
        shard: ShardId,
        epoch: Epoch,
        primary: Option<ServerRef>,
    ) -> bool {
        let known = self.route(shard);
        let news = epoch > known.epoch || (epoch == known.epoch && known.primary.is_none());
        let useful = news
            && (epoch, primary) != (known.epoch, known.primary)
            && self.view.route(shard).is_some_and(|viewed| epoch > viewed.epoch);
        if useful {
            self.hints.insert(shard, (epoch, primary));
        }
        useful
    }
}

/// The first field in which two definitions of one variable differ: (field, cluster's, wanted).
pub(crate) fn variable_difference(
    cluster: &VariableSpec,
    wanted: &VariableSpec,
) -> Option<(&'static str, String, String)> {
    use downpour_core::spec::Shape;
    let differ = |field, cluster: &dyn std::fmt::Debug, wanted: &dyn std::fmt::Debug| {
        Some((field, format!("{cluster:?}"), format!("{wanted:?}")))
    };
    let (a, b) = (&cluster.optimizer, &wanted.optimizer);
    if a.rule != b.rule {
        return differ("optimizer", &a.rule, &b.rule);
    }
    if a.schedule != b.schedule {
        return differ("optimizer.schedule", &a.schedule, &b.schedule);
    }
    if a.staleness != b.staleness {
        return differ("optimizer.staleness", &a.staleness, &b.staleness);
    }
    if a.clip_row_norm != b.clip_row_norm {
        return differ("optimizer.clip_row_norm", &a.clip_row_norm, &b.clip_row_norm);
    }
    if a.l2_decay != b.l2_decay {
        return differ("optimizer.l2_decay", &a.l2_decay, &b.l2_decay);
    }
    match (&cluster.shape, &wanted.shape) {
        (Shape::Table(a), Shape::Table(b)) if a.dim != b.dim => differ("dim", &a.dim, &b.dim),
        (Shape::Table(a), Shape::Table(b)) if a.init != b.init => differ("init", &a.init, &b.init),
        (Shape::Table(a), Shape::Table(b)) if a.group != b.group => {
            differ("group", &a.group, &b.group)
        }
        (Shape::Table(a), Shape::Table(b)) if a.row_format != b.row_format => {
            differ("row_format", &a.row_format.name(), &b.row_format.name())
        }
        (Shape::Dense(a), Shape::Dense(b)) if a.shape != b.shape => {
            differ("shape", &a.shape, &b.shape)
        }
        (Shape::Dense(a), Shape::Dense(b)) if a.block_floats != b.block_floats => {
            differ("block_floats", &a.block_floats, &b.block_floats)
        }
        (a, b) if a != b => differ("shape", a, b),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use downpour_core::cells::ClosedSessions;
    use downpour_core::id::{Incarnation, JobId};
    use downpour_core::routing::ShardRoute;
    use downpour_core::spec::JobSpec;

    pub(crate) fn server(node: u32, incarnation: u64) -> ServerRef {
        ServerRef { node: NodeId(node), incarnation: Incarnation(incarnation) }
    }

    pub(crate) fn node(node: u32, incarnation: u64, alive: bool) -> NodeView {
        NodeView {
            name: format!("ps-{node}"),
            server: server(node, incarnation),
            address: format!("127.0.0.1:{}", 7000 + node),
            zone: String::new(),
            alive,
            admission: downpour_core::view::Admission::Open,
        }
    }

    /// Two shards in epoch 1: on server 1@1 and on server 2@2.
    pub(crate) fn view(version: u64) -> JobView {
        let route = |primary| ShardRoute {
            epoch: Epoch(1),
            set_version: 1,
            primary: Some(primary),
            in_sync: vec![primary],
            joining: None,
            moving: None,
        };
        JobView {
            job: JobId(1),
            spec: JobSpec { name: "job".into(), shards: 2, replicas: 1, min_in_sync: 1, seed: 1 },
            version,
            variables: Vec::new(),
            shards: vec![route(server(1, 1)), route(server(2, 2))],
            sessions: ClosedSessions::default(),
            orders: downpour_core::checkpoint::Orders::default(),
            consistency: downpour_core::consistency::Consistency::default(),
        }
    }

    pub(crate) fn state() -> JobState {
        JobState::new(view(1), [node(1, 1, true), node(2, 2, true)])
    }

    #[test]
    fn a_redirect_leads_until_the_view_has_caught_up() {
        let mut state = state();
        let shard = ShardId(0);
        assert!(!state.redirected(shard, Epoch(1), Some(server(2, 2))), "not ahead of the view");
        assert!(state.redirected(shard, Epoch(3), None));
        assert_eq!(state.route(shard), Route { epoch: Epoch(3), primary: None });
        assert!(state.redirected(shard, Epoch(3), Some(server(2, 2))));
        assert!(!state.redirected(shard, Epoch(2), Some(server(1, 1))), "older than the hint");
        let mut newer = view(2);
        newer.shards[0].epoch = Epoch(2);
        assert!(state.learn_view(newer));
        assert_eq!(state.route(shard).epoch, Epoch(3), "still ahead");
        let mut newest = view(3);
        newest.shards[0].epoch = Epoch(3);
        assert!(state.learn_view(newest));
        assert_eq!(state.route(shard).primary, Some(server(1, 1)), "what is committed counts");
        assert!(!state.redirected(ShardId(9), Epoch(9), None), "no such shard");
    }

    #[test]
    fn an_address_belongs_to_one_life() {
        let mut state = state();
        assert_eq!(state.address(server(1, 1)), Some("127.0.0.1:7001"));
        state.learn_node(node(1, 5, true));
        assert_eq!(state.address(server(1, 1)), None);
    }
}
