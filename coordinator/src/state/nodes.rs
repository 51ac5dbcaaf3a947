//! Servers: registering, judging, reviving.

use std::sync::Arc;

use downpour_core::id::{Incarnation, NodeId, ServerRef};
use downpour_core::planted::{Bug, planted};
use downpour_core::view::NodeView;

use super::requests::Remembered;
use super::size::NODE_BYTES;
use super::{Cluster, Node, Outcome, Refused, Reply, State};
use crate::command::Registration;

/// Most servers by name that a cluster remembers.
const NODES_MAX: usize = 10_000;

/// What is known of one life of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It is heard.
    Alive,
    /// It was silent for too long. It may only be unreachable, with all it holds.
    Judged,
    /// Its node registered a newer life: what it held is gone.
    Over,
}

impl Cluster {
    /// What is known of `server`.
    #[must_use]
    pub fn life(&self, server: ServerRef) -> Life {
        match self.nodes.get(&server.node) {
            Some(node) if node.view.server == server && node.view.alive => Life::Alive,
            Some(node) if node.view.server == server => Life::Judged,
            _ => Life::Over,
        }
    }
}

impl State {
    /// A new life replaces the old one of the same name in the same step (protocol 1.1): else a server that restarts empty under its name
    /// could be promoted. But a name is no proof that the old process is gone: while the old life has the last copy of a shard, only who proves that replaces it (8.7).
    pub(super) fn register_server(&mut self, registration: Registration) -> Outcome {
        let Registration {
            name,
            address,
            zone,
            request_id,
            origin,
            exclusive_name,
            isolation_ms,
            lease_ms,
        } = registration;
        let request = format!("register {name} {request_id}");
        if let Some(&Remembered::Server(server)) = self.requests.find(&request) {
            return Ok(Reply::Registered(server));
        }
        let known = self.cluster.nodes.values().find(|node| node.view.name == name);
        if let Some(old) = known
            && !exclusive_name
            && (origin.is_empty() || origin != old.origin)
        {
            self.check_expendable(&old.view)?;
        }
        let node = match known {
            Some(node) => node.view.server.node,
            None if self.cluster.nodes.len() == NODES_MAX => {
                let problem = format!("the cluster already knows {NODES_MAX} servers by name");
                return Err(Refused::FailedPrecondition(problem));
            }
            None => {
                self.check_room(NODE_BYTES)?;
                self.last.node += 1;
                NodeId(self.last.node)
            }
        };
        if planted(Bug::KeepIncarnation)
            && let Some(old) = self.cluster.nodes.get(&node).filter(|old| old.view.alive)
        {
            return Ok(Reply::Registered(old.view.server));
        }
        // A group that lost its log counts anew, and an old life must not be taken for another server's: so they begin at the wall time, which goes on meanwhile.
        self.last.incarnation = (self.last.incarnation + 1).max(self.now_ms);
        let server = ServerRef { node, incarnation: Incarnation(self.last.incarnation) };
        let admission = self.cluster.nodes.get(&node).map(|node| node.view.admission);
        let admission = admission.unwrap_or_default();
        self.tell("node", format!("{name} registered at {address}"));
        let view = NodeView { name, server, address, zone, alive: true, admission };
        let version = self.cluster.version;
        self.cluster.nodes.insert(node, Arc::new(Node { view, version, origin, isolation_ms }));
        self.cluster.lease_ms = self.cluster.lease_ms.max(lease_ms);
        self.requests.remember(request, Remembered::Server(server));
        self.settle_routes();
        Ok(Reply::Registered(server))
    }

    /// Whether nothing is lost with a life whose process may go on somewhere: whatever it can still acknowledge, another member of the set has.
    fn check_expendable(&self, old: &NodeView) -> Result<(), Refused> {
        let routes = self.cluster.routes();
        let last = routes.filter(|(.., route)| route.in_sync == [old.server]).count();
        if last == 0 {
            return Ok(());
        }
        Err(Refused::Later(format!(
            "{name} at {address} has the last copy of {last} shards, and nothing says that its process is gone: if you know, start this one with --exclusive-name",
            name = old.name,
            address = old.address,
        )))
    }

    pub(super) fn judge_dead(&mut self, servers: &[ServerRef]) -> Outcome {
        for &server in servers {
            if self.cluster.life(server) == Life::Alive {
                let routes = self.cluster.routes();
                let led = routes.filter(|(_, _, _, route)| route.primary == Some(server)).count();
                let text =
                    format!("{} was judged dead: it led {led} shards", self.cluster.name(server));
                self.tell("failover", text);
            }
            self.set_alive(server, Life::Alive, false);
        }
        self.settle_routes();
        Ok(Reply::Done)
    }

    /// Only a life that still is in an in-sync set comes back: the others hold nothing that counts and register anew.
    pub(super) fn revive(&mut self, server: ServerRef) -> Outcome {
        if self.cluster.holds_shards(server) {
            self.set_alive(server, Life::Judged, true);
            self.settle_routes();
        }
        Ok(Reply::Done)
    }

    fn set_alive(&mut self, server: ServerRef, from: Life, alive: bool) {
        if self.cluster.life(server) == from
            && let Some(node) = self.cluster.nodes.get_mut(&server.node)
        {
            let node = Arc::make_mut(node);
            node.view.alive = alive;
            node.version = self.cluster.version;
        }
    }
}
